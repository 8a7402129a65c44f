"""Where a network runs: its passes, what they draw from, and what they leave behind.

A *pass of record* is one that training would run as well: it moves buffers and generators. A *replay* runs the network
once more, on the draws and from the buffers of a pass of record, and leaves nothing behind. What a replay computes is
compared with what the pass of record computed (:mod:`metapl.execution.agreement`).
"""
