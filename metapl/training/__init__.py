"""Training: the base of all trainers, and the loop around their steps.

base        what every trainer has: fit, evaluate, predict, save, load
options     how a fit runs, with the schedule of the learning rates
contract    what the loop asks of a trainer, and of the report of a step
report      what a step of the bilevel trainer saw
loop        the loop
rates       the learning rates, moved by the schedule
watch       numbers gone wrong, found without waiting for the device
selection   validation, and the student that is kept
average     the moving average of the weights
callbacks   what is called after each row
records     rows, TensorBoard events and checkpoints
stopping    Ctrl-C and SIGTERM, heard between steps
progress    the bar

Imports go down: base → loop → rates, watch, selection, callbacks, records → options, contract.
"""

from metapl.training.base import Trainer
from metapl.training.callbacks import Callback, StopFit
from metapl.training.contract import Report, Say
from metapl.training.loop import FitResult
from metapl.training.options import FitOptions
from metapl.training.stopping import Interrupted

__all__ = ["Callback", "FitOptions", "FitResult", "Interrupted", "Report", "Say", "StopFit", "Trainer"]
