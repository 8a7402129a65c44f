"""Running a network: its passes, and what a pass reads and moves.

An *inner pass* is one that ordinary training runs too: it moves buffers and generators. A *replay*
runs the network again from the state and random numbers of an inner pass, leaves nothing changed,
and must give the same outputs.

``state``: buffers, frozen parameters and generators. ``layout``, ``ranks``, ``shards``: several
processes. ``batch``, ``numerics``: parts of a batch; norms, types, kernels. ``checks``,
``compare``: what is refused; the two comparisons of a step.
"""
