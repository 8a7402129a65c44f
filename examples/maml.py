"""What maml_sinusoids.py, maml_digits.py and learned_start.py share.

A start from which some steps of SGD fit a new task, learned from many tasks at once.
"""

from torch.func import functional_call, vmap

import metapl

EQUAL_WEIGHTS = metapl.problems.EqualWeights()


def after_steps(network, sgd, few, many, problem=EQUAL_WEIGHTS, steps=5):
    """Return the gradient of the loss after steps of SGD on each task, and where these lead."""
    return metapl.hypergradient(
        None,
        network,
        outer=many,
        inner=metapl.Lookahead([few] * steps),
        problem=problem,
        inner_optimizer=sgd,
        wrt="start",
        tasks=True,
    )


def learn(network, adam, sgd, batches, **options):
    """Take a step of Adam on the loss after the steps of SGD, for each batch of tasks."""
    for few, many in batches:
        gradient = after_steps(network, sgd, few, many, **options)
        for name, p in network.named_parameters():
            p.grad = gradient.start[name]
        adam.step()


def outputs_after_steps(network, sgd, few, many, **options):
    """Return the outputs, (tasks, examples, ...), after the steps of SGD on each task."""
    tuned = after_steps(network, sgd, few, many, **options).student_params
    return vmap(lambda weights, x: functional_call(network, weights, (x,)))(tuned, many[0])
