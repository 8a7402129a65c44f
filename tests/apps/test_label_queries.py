"""Statistics and selections of stored labels, against plain numpy; and what the commands say."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
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
from metapl.apps.labels import LabelStore, LabelWriter, queries, select, statistics, writer
from metapl.apps.labels.queries import BINS
from metapl.apps.main import main
from metapl.apps.pictures import folders
from metapl.apps.pictures.folders import scan_unlabeled

CLASSES = tuple(f"class {index}" for index in range(6))


def with_ties(rows: int, seed: int = 0) -> torch.Tensor:
    """Distributions of few different values, so that many examples are equally confident."""
    weights = torch.randint(0, 5, (rows, 6), generator=torch.Generator().manual_seed(seed)).float()
    weights[:, 5] = 0  # a class without examples
    weights[:, 0] += 1.5
    return weights / weights.sum(dim=1, keepdim=True)


def file_of(number: int) -> bytes:
    return hashlib.sha256(f"{number}".encode()).digest()


def made(
    folder: Path, rows: int = 400, *, numbers: bool = False, top_k: int | None = None, **options: Any
) -> LabelStore:
    ids: list[Any] = list(range(3, 3 + rows)) if numbers else sorted(f"p/é{number}.png" for number in range(rows))
    p = with_ties(rows)
    with LabelWriter(folder, CLASSES, top_k=top_k, rows_per_part=64) as writer:
        writer.add(ids, p, None if numbers else [file_of(number) for number in range(rows)])
    return LabelStore(folder)


def columns(store: LabelStore) -> dict[str, Any]:
    """All rows, as another reader of Parquet has them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.concat_tables([pq.read_table(store.folder / part.file) for part in store.parts])
    return {name: np.array(table[name].to_pylist()) for name in ("label", "confidence", "entropy", "copies")} | {
        "id": table["id"].to_pylist()
    }


def chosen_by_hand(
    store: LabelStore,
    threshold: float | None,
    per_class: int | None,
    balance: bool,
    dropped: Sequence[int],
) -> dict[Any, int]:
    """The ids that are to be left, each with its copies, by plain Python and numpy."""
    rows = columns(store)
    confidence = rows["confidence"].astype(np.float32)
    left = [row for row in range(len(store)) if row not in dropped]
    if threshold is not None:
        left = [row for row in left if confidence[row] > np.float32(threshold)]
    result: dict[Any, int] = {}
    groups = {label: [row for row in left if rows["label"][row] == label] for label in range(len(CLASSES))}
    groups = {
        label: sorted(group, key=lambda row: (-confidence[row], rows["id"][row]))[:per_class]
        for label, group in groups.items()
    }
    largest = max(map(len, groups.values()))
    for group in groups.values():
        copies = {row: int(rows["copies"][row]) for row in group}
        if balance and group:
            goal = per_class or largest
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
    store = made(tmp_path / "store", numbers=numbers, top_k=top_k)
    expected = chosen_by_hand(store, threshold, per_class, balance, [])
    found = select(store, tmp_path / "out", threshold=threshold, per_class=per_class, balance=balance)
    kept = LabelStore(tmp_path / "out")
    assert list(kept) == sorted(expected)
    rows = columns(kept)
    assert dict(zip(rows["id"], rows["copies"].tolist(), strict=True)) == expected
    assert torch.equal(kept[list(expected)], store[list(expected)]), "distributions stay as they are"
    assert found.kept == len(expected)
    assert found.copies == sum(expected.values()) == len(kept.rows_with_copies())
    assert found.overlapping + found.unsure + found.beyond + found.kept == found.rows == len(store)
    assert found.missing == (CLASSES[5],)
    assert (kept.classes, kept.top_k, kept.has_digests) == (store.classes, store.top_k, not numbers)
    if balance:
        sizes = {sum(rows["copies"][rows["label"] == label]) for label in set(rows["label"].tolist())}
        assert len(sizes) == 1


