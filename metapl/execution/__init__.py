"""Running a network: its passes, and the random numbers and buffers that they use.

A *pass of record* is a pass that ordinary training runs too: it updates buffers and advances generators. A *replay*
runs the network once more, with the random numbers and the buffers of a pass of record, and changes nothing; its
outputs are compared with those of its pass of record. Begin with ``local``; ``sharded`` is the same where a process
holds a part of the network, ``compare`` and ``checks`` are what is refused on the way.
"""
