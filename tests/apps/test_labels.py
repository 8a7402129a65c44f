"""Stored labels: what is read is what was written, in any order, and nothing else is ever taken for it."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from metapl import MetaplError
from metapl.apps.labels import LabelStore, LabelWriter
from metapl.apps.labels import store as reading

CLASSES = ("ant", "bee", "cat", "dog", "eel")


def softmax(rows: int, classes: int = 5, seed: int = 0) -> Tensor:
    return (3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))).softmax(dim=1)


def names(count: int) -> list[str]:
    return [f"sub/{number:04}.png" for number in range(0, 2 * count, 2)]


def written(folder: Path, ids: list[Any], p: Tensor, rows_per_part: int = 10, **options: Any) -> LabelStore:
    classes = CLASSES if p.shape[1] == 5 else [str(index) for index in range(p.shape[1])]
    with LabelWriter(folder, classes, rows_per_part=rows_per_part, **options) as writer:
        for start in range(0, len(ids), 7):
            writer.add(ids[start : start + 7], p[start : start + 7])
    return LabelStore(folder)


def files(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".arrow"))


def read_by_hand(p: Tensor, k: int | None) -> Tensor:
    """The equation of LabelStore, an example at a time."""
    result = []
    for row in p.numpy():
        kept = sorted(range(len(row)), key=lambda c, row=row: (-row[c], c))[: k or len(row)]
        stored = {c: float(np.float16(row[c])) for c in kept}
        rest = max(0.0, 1 - sum(stored.values()))
        q = np.array([stored.get(c, rest / max(1, len(row) - len(kept))) for c in range(len(row))])
        result.append(q / q.sum())
    return torch.tensor(np.array(result), dtype=torch.float32)


# ------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("classes", [2, 3])
def test_what_is_read_is_off_by_two_parts_in_2048_at_most(classes: int, tmp_path: Path) -> None:
    """One part is the number's own, and one that of the sum that is divided by."""
    p = softmax(16_000, classes)
    store = written(tmp_path / "store", [*range(len(p))], p, rows_per_part=len(p))
    off = (store.at(range(len(p))).double() / p.double() - 1).abs()[p > 6.2e-5].max() * 2048
    assert 1.1 < off < 2.001


@pytest.mark.parametrize("top_k", [None, 1, 3, 5])
@pytest.mark.parametrize("kind", ["names", "numbers"])
def test_what_is_read_follows_the_equation_in_any_order(top_k: int | None, kind: str, tmp_path: Path) -> None:
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
    assert torch.equal(store[ids[3]], store[[ids[3]]][0])
    assert store.find([ids[52], ids[0]]).tolist() == [52, 0]
    assert (store.find([]).tolist(), store.at([]).shape) == ([], (0, 5))
    assert store.rows_with_copies().tolist() == [*range(53)]
    assert np.allclose(store.column("confidence"), p.max(dim=1).values)
    if kind == "numbers":
        for wanted in (np.array([6, 0]), torch.tensor([6, 0]), (6, 0), np.array([6, 0], dtype=np.int32)):
            assert torch.equal(store[wanted], store[[6, 0]])
    assert not store.matrix(0, "probabilities").flags.owndata  # as they lie in the file
    copy = pickle.loads(pickle.dumps(store))
    assert "tables" not in vars(copy)  # which checks what it reads for itself
    served = DataLoader([[i, 29 - i] for i in range(6)], batch_size=None, num_workers=2, collate_fn=copy.at)
    assert torch.equal(torch.stack([*served]), torch.stack([store.at([i, 29 - i]) for i in range(6)]))


@pytest.mark.parametrize("ids", [names(30), [*range(0, 60, 2)]], ids=["names", "numbers"])
def test_an_example_that_is_not_there_is_named(ids: list[Any], tmp_path: Path) -> None:
    store = written(tmp_path / "store", ids, softmax(30))
    for missing in ["", "sub/0001.png", "zzz", "sub/\udce9.png"] if isinstance(ids[0], str) else [-1, 1, 59]:
        assert store.find([ids[3], missing]).tolist() == [3, -1]
        with pytest.raises(MetaplError, match="expected"):
            _ = store[[ids[2], missing]]
    with pytest.raises(MetaplError, match="30"):
        store.at([0, 30])


