"""Views of images whose every draw is a function of (seed, step, example).

``base`` has the interface and chains, ``crops`` and ``randaugment`` the views of the paper's protocols (``operations``
are their kernels), ``batched`` views that change whole batches, ``seeded`` any transform of torchvision.
"""
