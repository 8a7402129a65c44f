"""Training: the trainers, and the loop around their steps.

trainer       teacher and student together: Algorithm 1
guard         what holds around a step of it
loss_trainer  one network on its own losses: supervised learning, UDA, finetuning
base          what every trainer has: fit, evaluate, predict, save, load
loop          the loop
selection     the moving average of the weights, validation, and the best student so far
stopping      what ends a fit early: callbacks, Ctrl-C, SIGTERM and SIGHUP
records       rows, TensorBoard events and checkpoints
resuming      what a checkpoint says, and whether it is of a fit that was made alike
states        whether a state is one of such a trainer
options       how a fit runs, and the learning rates that its schedule moves
contract      what the loop requires of a trainer, and the numbers of a step

Imports go down: trainer → loss_trainer → base → loop → selection, stopping, records → options → contract.
"""

from metapl.training.base import Trainer
from metapl.training.contract import Report, Say
from metapl.training.loop import FitResult
from metapl.training.options import FitOptions
from metapl.training.stopping import Callback, Interrupted, StopFit

__all__ = ["Callback", "FitOptions", "FitResult", "Interrupted", "Report", "Say", "StopFit", "Trainer"]
__dir__ = __all__.copy
