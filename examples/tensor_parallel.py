"""Train two vision transformers by Algorithm 1, the products of their layers cut over processes.

    python examples/tensor_parallel.py
    torchrun --nproc-per-node=2 examples/tensor_parallel.py --mesh.tensor 2
    # vit_1b_14 as it is, of 1.2 billion weights, on eight GPUs
    torchrun --nproc-per-node=8 examples/tensor_parallel.py --mesh.tensor 4 --mesh.shard 2 \\
        --layers 24 --heads 16 --width 2048 --size 224 --device cuda

By default the network is a narrow copy of ``vit_1b_14``, and the pictures are the digits, enlarged.
``PLAN`` cuts the two products of each block's perceptron, which are two thirds of the weights, over
``--mesh.tensor`` processes; attention, whose projections torch holds in one weight, stays whole,
and ``--mesh.shard`` cuts it. All processes of ``--mesh.tensor`` see the same rows. In float64 two
processes end on the numbers of one, to 1e-10; ``--out`` writes the student's weights.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torchvision.models import VisionTransformer

import metapl
from metapl.data import StepSampler
from metapl.distributed import Mesh, shard
from metapl.errors import MetaplError
from metapl.pictures import load_digits_split
from metapl.processes import joined

# For networks of torchvision's VisionTransformer, vit_1b_14 among them: the first product of a
# block's perceptron is cut by its outputs, and the second one by its inputs.
PLAN: dict[str, ParallelStyle] = {
    "encoder.layers.*.mlp.0": ColwiseParallel(),
    "encoder.layers.*.mlp.3": RowwiseParallel(),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained, and on how many processes.

    Args:
        mesh: the processes that torchrun has started.
        steps: number of steps.
        layers: number of blocks; vit_1b_14 has 24.
        heads: number of heads of attention; vit_1b_14 has 16.
        width: width of a block, whose perceptron is four times as wide; vit_1b_14 has 2048.
        size: side that the digits are enlarged to, a multiple of 14.
        dtype: type of the weights.
        device: where the networks are.
        out: file of the student's weights.
    """

    mesh: Mesh = field(default_factory=Mesh)
    steps: int = 4
    layers: int = 2
    heads: int = 2
    width: int = 16
    size: int = 28
    dtype: str = "float64"
    device: str = "cpu"
    out: Path | None = None


def network_of(c: Settings) -> nn.Module:
    """Build a copy of vit_1b_14 of this depth and width, laid out over the processes."""
    network = VisionTransformer(
        image_size=c.size,
        patch_size=14,
        num_layers=c.layers,
        num_heads=c.heads,
        hidden_dim=c.width,
        mlp_dim=4 * c.width,
        num_classes=10,
    )
    # torchvision begins with a head of zeros, from which nothing is fed back.
    nn.init.normal_(network.heads.head.weight, std=0.02)
    network.to(c.device, getattr(torch, c.dtype))
    if c.mesh.size == 1:
        return network
    return shard(network, c.mesh, plan=PLAN if c.mesh.tensor > 1 else None)


def train(c: Settings) -> dict[str, Tensor]:
    """Train teacher and student, and return the student's weights, whole, in every process."""
    if c.size % 14:
        raise MetaplError(f"--size {c.size}: expected a multiple of 14, the side of a patch.")
    with joined(c.mesh, torch.device(c.device)) as processes:
        torch.manual_seed(0)
        teacher = network_of(c)
        student = network_of(c)
        trainer = metapl.BilevelTrainer(
            teacher,
            student,
            "reinforce",
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9),
            outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9),
            feedback_weight=1.0,
            # Every process draws the same labels.
            generator=torch.Generator(c.device).manual_seed(0),
            verify=False,
        )
        split = load_digits_split(labels_per_class=10, seed=0)
        few, labels = split.labeled

        def pictures(digits: Tensor) -> Tensor:
            enlarged = F.interpolate(digits.to(torch.float64), size=(c.size, c.size))
            return enlarged.expand(-1, 3, -1, -1).to(c.device, getattr(torch, c.dtype))

        def rows(count: int, size: int, stream: int, step: int) -> Tensor:
            drawn = StepSampler(count, size, seed=0, stream=stream).indices(step)
            if c.mesh.shares == 1:
                return drawn
            # Processes that share a batch have a part of it each.
            return drawn.chunk(c.mesh.shares)[c.mesh.share]

        for step in range(c.steps):
            labeled_rows = rows(len(few), 16, 0, step)
            labeled = pictures(few[labeled_rows]), labels[labeled_rows].to(c.device)
            unlabeled = pictures(split.unlabeled[rows(len(split.unlabeled), 32, 1, step)])
            report = trainer.step(labeled, unlabeled)
            if processes.first:
                print(f"step {step + 1}: student's labeled loss {float(report.outer_loss):.12f}")
        weights = {name: whole(weight) for name, weight in student.state_dict().items()}
        if c.out is not None and processes.first:
            save_file(weights, c.out)
    return weights


def whole(weight: Tensor) -> Tensor:
    """Return a weight on the CPU, gathered where it is cut."""
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    return weight.cpu().contiguous()


def main() -> None:
    c = tyro.cli(Settings, description=__doc__)
    try:
        train(c)
    except MetaplError as error:
        sys.exit(f"tensor_parallel.py: {error}")


if __name__ == "__main__":
    main()
