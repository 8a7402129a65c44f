"""``metapl export RUN --hub``: huggingface_hub's own from_pretrained loads what was written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command import metapl, reseal, result
from safetensors.torch import load_file, save_file
from test_bits import one_thread

from metapl import MetaplError
from metapl.run_folder import EndedRun, RunFolder

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

huggingface_hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

from metapl.integrations.hub import Classifier  # noqa: E402

FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture(autouse=True)
def _without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where anything is asked of the hub."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the hub was asked for something")

    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)


def logits_of(run: Path, images: torch.Tensor) -> torch.Tensor:
    """Return what the network that a run delivers says of pictures."""
    ended = EndedRun.load(run)
    network = ended.network(ended.name("delivered")).eval()
    with torch.inference_mode():
        logits: torch.Tensor = network(images)
    return logits


@pytest.mark.parametrize(("kind", "shape"), [("tiny", (1, 8, 8)), ("colors", (3, 8, 8))])
def test_the_hubs_own_call_loads_the_network(
    kind: str, shape: tuple[int, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run: Path = request.getfixturevalue(kind)
    if kind == "colors":
        run = run / "run"
    said = metapl("export", run, "--hub", "--out", tmp_path / "out")
    assert "nothing was uploaded" in " ".join(said.stdout.split())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    model = Classifier.from_pretrained(tmp_path / "out")
    assert isinstance(model, huggingface_hub.PyTorchModelHubMixin)
    assert not model.training
    images = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert model(images).equal(logits_of(run, images))
    assert model.classes == EndedRun.load(run).classes
    # What it writes itself are the same files.
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        written = (tmp_path / "again" / name).read_bytes()
        assert written == (tmp_path / "out" / name).read_bytes()


def test_the_card_has_the_hubs_metadata_the_figures_and_code_that_loads_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metapl("export", tiny, "--hub", "--out", tmp_path, "--network", "teacher")
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    card_data = card.data.to_dict()
    assert card_data["library_name"] == "metapl"
    assert card_data["pipeline_tag"] == "image-classification"
    figures = {figure.dataset_split: figure.metric_value for figure in card.data.eval_results}
    reached = result(tiny)
    assert figures == {
        "test": reached["teacher_test_accuracy"],
        "validation": reached["teacher_validation_accuracy"],
    }
    assert f"{100 * reached['teacher_test_accuracy']:.1f} %" in card.text
    assert str(tmp_path) not in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(code, scope)
    probabilities = scope["predict"](torch.rand(2, 1, 8, 8))
    assert probabilities.shape == (2, 10)
    assert torch.allclose(probabilities.sum(1), torch.ones(2))


def test_weights_that_do_not_fit_are_refused(tiny: Path, tmp_path: Path) -> None:
    """The hub's mixin alone would leave them at random."""
    metapl("export", tiny, "--hub", "--out", tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["network.3.bias"]
    save_file(weights, file)
    with pytest.raises(RuntimeError, match="Missing key"):
        Classifier.from_pretrained(tmp_path)


def test_a_folder_of_another_form_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for folder in (tiny, tmp_path):
        with pytest.raises(MetaplError, match=r"no config.json with a card .* export RUN --hub"):
            Classifier.from_pretrained(folder)


def test_what_cannot_be_written_is_refused_and_nothing_is(
    tiny: Path, run: Path, tmp_path: Path
) -> None:
    def refused(*words: str | Path) -> str:
        said = metapl("export", *words, code=2)
        assert said.stderr.count("\n") == 1
        return said.stderr

    out = tmp_path / "out"
    assert "take one" in refused(tiny, "--hub", "--onnx", "--out", out)
    metapl("export", tiny, "--out", out)
    contents = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "holds an export of the other form" in refused(tiny, "--hub", "--out", out)
    assert contents == {path.name: path.read_bytes() for path in out.iterdir()}
    metapl("export", tiny, "--hub", "--out", tmp_path / "hub")
    assert "holds an export for the hub" in refused(tiny, "--out", tmp_path / "hub")
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == FILES
    # A network of one's own, which has no name.
    content = RunFolder(run).read_json("network.json")
    for card in content["networks"].values():
        card["widths"] = None
    RunFolder(run).write_json("network.json", content)
    reseal(run)
    assert "its network is one of its own" in refused(run, "--hub", "--out", tmp_path / "own")
    assert not (tmp_path / "own").exists()
