"""Stored labels.

What is read is what was written, in any order, and nothing else is ever taken for it; statistics
and selections against plain numpy; and what the commands say.
"""

import hashlib
import json
import os
import pickle
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import metapl
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from metapl import MetaplError
from metapl.apps.labeling import read_labels
from metapl.labels.selection import select, statistics
from metapl.labels.store import DESCRIPTION, LabelStore, LabelWriter
from metapl.pictures.folders import scan_unlabeled

CLASSES = ("ant", "bee", "cat", "dog", "eel")


def softmax(rows: int, classes: int = 5, seed: int = 0) -> Tensor:
    return (3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))).softmax(
        dim=1
    )


def names(count: int) -> list[str]:
    return [f"sub/{number:04}.png" for number in range(0, 2 * count, 2)]


def written(
    folder: Path, ids: list[Any], p: Tensor, rows_per_part: int = 10, **options: Any
) -> LabelStore:
    classes = CLASSES if p.shape[1] == 5 else [str(index) for index in range(p.shape[1])]
    with LabelWriter(folder, classes, rows_per_part=rows_per_part, **options) as writer:
        for start in range(0, len(ids), 7):
            writer.add(ids[start : start + 7], p[start : start + 7])
    return LabelStore(folder)


def files(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".arrow"))


def read_by_hand(p: Tensor, k: int | None) -> Tensor:
    """Return labels by the equation of LabelStore, an example at a time."""
    result = []
    for row in p.numpy():
        kept = sorted(range(len(row)), key=lambda c, row=row: (-row[c], c))[: k or len(row)]
        stored = {c: float(np.float16(row[c])) for c in kept}
        rest = max(0.0, 1 - sum(stored.values()))
        q = np.array([stored.get(c, rest / max(1, len(row) - len(kept))) for c in range(len(row))])
        result.append(q / q.sum())
    return torch.tensor(np.array(result), dtype=torch.float32)


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("kind", ["names", "numbers"])
def test_what_is_read_follows_the_equation_in_any_order(
    top_k: int | None, kind: str, tmp_path: Path
) -> None:
    p = softmax(53)
    p[5] = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2])  # ties: the first classes are kept
    p[6] = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    p[7] = torch.tensor([0.5003, 0.4997, 0.0, 0.0, 0.0])  # in float16, their sum is above 1
    ids: list[Any] = names(53) if kind == "names" else [*range(-20, 86, 2)]
    store, expected = written(tmp_path / "store", ids, p, top_k=top_k), read_by_hand(p, top_k)
    assert (len(store.parts), [*store]) == (6, ids)
    order = torch.randint(53, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    found = store[[ids[i] for i in order]]
    assert (found.dtype, found.shape) == (torch.float32, (200, 5))
    assert torch.allclose(found, expected[order], atol=1e-6)
    if top_k is None:  # a rounding of the number's own, and one of the sum that is divided by
        assert (found.double() / p[order] - 1).abs()[p[order] > 6.2e-5].max() < 2.001 / 2048
    assert torch.equal(store[ids[3]], store[[ids[3]]][0])
    assert (store.find([ids[52], ids[0]]).tolist(), store.find([]).tolist()) == ([52, 0], [])
    assert store.rows_with_copies().tolist() == [*range(53)]
    assert np.allclose(store.column("confidence"), p.max(dim=1).values)
    if kind == "numbers":
        for wanted in (
            np.array([6, 0]),
            torch.tensor([6, 0]),
            (6, 0),
            np.array([6, 0], dtype=np.int32),
        ):
            assert torch.equal(store[wanted], store[[6, 0]])
    copy = pickle.loads(pickle.dumps(store))
    assert "tables" not in vars(copy)  # which checks what it reads for itself
    if kind == "names" and top_k is None:
        served = DataLoader(
            [[i, 29 - i] for i in range(6)], batch_size=None, num_workers=2, collate_fn=copy.at
        )
        assert torch.equal(
            torch.stack([*served]), torch.stack([store.at([i, 29 - i]) for i in range(6)])
        )
    for missing in (
        ["", "sub/0001.png", "zzz", "sub/\udce9.png"] if kind == "names" else [-21, 1, 86]
    ):
        assert store.find([ids[3], missing]).tolist() == [3, -1]
        with pytest.raises(MetaplError, match="expected"):
            _ = store[[ids[2], missing]]
    with pytest.raises(MetaplError, match="53"):
        store.at([0, 53])


def add(folder: Path, ids: Any, p: Any, **options: Any) -> None:
    with LabelWriter(folder, CLASSES, **options) as writer:
        writer.add(ids, p)


WRONG: list[tuple[Any, Any, dict[str, Any], str]] = [
    (["b", "a"], softmax(2), {}, "after"),
    (["a", "a"], softmax(2), {}, "after"),
    (["a", 1], softmax(2), {}, "ids"),
    ([1.5, 2.5], softmax(2), {}, "ids"),
    (["\udce9"], softmax(1), {}, "UTF-8"),
    (["a"], softmax(2), {}, "floating"),
    (["a"], torch.ones(1, 5, dtype=torch.int64), {}, "floating"),
    (["a"], torch.ones(1, 5), {}, "sum"),
    (["a"], torch.tensor([[2.0, -1, 0, 0, 0]]), {}, "negative"),
    (["a"], torch.full((1, 5), torch.nan), {}, "finite"),
    ([], softmax(0), {}, "no example"),
    (["a"], softmax(1), {"top_k": 6}, "top_k"),
]


def test_names_are_compared_in_one_unicode_form(tmp_path: Path) -> None:
    """After a way through a Mac, ids are found again; what is written exactly so goes first."""
    p = softmax(3)
    composed, decomposed, plain = "b/é.png", unicodedata.normalize("NFD", "b/é.png"), "c/ö.png"
    both = written(tmp_path / "both", [decomposed, composed, plain], p)
    wanted = [composed, decomposed, unicodedata.normalize("NFD", plain), "d.png"]
    assert both.find(wanted).tolist() == [1, 0, 2, -1]
    with LabelWriter(tmp_path / "store", [unicodedata.normalize("NFD", "é"), "f"]) as writer:
        writer.add([1], softmax(1, 2))
    assert LabelStore(tmp_path / "store").classes == ("é", "f")


def test_wrong_rows_and_settings_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    for ids, p, options, word in WRONG:
        with pytest.raises(MetaplError, match=word):
            add(tmp_path / "new" / "store", ids, p, **options)
        assert not (tmp_path / "new").exists()


def test_one_writer_at_a_time_whose_rows_are_of_one_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metapl.runs.folder.PATIENCE", 0.1)
    with LabelWriter(tmp_path / "store", CLASSES) as writer:
        with pytest.raises(MetaplError, match="another process"):
            add(tmp_path / "store", ["a"], softmax(1))
        writer.add(["b"], softmax(1))
        for ids, digests, word in (
            (["a"], None, "after"),
            ([3], None, "ids"),
            (["c"], [bytes(16)], "digests"),
        ):
            with pytest.raises(MetaplError, match=word):
                writer.add(ids, softmax(1), digests)
        writer.add(["c"], softmax(1))
    assert [*LabelStore(tmp_path / "store")] == ["b", "c"]
    decomposed = unicodedata.normalize("NFD", "é")
    for classes in (["a", "a"], ["é", decomposed], [], range(3), np.arange(3), "ab"):
        with pytest.raises(MetaplError, match="expected one or more texts, each once"):
            LabelWriter(tmp_path / "other", classes)  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()
    with LabelWriter(tmp_path / "other", np.array(["a", "b"])) as writer:  # type: ignore[arg-type]
        writer.add([1], softmax(1, 2))
    assert LabelStore(tmp_path / "other").classes == ("a", "b")


def test_ids_of_the_other_kind_have_no_row(tmp_path: Path) -> None:
    numbered = written(tmp_path / "numbers", [1, 2], softmax(2))
    assert numbered.find(["1", 2]).tolist() == [-1, 1]
    assert numbered.find([np.int64(1), 3]).tolist() == [0, -1]
    assert numbered.find([torch.tensor(2), 1.0]).tolist() == [1, 0]  # type: ignore[list-item]
    others: list[Any] = [True, 2**70, 1.5, None]
    assert numbered.find(others).tolist() == [-1, -1, -1, -1]
    named = written(tmp_path / "names", ["1", "2"], softmax(2))
    assert named.find([1, "2"]).tolist() == [-1, 1]
    for store, ids in ((numbered, ["1"]), (named, [3])):
        with pytest.raises(MetaplError, match="has no labels of"):
            store[ids]


def test_what_is_no_store_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(MetaplError, match=r"mine\.txt"):
        add(tmp_path, ["a"], softmax(1))
    assert os.listdir(tmp_path) == ["mine.txt"]
    for path in (tmp_path, tmp_path / "no", tmp_path / "mine.txt"):
        with pytest.raises(MetaplError, match="expected"):
            LabelStore(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MetaplError, match="pip install"):
        LabelStore(tmp_path)


def read_everything(folder: Path) -> Tensor:
    store = LabelStore(folder)
    return store.at(range(len(store)))


def test_one_flipped_bit_and_a_description_of_another_version_are_refused_and_named(
    tmp_path: Path,
) -> None:
    store = written(
        tmp_path / "store", names(30), softmax(30), provenance={"temperature": 1e-05, "é": "é"}
    )
    generator = np.random.default_rng(0)
    for file in (DESCRIPTION, *files(store.folder)):
        path = store.folder / file
        content = path.read_bytes()
        for _ in range(40):
            spoiled = bytearray(content)
            spoiled[generator.integers(len(content))] ^= 1 << int(generator.integers(8))
            path.write_bytes(spoiled)
            with pytest.raises(MetaplError) as told:
                read_everything(store.folder)
            assert str(path) in str(told.value)
        path.write_bytes(content)
        read_everything(store.folder)
    told_of = json.loads((store.folder / DESCRIPTION).read_text())
    for text in (
        json.dumps({**told_of, "format": 2}),
        json.dumps({**told_of, "complete": False}),
        "{",
        "[]",
        "\x00",
    ):
        (store.folder / DESCRIPTION).write_text(text)
        with pytest.raises(MetaplError, match="store"):
            read_everything(store.folder)


def test_what_lacks_a_file_or_has_a_cut_one_is_not_gone_on_with(tmp_path: Path) -> None:
    stop_after(tmp_path, 25, softmax(35))
    for path in [tmp_path / name for name in (DESCRIPTION, files(tmp_path)[1])]:
        content = path.read_bytes()
        for spoil in (lambda path=path, cut=content[:-100]: path.write_bytes(cut), path.unlink):
            spoil()
            with pytest.raises(MetaplError, match=path.name):
                go_on(tmp_path).__enter__()
        path.write_bytes(content)


def go_on(folder: Path, **options: Any) -> LabelWriter:
    return LabelWriter(folder, CLASSES, **{"rows_per_part": 10, "resume": True, **options})


def stop_after(folder: Path, rows: int, p: Tensor, **options: Any) -> None:
    """Write to a store by a block that fails after so many rows."""
    writer = LabelWriter(folder, CLASSES, rows_per_part=10, **options).__enter__()
    writer.add(names(len(p))[:rows], p[:rows])
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def test_a_stopped_writer_goes_on_behind_its_last_part_with_the_same_settings(
    tmp_path: Path,
) -> None:
    p, folder, same = (
        softmax(35),
        tmp_path / "store",
        {"provenance": {"temperature": 1, "run": "elsewhere"}},
    )
    whole = written(tmp_path / "whole", names(35), p, provenance={"temperature": 1, "run": "there"})
    stop_after(folder, 25, p, provenance={"temperature": 1, "run": "there"})
    for use in (lambda: LabelStore(folder), lambda: add(folder, ["a"], softmax(1))):
        with pytest.raises(MetaplError, match="--resume"):
            use()
    provenances = [{"temperature": 2}, {}, {"temperature": 1, "weights_fingerprint": 0}]
    for name, other in (
        ("top_k", 2),
        ("rows_per_part", 11),
        *(("provenance", one) for one in provenances),
    ):
        with pytest.raises(MetaplError, match=name):
            go_on(folder, **{**same, name: other}).__enter__()
    (folder / "part-00002.arrow.01234567.tmp").write_bytes(b"torn")
    with go_on(folder, **same) as writer:
        assert (writer.rows, writer.last, writer.complete) == (20, names(35)[19], False)
        with pytest.raises(MetaplError, match="after"):
            writer.add(names(35)[19:], p[19:])
        writer.add(names(35)[20:], p[20:])
    assert sorted(os.listdir(folder)) == sorted(os.listdir(whole.folder))
    assert torch.equal(read_everything(folder), read_everything(whole.folder))
    with go_on(folder, **same) as writer:
        assert (writer.rows, writer.complete) == (35, True)
        with pytest.raises(MetaplError, match="whole"):
            writer.add(["zzz"], softmax(1))


SIX = tuple(f"class {index}" for index in range(6))


def made(
    folder: Path, rows: int = 400, *, numbers: bool = False, top_k: int | None = None
) -> LabelStore:
    """Store distributions of few values: many examples are equally confident, a class has none."""
    weights = torch.randint(0, 5, (rows, 6), generator=torch.Generator().manual_seed(0)).float()
    weights[:, 5] = 0
    weights[:, 0] += 1.5
    ids: list[Any] = (
        [*range(3, 3 + rows)] if numbers else sorted(f"p/é{number}.png" for number in range(rows))
    )
    digests = (
        None
        if numbers
        else [hashlib.sha256(f"{number}".encode()).digest() for number in range(rows)]
    )
    with LabelWriter(folder, SIX, top_k=top_k, rows_per_part=64) as store:
        store.add(ids, weights / weights.sum(dim=1, keepdim=True), digests)
    return LabelStore(folder)


def held_out(folder: Path, *numbers: int) -> Path:
    """Make files of these examples, under other names."""
    (folder / "deep").mkdir(parents=True)
    for number in numbers:
        (folder / "deep" / f"other name {number}.png").write_bytes(f"{number}".encode())
    (folder / "new.jpg").write_bytes(b"of no example")
    return folder


def columns(store: LabelStore) -> dict[str, Any]:
    """Return all rows, as another reader of Parquet has them."""
    import pyarrow as pa
    import pyarrow.feather as feather

    table = pa.concat_tables([feather.read_table(store.folder / part.file) for part in store.parts])
    numbers = {
        name: np.array(table[name].to_pylist())
        for name in ("label", "confidence", "entropy", "copies")
    }
    return {**numbers, "id": table["id"].to_pylist()}


def copies_of(store: LabelStore) -> dict[Any, int]:
    rows = columns(store)
    return dict(zip(rows["id"], rows["copies"].tolist(), strict=True))


def chosen_by_hand(
    store: LabelStore,
    threshold: float | None,
    per_class: int | None,
    balance: bool,
    dropped: Sequence[int] = (),
) -> dict[Any, int]:
    """Return the ids that are to be left, each with its copies, by plain Python and numpy."""
    rows = columns(store)
    confidence = rows["confidence"].astype(np.float32)
    left = [row for row in range(len(store)) if row not in dropped]
    left = [row for row in left if threshold is None or confidence[row] > np.float32(threshold)]
    result: dict[Any, int] = {}
    groups = [[row for row in left if rows["label"][row] == label] for label in range(len(SIX))]
    groups = [
        sorted(group, key=lambda row: (-confidence[row], rows["id"][row]))[:per_class]
        for group in groups
    ]
    goal = per_class or max(map(len, groups))
    for group in groups:
        copies = {row: int(rows["copies"][row]) for row in group}
        if balance and group:
            digests = {
                row: hashlib.md5(str(rows["id"][row]).encode()).digest()[8:] for row in group
            }
            order = sorted(group, key=lambda row: (int.from_bytes(digests[row], "little"), row))
            copies = {
                row: goal // len(group) + (place < goal % len(group))
                for place, row in enumerate(order)
            }
        result |= {rows["id"][row]: copies[row] for row in group}
    return result


@pytest.mark.parametrize("numbers", [False, True], ids=["names", "numbers"])
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(
    ("threshold", "per_class", "balance"),
    [(0.3, None, False), (None, 20, False), (0.4, 30, True), (0.35, 1, True)],
)
def test_what_is_selected_is_what_numpy_selects(
    numbers: bool,
    top_k: int | None,
    threshold: float | None,
    per_class: int | None,
    balance: bool,
    tmp_path: Path,
) -> None:
    """Pictures of a folder dropped, from a store and from what was selected of one.

    And its statistics.
    """
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
    assert (found.kept, found.overlapping, found.missing) == (len(expected), len(gone), (SIX[5],))
    assert found.overlapping + found.unsure + found.beyond + found.kept == found.rows == len(store)
    assert (kept.classes, kept.top_k, kept.has_digests) == (store.classes, store.top_k, not numbers)
    again: dict[str, Any] = {"threshold": 0.36} if balance else {"per_class": 10, "balance": True}
    select(kept, tmp_path / "again", **again)
    assert copies_of(LabelStore(tmp_path / "again")) == chosen_by_hand(
        kept, again.get("threshold"), again.get("per_class"), not balance
    )
    assert len(LabelStore(tmp_path / "again").provenance["selected"]) == 2
    rows, told = columns(kept), statistics(kept)
    labels, confidence = rows["label"], rows["confidence"].astype(float)
    assert (told.rows, told.copies) == (len(labels), rows["copies"].sum())
    assert told.counts == tuple(np.bincount(labels, minlength=6).tolist())
    assert told.class_copies == tuple(
        np.bincount(labels, rows["copies"], minlength=6).astype(int).tolist()
    )
    of_class = [
        confidence[labels == label].mean() if label in labels else None for label in range(6)
    ]
    assert told.class_confidence == pytest.approx(of_class)
    assert told.mean_confidence == pytest.approx(confidence.mean())
    assert told.mean_entropy == pytest.approx(rows["entropy"].astype(float).mean())


@pytest.mark.parametrize(("lower", "upper"), [(0.0, 0.4), (0.4, 0.5), (0.5, 1.0)])
def test_an_interval_of_confidence_has_its_upper_bound_and_not_its_lower_one(
    lower: float, upper: float, tmp_path: Path
) -> None:
    store = made(tmp_path / "store")
    confidence = store.column("confidence")
    is_within = (confidence > np.float32(lower)) & (confidence <= np.float32(upper))
    selection = select(store, tmp_path / "out", threshold=lower, at_most=upper)
    assert [*LabelStore(tmp_path / "out")] == [
        name for name, kept in zip(store, is_within, strict=True) if kept
    ]
    assert selection.kept == is_within.sum() > 0
    assert selection.too_sure == (confidence > np.float32(upper)).sum()
    assert selection.unsure + selection.too_sure + selection.kept == len(store)


def test_a_uniform_share_is_drawn_of_the_copies_and_lies_within_a_larger_one(
    tmp_path: Path,
) -> None:
    """Over many seeds each copy is drawn as often; what is drawn is as many as the share says."""
    store, asked = made(tmp_path / "store", rows=60), {"threshold": 0.3, "balance": True}
    select(store, tmp_path / "all", **asked)
    copies = copies_of(LabelStore(tmp_path / "all"))
    total = sum(copies.values())
    drawn = dict.fromkeys(copies, 0.0)
    for seed in range(30):
        folder = tmp_path / f"{seed}"
        selection = select(store, folder, **asked, share=0.25, seed=seed)
        assert selection.copies == round(0.25 * total)
        assert selection.kept + selection.not_drawn == len(copies)
        for name, count in copies_of(LabelStore(folder)).items():
            assert count <= copies[name]
            drawn[name] += count / copies[name] / 30
    # The share of a row's copies has a variance of 3/16 a draw at most: five standard errors.
    assert all(abs(share - 0.25) < 5 * (3 / 16 / 30) ** 0.5 for share in drawn.values())
    select(store, tmp_path / "half", **asked, share=0.5, seed=7)
    larger = copies_of(LabelStore(tmp_path / "half"))
    assert all(
        count <= larger[name] for name, count in copies_of(LabelStore(tmp_path / "7")).items()
    )
    again = select(store, tmp_path / "half", **asked, share=0.5, seed=7)
    assert again.copies == round(0.5 * total)
    with pytest.raises(MetaplError, match=r"was begun with provenance\.selected"):
        select(store, tmp_path / "half", **asked, share=0.5, seed=8)


def test_a_count_is_drawn_of_an_interval_and_refused_where_there_are_fewer(tmp_path: Path) -> None:
    """As Figure 5 has it: the same number of pictures of each interval of confidence."""
    store = made(tmp_path / "store")
    confidence = store.column("confidence")
    for lower, upper in ((0.3, 0.4), (0.4, 0.5)):
        interval: dict[str, Any] = {"threshold": lower, "at_most": upper}
        is_within = (confidence > np.float32(lower)) & (confidence <= np.float32(upper))
        within = {name for name, inside in zip(store, is_within, strict=True) if inside}
        out = tmp_path / f"{lower}"
        selection = select(store, out, **interval, count=7)
        assert (selection.kept, selection.copies) == (7, 7)
        assert selection.not_drawn == len(within) - 7 > 0
        assert within > {*LabelStore(out)}
        whole = select(store, tmp_path / f"all {lower}", **interval, count=len(within))
        assert whole.kept == len(within)
        with pytest.raises(
            MetaplError, match=f"^{len(within)} of the 400 .* the {len(within) + 1}"
        ):
            select(store, tmp_path / "more", **interval, count=len(within) + 1)
    assert not (tmp_path / "more").exists()
    select(store, tmp_path / "balanced", balance=True)
    copies = copies_of(LabelStore(tmp_path / "balanced"))
    drawn = select(store, tmp_path / "of copies", balance=True, count=401)
    assert drawn.copies == 401
    some = copies_of(LabelStore(tmp_path / "of copies"))
    assert all(count <= copies[name] for name, count in some.items())


@pytest.mark.parametrize(("top_k", "threshold", "gone"), [(None, None, []), (2, 0.4, [5, 6, 7])])
def test_of_any_class_the_most_probable_are_kept(
    top_k: int | None, threshold: float | None, gone: list[int], tmp_path: Path
) -> None:
    import pyarrow as pa

    store = made(tmp_path / "store", top_k=top_k)
    table, confidence = pa.concat_tables(store.tables), store.column("confidence")
    p = np.full((400, 6), -1.0)  # of a class that is not stored
    for row, values in enumerate(table["probabilities"].to_pylist()):
        p[row, table["classes"][row].as_py() if top_k else slice(None)] = values
    sure = [
        row
        for row in range(400)
        if row not in gone and confidence[row] > np.float32(threshold or 0)
    ]
    expected = set()
    for label in range(6):
        known = [row for row in sure if p[row, label] >= 0]
        expected |= {*sorted(known, key=lambda row, label=label: (-p[row, label], row))[:15]}
    dropped = {"drop_overlap": held_out(tmp_path / "held", *gone)} if gone else {}
    found = select(
        store, tmp_path / "out", per_class=15, any_class=True, threshold=threshold, **dropped
    )
    assert store.find([*LabelStore(tmp_path / "out")]).tolist() == sorted(expected)
    assert (found.kept, found.overlapping) == (len(expected), len(gone))


def test_the_same_selection_gives_the_same_files_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"threshold": 0.25, "per_class": 70, "balance": True}
    store, stop, add = made(tmp_path / "store"), tmp_path / "stopped", LabelWriter.add_table
    select(store, tmp_path / "one", **asked)

    def stopped(self: LabelWriter, table: Any) -> None:
        if self.rows >= 128:
            raise KeyboardInterrupt
        add(self, table)

    with monkeypatch.context() as patch:
        patch.setattr(LabelWriter, "add_table", stopped)
        with pytest.raises(KeyboardInterrupt):
            select(store, stop, **asked)
    assert len(files(stop)) == 2
    with pytest.raises(MetaplError, match="selected"):
        select(store, stop, **{**asked, "per_class": 71})
    whole = select(store, stop, **asked)
    assert LabelStore(stop).sha256 == LabelStore(tmp_path / "one").sha256
    assert select(store, stop, **asked) == whole


UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"threshold": 1.0}, "threshold"),
    ({"per_class": 0}, "per_class"),
    ({"any_class": True, "threshold": 0.1}, "any_class"),
    ({"any_class": True, "per_class": 10, "balance": True}, "any_class"),
    ({"threshold": 0.99}, "nothing is left"),
    ({"threshold": 0.3, "at_most": 0.3}, "the interval of confidence is empty"),
    ({"at_most": 0.01}, "400 are above 0.01"),
    ({"at_most": 0.0}, "at_most"),
    ({"share": 0.0}, "share"),
    ({"count": 0}, "count"),
    ({"count": 3, "share": 0.5}, "expected one of them"),
    ({"drop_overlap": Path("nowhere")}, "nowhere"),
]


def test_what_cannot_be_selected_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    store, numbers = made(tmp_path / "store"), made(tmp_path / "numbers", numbers=True)
    held = held_out(tmp_path / "held", 1)
    for of, asked, word in [
        *((store, *unfit) for unfit in UNFIT),
        (numbers, {"drop_overlap": held}, "files"),
    ]:
        with pytest.raises(MetaplError, match=word):
            select(of, tmp_path / "out", **asked)
    path = store.folder / store.parts[3].file
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    store = LabelStore(store.folder)
    for use in (lambda: statistics(store), lambda: select(store, tmp_path / "out", threshold=0.3)):
        with pytest.raises(MetaplError, match=path.name):
            use()
    assert not (tmp_path / "out").exists()


