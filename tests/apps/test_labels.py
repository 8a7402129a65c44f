"""Stored labels: what is read is what was written, in any order, and nothing else is ever taken for it."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from metapl import MetaplError
from metapl.apps.labels import LabelStore, LabelWriter
from metapl.apps.labels import files as layout
from metapl.apps.labels import store as reading
from metapl.apps.labels.writer import entropy, most_probable
from metapl.apps.machine import ownership

CLASSES = ("ant", "bee", "cat", "dog", "eel")


def softmax(rows: int, classes: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, classes, generator=generator)).softmax(dim=1)


def names(count: int) -> list[str]:
    return [f"sub/{number:04}.png" for number in range(0, 2 * count, 2)]


def written(
    folder: Path, ids: list[Any], p: Tensor, batch: int = 7, rows_per_part: int = 10, **options: Any
) -> LabelStore:
    classes = [str(index) for index in range(p.shape[1])] if p.shape[1] != len(CLASSES) else CLASSES
    with LabelWriter(folder, classes, rows_per_part=rows_per_part, **options) as writer:
        for start in range(0, len(ids), batch):
            writer.add(ids[start : start + batch], p[start : start + batch])
    return LabelStore(folder)


def files(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".parquet"))


def read_by_hand(p: Tensor, k: int | None) -> Any:
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
    store = written(tmp_path / "store", list(range(len(p))), p, batch=len(p), rows_per_part=len(p))
    off = (store.at(range(len(p))).double() / p.double() - 1).abs()[p > 6.2e-5].max() * 2048
    assert 1.1 < off < 2.001


@pytest.mark.parametrize("top_k", [None, 1, 3, 5])
@pytest.mark.parametrize("kind", ["names", "numbers"])
def test_what_is_read_follows_the_equation_in_any_order(top_k: int | None, kind: str, tmp_path: Path) -> None:
    p = softmax(53)
    p[5] = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2])  # ties: the first classes are kept
    p[6] = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    p[7] = torch.tensor([0.5003, 0.4997, 0.0, 0.0, 0.0])  # in float16, their sum is above 1
    ids: list[Any] = names(53) if kind == "names" else list(range(-20, 86, 2))
    store = written(tmp_path / "store", ids, p, top_k=top_k)
    expected = read_by_hand(p, top_k)
    assert len(store.parts) == 6
    assert list(store) == ids
    order = torch.randint(53, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    found = store[[ids[i] for i in order]]
    assert (found.dtype, found.shape) == (torch.float32, (200, 5))
    assert torch.allclose(found, expected[order], atol=1e-6)
    assert torch.allclose(found.sum(dim=1), torch.ones(200), atol=1e-6)
    assert (found - p[order]).abs().max() < (2e-3 if top_k in (None, 5) else 1)
    assert torch.equal(store[ids[3]], store[[ids[3]]][0])
    assert store.rows([ids[52], ids[0]]).tolist() == [52, 0]
    assert torch.equal(store.at(torch.tensor([9, 10, 52])), store[[ids[9], ids[10], ids[52]]])
    assert ids[3] in store
    assert store.rows([]).tolist() == []
    assert store.at([]).shape == (0, 5)
    assert store.rows_with_copies().tolist() == list(range(53))


def test_arrays_and_tensors_are_ids_too(tmp_path: Path) -> None:
    store = written(tmp_path / "store", list(range(30)), softmax(30))
    wanted = [29, 0, 11]
    for ids in (np.array(wanted), torch.tensor(wanted), tuple(wanted), np.array(wanted, dtype=np.int32)):
        assert torch.equal(store[ids], store.at(wanted))
    assert torch.equal(store[np.int64(11)], store.at([11])[0])


@pytest.mark.parametrize("missing", ["", "sub/0001.png", "zzz", "sub/0000.pnG", "sub/\udce9.png"])
def test_an_example_that_is_not_there_is_named(missing: str, tmp_path: Path) -> None:
    store = written(tmp_path / "store", names(30), softmax(30))
    assert missing not in store
    with pytest.raises(MetaplError, match=r"has no labels of .*; expected examples that it was made of"):
        _ = store[["sub/0002.png", missing]]
    with pytest.raises(MetaplError, match="expected strings"):
        _ = store[[3]]
    with pytest.raises(MetaplError, match="has no row -1, 30; expected 0 to 29"):
        store.at([0, -1, 30])


def test_numbers_that_are_not_there_are_named(tmp_path: Path) -> None:
    store = written(tmp_path / "store", list(range(0, 60, 2)), softmax(30))
    assert [number in store for number in (-1, 0, 1, 58, 59, 10**30)] == [False, True, False, True, False, False]
    with pytest.raises(MetaplError, match="has no labels of 1, 59;"):
        _ = store[[0, 1, 59]]
    with pytest.raises(MetaplError, match="expected integers"):
        _ = store["0"]


def test_the_most_probable_classes_are_those_of_a_stable_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randint(0, 4, (500, 12), generator=generator).float()  # ties everywhere
    for k in (1, 3, 11, 12):
        expected = p.sort(dim=1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(most_probable(p, k), expected)


def test_the_entropy_is_torch_s() -> None:
    p = torch.cat([softmax(50, 30), torch.eye(30)])
    assert torch.allclose(entropy(p), torch.special.entr(p).sum(dim=1), atol=1e-6)


def test_other_readers_of_parquet_understand_a_part(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    p = softmax(20)
    store = written(tmp_path / "store", names(20), p, top_k=2, rows_per_part=20)
    table = pq.read_table(store.folder / files(store.folder)[0])
    assert table["id"].to_pylist() == names(20)
    assert table["label"].to_pylist() == p.argmax(dim=1).tolist()
    assert np.allclose(table["confidence"].to_numpy(), p.max(dim=1).values)
    assert np.allclose(table["entropy"].to_numpy(), -(p * p.log()).sum(dim=1), atol=1e-6)
    assert np.array_equal(np.array(table["classes"].to_pylist()), most_probable(p, 2).numpy())
    assert np.allclose(np.array(table["probabilities"].to_pylist()), p.topk(2).values, atol=1e-3)


def test_numbers_are_read_from_a_memory_map(tmp_path: Path) -> None:
    store = written(tmp_path / "store", list(range(20)), softmax(20), top_k=2)
    store.at([0])
    assert store._sound == {0}, "other parts are not touched"
    opened = {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
    assert not any(path.startswith(str(tmp_path)) for path in opened), "a process may have few open files"
    assert f"{store.folder}/{store.parts[0].file}" in Path("/proc/self/maps").read_text()
    for column in reading._columns(store._checked(0)).values():
        assert not column.flags.owndata
        assert not column.flags.writeable


def test_rows_are_read_by_the_thread_that_asks(store: LabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of pyarrow's that still holds the file when Python ends aborts the process."""
    threads = set()

    class Noted(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            threads.add(threading.get_ident())
            return super().read(-1 if size is None else size)

    monkeypatch.setattr(layout, "open_plain", Noted)
    layout.read_rows(store.folder / store.parts[0].file, ["label", "confidence"])
    assert threads == {threading.get_ident()}


def test_a_store_with_more_parts_than_are_kept_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_columns", "_names"):
        monkeypatch.setattr(reading, name, lru_cache(2)(getattr(reading, name).__wrapped__))
    p = softmax(40)
    store = written(tmp_path / "store", names(40), p, rows_per_part=5)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.allclose(store[[names(40)[i] for i in order]], read_by_hand(p[order], None), atol=1e-6)
    assert [read.cache_info().currsize for read in (reading._columns, reading._names)] == [2, 2]


def test_worker_processes_read_for_themselves(tmp_path: Path) -> None:
    store = written(tmp_path / "store", names(30), softmax(30))
    store.at([0])
    copy = pickle.loads(pickle.dumps(store))
    assert (store._sound, copy._sound) == ({0}, set())
    served = DataLoader(
        [[i, 29 - i] for i in range(6)],
        batch_size=None,
        num_workers=2,
        collate_fn=store.at,
        generator=torch.Generator(),
    )
    assert torch.equal(torch.stack(list(served)), torch.stack([store.at([i, 29 - i]) for i in range(6)]))


def test_many_classes_make_smaller_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metapl.apps.labels.writer.PAGE_VALUES", 200)
    store = written(tmp_path / "store", names(30), softmax(30, classes=50), rows_per_part=10)
    assert [part.rows for part in store.parts] == [4] * 7 + [2]


# ------------------------------------------------------------------------------------------------- what is refused


def add(folder: Path, ids: Any, p: Any, **options: Any) -> None:
    with LabelWriter(folder, CLASSES, **options) as writer:
        writer.add(ids, p)


@pytest.mark.parametrize(
    ("ids", "p", "expected"),
    [
        (["b", "a"], softmax(2), "the id a comes after b; expected each greater"),
        (["a", "a"], softmax(2), "the id a comes after a;"),
        (["a", 1], softmax(2), "expected strings, or integers"),
        ([1.5, 2.5], softmax(2), "expected strings, or integers"),
        (["\udce9"], softmax(1), "expected strings that UTF-8 can hold"),
        (["a"], softmax(2), r"expected floating point \(1, 5\)"),
        (["a"], softmax(1, 4), r"expected floating point \(1, 5\)"),
        (["a"], torch.ones(1, 5, dtype=torch.int64), "expected floating point"),
        (["a"], [[1.0, 0, 0, 0, 0]], "expected floating point"),
        (["a"], torch.ones(1, 5), "do not sum to 1; expected what softmax gives"),
        (["a"], torch.tensor([[2.0, -1, 0, 0, 0]]), "negative"),
        (["a"], torch.full((1, 5), torch.nan), "not finite"),
        ([], softmax(0), "no example was given"),
    ],
)
def test_wrong_rows_are_refused_and_nothing_is_left(ids: Any, p: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(MetaplError, match=expected):
        add(tmp_path / "new" / "store", ids, p)
    assert not (tmp_path / "new").exists()


def test_ids_ascend_over_all_calls_and_are_of_one_kind(tmp_path: Path) -> None:
    with LabelWriter(tmp_path / "store", CLASSES) as writer:
        writer.add(["b"], softmax(1))
        for ids, expected in ((["a"], "comes after b"), ([3], "expected strings, or integers")):
            with pytest.raises(MetaplError, match=expected):
                writer.add(ids, softmax(1))
        with pytest.raises(MetaplError, match="either all with digests or none"):
            writer.add(["c"], softmax(1), [bytes(16)])
        writer.add(["c"], softmax(1))
    assert list(LabelStore(tmp_path / "store")) == ["b", "c"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 0}, "top_k is 0; expected 1 to 5"),
        ({"top_k": 6}, "top_k is 6; expected 1 to 5"),
        ({"rows_per_part": 0}, "rows_per_part is 0; expected 1 to 16,384"),
        ({"rows_per_part": 20_000}, "rows_per_part is 20000"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(MetaplError, match=expected):
        add(tmp_path / "store", ["a"], softmax(1), **options)
    with pytest.raises(MetaplError, match="each once"):
        LabelWriter(tmp_path / "store", ["a", "a"])
    assert not (tmp_path / "store").exists()


def test_a_folder_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(MetaplError, match=r"holds files that are not a store's \(mine.txt\)"):
        add(tmp_path, ["a"], softmax(1))
    assert sorted(os.listdir(tmp_path)) == ["mine.txt"]


def test_one_writer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "PATIENCE", 0.1)
    with LabelWriter(tmp_path / "store", CLASSES) as writer:
        with pytest.raises(MetaplError, match="another process is running in"):
            add(tmp_path / "store", ["a"], softmax(1))
        writer.add(["a"], softmax(1))
    assert len(LabelStore(tmp_path / "store")) == 1


@pytest.mark.parametrize("module", ["pyarrow"])
def test_without_the_extra_its_name_is_said(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for use in (lambda: LabelStore(tmp_path), lambda: add(tmp_path / "new", ["a"], softmax(1))):
        with pytest.raises(MetaplError, match=r"need pyarrow: not installed.*pip install 'metapl\[labels\]'"):
            use()


# ------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    return written(tmp_path / "store", names(30), softmax(30), provenance={"temperature": 1e-05, "é": "é"})


def read_everything(folder: Path) -> Tensor:
    store = LabelStore(folder)
    return store.at(range(len(store)))


def test_one_flipped_bit_is_refused_and_named(store: LabelStore) -> None:
    generator = np.random.default_rng(0)
    for file in (layout.DESCRIPTION, *files(store.folder)):
        path = store.folder / file
        content = path.read_bytes()
        for _ in range(40):
            spoiled = bytearray(content)
            spoiled[generator.integers(len(content))] ^= 1 << int(generator.integers(8))
            path.write_bytes(spoiled)
            with pytest.raises(MetaplError) as told:
                read_everything(store.folder)
            assert str(path) in str(told.value)
            if file != layout.DESCRIPTION:
                with pytest.raises(MetaplError, match="is damaged"):
                    LabelStore(store.folder).verify()
        path.write_bytes(content)
        read_everything(store.folder)


def test_a_part_that_is_not_read_does_not_keep_the_others_from_being_read(store: LabelStore) -> None:
    path = store.folder / files(store.folder)[2]
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    opened = LabelStore(store.folder)
    opened.at(range(20))
    with pytest.raises(MetaplError, match="is damaged: its SHA-256"):
        opened.at([20])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def fold(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (cut, r"is truncated: it has [\d,]+ bytes, and [\d,]+ were written"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "is damaged: it has"),
        (lambda path: path.write_bytes(b"x" * path.stat().st_size), "is damaged: its SHA-256"),
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (fold, "cannot be read: it is a folder"),
        (pipe, "cannot be read: it is a pipe"),
    ],
    ids=["truncated", "longer", "foreign", "gone", "a folder", "a pipe"],
)
def test_a_spoiled_part_is_named(spoil: Any, expected: str, store: LabelStore) -> None:
    path = store.folder / files(store.folder)[1]
    spoil(path)
    with pytest.raises(MetaplError, match=expected) as told:
        read_everything(store.folder)
    assert str(path) in str(told.value)


def edited(path: Path, **changes: Any) -> None:
    path.write_bytes(layout.sealed(json.loads(path.read_text()) | changes))


def edited_part(path: Path, **changes: Any) -> None:
    first, *others = json.loads(path.read_text())["parts"]
    edited(path, parts=[first | changes, *others])


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda path: path.unlink(), "there is no store.json in it"),
        (fold, "cannot be read: .*it is a folder"),
        (pipe, "it is a pipe"),
        (lambda path: path.write_text("{"), "cannot be read"),
        (lambda path: path.write_text("[" * 100_000), "nested too deeply"),
        (lambda path: path.write_text("[]"), r"is damaged: it holds \[\]; expected an object"),
        (lambda path: path.write_bytes(b"\x00\xff"), "cannot be read"),
        (lambda path: edited(path, format=2), "is of format 2; this metapl reads format 1"),
        (lambda path: edited(path, parts=[]), "is damaged: its parts are not such as it describes"),
        (lambda path: edited(path, parts=[{"file": "x"}]), "is damaged: "),
        (lambda path: edited(path, classes="ab"), "is damaged: it.classes is 'ab'"),
        (lambda path: edited(path, classes=[]), "the classes are ; expected one or more"),
        (lambda path: edited(path, classes=[*CLASSES[:4]]), "is not a part as store.json describes it"),
        (lambda path: edited(path, classes=[*CLASSES, "f"]), "is not a part as store.json describes it"),
        (lambda path: edited(path, top_k=9), "is damaged: top_k is 9; expected 1 to 5"),
        (lambda path: edited(path, top_k=2), "is not a part as store.json describes it"),
        (lambda path: edited(path, digests=True), "is not a part as store.json describes it"),
        (lambda path: edited(path, numbers=True), "its parts are not such as it describes"),
        (lambda path: edited(path, rows=10**30), "its parts are not such as it describes"),
        (
            lambda path: edited_part(path, rows=10**30),
            r"parts\.0\.rows is 10+; expected a whole number from 1 to 16,384",
        ),
        (lambda path: edited_part(path, rows=9), "its parts are not such as it describes"),
        (lambda path: edited_part(path, file="../x.parquet"), "its parts are not such as it describes"),
        (lambda path: edited(path, complete=False), "is not whole: its writer was stopped"),
    ],
)
def test_a_spoiled_description_is_named(spoil: Any, expected: str, store: LabelStore) -> None:
    spoil(store.folder / layout.DESCRIPTION)
    with pytest.raises(MetaplError, match=expected):
        read_everything(store.folder)