def test_the_threshold_is_not_kept_itself(tmp_path: Path) -> None:
    """As a number of float32: 0.3 is above 0.3 in float64."""
    with LabelWriter(tmp_path / "store", ["a", "b", "c", "d"]) as writer:
        writer.add(["at", "below"], torch.tensor([[0.3, 0.25, 0.25, 0.2], [0.28, 0.24, 0.24, 0.24]]))
        writer.add(["just above"], torch.tensor([[0.3000002, 0.25, 0.25, 0.1999998]]))
    select(LabelStore(tmp_path / "store"), tmp_path / "out", threshold=0.3)
    assert list(LabelStore(tmp_path / "out")) == ["just above"]


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(("threshold", "held_out"), [(None, []), (0.4, [5, 6, 7])])
def test_of_any_class_the_most_probable_are_kept(
    top_k: int | None, threshold: float | None, held_out: list[int], tmp_path: Path
) -> None:
    import pyarrow as pa

    store = made(tmp_path / "store", top_k=top_k)
    folder = tmp_path / "held out"
    folder.mkdir()
    for number in held_out:
        (folder / f"{number}.png").write_bytes(f"{number}".encode())
    table = pa.concat_tables([store.table(number) for number in range(len(store.parts))])
    p = np.zeros((400, 6))
    for row, values in enumerate(table["probabilities"].to_pylist()):
        p[row, table["classes"][row].as_py() if top_k else slice(None)] = values
    sure = [
        row
        for row in range(400)
        if row not in held_out and table["confidence"][row].as_py() > np.float32(threshold or 0)
    ]
    expected = set()
    for label in range(6):
        known = [row for row in sure if top_k is None or label in table["classes"][row].as_py()]
        expected |= set(sorted(known, key=lambda row, label=label: (-p[row, label], row))[:15])
    dropped = folder if held_out else None
    found = select(store, tmp_path / "out", per_class=15, any_class=True, threshold=threshold, drop_overlap=dropped)
    assert store.rows(list(LabelStore(tmp_path / "out"))).tolist() == sorted(expected)
    assert found.kept == len(expected) < 6 * 15
    assert found.overlapping == len(held_out)


def test_of_equally_confident_examples_those_come_first_whose_ids_do(tmp_path: Path) -> None:
    p = torch.tensor([[0.75, 0.25]]).expand(7, 2)
    with LabelWriter(tmp_path / "store", ["a", "b"], rows_per_part=2) as writer:
        writer.add(list("abcdefg"), p)
    select(LabelStore(tmp_path / "store"), tmp_path / "out", per_class=3)
    assert list(LabelStore(tmp_path / "out")) == ["a", "b", "c"]


