"""What ``metapl predict`` draws: of each class that was predicted, its surest and its least sure pictures."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from metapl.apps.reports import MOST_GROUPS, Gallery, draw_grid, pictures_a_group

NAMED = 5
"""Classes that are named where none was predicted for them."""


class PredictionGrid:
    """Collects predictions one by one, and draws the extremes of each class.

    Args:
        classes: names, in the order of the network's outputs.

    Of each class seen so far, as many pictures are kept as a page has room for, eight at most and fewer the more
    classes there are: the most and the least probable ones.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes
        self.counts: Counter[int] = Counter()
        self._seen: dict[int, list[tuple[float, str, Tensor]]] = {}  # probability, name, picture

    def add(self, index: int, probability: float, name: str, x: Tensor) -> None:
        """An example ``x`` (C, H, W), in [0, 1], that was taken for class ``index``."""
        picture = (x.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
        kept = self._seen.setdefault(index, [])
        bisect.insort(kept, (probability, name, picture), key=lambda seen: -seen[0])
        self.counts[index] += 1
        # More classes leave less room for each. What stands in the middle now stays there, whatever comes.
        for group in self._seen.values() if len(kept) == 1 else [kept]:
            most = pictures_a_group(len(self._seen))
            while len(group) > most:
                del group[most // 2]

    def draw(self, path: Path, source: str) -> None:
        """One PNG file with a group for each class; nothing where nothing was added. ``source`` names the network."""
        if not self.counts:
            return
        # In the order of the classes; where there are too many, the ones with the most pictures.
        drawn = sorted(index for index, _ in self.counts.most_common(MOST_GROUPS))
        draw_grid(
            path, "What the pictures were taken for", self._note(source, len(drawn)), [self._group(i) for i in drawn]
        )

    def _note(self, source: str, drawn: int) -> str:
        total, predicted = sum(self.counts.values()), len(self.counts)
        each = pictures_a_group(predicted)
        parts = [
            f"{source}; {total:,} picture{'s' * (total != 1)}, {predicted:,} of {len(self.classes):,} classes predicted"
        ]
        if drawn < predicted:
            parts.append(f"shown: the {drawn:,} with the most pictures")
        if max(self.counts.values()) > each:
            half = f"{each // 2} " if each > 2 else ""
            parts.append(f"of a class with more than {each}: the {half}most and the {half}least probable")
        absent = [name for index, name in enumerate(self.classes) if index not in self.counts]
        if absent:
            more = f" and {len(absent) - NAMED:,} more" if len(absent) > NAMED else ""
            parts.append(f"never predicted: {', '.join(absent[:NAMED])}{more}")
        return "; ".join(parts)

    def _group(self, index: int) -> Gallery:
        count = self.counts[index]
        probabilities, names, pictures = zip(*self._seen[index], strict=True)
        return Gallery(
            title=self.classes[index],
            note=f"{count:,} picture{'s' * (count != 1)}",
            pictures=torch.stack(pictures),
            captions=tuple(f"{p:.1%}\n{Path(name).name}" for p, name in zip(probabilities, names, strict=True)),
        )