def parquet(**columns: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    "content",
    [b"hello", parquet(id=["a"] * 10), parquet(id=["a"])],
    ids=["text", "only ids", "fewer rows"],
)
def test_a_foreign_part_with_its_own_description_is_named(content: bytes, store: LabelStore) -> None:
    sha256 = hashlib.sha256(content).hexdigest()
    path = store.folder / layout.part_name(0, sha256)
    path.write_bytes(content)
    changes = {"file": path.name, "bytes": len(content), "sha256": sha256}
    edited_part(store.folder / layout.DESCRIPTION, **changes)
    with pytest.raises(MetaplError, match=f"{path.name} is not a part as store.json describes it"):
        read_everything(store.folder)


def test_what_is_no_store_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, expected in (
        (tmp_path, "is not a store"),
        (tmp_path / "no", "does not exist"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(MetaplError, match=expected):
            LabelStore(path)


# ------------------------------------------------------------------------------------------------- stopped writers


def stop_after(folder: Path, rows: int, p: Tensor, **options: Any) -> None:
    """A writer whose block fails after so many rows."""
    writer = LabelWriter(folder, CLASSES, rows_per_part=10, **options).__enter__()
    writer.add(names(len(p))[:rows], p[:rows])
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def test_a_stopped_writer_goes_on_behind_its_last_part(tmp_path: Path) -> None:
    p, folder = softmax(35), tmp_path / "store"
    whole = written(tmp_path / "whole", names(35), p)
    stop_after(folder, 25, p)
    with pytest.raises(MetaplError, match=r"is not whole: its writer was stopped.*--resume"):
        LabelStore(folder)
    with pytest.raises(MetaplError, match=r"holds an unfinished store of labels; go on with resume=True \(--resume\)"):
        add(folder, ["a"], softmax(1))
    (folder / f"part-00002-{'0' * 16}.parquet.01234567.tmp").write_bytes(b"torn")
    with LabelWriter(folder, CLASSES, rows_per_part=10, resume=True) as writer:
        assert (writer.rows, writer.last, writer.complete) == (20, names(35)[19], False)
        with pytest.raises(MetaplError, match="comes after"):
            writer.add(names(35)[19:], p[19:])
        writer.add(names(35)[20:], p[20:])
    assert files(folder) == files(whole.folder)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(whole.folder))
    assert list(LabelStore(folder)) == names(35)
    with LabelWriter(folder, CLASSES, rows_per_part=10, resume=True) as writer:
        assert (writer.rows, writer.complete) == (35, True)
        with pytest.raises(MetaplError, match="is whole; expected nothing more"):
            writer.add(["zzz"], softmax(1))
    with pytest.raises(MetaplError, match=r"holds a store of labels; give another folder \(--out\)"):
        add(folder, ["a"], softmax(1))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 2}, "was begun with top_k None, and now it is 2"),
        ({"rows_per_part": 11}, "was begun with rows_per_part 10, and now it is 11"),
        ({"provenance": {"temperature": 2}}, "was begun with provenance.temperature 1, and now it is 2"),
        ({"provenance": {}}, "was begun with provenance.temperature 1, and now it is None"),
    ],
)
def test_what_is_gone_on_with_is_the_same(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    stop_after(tmp_path, 25, softmax(35), provenance={"temperature": 1, "run": "there"})
    same: dict[str, Any] = {"rows_per_part": 10, "provenance": {"temperature": 1, "run": "elsewhere"}, "resume": True}
    with pytest.raises(MetaplError, match=expected), LabelWriter(tmp_path, CLASSES, **(same | options)):
        pass
    with LabelWriter(tmp_path, CLASSES, **same) as writer:
        assert writer.rows == 20


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]), "is damaged"),
        (cut, "is truncated"),
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (pipe, "cannot be read: it is a pipe"),
    ],
    ids=["flipped", "truncated", "missing", "a pipe"],
)
def test_a_part_that_was_spoiled_meanwhile_is_not_gone_on_with(spoil: Any, expected: str, tmp_path: Path) -> None:
    stop_after(tmp_path, 25, softmax(35))
    path = tmp_path / files(tmp_path)[0]
    spoil(path)
    with pytest.raises(MetaplError, match=f"{path.name} {expected}"):
        LabelWriter(tmp_path, CLASSES, rows_per_part=10, resume=True).__enter__()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("number", [1, 2])
