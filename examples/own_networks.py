"""Meta Pseudo Labels with networks and DataLoaders of one's own: python examples/own_networks.py"""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import metapl

torch.manual_seed(0)
images, labels = torch.tensor(load_digits().data / 16, dtype=torch.float32), torch.tensor(load_digits().target)
labeled = DataLoader(TensorDataset(images[:100], labels[:100]), batch_size=50, shuffle=True)
unlabeled = DataLoader(TensorDataset(images[100:1300]), batch_size=100, shuffle=True)

teacher, student = (
    torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)) for _ in "TS"
)
trainer = metapl.BilevelTrainer(teacher, student, mode="forward", feedback_weight=10.0)
for _ in range(30):
    for (x_u,), (x_l, y_l) in zip(unlabeled, [*labeled] * 6, strict=True):
        report = trainer.step(labeled=(x_l, y_l), unlabeled=x_u)

accuracy = (student(images[1300:]).argmax(1) == labels[1300:]).float().mean()
print(f"student's accuracy on images it never saw: {accuracy:.3f}; its labelled loss: {report.outer_loss:.3f}")
