"""Tables of a recording's scores, in the rows of a data set whatever its order.

The reference is the same recording with ``train=``, whose scores are those of double backward
(``test_record.py``).
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl import MetaplError, Recording, record
from metapl.attribution.recording import RecordedAttribution
from metapl.problems import NextToken

EXAMPLES = 24
CLASSES = 3

draw = torch.Generator().manual_seed(0)
X = torch.randn(EXAMPLES, 5, generator=draw, dtype=torch.float64)
Y = torch.randint(CLASSES, (EXAMPLES,), generator=draw)
DATA = {"x": X, "labels": Y}
OUTER = {
    "x": torch.randn(9, 5, generator=draw, dtype=torch.float64),
    "labels": torch.arange(9) % CLASSES,
}


class Probe(nn.Module):
    """A network that is called with labels, as those of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.body(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def shuffled(epochs: int = 2, examples: int = EXAMPLES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    epoch = [torch.randperm(EXAMPLES, generator=generator)[:examples] for _ in range(epochs)]
    return [rows for order in epoch for rows in order.split(6)]


def recorded(
    out: Path, train: Any = None, data: dict[str, Tensor] = DATA, batches: Any = None
) -> Recording:
    model = Probe()
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    with record(model, optimizer, out=out, train=train, states_every=3) as recording:
        for rows in shuffled() if batches is None else batches:
            optimizer.zero_grad()
            model(x=data["x"][rows], labels=data["labels"][rows])["loss"].backward()
            optimizer.step()
    return recording


def attributed(recording: Recording, outer: Any = OUTER) -> RecordedAttribution:
    return recording.attribute(outer, progress=False)


class Table:
    """A ``datasets.Dataset`` as far as it is asked: rows by number, and columns that are added."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.columns = columns

    @property
    def column_names(self) -> list[str]:
        return [*self.columns]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {name: values[number] for name, values in self.columns.items()}

    def add_column(self, name: str, values: list[Any]) -> Table:
        if name in self.columns:
            raise ValueError(f"{name} is there")
        return Table({**self.columns, name: values})

    def remove_columns(self, names: list[str]) -> Table:
        return Table({name: v for name, v in self.columns.items() if name not in names})


# --------------------------------------------------------------------------- rows of any data set


@pytest.mark.parametrize("has_data", [True, False])
def test_weights_are_those_of_the_rows_of_a_data_set(has_data: bool, tmp_path: Path) -> None:
    """In any order of the data set, and in any form of it."""
    expected = attributed(recorded(tmp_path / "data", train=DATA)).weights()
    attribution = attributed(recorded(tmp_path / "r", train=DATA if has_data else None))
    assert (attribution.weights(dataset=DATA) - expected).abs().max() < 1e-12
    order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(6))
    turned = {name: t[order] for name, t in DATA.items()}
    pairs = torch.utils.data.TensorDataset(X[order], Y[order])
    for dataset in (
        turned,
        (X[order], Y[order]),
        pairs,
        torch.utils.data.DataLoader(pairs, batch_size=5, shuffle=True),
        Table({"text": ["a"] * EXAMPLES, "label": Y[order].tolist(), "x": X[order].tolist()}),
    ):
        weights = attribution.weights(dataset=dataset)
        assert (weights - expected[order]).abs().max() < 1e-12


def test_a_recording_that_knows_no_data_set_says_so(tmp_path: Path) -> None:
    attribution = attributed(recorded(tmp_path / "r"))
    with pytest.raises(MetaplError, match=r"without train=.* expected weights\(dataset=\)"):
        attribution.weights()
    columns = attribution.columns()
    assert [*columns] == ["first_seen", "score", "weight", "draws"]
    seen = [*dict.fromkeys(torch.cat(shuffled()).tolist())]
    in_rows = attribution.columns(dataset=DATA)
    assert [*in_rows] == ["example", "score", "weight", "draws"]
    assert [in_rows["score"][row] for row in seen] == columns["score"]
    assert [in_rows["weight"][row] for row in seen] == pytest.approx(columns["weight"], rel=1e-12)


def test_rows_that_were_never_drawn_have_the_score_0(tmp_path: Path) -> None:
    batches = shuffled(epochs=1, examples=18)
    undrawn = sorted({*range(EXAMPLES)} - {*torch.cat(batches).tolist()})
    in_data = attributed(recorded(tmp_path / "data", DATA, batches=batches))
    by_sight = attributed(recorded(tmp_path / "r", batches=batches))
    columns = by_sight.columns(dataset=DATA)
    assert columns["score"] == pytest.approx(in_data.scores.tolist(), abs=1e-14)
    assert columns["weight"] == pytest.approx(in_data.weights().tolist(), rel=1e-10)
    for row in undrawn:
        assert columns["draws"][row] == columns["score"][row] == 0
    with pytest.raises(MetaplError, match="dataset has 12 rows, and 12 of the 24 examples .* none"):
        in_data.weights(dataset=(X[:12], Y[:12]))
    with pytest.raises(MetaplError, match="18 of the 18 examples of the recording are none"):
        by_sight.weights(dataset=(X + 1, Y))


@pytest.mark.filterwarnings("ignore:.*equal an earlier one")
def test_equal_rows_share_their_score(tmp_path: Path) -> None:
    """The two together have the score of the example, and each the mean."""
    data = {name: t.clone() for name, t in DATA.items()}
    for t in data.values():
        t[17] = t[4]
    by_sight = attributed(recorded(tmp_path / "r", data=data))
    in_data = attributed(recorded(tmp_path / "data", data, data=data))
    assert by_sight.scores.shape == (EXAMPLES - 1,)
    total = in_data.scores[4]
    for columns in (by_sight.columns(dataset=data), in_data.columns()):
        assert columns["score"][4] == columns["score"][17] == pytest.approx(float(total) / 2)
        assert columns["weight"][4] == columns["weight"][17]
        assert sum(columns["score"]) == pytest.approx(float(in_data.scores.sum()), rel=1e-10)


def test_a_recording_is_opened_in_the_rows_of_a_data_set(tmp_path: Path) -> None:
    """Then removals are rows of it, too: by trainings of the loop without them."""
    recorded(tmp_path / "r")
    opened = attributed(Recording.open(tmp_path / "r", Probe(), train=DATA))
    in_data = attributed(recorded(tmp_path / "data", train=DATA))
    assert (opened.scores - in_data.scores).abs().max() < 1e-12
    assert opened.order.equal(in_data.order)
    assert opened.weights().equal(opened.weights(dataset=DATA))
    assert opened.top(3)[0].equal(in_data.top(3)[0])
    removals = [[row] for row in range(6)]
    found = opened.validate(removals, progress=False)
    assert found.retrained.shape == (6,)
    expected = in_data.validate(removals, progress=False)
    assert (found.retrained - expected.retrained).abs().max() < 1e-12
    with pytest.raises(MetaplError, match="train has 23 rows, and 1 of the 24 examples"):
        Recording.open(tmp_path / "r", Probe(), train=(X[:23], Y[:23]))


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(11, 5).double()
        self.head = nn.Linear(5, 11).double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Tensor:
        return self.head(self.words(input_ids).cumsum(1).tanh())


def test_sequences_are_found_however_far_they_were_padded(tmp_path: Path) -> None:
    """Batches are padded to their longest sequence, and the data set has none padded."""
    generator = torch.Generator().manual_seed(8)
    lengths = torch.randint(3, 8, (EXAMPLES,), generator=generator).tolist()
    texts = [torch.randint(11, (n,), generator=generator) for n in lengths]
    rows = [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": t} for t in texts]
    listed = Table({name: [row[name].tolist() for row in rows] for name in rows[0]})

    def padded(examples: list[Any]) -> dict[str, Tensor]:
        def column(name: str, filling: int) -> Tensor:
            values = [example[name] for example in examples]
            return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filling)

        fillings = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {name: column(name, filling) for name, filling in fillings.items()}

    loader = torch.utils.data.DataLoader(rows, collate_fn=padded)  # type: ignore[arg-type]
    attributions: list[RecordedAttribution] = []
    for number, train in enumerate((loader, None)):
        model = Causal()
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        out = tmp_path / str(number)
        problem = NextToken(mean="token")
        with record(model, optimizer, out=out, problem=problem, train=train) as recording:
            for batch_rows in shuffled():
                batch = padded([rows[i] for i in batch_rows.tolist()])
                words = model(**batch)[:, :-1].transpose(1, 2)
                optimizer.zero_grad()
                F.cross_entropy(words, batch["labels"][:, 1:]).backward()
                optimizer.step()
        attributions.append(attributed(recording, padded(rows[:5])))
    in_data, by_sight = attributions
    expected = in_data.weights()
    assert by_sight.scores.shape == (EXAMPLES,)
    for dataset in (loader, rows, listed):
        assert (by_sight.weights(dataset=dataset) - expected).abs().max() < 1e-12
        assert (in_data.weights(dataset=dataset) - expected).abs().max() < 1e-12
    weighted = by_sight.add_to(listed)
    assert weighted.columns["weight"] == pytest.approx(expected.tolist(), rel=1e-10)
    # The way out of what a collator adds, as the message has it.
    del listed.columns["attention_mask"]
    with pytest.raises(
        MetaplError, match=r"weights\(dataset=DataLoader\(dataset, collate_fn="
    ) as error:
        by_sight.add_to(listed)
    assert "no column attention_mask" in str(error.value)
    weights = by_sight.weights(dataset=loader)
    assert listed.add_column("weight", weights.tolist()).columns["weight"] == weights.tolist()


# ------------------------------------------------------------------------------------------ tables


def test_a_table_has_scores_weights_and_draws(tmp_path: Path) -> None:
    attribution = attributed(recorded(tmp_path / "r", train=DATA))
    weights = attribution.weights()
    assert abs(weights.mean() - 1) < 1e-12
    assert (weights >= 0).all()
    assert weights.argmax() == attribution.scores.argmax()
    columns = attribution.columns()
    assert columns["score"] == attribution.scores.tolist()
    assert columns["weight"] == weights.tolist()
    assert sum(columns["draws"]) == 2 * EXAMPLES
    # A small step of descent lowers the loss.
    better = attribution._losses_with(attribution.weights(rate=0.1))
    assert better < attribution.outer_loss
    with pytest.raises(MetaplError, match="expected a name.csv or name.parquet"):
        attribution.save_table(tmp_path / "scores.txt")
    with pytest.raises(MetaplError, match="expected a datasets.Dataset"):
        attribution.add_to([1, 2])
    attribution.save(tmp_path / "scores.safetensors")


@pytest.mark.parametrize("has_data", [True, False])
def test_a_table_is_written_as_csv_without_pyarrow(
    has_data: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    order = torch.arange(EXAMPLES).flip(0)
    dataset = X[order], Y[order]
    attribution = attributed(recorded(tmp_path / "r", train=DATA if has_data else None))
    file = tmp_path / "tables" / "scores.csv"
    attribution.save_table(file, dataset=dataset)
    rows = [*csv.DictReader(file.read_text().splitlines())]
    assert [*rows[0]] == ["example", "score", "weight", "draws"]
    assert [int(row["example"]) for row in rows] == [*range(EXAMPLES)]
    assert [float(row["weight"]) for row in rows] == attribution.weights(dataset=dataset).tolist()
    with pytest.raises(MetaplError, match="pyarrow"):
        attribution.save_table(tmp_path / "scores.parquet")


def test_scores_of_tokens_are_lists_in_csv(tmp_path: Path) -> None:
    ids = torch.randint(11, (EXAMPLES, 4), generator=draw)
    model = nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 11)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    problem = NextToken(per="token")
    with record(model, optimizer, out=tmp_path / "r", problem=problem) as recording:
        for rows in shuffled():
            optimizer.zero_grad()
            words = model(ids[rows])[:, :-1].transpose(1, 2)
            F.cross_entropy(words, ids[rows][:, 1:]).backward()
            optimizer.step()
    attribution = attributed(recording, ids[:5])
    file = tmp_path / "scores.csv"
    attribution.save_table(file, dataset=ids)
    in_file = [
        json.loads(row["token_weight"]) for row in csv.DictReader(file.read_text().splitlines())
    ]
    assert in_file == attribution.weights(dataset=ids).tolist()


def test_a_table_is_read_as_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    attribution = attributed(recorded(tmp_path / "r", train=DATA))
    attribution.save_table(tmp_path / "tables" / "scores.parquet")
    table = parquet.read_table(tmp_path / "tables" / "scores.parquet")
    assert table.column_names == ["example", "score", "weight", "draws"]
    assert table["weight"].to_pylist() == attribution.weights().tolist()


def as_datasets(columns: dict[str, Any]) -> Any:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize("has_data", [True, False])
@pytest.mark.parametrize("make", [Table, as_datasets])
def test_a_data_set_of_hugging_face_gets_the_columns(
    make: Any, has_data: bool, tmp_path: Path
) -> None:
    attribution = attributed(recorded(tmp_path / "r", train=DATA if has_data else None))
    order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(6))
    columns = {"text": ["a"] * EXAMPLES, "x": X[order].tolist(), "label": Y[order].tolist()}
    expected = attribution.weights(dataset=(X[order], Y[order])).tolist()
    weighted = attribution.add_to(make(columns))
    assert [row["weight"] for row in rows_of(weighted)] == expected
    assert weighted.column_names == ["text", "x", "label", "score", "weight"]
    # For another round.
    with pytest.raises(MetaplError, match="has the columns score, weight already; .*replace="):
        attribution.add_to(weighted)
    again = attribution.add_to(weighted, rate=0.1, replace=True)
    by_rate = attribution.weights(rate=0.1, dataset=(X[order], Y[order])).tolist()
    assert [row["weight"] for row in rows_of(again)] == by_rate
    other = {**columns, "weight": [7] * EXAMPLES}
    with pytest.raises(MetaplError, match="has the columns weight already"):
        attribution.add_to(make(other))
    replaced = attribution.add_to(make(other), replace=True)
    assert [row["weight"] for row in rows_of(replaced)] == expected
    with pytest.raises(MetaplError, match="dataset has 23 rows"):
        attribution.add_to(make({name: values[:23] for name, values in columns.items()}))


def rows_of(dataset: Any) -> list[dict[str, Any]]:
    return [dataset[number] for number in range(len(dataset))]
