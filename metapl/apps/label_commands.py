"""``metapl label RUN PICTURES``, and ``metapl labels stats`` and ``select`` on what it stores."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from metapl.apps.inputs import BATCH, Factory, Network, Run
from metapl.apps.labeling import ToLabel, write_labels
from metapl.apps.printing import short, table, tell
from metapl.apps.settings import MOST_IN_A_BATCH
from metapl.errors import few
from metapl.labels.selection import select, statistics
from metapl.labels.store import LabelStore
from metapl.pictures.folders import scan_unlabeled
from metapl.pictures.levels import refuse_other_levels
from metapl.run_folder import WEIGHTS, EndedRun
from metapl.runs.fields import Range
from metapl.runs.files import sha256_of, write_whole
from metapl.training.options import MOST_WORKERS
from metapl.words import shown

Store = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]

# The file in a selection's folder with the paths of its pictures.
LIST = "list.txt"


@dataclass(frozen=True, kw_only=True)
class Label:
    """Store the class probabilities that a run's network gives many pictures, to train on.

    The network runs in eval mode on pictures as they are. The labels are written to a folder of
    Arrow files, part by part. A command that was stopped goes on with --resume, and ends with the
    same files. In the store, a picture is called by its path in PICTURES, and a digit by its
    number. A file that cannot be read is left out, with the reason on standard error; the exit code
    is then 1. It needs the extra labels, see metapl --help.

    Args:
        folder: folder of a run.
        pictures: folder of pictures, or, of a run on digits, the word digits.
        out: folder of the store. It is made if it does not exist.
        temperature: temperature of the softmax. Below 1 it sharpens the probabilities, above 1 it
            evens them out.
        top_k: number of the greatest probabilities of a picture to keep, with their classes. By
            default all are kept. When the store is read, the rest is spread evenly over the other
            classes.
        batch: number of pictures that the network takes at a time.
        num_workers: number of extra processes that read pictures. It only changes the speed.
        resume: go on with the store that is in the folder.
    """

    folder: Run
    pictures: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURES")]
    out: Path
    temperature: Annotated[float, Range(above=0)] = 1.0
    top_k: int | None = None
    network: Network = "delivered"
    factory: Factory = None
    batch: Annotated[int, Range(1, most=MOST_IN_A_BATCH)] = BATCH
    num_workers: Annotated[int, Range(0, most=MOST_WORKERS)] = 0
    resume: bool = False

    def run(self) -> int:
        """Label the pictures; return 1 where files were left out."""
        run = EndedRun.load(self.folder)
        if self.resume and not self.out.exists():
            tell(f"there is no store {self.out} to resume: it begins")
        name = run.name(self.network)
        network = run.network(name, self.factory).to(run.device)
        network_input = run.cards[name].input
        images: Any
        ids: Any
        if self.pictures == "digits" and network_input.kind == "digit":
            from sklearn.datasets import load_digits

            images = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None] / 16.0
            ids = range(len(images))
            place = self.pictures
        else:
            images = scan_unlabeled(self.pictures).without_repeats()
            refuse_other_levels(images, run.cards[name].input.levels)
            ids = images.names
            # A selection may be made from another folder than this.
            place = str(Path(images.root).resolve())
        labeled = ToLabel(
            images=images,
            ids=ids,
            name=place,
            input=network_input,
            batch_size=self.batch,
        )
        model = {key: run.result[key] for key in ("recipe", "method", "seed")}
        model["network"] = name
        model["weights_sha256"] = sha256_of(run.folder.path / WEIGHTS[name])
        left_out: list[str] = []

        def leave_out(reason: str) -> None:
            left_out.append(reason)
            tell(f"metapl: left out {reason}", file=sys.stderr)

        try:
            store = write_labels(
                network,
                labeled,
                self.out,
                run.classes,
                leave_out,
                about={"run": str(self.folder), "model": model},
                temperature=self.temperature,
                top_k=self.top_k,
                num_workers=self.num_workers,
                resume=self.resume,
                shows=True,
            )
        except KeyboardInterrupt:
            tell(
                f"\nmetapl: what is labeled is in {self.out}; go on with --resume.", file=sys.stderr
            )
            raise
        missing = len(labeled.ids) - len(store)
        tell(
            f"{self.out}: labels of {len(store):,} pictures; what is in it: metapl labels stats "
            f"{self.out}"
        )
        if missing:
            tell(f"metapl: {missing:,} of {len(labeled.ids):,} files left out", file=sys.stderr)
        return 1 if missing or left_out else 0


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Say what is in a store of labels: examples of each class, confidence and entropy.

    The class of an example is its most probable one, and the confidence is the probability of that.

    Args:
        store: folder of the store.
    """

    store: Store

    def run(self) -> int:
        """Print what is in the store."""
        store = LabelStore(self.store)
        counted = statistics(store)
        provenance = store.provenance
        lines = [
            f"{self.store}: {counted.rows:,} examples, {counted.copies:,} with copies, "
            f"{len(store.classes):,} classes"
        ]
        if "model" in provenance:
            model = ", ".join(provenance["model"][key] for key in ("recipe", "method", "network"))
            lines.append(
                f"by {provenance['run']} ({model}) of {provenance['pictures']}, "
                f"{provenance['begun'][:10]}"
            )
        for selection in provenance.get("selected", []):
            settings = [
                f"{name} {value}"
                for name, value in selection.items()
                if value and not name.startswith("of_")
            ]
            lines.append(f"selected from {selection['of_rows']:,}: {', '.join(settings)}")
        rows = [("class", "examples", "with copies", "share", "mean confidence")]
        for number, name in enumerate(counted.classes):
            copies = counted.class_copies[number]
            confidence = counted.class_confidence[number]
            rows.append(
                (
                    short(name),
                    f"{counted.counts[number]:,}",
                    f"{copies:,}",
                    f"{copies / counted.copies:.1%}",
                    "-" if confidence is None else f"{confidence:.1%}",
                )
            )
        lines += ["", table(rows), ""]
        lines.append(
            f"mean confidence {counted.mean_confidence:.1%}, mean entropy "
            f"{counted.mean_entropy:.2f} nats"
        )
        tell("\n".join(lines))
        return 0


