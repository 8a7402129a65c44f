"""Training: the trainers, and the loop around their steps.

trainer       teacher and student together: Algorithm 1
guard         what holds around a step of it
loss_trainer  one network on its own losses: supervised learning, UDA, finetuning
base          what every trainer has: fit, evaluate, predict, save, load
loop          the loop
selection     the moving average of the weights, validation, and the best student so far
stopping      what ends a fit early: callbacks, Ctrl-C, SIGTERM and SIGHUP
records       rows, TensorBoard's copy of them, and checkpoints
figures       what is recorded of a step's feedback
resuming      what a resumed fit must have in common with its beginning
options       how a fit runs, and the learning rates that its schedule moves
contract      the numbers of a step

Imports go down: trainer → loss_trainer → base → loop → selection, stopping, records → options → contract.
"""

from metapl.feedback.report import Report, Say
from metapl.training.base import Trainer
from metapl.training.loop import FitResult
from metapl.training.options import FitOptions
from metapl.training.stopping import Callback, Interrupted, StopFit

__all__ = ["Callback", "FitOptions", "FitResult", "Interrupted", "Report", "Say", "StopFit", "Trainer"]
__dir__ = __all__.copy