def test_a_part_of_another_store_is_not_gone_on_with(number: int, whole: bool, tmp_path: Path) -> None:
    """The next part may be one that a killed writer left: it is written again. Others are named."""
    p, here, there = softmax(35), tmp_path / "here", tmp_path / "there"
    expected = written(tmp_path / "expected", names(35), p, provenance={"temperature": 1})
    stop_after(here, 15, p, provenance={"temperature": 1})
    if whole:
        written(there, names(35), softmax(35, seed=1), provenance={"temperature": 2})
    else:
        stop_after(there, 35, softmax(35, seed=1), provenance={"temperature": 2})
    shutil.copy(there / files(there)[number], here)
    again = LabelWriter(here, CLASSES, rows_per_part=10, provenance={"temperature": 1}, resume=True)
    if number == 2:
        with pytest.raises(MetaplError, match=f"has {files(there)[2]}, which its store.json does not name"):
            again.__enter__()
        (here / files(there)[2]).unlink()
    with again:
        assert again.rows == 10
        again.add(names(35)[10:], p[10:])
    assert files(here) == files(expected.folder)


def test_what_an_earlier_version_began_is_not_gone_on_with(tmp_path: Path) -> None:
    """Its description does not name the parts, which were found in the folder."""
    stop_after(tmp_path, 15, softmax(35))
    content = json.loads((tmp_path / layout.DESCRIPTION).read_text())
    earlier = {name: content[name] for name in content if name not in ("numbers", "digests", "rows", "parts")}
    (tmp_path / layout.DESCRIPTION).write_bytes(layout.sealed(earlier))
    with pytest.raises(MetaplError, match="it does not say numbers, or an earlier metapl began it"):
        LabelWriter(tmp_path, CLASSES, rows_per_part=10, resume=True).__enter__()
    assert len(files(tmp_path)) == 1


def test_a_disk_that_is_full_costs_nothing_that_is_there(tmp_path: Path) -> None:
    p, folder = softmax(40), tmp_path / "store"
    whole = written(tmp_path / "whole", names(40), p, batch=40)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def write() -> None:
        with LabelWriter(folder, CLASSES, rows_per_part=10) as writer:
            writer.add(names(40)[:20], p[:20])
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            writer.add(names(40)[20:], p[20:])

    try:
        with pytest.raises(MetaplError, match=r"the 20 rows that are there are whole.*is the disk full"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(files(folder)) == 2
    assert not list(folder.glob("*.tmp"))
    with LabelWriter(folder, CLASSES, rows_per_part=10, resume=True) as writer:
        writer.add(names(40)[20:], p[20:])
    assert files(folder) == files(whole.folder)


def test_a_refusal_of_the_disk_has_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("metapl.apps.machine.sealed.replacing", full)
    with pytest.raises(MetaplError, match=r"store.json could not be written: No space left on device; the 0 rows"):
        add(tmp_path / "store", ["a"], softmax(1))
    assert not (tmp_path / "store").exists()