@dataclass(frozen=True, kw_only=True)
class Select:
    """Select examples of a store into a new one, as the papers select their pictures.

    The flags are applied in this order: --drop-overlap, --threshold and --at-most, --per-class,
    --balance, --share or --count. Of each class the most confident pictures are kept; of equals,
    those whose names come first. The new store has a file list.txt with the paths of its pictures,
    each as often as it counts, which --unlabeled of metapl train images takes in the place of a
    folder.

    Args:
        store: folder of the store to select from.
        out: folder of the new store. It is made if it does not exist.
        threshold: keep examples of which the network is more confident than this. Noisy Student has
            0.3.
        at_most: leave out examples of which the network is more confident than this. --threshold
            0.2 --at-most 0.3 is an interval of Noisy Student's Figure 5.
        per_class: largest number of examples of a class, by the most probable class of each. Noisy
            Student has 130000.
        any_class: keep, for each class, the --per-class examples with the greatest probability of
            it, even if another class is more probable. A picture of two classes is kept once, so
            that fewer than --per-class times the classes may be left. With 12800 it is the filter
            of Meta Pseudo Labels' ResNet-50.
        balance: repeat examples of classes that have fewer than --per-class, or than the largest
            class.
        share: share of the selected examples, with copies, to keep, drawn at random. Noisy
            Student's Table 10 does so.
        count: number of the selected examples, with copies, to keep, drawn at random. Noisy
            Student's Figure 5 has 1300000 of each interval. Refused where there are fewer.
        seed: seed with which --share or --count is drawn.
        drop_overlap: folder of other pictures, such as your test pictures. Files that are also in
            it are left out.
    """

    store: Store
    out: Path
    threshold: float | None = None
    at_most: float | None = None
    per_class: int | None = None
    any_class: bool = False
    balance: bool = False
    share: float | None = None
    count: int | None = None
    seed: Annotated[int, Range(0, most=2**32 - 1)] = 0
    drop_overlap: Path | None = None

    def run(self) -> int:
        """Write the store, and print how many examples were kept and dropped."""
        selection = select(
            LabelStore(self.store),
            self.out,
            threshold=self.threshold,
            at_most=self.at_most,
            per_class=self.per_class,
            any_class=self.any_class,
            balance=self.balance,
            share=self.share,
            count=self.count,
            seed=self.seed,
            drop_overlap=self.drop_overlap,
        )
        of_class = "of any class" if self.any_class else "of its class"
        drawn = f"among {self.count:,}" if self.count else f"in a share of {self.share or 0:g}"
        lines = [
            (selection.rows, "examples in the store"),
            (selection.overlapping, f"dropped: in {shown(self.drop_overlap)}"),
            (selection.unread, f"files cannot be read in {shown(self.drop_overlap)}"),
            (selection.unsure, f"dropped: confidence not above {self.threshold or 0:g}"),
            (selection.too_sure, f"dropped: confidence above {self.at_most or 0:g}"),
            (selection.beyond, f"dropped: not among the {self.per_class or 0:,} {of_class}"),
            (selection.not_drawn, f"dropped: not drawn {drawn}"),
            (selection.kept, "kept"),
            (selection.copies, "with copies"),
        ]
        width = len(f"{max(selection.rows, selection.copies):,}")
        tell("\n".join(f"{number:>{width},}  {text}" for number, text in lines if number))
        selected = LabelStore(self.out)
        # Those of a store of a program's own need not be pictures.
        pictures = Path(str(selected.provenance.get("pictures", "")))
        are_files = isinstance(next(iter(selected), None), str)
        # The place of an older store may be below another folder than the present one.
        are_there = pictures.is_absolute() or all((pictures / str(n)).exists() for n in selected)
        if are_files and pictures.is_dir() and are_there:
            listed = []
            left_out = []
            for name, copies in zip(selected, selected.column("copies").tolist(), strict=True):
                if "\n" in str(name) or str(name).endswith("\r"):
                    left_out.append(name)
                else:
                    listed += [f"{relpath(pictures / str(name), self.out)}\n"] * copies
            if left_out:
                text = f"{LIST} holds no name with a line's end, and leaves out {few(left_out, 3)}."
                tell(f"metapl: note: {text}", file=sys.stderr)
            write_whole(
                self.out / LIST,
                "".join(listed).encode("utf-8", "surrogateescape"),
                "make room, and select again.",
            )
        elif are_files and pictures.name:
            text = f"no {LIST}, since {shown(pictures)}, which was labeled, is not there."
            tell(f"metapl: note: {text}", file=sys.stderr)
        if selection.missing:
            tell(f"metapl: note: nothing is left of {few(selection.missing)}.", file=sys.stderr)
        tell(f"what is in it: metapl labels stats {self.out}")
        return 0
