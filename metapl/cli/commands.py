"""The commands that work on a finished run, by name."""

from __future__ import annotations

from metapl.cli.compare import Compare
from metapl.cli.evaluate import Evaluate
from metapl.cli.export import Export
from metapl.cli.finetune import Finetune
from metapl.cli.predict import Predict

AFTER_TRAINING: dict[str, type[Evaluate] | type[Predict] | type[Finetune] | type[Compare] | type[Export]] = {
    "evaluate": Evaluate,
    "predict": Predict,
    "finetune": Finetune,
    "compare": Compare,
    "export": Export,
}
