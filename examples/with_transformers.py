"""Rate training data in ``transformers.Trainer``: python examples/with_transformers.py [STEPS]

Half of the training sequences count upwards, and half are random; the rater is not told which. It
learns from 100 sequences that count, beside the model, and prints the mean score of both halves.
Nothing is downloaded: the model is GPT-2's architecture with random weights.
"""

import sys

import torch
from torch.utils.data import DataLoader

from metapl.integrations.transformers import weighted
from metapl.problems import Table

try:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error}; expected it to be installed: pip install '.[integrations]'"
    ) from None

WORDS = 50
LENGTH = 20


class Rater(Table):
    """Scores (B,): the mean of those of neighbouring tokens, one for each pair of them."""

    def forward(self, inputs):
        tokens = inputs["input_ids"]
        return 10 * super().forward(WORDS * tokens[:, :-1] + tokens[:, 1:]).mean(1)


def main(steps):
    torch.manual_seed(0)
    counting = (torch.randint(WORDS, (1100, 1)) + torch.arange(LENGTH)) % WORDS
    clean = counting[:100]
    mixed = torch.cat([counting[100:], torch.randint(WORDS, (1000, LENGTH))])
    rows = [{"input_ids": ids, "labels": ids} for ids in mixed]
    clean_rows = [{"input_ids": ids, "labels": ids} for ids in clean]

    sizes = {"vocab_size": WORDS, "n_positions": LENGTH, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    arguments = TrainingArguments(
        output_dir="runs/with-transformers",
        max_steps=steps,
        per_device_train_batch_size=50,
        learning_rate=3e-3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    rater = Rater(torch.zeros(WORDS**2))
    clean_batches = DataLoader(clean_rows, batch_size=50, shuffle=True)
    optimizer = torch.optim.Adam(rater.parameters(), lr=0.03)
    rated = weighted(
        trainer,
        rater,
        outer=clean_batches,
        every=2,
        rater_optimizer=optimizer,
    )
    trainer.train()

    scores = rater({"input_ids": mixed})
    print(f"steps of the rater: {rated.updates}")
    print(f"mean score of counting sequences {scores[:1000].mean():+.2f}")
    print(f"mean score of random sequences {scores[1000:].mean():+.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
