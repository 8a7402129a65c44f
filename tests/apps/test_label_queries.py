"""Statistics and selections of stored labels, against plain numpy; and what the commands say."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command import refused, said
from PIL import Image
from test_labels import files

from metapl import MetaplError
from metapl.apps.labels import LabelStore, LabelWriter, select, statistics
from metapl.apps.labels import store as writer
from metapl.apps.pictures.folders import scan_unlabeled

CLASSES = tuple(f"class {index}" for index in range(6))


def made(folder: Path, rows: int = 400, *, numbers: bool = False, top_k: int | None = None) -> LabelStore:
    """Distributions of few different values, so that many examples are equally confident, and none of a class."""
    weights = torch.randint(0, 5, (rows, 6), generator=torch.Generator().manual_seed(0)).float()
    weights[:, 5] = 0
    weights[:, 0] += 1.5
    ids: list[Any] = [*range(3, 3 + rows)] if numbers else sorted(f"p/é{number}.png" for number in range(rows))
    digests = None if numbers else [hashlib.sha256(f"{number}".encode()).digest() for number in range(rows)]
    with LabelWriter(folder, CLASSES, top_k=top_k, rows_per_part=64) as store:
        store.add(ids, weights / weights.sum(dim=1, keepdim=True), digests)
    return LabelStore(folder)


def held_out(folder: Path, *numbers: int) -> Path:
    """Files of these examples, under other names."""
    (folder / "deep").mkdir(parents=True)
    for number in numbers:
        (folder / "deep" / f"other name {number}.png").write_bytes(f"{number}".encode())
    (folder / "new.jpg").write_bytes(b"of no example")
    return folder


def columns(store: LabelStore) -> dict[str, Any]:
    """All rows, as another reader of Parquet has them."""
    import pyarrow as pa
    import pyarrow.feather as feather

    table = pa.concat_tables([feather.read_table(store.folder / part.file) for part in store.parts])
    numbers = {name: np.array(table[name].to_pylist()) for name in ("label", "confidence", "entropy", "copies")}
    return {**numbers, "id": table["id"].to_pylist()}


def copies_of(store: LabelStore) -> dict[Any, int]:
    rows = columns(store)
    return dict(zip(rows["id"], rows["copies"].tolist(), strict=True))


def chosen_by_hand(
    store: LabelStore, threshold: float | None, per_class: int | None, balance: bool, dropped: Sequence[int] = ()
) -> dict[Any, int]:
    """The ids that are to be left, each with its copies, by plain Python and numpy."""
    rows = columns(store)
    confidence = rows["confidence"].astype(np.float32)
    left = [row for row in range(len(store)) if row not in dropped]
    left = [row for row in left if threshold is None or confidence[row] > np.float32(threshold)]
    result: dict[Any, int] = {}
    groups = [[row for row in left if rows["label"][row] == label] for label in range(len(CLASSES))]
    groups = [sorted(group, key=lambda row: (-confidence[row], rows["id"][row]))[:per_class] for group in groups]
    goal = per_class or max(map(len, groups))
    for group in groups:
        copies = {row: int(rows["copies"][row]) for row in group}
        if balance and group:
            digests = {row: hashlib.md5(str(rows["id"][row]).encode()).digest()[8:] for row in group}
            order = sorted(group, key=lambda row: (int.from_bytes(digests[row], "little"), row))
            copies = {row: goal // len(group) + (place < goal % len(group)) for place, row in enumerate(order)}
        result |= {rows["id"][row]: copies[row] for row in group}
    return result


@pytest.mark.parametrize("numbers", [False, True], ids=["names", "numbers"])
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(
    ("threshold", "per_class", "balance"),
    [(0.3, None, False), (None, 20, False), (None, None, True), (0.4, 30, True), (None, 500, True), (0.35, 1, True)],
)
def test_what_is_selected_is_what_numpy_selects(
    numbers: bool, top_k: int | None, threshold: float | None, per_class: int | None, balance: bool, tmp_path: Path
) -> None:
    """Pictures of a folder dropped, from a store and from what was selected of one."""
    store = made(tmp_path / "store", numbers=numbers, top_k=top_k)
    gone = () if numbers else (0, 7, 399)
    dropped = {"drop_overlap": held_out(tmp_path / "held", *gone)} if gone else {}
    asked: dict[str, Any] = {"threshold": threshold, "per_class": per_class, "balance": balance}
    expected = chosen_by_hand(store, threshold, per_class, balance, gone)
    found = select(store, tmp_path / "out", **asked, **dropped)
    kept = LabelStore(tmp_path / "out")
    assert [*kept] == sorted(expected)
    assert copies_of(kept) == expected
    assert torch.equal(kept[[*expected]], store[[*expected]]), "distributions stay as they are"
    assert found.copies == sum(expected.values()) == len(kept.rows_with_copies())
    assert (found.kept, found.overlapping, found.missing) == (len(expected), len(gone), (CLASSES[5],))
    assert found.overlapping + found.unsure + found.beyond + found.kept == found.rows == len(store)
    assert (kept.classes, kept.top_k, kept.has_digests) == (store.classes, store.top_k, not numbers)
    again: dict[str, Any] = {"threshold": 0.36} if balance else {"per_class": 10, "balance": True}
    select(kept, tmp_path / "again", **again)
    assert copies_of(LabelStore(tmp_path / "again")) == chosen_by_hand(
        kept, again.get("threshold"), again.get("per_class"), not balance
    )
    assert len(LabelStore(tmp_path / "again").provenance["selected"]) == 2


def test_the_threshold_is_not_kept_itself(tmp_path: Path) -> None:
    """As a number of float32: 0.3 is above 0.3 in float64."""
    with LabelWriter(tmp_path / "store", ["a", "b", "c", "d"]) as store:
        store.add(["at", "below"], torch.tensor([[0.3, 0.25, 0.25, 0.2], [0.28, 0.24, 0.24, 0.24]]))
        store.add(["just above"], torch.tensor([[0.3000002, 0.25, 0.25, 0.1999998]]))
    select(LabelStore(tmp_path / "store"), tmp_path / "out", threshold=0.3)
    assert [*LabelStore(tmp_path / "out")] == ["just above"]


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(("threshold", "gone"), [(None, []), (0.4, [5, 6, 7])])
def test_of_any_class_the_most_probable_are_kept(
    top_k: int | None, threshold: float | None, gone: list[int], tmp_path: Path
) -> None:
    import pyarrow as pa

    store = made(tmp_path / "store", top_k=top_k)
    table = pa.concat_tables(store.tables)
    p = np.full((400, 6), -1.0)  # of a class that is not stored
    for row, values in enumerate(table["probabilities"].to_pylist()):
        p[row, table["classes"][row].as_py() if top_k else slice(None)] = values
    sure = [
        row for row in range(400) if row not in gone and store.column("confidence")[row] > np.float32(threshold or 0)
    ]
    expected = set()
    for label in range(6):
        known = [row for row in sure if p[row, label] >= 0]
        expected |= {*sorted(known, key=lambda row, label=label: (-p[row, label], row))[:15]}
    dropped = {"drop_overlap": held_out(tmp_path / "held", *gone)} if gone else {}
    found = select(store, tmp_path / "out", per_class=15, any_class=True, threshold=threshold, **dropped)
    assert store.find([*LabelStore(tmp_path / "out")]).tolist() == sorted(expected)
    assert (found.kept, found.overlapping) == (len(expected), len(gone))


def test_the_same_selection_gives_the_same_files_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the store was written, and in a folder whose name is not UTF-8."""
    asked: dict[str, Any] = {"threshold": 0.25, "per_class": 70, "balance": True}
    places = tmp_path / "one", Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    for day, place in enumerate(places, start=1):
        now = datetime(2026, 1, day, tzinfo=UTC)
        with monkeypatch.context() as patch:
            patch.setattr(writer, "datetime", SimpleNamespace(now=lambda _, now=now: now))
            select(made(tmp_path / f"store{day}"), place, **asked)
    assert files(places[0]) == files(places[1])
    store, stop, add = LabelStore(tmp_path / "store1"), tmp_path / "stopped", LabelWriter.add_table

    def stopped(self: LabelWriter, table: Any) -> None:
        if self.rows >= 128:
            raise KeyboardInterrupt
        add(self, table)

    with monkeypatch.context() as patch:
        patch.setattr(LabelWriter, "add_table", stopped)
        with pytest.raises(KeyboardInterrupt):
            select(store, stop, **asked)
    assert len(files(stop)) == 2
    for other, word in ((asked, "--resume"), ({**asked, "per_class": 71, "resume": True}, "selected")):
        with pytest.raises(MetaplError, match=word):
            select(store, stop, **other)
    whole = select(store, stop, **asked, resume=True)
    assert sorted(os.listdir(stop)) == sorted(os.listdir(tmp_path / "one"))
    assert select(store, stop, **asked, resume=True) == whole


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"threshold": 1.0}, "threshold"),
        ({"threshold": math.nan}, "threshold"),
        ({"per_class": 0}, "per_class"),
        ({"per_class": 10**30, "balance": True}, "per_class"),
        ({"any_class": True, "threshold": 0.1}, "any_class"),
        ({"any_class": True, "per_class": 10, "balance": True}, "any_class"),
        ({"threshold": 0.99}, "nothing is left"),
        ({"drop_overlap": Path("nowhere")}, "nowhere"),
    ],
)
def test_what_cannot_be_selected_is_refused_and_nothing_is_left(
    asked: dict[str, Any], word: str, tmp_path: Path
) -> None:
    with pytest.raises(MetaplError, match=word):
        select(made(tmp_path / "store"), tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_a_damaged_part_is_named_and_what_has_no_files_is_not_compared(tmp_path: Path) -> None:
    store = made(tmp_path / "store")
    path = store.folder / store.parts[3].file
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    for use in (lambda: statistics(store), lambda: select(store, tmp_path / "out", threshold=0.3)):
        with pytest.raises(MetaplError, match=path.name):
            use()
    with pytest.raises(MetaplError, match="files"):
        select(made(tmp_path / "numbers", numbers=True), tmp_path / "out", drop_overlap=held_out(tmp_path / "held", 1))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("numbers", [False, True], ids=["names", "numbers"])
def test_statistics_are_those_of_numpy(numbers: bool, tmp_path: Path) -> None:
    select(made(tmp_path / "store", numbers=numbers), tmp_path / "out", per_class=60, balance=True)
    store = LabelStore(tmp_path / "out")
    rows, found = columns(store), statistics(store)
    confidence, entropy = rows["confidence"].astype(float), rows["entropy"].astype(float)
    assert (found.rows, found.copies) == (len(rows["id"]), rows["copies"].sum())
    assert found.counts == tuple(np.bincount(rows["label"], minlength=6).tolist())
    assert found.class_copies == tuple(np.bincount(rows["label"], rows["copies"], minlength=6).astype(int).tolist())
    assert found.class_confidence[5] is None
    for label in range(5):
        assert found.class_confidence[label] == pytest.approx(confidence[rows["label"] == label].mean())
    assert (found.mean_confidence, found.mean_entropy) == pytest.approx((confidence.mean(), entropy.mean()))


# ------------------------------------------------------------------------------------------------- the commands


def test_the_commands_say_what_is_in_a_store_and_what_became_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, flags = made(tmp_path / "store"), ("--threshold", "0.3", "--per-class", "50", "--balance")
    text, counts = said(capsys, "labels", "stats", store.folder), statistics(store).counts
    for name, count in zip(CLASSES, counts, strict=True):
        assert any(line.startswith(name) and f" {count} " in line for line in text.splitlines())
    found = json.loads(said(capsys, "labels", "stats", store.folder, "--json"))
    assert (found["counts"], found["provenance"]["made_with"]["torch"]) == ([*counts], torch.__version__)
    told = said(capsys, "labels", "select", store.folder, "--out", tmp_path / "out", *flags)
    expected = chosen_by_hand(store, 0.3, 50, True)
    assert f"\n{len(expected)}  kept\n" in told
    assert f"\n{sum(expected.values())}  with copies\n" in told
    assert sum(int(line.split()[0]) for line in told.splitlines() if "dropped" in line) == 400 - len(expected)
    stats = said(capsys, "labels", "stats", tmp_path / "out")
    assert "selected from 400: threshold 0.3, per_class 50, balance" in stats
    assert max(map(len, (text + stats).splitlines()[1:])) <= max(80, len(str(tmp_path)) + 80)
    os.mkfifo(tmp_path / "pipe.png")
    before = sorted(os.listdir(store.folder))
    for out in (store.folder, tmp_path / "out", tmp_path / "pipe.png"):
        refused(capsys, "labels", "select", store.folder, "--out", out, *flags)
    assert "stats" in refused(capsys, "labels", "stat", store.folder)
    assert "store" in refused(capsys, "labels", "stats", tmp_path)
    assert sorted(os.listdir(store.folder)) == before


def test_the_pictures_that_were_selected_are_listed_for_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, many = ["b.png", "c d.png", "deep/a.png"], tmp_path / "many"
    for name in names:
        (many / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(many / name)
    with LabelWriter(tmp_path / "store", ["x", "y"], provenance={"pictures": str(many)}) as store:
        store.add(names, torch.tensor([[0.2, 0.8], [0.4, 0.6], [0.9, 0.1]]))
    said(capsys, "labels", "select", tmp_path / "store", "--any-class", "--per-class", "1", "--out", tmp_path / "one")
    found = scan_unlabeled(tmp_path / "one" / "list.txt")
    assert [Path(path) for path in found.paths()] == [many / name for name in ("b.png", "deep/a.png")]
