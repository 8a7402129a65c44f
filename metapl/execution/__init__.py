"""Running a network: its passes, and the random numbers and buffers that they use.

A *pass of record* is a pass that ordinary training runs too: it updates buffers and advances generators. A *replay*
runs the network once more, with the random numbers and the buffers of a pass of record, and changes nothing. The
outputs of a replay are compared with those of its pass of record.

local      a network on one device: passes of record, replays, and passes at other weights
buffers    the parameters and state of a module: replaced for a block, copied, restored; the block around a step
rng        the default random number generators: saved, restored, branched
agreement  whether a replay agrees with its pass of record, and processes that hold the same rows with each other
kernels    which kernels a pass uses: attention, activation checkpoints, missing derivatives
compiled   forward passes through ``torch.compile``
writes     what a pass does besides: writes to weights, hooks on gradients, tensors that it reads from elsewhere
sharded    a network of which this process holds a part
layout     how a network that was handed over is laid out, found by looking at it
ranks      the processes that share a batch, or the columns of its images: means, sums and agreement over them
shards     weights of which this process holds a part: norms and products over all parts
capabilities  what estimators and problems may require of a layout

What every pass asks of its arguments:

batch      the parts of a batch
checks     wrong batches and networks, refused before anything moves
modules    the parts of a network
numerics   products and norms over trees of parameters
device     batches on their way to a device
"""