def test_the_commands_say_what_is_in_a_store_and_what_became_of_it(tmp_path: Path) -> None:
    store = made(tmp_path / "store")
    flags = ("--threshold", "0.3", "--per-class", "50", "--balance")
    text, counts = metapl("labels", "stats", store.folder).stdout, statistics(store).counts
    for name, count in zip(SIX, counts, strict=True):
        assert any(line.startswith(name) and f" {count} " in line for line in text.splitlines())
    told = metapl("labels", "select", store.folder, "--out", tmp_path / "out", *flags).stdout
    expected = chosen_by_hand(store, 0.3, 50, balance=True)
    assert f"\n{len(expected)}  kept\n" in told
    assert f"\n{sum(expected.values())}  with copies\n" in told
    assert sum(
        int(line.split()[0]) for line in told.splitlines() if "dropped" in line
    ) == 400 - len(expected)
    stats = metapl("labels", "stats", tmp_path / "out").stdout
    assert "selected from 400: threshold 0.3, per_class 50, balance" in stats
    assert max(map(len, (text + stats).splitlines()[1:])) <= max(80, len(str(tmp_path)) + 80)
    interval = ("--threshold", "0.3", "--at-most", "0.5", "--share", "0.5")
    told = metapl("labels", "select", store.folder, "--out", tmp_path / "some", *interval).stdout
    assert "dropped: confidence above 0.5" in told
    assert "dropped: not drawn in a share of 0.5" in told
    dropped_or_kept = [
        line for line in told.splitlines() if "dropped" in line or line.endswith("  kept")
    ]
    assert sum(int(line.split()[0]) for line in dropped_or_kept) == 400
    counted = (*interval[:4], "--count", "5")
    told = metapl("labels", "select", store.folder, "--out", tmp_path / "five", *counted).stdout
    assert "dropped: not drawn among 5" in told
    assert "\n  5  kept\n" in told
    empty = metapl(
        "labels", "select", store.folder, "--out", tmp_path / "none", *interval[:3], "0.2", code=2
    ).stderr
    assert "at_most is 0.2, and threshold 0.3: the interval of confidence is empty" in empty
    before = sorted(os.listdir(store.folder))
    metapl("labels", "select", store.folder, "--out", store.folder, *flags, code=2)
    assert sorted(os.listdir(store.folder)) == before


