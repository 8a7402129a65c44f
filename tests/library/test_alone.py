"""The library runs with torch, numpy, safetensors and tqdm alone.

The application is not there.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import metapl

BEGIN = '''
import gc
import sys

gc.disable()
OTHERS = (
    "tyro", "matplotlib", "tensorboard", "sklearn", "joblib", "torchvision", "PIL", "torchopt",
    "einops", "scipy", "timm", "pyarrow", "pandas", "metapl.apps",
)


def away(name):
    return any(f"{name}.".startswith(f"{other}.") for other in OTHERS)


class Without:
    """Finds what another finder does, but for these."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if away(name) else self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        found = getattr(self.finder, "find_distributions", lambda context: ())
        return () if away(context.name) else found(context)


sys.meta_path[:] = map(Without, sys.meta_path)
import torch
import metapl

torch.manual_seed(0)
x, y, u = torch.randn(12, 6), torch.arange(12) % 3, torch.randn(24, 6)
# Of a network that is not near an optimum, "implicit" takes no other solver.
IMPLICIT = metapl.feedback.Implicit(solver="identity")
MODES = [IMPLICIT if mode == "implicit" else mode for mode in metapl.MODES]
# Pseudo-labels have no direct term.
MODES.remove("direct")


def networks():
    return {name: metapl.models.mlp([6, 8, 3], torch.nn.Tanh) for name in ("teacher", "student")}
'''

PARTS = {
    "steps": """
for mode in MODES:
    trainer = metapl.BilevelTrainer(**networks(), mode=mode, verify=mode == "forward")
    report = trainer.step(outer=(x, y), inner=u)
    assert torch.isfinite(torch.as_tensor(report.inner_loss)), mode
""",
    "fit and evaluate": """
from torch.utils.data import DataLoader, TensorDataset

labeled = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
unlabeled = DataLoader(TensorDataset(u), batch_size=8, shuffle=True)
said = []
for resume, steps in ((False, 4), (True, 4)):
    trainer = metapl.BilevelTrainer(**networks(), mode="forward")
    trainer.fit(
        labeled, unlabeled, steps=steps, validation=(x, y), validate_every=2, save_every=2,
        out=sys.argv[1], resume=resume, say=said.append,
    )
assert any("TensorBoard" in text for text in said), said
assert 0 <= trainer.evaluate((x, y)).accuracy <= 1
assert trainer.predict(x).shape == (12, 3)
trainer.save(sys.argv[1] + "/trainer.safetensors")
trainer.load(sys.argv[1] + "/trainer.safetensors")
student = networks()["student"]
optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
losses = metapl.LossTrainer(student, [metapl.CrossEntropy()], optimizer=optimizer)
losses.fit(labeled, steps=2, progress=False)
metapl.ablate(metapl.BilevelTrainer(**networks()), (x, y), u, ["forward", "none"])
""",
    "nothing of the application in all of this": """
assert not [name for name in sys.modules if name.startswith("metapl.apps")]
for name in ("LabeledBatches", "nothing"):
    assert not hasattr(metapl.data, name)
assert metapl.data.StepSampler(4, 2, seed=0)
""",
}


def test_the_library_stands_alone(tmp_path: Path) -> None:
    code = "".join([BEGIN, *(f"\nprint({part!r})\n{lines}" for part, lines in PARTS.items())])
    program = [
        sys.executable,
        "-W",
        "error::DeprecationWarning:metapl",
        "-c",
        code,
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        program, cwd=Path(metapl.__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"in {done.stdout.splitlines()[-1:]}: {done.stderr}"
