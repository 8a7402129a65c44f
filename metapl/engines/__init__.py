"""How a student is run and differentiated: on one device, in micro-batches, sharded, recorded."""
