"""Attribute a training of ``transformers.Trainer``: python examples/record_a_trainer.py [STEPS]

A small GPT-2 with random weights learns Python's documentation from the docstrings of the standard
library, by AdamW with a linear warm-up, clipping and an accumulation of two. Every eighth training
sequence is random bytes, and nobody is told which. The recording says what each sequence did to the
loss on clean text. To find random bytes, the trained model's own loss is simpler, and finds more of
them. Nothing is downloaded.
"""

import ast
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

import metapl
from metapl.problems import NextToken

try:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error}; expected it to be installed: pip install '.[integrations]'"
    ) from None

LENGTH = 64
SEQUENCES = 128


def docstrings():
    """Return the documentation in Python's standard library, as bytes."""
    texts = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(file.read_text())
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) > 200:
                    texts.append(text)
    return torch.tensor(list("\n\n".join(texts).encode()))


def main(steps, out):
    text = docstrings()
    pieces = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    torch.manual_seed(0)
    pieces = pieces[torch.randperm(len(pieces))]
    train = pieces[:SEQUENCES].clone()
    clean = pieces[SEQUENCES : SEQUENCES + 32]
    is_noise = torch.arange(SEQUENCES) % 8 == 0
    train[is_noise] = torch.randint(256, (int(is_noise.sum()), LENGTH))
    rows = [{"input_ids": ids, "labels": ids} for ids in train]

    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, attn_implementation="eager")
    model = GPT2LMHeadModel(config)
    arguments = TrainingArguments(
        output_dir=str(Path(out) / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        # At the usual 1e-8 exact scores may be noise: leave smoothing=0.0 out then.
        adam_epsilon=1e-2,
        warmup_steps=steps // 10,
        max_grad_norm=1.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)

    folder = Path(out) / "recording"
    with metapl.record(model, out=folder, problem=NextToken(), train=rows) as recording:
        trainer.train()
    attribution = recording.attribute({"input_ids": clean, "labels": clean}, smoothing=0.0)

    scores = attribution.scores
    print(f"steps {recording.steps}, loss on clean text {attribution.outer_loss:.3f}")
    print(f"mean score of documentation {scores[~is_noise].mean():+.5f}")
    print(f"mean score of random bytes {scores[is_noise].mean():+.5f}")
    number = int(is_noise.sum())
    share = is_noise[scores.argsort()[:number]].float().mean()
    print(f"of the {number} lowest scores, {100 * share:.0f} % are random bytes")
    with torch.no_grad():
        logits = model(train).logits[:, :-1].mT
    losses = torch.nn.functional.cross_entropy(logits, train[:, 1:], reduction="none").mean(1)
    share = is_noise[losses.argsort()[-number:]].float().mean()
    print(f"of the {number} highest losses, {100 * share:.0f} % are")
    attribution.save_table(Path(out) / "scores.csv")
    return attribution


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as out:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 60, out)