def test_other_readers_of_arrow_understand_a_part(tmp_path: Path) -> None:
    import pyarrow.feather as feather

    p = softmax(20)
    p[3] = 0.2  # of equals the first
    store = written(tmp_path / "store", names(20), p, top_k=2, rows_per_part=20)
    table = feather.read_table(store.folder / files(store.folder)[0])
    assert table["id"].to_pylist() == names(20)
    assert table["label"].to_pylist() == p.argmax(dim=1).tolist()
    assert np.allclose(table["entropy"].to_numpy(), -(p * p.log()).sum(dim=1), atol=1e-6)
    assert table["classes"].to_pylist() == p.sort(dim=1, descending=True, stable=True).indices[:, :2].tolist()
    assert np.allclose(np.array(table["probabilities"].to_pylist()), p.topk(2).values, atol=1e-3)


# ------------------------------------------------------------------------------------------------- what is refused


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
    (["a"], softmax(1, 4), {}, "floating"),
    (["a"], torch.ones(1, 5, dtype=torch.int64), {}, "floating"),
    (["a"], torch.ones(1, 5), {}, "sum"),
    (["a"], torch.tensor([[2.0, -1, 0, 0, 0]]), {}, "negative"),
    (["a"], torch.full((1, 5), torch.nan), {}, "finite"),
    ([], softmax(0), {}, "no example"),
    (["a"], softmax(1), {"top_k": 0}, "top_k"),
    (["a"], softmax(1), {"top_k": 6}, "top_k"),
]


@pytest.mark.parametrize(("ids", "p", "options", "word"), WRONG)
def test_wrong_rows_and_settings_are_refused_and_nothing_is_left(
    ids: Any, p: Any, options: dict[str, Any], word: str, tmp_path: Path
) -> None:
    with pytest.raises(MetaplError, match=word):
        add(tmp_path / "new" / "store", ids, p, **options)
    assert not (tmp_path / "new").exists()


def test_one_writer_at_a_time_whose_rows_are_of_one_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metapl.runs.folder.PATIENCE", 0.1)
    with LabelWriter(tmp_path / "store", CLASSES) as writer:
        with pytest.raises(MetaplError, match="another process"):
            add(tmp_path / "store", ["a"], softmax(1))
        writer.add(["b"], softmax(1))
        for ids, digests, word in ((["a"], None, "after"), ([3], None, "ids"), (["c"], [bytes(16)], "digests")):
            with pytest.raises(MetaplError, match=word):
                writer.add(ids, softmax(1), digests)
        writer.add(["c"], softmax(1))
    assert [*LabelStore(tmp_path / "store")] == ["b", "c"]
    with pytest.raises(MetaplError, match="once"):
        LabelWriter(tmp_path / "store", ["a", "a"])


def test_what_is_no_store_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(MetaplError, match=r"mine\.txt"):
        add(tmp_path, ["a"], softmax(1))
    assert os.listdir(tmp_path) == ["mine.txt"]
    for path in (tmp_path, tmp_path / "no", tmp_path / "mine.txt"):
        with pytest.raises(MetaplError, match="expected"):
            LabelStore(path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for use in (lambda: LabelStore(tmp_path), lambda: add(tmp_path / "new", ["a"], softmax(1))):
        with pytest.raises(MetaplError, match="pip install"):
            use()


# ------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    return written(tmp_path / "store", names(30), softmax(30), provenance={"temperature": 1e-05, "é": "é"})


def read_everything(folder: Path) -> Tensor:
    store = LabelStore(folder)
    return store.at(range(len(store)))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


SPOILED: dict[str, Any] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "gone": lambda path: path.unlink(),
    "a pipe": pipe,
}


