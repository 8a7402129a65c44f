"""The parts of :meth:`metapl.fit.Loop.fit`.

options     how a fit runs, with the schedule of the learning rates
contract    what the loop asks of a trainer, and of the report of a step
run         the loop
rates       the learning rates, moved by the schedule
watch       numbers gone wrong, found without waiting for the device
selection   validation, and the student that is kept
callbacks   what is called after each row
records     rows, TensorBoard events and checkpoints
stopping    Ctrl-C and SIGTERM, heard between steps
progress    the bar

Imports go down: run → rates, watch, selection, callbacks, records → options, contract.
"""
