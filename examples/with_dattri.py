"""Hand metapl's scores to dattri: python examples/with_dattri.py [STEPS]

A fifth of 500 digits has the next digit as its label. dattri's metric says how well the scores of a
whole training find these. dattri is no extra of metapl: pip install dattri.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import metapl

try:
    from dattri.algorithm.base import BaseAttributor
    from dattri.metric import mislabel_detection_auc
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; expected it to be installed: pip install dattri") from None


class WholeTraining(BaseAttributor):
    """Scores through a whole training; positive ones lower the test loss."""

    def __init__(self, student, **training):
        self.student = student
        self.training = training

    def cache(self, full_train_dataloader=None):
        """Keep nothing: each call goes through the training."""

    def attribute(self, train_dataloader, test_dataloader):
        """Return scores of shape (train, test), by the loaders' own order."""
        train, test = (
            Subset(loader.dataset, list(loader.sampler))
            for loader in (train_dataloader, test_dataloader)
        )
        found = metapl.attribute(self.student, train, test, each=True, **self.training)
        return found.scores.T


def main(steps):
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    is_wrong = torch.arange(500) % 5 == 0
    given = torch.where(is_wrong, (y[:500] + 1) % 10, y[:500])
    train = DataLoader(TensorDataset(x[:500], given), batch_size=50)
    test = DataLoader(TensorDataset(x[500:540], y[500:540]), batch_size=20)

    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))
    attributor = WholeTraining(
        student,
        optimizer=torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9),
        steps=steps,
        batch_size=50,
        progress=False,
    )
    scores = attributor.attribute(train, test)
    # dattri looks for the largest numbers.
    area, _ = mislabel_detection_auc(-scores.sum(1), is_wrong)
    print(f"scores {tuple(scores.shape)}, AUC of wrong labels {area:.2f}")
    return scores


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
