"""``metapl export``: a trained network for others, by :mod:`metapl.networks.exports`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from metapl.apps.inputs import Factory, Network, Run, check_out, held
from metapl.apps.model_card import sections_of
from metapl.apps.printing import tell
from metapl.networks.exports import ONNX, export
from metapl.networks.model_card import CARD
from metapl.run_folder import EndedRun


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run's network for others: a program for torch alone, its weights, and a card.

    model.pt2 is the whole network, with its normalization, as a program for torch.export.load: any
    number of pictures in, logits out. model.safetensors holds the weights under the names of
    torchvision or timm, where the network is theirs. MODEL_CARD.md has the code that loads each,
    the accuracies, the recipe without the paths of your files, hashes of the data, and versions.
    Files of these names that are there already are replaced. Programs are compared with the network
    before anything is written.

    Args:
        folder: folder of a run.
        out: folder to write to. It is made if it does not exist.
        onnx: write model.onnx too. It needs the extra onnx, see metapl --help.
    """

    folder: Run
    out: Path
    network: Network = "delivered"
    factory: Factory = None
    onnx: bool = False

    def run(self) -> int:
        """Write the files, and print what they are."""
        run = EndedRun.load(self.folder)
        name = run.name(self.network)
        card = run.cards[name]
        check_out(self.out, run.folder.recipe().get("fields", {}))
        sections = sections_of(run, name)
        with held(self.out):
            digests = export(
                run.network(name, self.factory),
                self.out,
                shape=card.input.shape,
                title=f"{run.result['recipe']}: {run.result['title']}, {card.title}",
                sections=sections,
                classes=run.classes,
                architecture=card.architecture,
                center=card.input.center,
                onnx=self.onnx,
            )
        tell(f"{run.heading(name)}\n")
        for file, sha256 in digests.items():
            megabytes = (self.out / file).stat().st_size / 1e6
            tell(f"{self.out / file}: {megabytes:.3g} MB, SHA-256 {sha256}")
        if self.onnx and not importlib.util.find_spec("onnxruntime"):
            tell(f"{self.out / ONNX} was not run: onnxruntime is not installed")
        tell(f"{self.out / CARD}: how to load them, and how good they are")
        return 0