def test_the_pictures_that_were_selected_are_listed_for_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, many = ["b.png", "c d.png", "deep/a.png"], tmp_path / "many"
    for name in names:
        (many / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(many / name)
    with LabelWriter(tmp_path / "store", ["x", "y"], provenance={"pictures": str(many)}) as store:
        store.add(names, torch.tensor([[0.2, 0.8], [0.4, 0.6], [0.9, 0.1]]))
    for out, how, chosen in (
        ("one", ("--any-class", "--per-class", "1"), {"b.png": 1, "deep/a.png": 0}),
        ("sure", ("--threshold", "0.85"), {"deep/a.png": 0}),  # all in one folder of it
    ):
        metapl("labels", "select", tmp_path / "store", *how, "--out", tmp_path / out)
        found = scan_unlabeled(tmp_path / out / "list.txt")
        assert [Path(path) for path in found.paths()] == [many / name for name in chosen]
        labels = read_labels(str(tmp_path / out), found, found, print)
        assert labels.argmax(1).tolist() == [*chosen.values()]
    metapl("labels", "select", tmp_path / "store", "--balance", "--out", tmp_path / "balanced")
    found = scan_unlabeled(tmp_path / "balanced" / "list.txt")
    assert Counter(found.names) == {"b.png": 1, "c d.png": 1, "deep/a.png": 2}
    labels = read_labels(str(tmp_path / "balanced"), found, found, print)
    assert labels.argmax(1).bincount().tolist() == [2, 2]
    # A name that no line holds is left out, and said.
    with LabelWriter(tmp_path / "odd", ["x", "y"], provenance={"pictures": str(many)}) as store:
        store.add(["a\nb.png", "b.png"], torch.tensor([[0.2, 0.8], [0.4, 0.6]]))
    ended = metapl("labels", "select", tmp_path / "odd", "--out", tmp_path / "one-odd")
    assert "list.txt holds no name with a line's end, and leaves out" in ended.stderr
    assert scan_unlabeled(tmp_path / "one-odd" / "list.txt").names == ("b.png",)
    # The place of an older store is below the folder where it was written.
    with LabelWriter(tmp_path / "older", ["x", "y"], provenance={"pictures": "many"}) as store:
        store.add(["b.png"], torch.tensor([[0.4, 0.6]]))
    monkeypatch.chdir(tmp_path)
    metapl("labels", "select", "older", "--out", "older-selected")
    assert (tmp_path / "older-selected" / "list.txt").read_text() == "../many/b.png\n"
    (tmp_path / "elsewhere" / "many").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    ended = metapl("labels", "select", "../older", "--out", "here")
    assert "no list.txt, since many, which was labeled, is not there" in ended.stderr
    # Pictures that have gone are not listed, and neither are others below the present folder.
    many.rename(tmp_path / "moved")
    ended = metapl("labels", "select", tmp_path / "store", "--out", tmp_path / "gone")
    assert f"metapl: note: no list.txt, since {many}, which was labeled, is not" in ended.stderr
    assert not (tmp_path / "gone" / "list.txt").exists()
