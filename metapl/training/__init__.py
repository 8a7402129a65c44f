"""Training: the trainers, and the loop around their steps.

trainer     teacher and student together: Algorithm 1
teacher     the teacher's half of its step
loss_trainer  one network on its own losses
finetuning  a trained network on labeled batches alone
base        what every trainer has: fit, evaluate, predict, save, load
options     how a fit runs, with the schedule of the learning rates
contract    what the loop requires of a trainer
report      the numbers of a step
loop        the loop
rates       the learning rates, moved by the schedule
states      whether a state is one of such a trainer
watch       NaN and infinite numbers, detected without waiting for the device
selection   validation, and the best student so far
average     the moving average of the weights; of sharded ones in ``sharded_copy``
callbacks   the user's functions, called after each recorded row
records     rows, TensorBoard events and checkpoints
stopping    Ctrl-C, SIGTERM and SIGHUP, handled between steps
progress    the bar

Imports go down: trainer → loss_trainer, finetuning → base → loop → rates, watch, selection, callbacks, records →
options, contract → report.
"""

from metapl.training.base import Trainer
from metapl.training.callbacks import Callback, StopFit
from metapl.training.contract import Say
from metapl.training.loop import FitResult
from metapl.training.options import FitOptions
from metapl.training.report import Report
from metapl.training.stopping import Interrupted

__all__ = ["Callback", "FitOptions", "FitResult", "Interrupted", "Report", "Say", "StopFit", "Trainer"]
