"""A process that takes steps of ``metapl train images`` and says how long their parts took.

``step.py`` starts one for each version of metapl that it compares, so that nothing is imported here
but that version. Each line that the process reads is an order, which it answers by a line of JSON
with milliseconds of processor time, means over some steps: ``parts`` of a step in each phase of a
training, beside the limit, or ``ways`` of computing the loss and its gradient.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.apps.images import METHODS, Images
from metapl.apps.look import choose_settings
from metapl.apps.methods import labeled_loss
from metapl.apps.settings import with_flags
from metapl.problems.base import Signal
from metapl.problems.losses import UDA, sum_of_terms
from metapl.runs.folder import Records
from metapl.training import loss_trainer
from metapl.training.loop import Fit, FitRequest
from metapl.training.loss_trainer import LossTrainer
from metapl.training.options import FitOptions

# So many that no step validates, and that the rate hardly moves.
STEPS = 1_000_000

Row = dict[str, Any]
Losses = Callable[[Any], Sequence[Any]]


@dataclass(frozen=True)
class Kind:
    """A kind of step that is measured.

    Attributes:
        method: by which the command trains.
        flags: of the command.
        losses: returns those of a step, by the method.
        passes: whether each pass of the network in a step has a graph.
        reads_unlabeled: whether a step may read unlabeled pictures.
    """

    method: str
    flags: Row
    losses: Losses
    passes: tuple[bool, ...]
    reads_unlabeled: bool = True


def losses_of_uda(method: Any) -> Sequence[Any]:
    return method.uda.losses()


def losses_of_mixup(method: Any) -> Sequence[Any]:
    return (labeled_loss(method.label_smoothing, method.mixup),)


# What the command calls its mild recipe, as it is tried, and trained where labels are many.
MIXED_UP = {"mixup": 0.4, "label_smoothing": 0.1, "network": "strided_cnn", "augment": "mild"}

KINDS = {
    # Of UDA, the weak view has no graph. Its first phase reads labels alone.
    "labels alone": Kind("uda", {"uda_start": STEPS}, losses_of_uda, (True,)),
    "labels and UDA": Kind("uda", {"uda_start": 0}, losses_of_uda, (True, False, True)),
    "mild, mixed up": Kind("supervised", MIXED_UP, losses_of_mixup, (True,), reads_unlabeled=False),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    phases = {name: Phase(kind, options.pictures) for name, kind in KINDS.items()}
    ways: dict[str, Callable[[], None]] = {}
    for line in sys.stdin:
        answer: Row = {}
        if line.strip() == "facts":
            answer = {name: facts(phase) for name, phase in phases.items()}
        elif line.strip() == "parts":
            for name, phase in phases.items():
                answer[name] = phase.parts(options.steps)
        else:
            ways = ways or ways_of(phases["labels and UDA"])
            for name, take in ways.items():
                answer[name] = mean_milliseconds(take, options.steps)
        print(json.dumps(answer), flush=True)


def facts(phase: Phase) -> Row:
    """Return what is measured on which processor, and what of it torch makes use of."""
    return {
        "architecture": phase.config.pictures.network,
        "image_size": phase.config.pictures.image_size,
        "batch": [phase.config.fitting.labeled_batch, phase.config.unlabeled_batch],
        "precision": phase.config.fitting.precision,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def mean_milliseconds(action: Callable[[], None], times: int) -> float:
    """Return the processor time of an action, a mean over several times."""
    since = time.process_time()
    for _ in range(times):
        action()
    return 1000 * (time.process_time() - since) / times


# ---------------------------------------------------------------------------------- parts of a step


class Phase:
    """A fit as the command runs it, in one phase of the training.

    Args:
        kind: of its steps.
        pictures: folder with labeled/CLASS and unlabeled.
    """

    def __init__(self, kind: Kind, pictures: Path) -> None:
        folders = {part: str(pictures / part) for part in ("labeled", "unlabeled")}
        flags: Row = {"steps": STEPS, **kind.flags}
        config = with_flags(Images(**folders), **flags)
        method = with_flags(METHODS[kind.method], **flags)
        self.config, method = choose_settings(config, method, say=_say_nothing)
        data = self.config.data(_say_nothing, progress=False, log=None)
        torch.manual_seed(0)
        self.network = self.config.network()
        self.losses = kind.losses(method)
        self.trainer = LossTrainer(
            self.network,
            self.losses,
            optimizer=self.config.optimizer("teacher", self.network),
            **self.config.trainer_options(),
        )
        # As after the first epoch, which reads the files.
        for source in (data.labeled, data.unlabeled):
            source.images.fetch(torch.arange(len(source.images)))
        sources = {"outer": data.labeled}
        if kind.reads_unlabeled:
            sources["inner"] = data.unlabeled
        request = FitRequest(
            options=FitOptions(steps=STEPS, **self.config.fitting.options()),
            sources=sources,
            batch_size=None,
            validation=None,
            metric=None,
            out=None,
            resume=False,
            shows_progress=False,
            say=_say_nothing,
            callbacks=(),
        )
        self.fit = Fit(self.trainer, request)
        self.fit.open(ExitStack())
        self.fit.begin()
        self.fit.records = Records(None, "fit", 0, _say_nothing)
        self.stopwatch = Stopwatch()
        self.stopwatch.watch(self.fit.sources, "next_batches", part="views")
        # The forward passes with the losses, and the backward pass.
        self.stopwatch.watch(loss_trainer, "sum_of_terms", part="network")
        self.stopwatch.watch(torch.Tensor, "backward", part="network")
        self.stopwatch.watch(self.trainer.optimizer, "step", part="optimizer")
        self.stopwatch.watch(self.fit.selection, "update_averages", part="averages")
        # The first steps make what later ones find made.
        self.take_steps(3)
        self.batches = (data.labeled[5], data.unlabeled[5])
        self.convolutions = Convolutions(self.network, self.batches[0][0], kind.passes)

    def take_steps(self, count: int) -> None:
        """Take steps as the loop does."""
        for _ in range(count):
            outer, report, student_waits = self.fit.take_step()
            self.fit.observe(report, outer, student_waits=student_waits)

    def parts(self, steps: int) -> Row:
        """Return what the parts of a step take, all of it, and the limit."""
        self.stopwatch.seconds.clear()
        whole = mean_milliseconds(lambda: self.take_steps(1), steps)
        answer: Row = {}
        for part, seconds in self.stopwatch.seconds.items():
            answer[part] = 1000 * seconds / steps
        answer["bookkeeping"] = whole - sum(answer.values())
        answer["whole"] = whole
        answer["limit"] = mean_milliseconds(self.convolutions.run, steps)
        return answer


def _say_nothing(text: str) -> None:
    """Take a line that is said."""


class Stopwatch:
    """Adds up the processor time of functions, by the part of a step that they belong to."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, name: str, *, part: str) -> None:
        """Put a function that is timed into the place of one."""
        function = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            since = time.process_time()
            result = function(*args, **options)
            self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - since
            return result

        setattr(owner, name, timed)


