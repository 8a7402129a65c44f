"""One step of the student, K steps, the walk back over them, and the teacher's gradient.

Each of these stands here once. What PyTorch is asked for on the way is in
:mod:`metapl.core.engine`, and the files of ``metapl.engines`` answer it.
"""
