"""Meta Pseudo Labels on a pretrained network, of which LoRA by peft is trained.

    pip install '.[integrations]'
    python examples/peft_backbone.py [resnet18.pth]

Low-rank updates of the convolutions and a new last layer are trained, in the teacher and in the
student. Without a file with the weights of torchvision's resnet18 the backbone is a random one,
which shows that it runs, and nothing else. Ten digits of each class keep their labels.
"""

import sys
from typing import Any

import torch
from torch.nn import functional as F
from torchvision.models import resnet18

import metapl
from metapl.pictures import ShiftNoiseCutout, load_digits_split

try:
    import peft
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; expected pip install '.[integrations]'") from None


def from_backbone() -> Any:
    """Return the backbone with low-rank updates, which are nothing at first, and a new head."""
    torch.manual_seed(0)
    network = resnet18()
    if sys.argv[1:]:
        network.load_state_dict(torch.load(sys.argv[1], weights_only=True))
    network.fc = torch.nn.Linear(512, 10)
    lora = peft.LoraConfig(r=8, target_modules=r".*\.conv\d", modules_to_save=["fc"])
    return peft.get_peft_model(network, lora)


def seen(x: torch.Tensor) -> torch.Tensor:
    """Return digits (B, 1, 8, 8) as the color pictures that the backbone takes."""
    return F.interpolate(x.expand(-1, 3, -1, -1), size=32, mode="bilinear")


split = load_digits_split(labels_per_class=10, seed=0)
teacher, student = from_backbone(), from_backbone()
inner, outer = (
    torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=3e-3)
    for network in (student, teacher)
)
trainer = metapl.BilevelTrainer(
    teacher, student, "forward", inner_optimizer=inner, outer_optimizer=outer
)
for step in range(20):
    rows = torch.randint(len(split.unlabeled), (32,))
    weak = split.unlabeled[rows]
    strong = ShiftNoiseCutout()(weak, seed=0, step=step, examples=rows)
    trainer.step(outer=(seen(split.labeled[0]), split.labeled[1]), inner=(seen(weak), seen(strong)))
accuracy = trainer.evaluate((seen(split.test[0]), split.test[1])).accuracy
print(f"the student's test accuracy: {100 * accuracy:.1f} %")
# With the updates added, it has the weights of torchvision's network, by their names.
weights = student.merge_and_unload().state_dict()