class Convolutions:
    """The convolutions of a step alone: those of each pass, and their gradients.

    That is the limit of a step: nothing else of it has to take long.

    Args:
        network: whose convolutions they are.
        images: a batch.
        passes: whether each pass has a graph.
    """

    def __init__(self, network: nn.Module, images: Tensor, passes: Sequence[bool]) -> None:
        self.passes = passes
        # Of each convolution: itself, its input, its weights, and a gradient of its output.
        self.layers: list[tuple[nn.Conv2d, Tensor, Tensor, Tensor]] = []

        def note(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            self.layers.append(
                (layer, inputs[0].detach(), layer.weight.detach(), torch.randn_like(output))
            )

        hooks = [
            layer.register_forward_hook(note)
            for layer in network.modules()
            if isinstance(layer, nn.Conv2d)
        ]
        with torch.no_grad():
            network(images)
        for hook in hooks:
            hook.remove()

    def run(self) -> None:
        """Compute all of them once."""
        for _ in self.passes:
            for layer, x, weight, _ in self.layers:
                F.conv2d(x, weight, None, layer.stride, layer.padding)
        for has_graph in self.passes:
            if not has_graph:
                continue
            for number, (layer, x, weight, gradient) in reversed([*enumerate(self.layers)]):
                torch.ops.aten.convolution_backward(
                    gradient,
                    x,
                    weight,
                    bias_sizes=None,
                    stride=layer.stride,
                    padding=layer.padding,
                    dilation=layer.dilation,
                    transposed=False,
                    output_padding=[0, 0],
                    groups=layer.groups,
                    # Pictures need no gradient, and there is no bias.
                    output_mask=[number > 0, True, False],
                )


# -------------------------------------------------------------- ways of computing loss and gradient


def ways_of(phase: Phase) -> dict[str, Callable[[], None]]:
    """Return what computes the loss and its gradient, by the way in which it does so."""
    as_it_is = phase.network
    in_place = copy.deepcopy(as_it_is)
    for layer in in_place.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = True
    contiguous = copy.deepcopy(as_it_is).to(memory_format=torch.contiguous_format)
    compiled: Any = torch.compile(copy.deepcopy(as_it_is), dynamic=False)
    ways = {
        "as it is": Way(phase, as_it_is).by_terms,
        "ReLU in place": Way(phase, in_place).by_terms,
        "one backward pass for each loss": Way(phase, copy.deepcopy(as_it_is)).by_two_backwards,
        "contiguous": Way(phase, contiguous).by_terms,
        "labeled and strong in one pass": Way(phase, copy.deepcopy(as_it_is)).in_two_passes,
        "all in one pass": Way(phase, copy.deepcopy(as_it_is)).in_one_pass,
        "compiled": Way(phase, compiled).by_terms,
    }
    # The first calls choose kernels, and compile.
    for take in ways.values():
        take()
        take()
    return ways


class Way:
    """The loss of a step and its gradient, for one network.

    In one pass over several kinds of pictures, batch norm has one mean and variance for all of
    them: it is another algorithm, which is here for its time alone.
    """

    def __init__(self, phase: Phase, network: Any) -> None:
        self.network = network
        self.losses = phase.losses
        (self.x, self.y), (self.weak, self.strong) = phase.batches
        self.uda = next(loss for loss in self.losses if isinstance(loss, UDA))

    def clear(self) -> None:
        """Forget the gradient."""
        for p in self.network.parameters():
            p.grad = None

    def terms(self, losses: Sequence[Any]) -> Tensor:
        """Return the sum of some losses, as a trainer computes it."""
        terms = sum_of_terms(
            self.network,
            losses,
            outer=(self.x, self.y),
            inner=(self.weak, self.strong),
            signal=Signal(torch.empty(0)),
            step=STEPS,
        )
        return torch.stack([*terms.values()]).sum()

    def by_terms(self) -> None:
        """Take one backward pass of all losses."""
        self.clear()
        self.terms(self.losses).backward()

    def by_two_backwards(self) -> None:
        """Take a backward pass of each loss when it is known."""
        self.clear()
        for loss in self.losses:
            self.terms([loss]).backward()

    def in_two_passes(self) -> None:
        """Take one pass of labeled and strong pictures, and one of the weak ones."""
        self.clear()
        with torch.no_grad():
            weak_logits = self.network(self.weak)
        logits = self.network(torch.cat([self.x, self.strong]))
        self.backward(logits, weak_logits)

    def in_one_pass(self) -> None:
        """Take one pass of all pictures."""
        self.clear()
        logits = self.network(torch.cat([self.x, self.strong, self.weak]))
        self.backward(logits, logits[-len(self.weak) :].detach())

    def backward(self, logits: Tensor, weak_logits: Tensor) -> None:
        """Take the backward pass, given logits of labeled and strong pictures, and of weak ones."""
        count = len(self.x)
        target = self.uda.target(weak_logits)
        strong_log_p = logits[count : 2 * count].log_softmax(-1)
        loss = F.cross_entropy(logits[:count], self.y) - (target * strong_log_p).sum(-1).mean()
        loss.backward()


if __name__ == "__main__":
    main()