def test_a_file_that_never_ends_is_not_compared_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a link to /proc/kmsg, which only root may open."""

    class Waiting(io.BytesIO):
        def read(self, size: int | None = -1) -> Any:
            return super().read(size) or None

    for name in ("1.png", "7.png"):
        (tmp_path / name).write_bytes(name[:1].encode())
    opened = folders.open_picture
    monkeypatch.setattr(
        folders, "open_picture", lambda path: Waiting(b"x") if str(path).endswith("1.png") else opened(path)
    )
    found = select(made(tmp_path / "store"), tmp_path / "out", drop_overlap=tmp_path)
    assert (found.overlapping, found.unread) == (1, 1)


def test_the_same_selection_gives_the_same_bytes_whenever_the_store_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = []
    for day in (1, 2):
        now = datetime(2026, 1, day, tzinfo=UTC)
        monkeypatch.setattr(writer, "datetime", SimpleNamespace(now=lambda _, now=now: now))
        select(made(tmp_path / f"{day}"), tmp_path / f"{day} selected", threshold=0.3)
        parts.append({path.name: path.read_bytes() for path in (tmp_path / f"{day} selected").glob("part-*")})
    assert parts[0]
    assert parts[0] == parts[1]


def test_overlapping_pictures_are_dropped_by_their_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "held out"
    (folder / "deep").mkdir(parents=True)
    held_out = [0, 7, 399]
    for number in held_out:
        (folder / "deep" / f"other name {number}.png").write_bytes(f"{number}".encode())
    (folder / "new.jpg").write_bytes(b"of no example")
    store = made(tmp_path / "store")
    expected = chosen_by_hand(store, 0.3, 40, True, held_out)
    found = select(store, tmp_path / "out", threshold=0.3, per_class=40, balance=True, drop_overlap=folder)
    rows = columns(LabelStore(tmp_path / "out"))
    assert dict(zip(rows["id"], rows["copies"].tolist(), strict=True)) == expected
    assert found.overlapping == 3
    asked = LabelStore(tmp_path / "out").provenance["selected"]
    assert asked[0]["dropped_overlap_with"]["pictures"] == 4
    with pytest.raises(MetaplError, match="have no files that could be compared"):
        select(made(tmp_path / "numbers", numbers=True), tmp_path / "no", drop_overlap=folder)


def test_a_selection_of_a_selection_keeps_copies_unless_it_balances_anew(tmp_path: Path) -> None:
    store = made(tmp_path / "store")
    select(store, tmp_path / "balanced", per_class=80, balance=True)
    balanced = LabelStore(tmp_path / "balanced")
    for name, asked in (("sure", {"threshold": 0.4}), ("anew", {"per_class": 10, "balance": True})):
        expected = chosen_by_hand(balanced, asked.get("threshold"), asked.get("per_class"), "balance" in asked, [])
        select(balanced, tmp_path / name, **asked)
        rows = columns(LabelStore(tmp_path / name))
        assert dict(zip(rows["id"], rows["copies"].tolist(), strict=True)) == expected
        assert len(LabelStore(tmp_path / name).provenance["selected"]) == 2


def test_the_same_selection_gives_the_same_files_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, asked = made(tmp_path / "store"), {"threshold": 0.25, "per_class": 70, "balance": True}
    select(store, tmp_path / "one", **asked)
    select(store, tmp_path / "other", **asked)
    assert files(tmp_path / "one") == files(tmp_path / "other")
    add = LabelWriter.add_table

    def stopped(self: LabelWriter, table: Any) -> None:
        if self.rows >= 128:
            raise KeyboardInterrupt
        add(self, table)

    monkeypatch.setattr(LabelWriter, "add_table", stopped)
    with pytest.raises(KeyboardInterrupt):
        select(store, tmp_path / "stopped", **asked)
    monkeypatch.undo()
    assert len(files(tmp_path / "stopped")) == 2
    with pytest.raises(MetaplError, match=r"holds an unfinished store of labels; go on with resume=True \(--resume\)"):
        select(store, tmp_path / "stopped", **asked)
    with pytest.raises(MetaplError, match=r"was begun with provenance\.selected"):
        select(store, tmp_path / "stopped", **(asked | {"per_class": 71}), resume=True)
    whole = select(store, tmp_path / "stopped", **asked, resume=True)
    assert files(tmp_path / "stopped") == files(tmp_path / "one")
    assert sorted(os.listdir(tmp_path / "stopped")) == sorted(os.listdir(tmp_path / "one"))
    assert select(store, tmp_path / "stopped", **asked, resume=True) == whole


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "nothing was asked for; expected one or more of threshold, per_class, balance and drop_overlap"),
        ({"threshold": 1.0}, r"threshold=1.0: expected a number in \[0, 1\) or None"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"per_class": 0}, "per_class=0: expected a whole number from 1 to 1,000,000,000"),
        ({"per_class": 10**30, "balance": True}, "per_class=10+: expected a whole number from 1 to 1,000,000,000"),
        (
            {"per_class": 10**9, "balance": True},
            "would count 5,000,000,000 examples .*; expected at most .* smaller per_class",
        ),
        ({"any_class": True, "threshold": 0.1}, "any_class needs per_class, and no balance"),
        ({"any_class": True, "per_class": 10, "balance": True}, "and no balance"),
        ({"threshold": 0.99}, "nothing is left of the 400 examples .*: 0 overlap, and 400 are not above the threshold"),
        ({"drop_overlap": Path("nowhere")}, "nowhere does not exist"),
    ],
)
def test_what_cannot_be_selected_is_refused_and_nothing_is_left(
    asked: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(MetaplError, match=expected):
        select(made(tmp_path / "store"), tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_a_damaged_part_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    store = made(tmp_path / "store")
    path = store.folder / store.parts[3].file
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    for use in (lambda: statistics(store), lambda: select(store, tmp_path / "out", threshold=0.3)):
        with pytest.raises(MetaplError, match=f"{path.name} is damaged: its SHA-256"):
            use()
    assert not (tmp_path / "out").exists()


def test_a_folder_whose_name_is_not_utf_8_is_written_to(tmp_path: Path) -> None:
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    select(made(tmp_path / "store"), out, balance=True)
    assert len(LabelStore(out)) == 400


def test_a_few_counters_find_what_many_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of keys of 64 bits, two at a time are looked at; so however many classes there are, memory is bounded."""
    store = made(tmp_path / "store")
    for asked in ({"per_class": 30, "balance": True}, {"per_class": 15, "any_class": True}):
        expected = select(store, tmp_path / f"{len(asked)} {asked['per_class']}", **asked)
        with monkeypatch.context() as patch:
            patch.setattr(queries, "COUNTERS", 32)
            found = select(store, tmp_path / "few", **asked)
        assert found == expected
        assert files(tmp_path / "few") == files(tmp_path / f"{len(asked)} {asked['per_class']}")
        shutil.rmtree(tmp_path / "few")


