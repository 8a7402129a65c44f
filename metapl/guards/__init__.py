"""What stands guard over a training, asked before its first step and by ``check_gradient``.

- :mod:`metapl.guards.door`: what may carry a gradient past the signal, refused by name.
- :mod:`metapl.guards.verification`: a gradient beside its definition.
- :mod:`metapl.guards.outcomes`: what a fit says of itself where it goes wrong.

The rooms below know nothing of this one, and a steady step asks it nothing.
"""
