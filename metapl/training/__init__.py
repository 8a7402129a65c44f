"""Training: the trainers, and the loop around their steps.

trainer       teacher and student together: Algorithm 1
verify        whether a mode's gradient is that of the steps as they are taken, by differences of these (real_step)
attribution   what each training example did to a trained network
loss_trainer  one network on its own losses: supervised learning, UDA, finetuning
base          what every trainer has: fit, evaluate, predict, save, load
loop          the loop, from start or checkpoint to the student that is kept
selection     the moving average of the weights, and the metric by which the best student is chosen
stopping      what ends a fit early: callbacks, Ctrl-C, SIGTERM and SIGHUP
records       rows with the figures of a step's feedback, and TensorBoard's copy of them
options       how a fit runs, and the learning rates that its schedule moves

Imports go down: trainer → loss_trainer → base → loop → selection, stopping, records → options.
"""

from metapl.feedback.report import Report, Say
from metapl.training.base import Trainer
from metapl.training.loop import FitResult
from metapl.training.options import FitOptions
from metapl.training.stopping import Callback, Interrupted, StopFit

__all__ = ["Callback", "FitOptions", "FitResult", "Interrupted", "Report", "Say", "StopFit", "Trainer"]
__dir__ = __all__.copy