def test_nothing_is_written_into_a_store_or_to_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(tmp_path / "store").folder
    there = sorted(os.listdir(folder))
    os.mkfifo(tmp_path / "pipe.png")
    for arguments, expected in (
        (["select", "--balance", "--out", str(folder / "sub" / "deeper")], f"deeper lies in the store {folder}"),
        (
            ["select", "--balance", "--out", str(tmp_path / "pipe.png")],
            "pipe.png is not a folder; expected that of a store",
        ),
    ):
        assert main(["labels", arguments[0], str(folder), *arguments[1:]]) != 0
        told = capsys.readouterr()
        assert expected in " ".join(told.err.split())
        assert not told.out
    assert sorted(os.listdir(folder)) == there


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
    assert found.confidence == tuple(np.histogram(confidence, BINS, (0, 1))[0].tolist())
    inside = np.clip(entropy, 0, math.log(6))
    assert found.entropy == tuple(np.histogram(inside, BINS, (0, math.log(6)))[0].tolist())
    assert found.mean_confidence == pytest.approx(confidence.mean())
    assert found.mean_entropy == pytest.approx(entropy.mean())
    assert sum(found.confidence) == sum(found.entropy) == found.rows


def test_the_ends_of_a_histogram_are_in_it(tmp_path: Path) -> None:
    with LabelWriter(tmp_path / "store", ["a", "b"]) as writer:
        writer.add(["sure", "unsure"], torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    found = statistics(LabelStore(tmp_path / "store"))
    assert (found.confidence[-1], found.confidence[BINS // 2]) == (1, 1)
    assert (found.entropy[0], found.entropy[-1]) == (1, 1)


def test_the_command_says_it_in_80_columns_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = made(tmp_path / "store")
    text = said(capsys, "labels", "stats", store.folder)
    assert max(map(len, text.splitlines()[1:])) <= 80
    counts = statistics(store).counts
    for name, count in zip(CLASSES, counts, strict=True):
        assert any(line.startswith(name) and f" {count} " in line for line in text.splitlines())
    found = json.loads(said(capsys, "labels", "stats", store.folder, "--json"))
    assert found["counts"] == list(counts)
    assert found["provenance"]["made_with"]["torch"] == torch.__version__


def test_many_classes_of_any_name_are_shown_by_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{index} \x1b[31m" + "x" * 60 for index in range(50)]
    p = torch.full((60, 50), 0.5 / 49)
    p[torch.arange(60), torch.arange(60).clamp(max=40)] = 0.5
    with LabelWriter(tmp_path / "store", names, top_k=1) as writer:
        writer.add(list(range(60)), p)
    text = said(capsys, "labels", "stats", tmp_path / "store")
    assert "\x1b" not in text
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert "(the 10 largest and the 10 smallest of 50 classes; 9 have no example)" in text
    (largest,) = (line for line in text.splitlines() if line.startswith("40 "))
    assert largest.split()[-3:] == ["20", "33.3%", "50.0%"]


def test_the_command_selects_and_says_what_became_of_the_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = made(tmp_path / "store")
    flags = ("--threshold", "0.3", "--per-class", "50", "--balance")
    text = said(capsys, "labels", "select", store.folder, "--out", tmp_path / "out", *flags)
    expected = chosen_by_hand(store, 0.3, 50, True, [])
    assert f"\n{len(expected)}  kept\n" in text
    assert f"\n{sum(expected.values())}  with copies\n" in text
    assert sum(int(line.split()[0]) for line in text.splitlines() if "dropped" in line) == 400 - len(expected)
    stats = said(capsys, "labels", "stats", tmp_path / "out")
    assert "selected from 400: confidence above 0.3, at most 50 a class, balanced\n" in stats
    assert max(map(len, stats.splitlines()[1:])) <= 80
    for arguments, words in (
        (
            ("select", store.folder, "--out", store.folder, *flags),
            "holds a store of labels; give another folder",
        ),
        (
            ("select", store.folder, "--out", tmp_path / "out", *flags),
            "holds a store of labels; give another folder",
        ),
        (("stats", tmp_path), "is not a store of labels"),
        (("stat", store.folder), "did you mean stats? Expected one of stats, select"),
        ((), "no action was named"),
    ):
        assert words in refused(capsys, "labels", *arguments)
    assert main(["labels", "--help"]) == 0


@pytest.mark.parametrize("selected", ["x", [{}], [3], {"threshold": []}, [{"of_rows": [], "threshold": {}}]])
def test_whatever_a_store_says_of_its_selection_is_shown(
    selected: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who wrote the store may have said something else by this name."""
    with LabelWriter(tmp_path / "store", ["a", "b"], provenance={"selected": selected}) as writer:
        writer.add(["x"], torch.tensor([[0.75, 0.25]]))
    select(LabelStore(tmp_path / "store"), tmp_path / "out", threshold=0.0)
    for place in ("store", "out"):
        said(capsys, "labels", "stats", tmp_path / place)
    assert "selected from 1: confidence above 0.0\n" in said(capsys, "labels", "stats", tmp_path / "out")


def test_the_pictures_that_were_selected_are_listed_for_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["b.png", "c d.png", "deep/a.png"]
    for name in names:
        (tmp_path / "many" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / "many" / name)
    about = {"pictures": str(tmp_path / "many")}
    with LabelWriter(tmp_path / "store", ["x", "y"], provenance=about) as writer:
        writer.add(names, torch.tensor([[0.2, 0.8], [0.4, 0.6], [0.9, 0.1]]))
    said(capsys, "labels", "select", tmp_path / "store", "--any-class", "--per-class", "1", "--out", tmp_path / "one")
    found = scan_unlabeled(tmp_path / "one" / "list.txt")
    assert [Path(path) for path in found.paths()] == [tmp_path / "many" / name for name in ("b.png", "deep/a.png")]
