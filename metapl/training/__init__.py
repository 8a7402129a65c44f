"""Training: the trainers, and the loop around their steps.

trainer     teacher and student together: Algorithm 1
teacher     the teacher's half of its step
loss_trainer  one network on its own losses
finetuning  a trained network on labeled batches alone
base        what every trainer has: fit, evaluate, predict, save, load
options     how a fit runs, with the schedule of the learning rates
contract    what the loop asks of a trainer, and of the report of a step
report      what a step saw
loop        the loop
rates       the learning rates, moved by the schedule
watch       numbers gone wrong, found without waiting for the device
selection   validation, and the student that is kept
average     the moving average of the weights
callbacks   what is called after each row
records     rows, TensorBoard events and checkpoints
stopping    Ctrl-C and SIGTERM, heard between steps
progress    the bar

Imports go down: trainer → loss_trainer, finetuning → base → loop → rates, watch, selection, callbacks, records →
options, contract.
"""

from metapl.training.base import Trainer
from metapl.training.callbacks import Callback, StopFit
from metapl.training.contract import Report, Say
from metapl.training.loop import FitResult
from metapl.training.options import FitOptions
from metapl.training.stopping import Interrupted

__all__ = ["Callback", "FitOptions", "FitResult", "Interrupted", "Report", "Say", "StopFit", "Trainer"]