def test_one_flipped_bit_is_refused_and_named(store: LabelStore) -> None:
    generator = np.random.default_rng(0)
    for file in (reading.DESCRIPTION, *files(store.folder)):
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


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_file_is_named_and_not_gone_on_with(kind: str, tmp_path: Path) -> None:
    for number in (0, 1, None):
        folder = tmp_path / f"{number}"
        stop_after(folder, 25, softmax(35))
        whole = written(tmp_path / f"whole{number}", names(35), softmax(35)).folder
        for there in (folder, whole):
            path = there / (reading.DESCRIPTION if number is None else files(there)[number])
            SPOILED[kind](path)
            with pytest.raises(MetaplError) as told:
                read_everything(there) if there == whole else go_on(folder).__enter__()
            assert path.name in str(told.value)


def test_a_description_of_something_else_or_of_another_version_is_named(store: LabelStore) -> None:
    content = json.loads((store.folder / reading.DESCRIPTION).read_text())
    others = json.dumps({**content, "format": 2}), json.dumps({**content, "complete": False}), "{", "[]", "\x00"
    for text in others:
        (store.folder / reading.DESCRIPTION).write_text(text)
        with pytest.raises(MetaplError, match="store"):
            read_everything(store.folder)


# ------------------------------------------------------------------------------------------------- stopped writers


def go_on(folder: Path, **options: Any) -> LabelWriter:
    return LabelWriter(folder, CLASSES, **{"rows_per_part": 10, "resume": True, **options})


def stop_after(folder: Path, rows: int, p: Tensor, **options: Any) -> None:
    """A writer whose block fails after so many rows."""
    writer = LabelWriter(folder, CLASSES, rows_per_part=10, **options).__enter__()
    writer.add(names(len(p))[:rows], p[:rows])
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def test_a_stopped_writer_goes_on_behind_its_last_part(tmp_path: Path) -> None:
    p, folder = softmax(35), tmp_path / "store"
    whole = written(tmp_path / "whole", names(35), p)
    stop_after(folder, 25, p)
    for use in (lambda: LabelStore(folder), lambda: add(folder, ["a"], softmax(1))):
        with pytest.raises(MetaplError, match="--resume"):
            use()
    (folder / "part-00002.arrow.01234567.tmp").write_bytes(b"torn")
    with go_on(folder) as writer:
        assert (writer.rows, writer.last, writer.complete) == (20, names(35)[19], False)
        with pytest.raises(MetaplError, match="after"):
            writer.add(names(35)[19:], p[19:])
        writer.add(names(35)[20:], p[20:])
    assert sorted(os.listdir(folder)) == sorted(os.listdir(whole.folder))
    assert torch.equal(read_everything(folder), read_everything(whole.folder))
    with go_on(folder) as writer:
        assert (writer.rows, writer.complete) == (35, True)
        with pytest.raises(MetaplError, match="whole"):
            writer.add(["zzz"], softmax(1))
    with pytest.raises(MetaplError, match="--out"):
        add(folder, ["a"], softmax(1))


def test_what_is_gone_on_with_is_the_same(tmp_path: Path) -> None:
    stop_after(tmp_path, 25, softmax(35), provenance={"temperature": 1, "run": "there"})
    same: dict[str, Any] = {"provenance": {"temperature": 1, "run": "elsewhere"}}
    provenances = [{"temperature": 2}, {}, {"temperature": 1, "weights_fingerprint": 0}]
    for name, other in (("top_k", 2), ("rows_per_part", 11), *(("provenance", one) for one in provenances)):
        with pytest.raises(MetaplError, match=name):
            go_on(tmp_path, **{**same, name: other}).__enter__()
    with go_on(tmp_path, **same) as writer:
        assert writer.rows == 20


def test_a_disk_that_is_full_costs_nothing_that_is_there(tmp_path: Path) -> None:
    p, folder = softmax(40), tmp_path / "store"
    whole = written(tmp_path / "whole", names(40), p)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def write() -> None:
        with LabelWriter(folder, CLASSES, rows_per_part=10) as writer:
            writer.add(names(40)[:20], p[:20])
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            writer.add(names(40)[20:], p[20:])

    try:
        with pytest.raises(MetaplError, match="20 rows"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (len(files(folder)), [*folder.glob("*.tmp")]) == (2, [])
    with go_on(folder) as writer:
        writer.add(names(40)[20:], p[20:])
    assert files(folder) == files(whole.folder)
