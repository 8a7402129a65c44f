"""Train by ``transformers.Trainer`` with a weight for each sequence, which metapl found.

python examples/weights_in_a_trainer.py [STEPS]

Half of the sequences count upwards, and the others are random. A recording of a first training says
what each did to the loss on clean sequences; a second one learns them by the weights that follow.
"""

import sys
import tempfile

import torch
from torch.nn import functional as F
from torch.utils.data import default_collate

import metapl
from metapl.problems import NextToken

try:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error}; expected it to be installed: pip install '.[transformers]'"
    ) from None

WORDS, LENGTH = 100, 8


def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "n_positions": LENGTH, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, attn_implementation="eager")
    return GPT2LMHeadModel(config)


def arguments(out, steps):
    return TrainingArguments(
        output_dir=out,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        adam_epsilon=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )


def with_weights(sequences, weights):
    """Put each weight beside the labels, since the Trainer drops other columns."""
    rows = []
    for ids, weight in zip(sequences, weights, strict=True):
        rows.append({"input_ids": ids, "labels": {"ids": ids, "weight": weight}})
    return rows


def weighted_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].transpose(1, 2)
    losses = F.cross_entropy(logits, labels["ids"][:, 1:], reduction="none")
    return (labels["weight"] * losses.mean(1)).mean()


def train_again(student, sequences, weights, given):
    Trainer(
        model=student,
        args=given,
        train_dataset=with_weights(sequences, weights),
        data_collator=default_collate,
        compute_loss_func=weighted_loss,
    ).train()
    return student


def main(steps):
    torch.manual_seed(1)
    counting = (torch.randperm(WORDS)[:96, None] + torch.arange(LENGTH)) % WORDS
    clean = counting[:32]
    sequences = torch.cat([counting[32:], torch.randint(WORDS, (64, LENGTH))])
    with tempfile.TemporaryDirectory() as out:
        first = model()
        rows = [{"input_ids": ids, "labels": ids} for ids in sequences]
        trainer = Trainer(model=first, args=arguments(out, steps), train_dataset=rows)
        recorded = metapl.record(first, out=f"{out}/recorded", problem=NextToken(), train=rows)
        with recorded as recording:
            trainer.train()
        attribution = recording.attribute(
            {"input_ids": clean, "labels": clean}, smoothing=0.0, progress=False
        )
        weights = attribution.weights()
        second = train_again(model(), sequences, weights, arguments(out, steps))
    print(f"mean weight of counting sequences {weights[:64].mean():.3f}")
    print(f"mean weight of random sequences {weights[64:].mean():.3f}")
    with torch.no_grad():
        for name, network in (("first", first), ("second", second)):
            print(f"loss on clean text, {name}: {network(clean, labels=clean).loss:.3f}")
    return weights


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
