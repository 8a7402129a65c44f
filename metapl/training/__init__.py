"""Training: the trainers, and the loop around their steps.

trainer       teacher and student together: Algorithm 1
loss_trainer  one network on its own losses: supervised learning, UDA, finetuning
base          what every trainer has: fit, evaluate, predict, save, load
contract      what the loop requires of a trainer
report        the numbers of a step
loop          the loop
options       how a fit runs, and the learning rates that its schedule moves
selection     validation, and the best student so far
average       the moving average of the weights
stopping      what ends a fit early: callbacks, Ctrl-C, SIGTERM and SIGHUP
records       rows, TensorBoard events and checkpoints
resuming      what a fit is made of, and whether a checkpoint is of one that was made alike
states        whether a state is one of such a trainer
processes     what of a checkpoint is of one process
progress      the bar

Imports go down: trainer → loss_trainer → base → loop → selection, stopping, records → options → contract →
report.
"""

from metapl.training.base import Trainer
from metapl.training.contract import Say
from metapl.training.loop import FitResult
from metapl.training.options import FitOptions
from metapl.training.report import Report
from metapl.training.stopping import Callback, Interrupted, StopFit

__all__ = ["Callback", "FitOptions", "FitResult", "Interrupted", "Report", "Say", "StopFit", "Trainer"]
