"""The same numbers on a device.

On CUDA where there is one, and on the CPU elsewhere, so that the tests are always run.

python -m pytest -m gpu    # these, and what can be tested on CUDA alone
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import metapl
from metapl.execution.numerics import explain, float32_products, full_float32

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLASSES = 4


class Attention(nn.Module):
    """A block of attention over the rows of a picture, by the kernel that the device prefers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.embed = nn.Linear(24, 32)
        self.qkv = nn.Linear(32, 96)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(self.embed(x.transpose(1, 2).flatten(2)))
            .unflatten(-1, (3, 2, 16))
            .permute(2, 0, 3, 1, 4)
        )
        dropout = self.dropout if self.training else 0.0
        return self.head(
            F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
            .transpose(1, 2)
            .flatten(2)
            .mean(1)
        )


def convolutions(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        *(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.GELU(),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.GELU(),
        ),
        *(nn.Dropout(dropout), nn.Flatten(), nn.Linear(32, CLASSES)),
    )


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "convolutions": convolutions,
    "attention": Attention,
}


def case(
    network: str, device: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> dict[str, Any]:
    """Return teacher, student and batches, the same on each device and in each precision."""
    torch.manual_seed(0)
    teacher = NETWORKS[network]()
    student = NETWORKS[network](dropout)
    x = torch.randn(6, 3, 8, 8)
    u = torch.randn(8, 3, 8, 8)
    return {
        "teacher": teacher.to(device, dtype),
        "student": student.to(device, dtype),
        "outer": (x.to(device, dtype), torch.arange(6, device=device) % CLASSES),
        "inner": u.to(device, dtype),
    }


def gradient(inputs: dict[str, Any], mode: Any, steps: int = 1) -> Tensor:
    """Return the gradient in the teacher's weights, in one row in float64 on the CPU."""
    inner = torch.optim.SGD(inputs["student"].parameters(), lr=0.1, momentum=0.9)
    unlabeled = inputs["inner"]
    if steps > 1:
        unlabeled = metapl.Lookahead([unlabeled] * steps)
    result = metapl.hypergradient(
        **{**inputs, "inner": unlabeled}, mode=mode, inner_optimizer=inner
    )
    return torch.cat([g.flatten() for g in result.grads.values()]).double().cpu()


def gap(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


# A path asks for deterministic algorithms and warns of the one that has none unless the caller
# insists on it: attention by the memory-efficient kernel, which CUDA takes in float32.
@pytest.mark.filterwarnings("ignore:Memory Efficient attention defaults:UserWarning")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("mode", "steps"), [("forward", 1), ("forward", 3), ("unrolled", 3), ("difference", 1)]
)
def test_the_gradient_is_that_of_float64_on_the_cpu(mode: str, network: str, steps: int) -> None:
    exact = gradient(case(network, "cpu", torch.float64), "unrolled", steps)
    with full_float32(torch.device(DEVICE)):
        in_float32 = gradient(case(network, DEVICE), mode, steps)
    assert gap(in_float32, exact) < (1e-2 if mode == "difference" else 1e-4)


def test_the_precision_of_float32_products_is_told_whatever_a_caller_has_set() -> None:
    """Also where reading the older switches would raise; what is not set at all is float32."""
    device = torch.device(DEVICE)
    products_before = float32_products(device)
    with full_float32(device):
        assert float32_products(device) == {"matrix products": "ieee", "convolutions": "ieee"}
    assert float32_products(device) == products_before
    reduced = "tf32" if DEVICE == "cuda" else "bf16"
    switch = torch.backends.cudnn.conv if DEVICE == "cuda" else torch.backends.mkldnn.conv
    old = switch.fp32_precision
    try:
        switch.fp32_precision = reduced
        assert float32_products(device)["convolutions"] == reduced
    finally:
        switch.fp32_precision = old


def test_results_and_reports_say_in_what_precision_products_were_taken() -> None:
    inputs = case("convolutions", DEVICE)
    device = torch.device(DEVICE)
    switch = torch.backends.cudnn.conv if DEVICE == "cuda" else torch.backends.mkldnn.conv
    inner = torch.optim.SGD(inputs["student"].parameters(), lr=0.1)
    old = switch.fp32_precision
    reduced = "tf32" if DEVICE == "cuda" else "bf16"
    products: list[dict[str, str]] = []
    for precision in ("ieee", reduced):
        try:
            switch.fp32_precision = precision
            result = metapl.hypergradient(**inputs, mode="difference", inner_optimizer=inner)
            trainer = metapl.BilevelTrainer(
                inputs["teacher"], inputs["student"], "none", verify=False
            )
            report = trainer.step(inputs["outer"], inputs["inner"])
            assert report.float32_products == result.float32_products == float32_products(device)
            products.append(result.float32_products)
        finally:
            switch.fp32_precision = old
    assert [by_operation["convolutions"] for by_operation in products] == ["ieee", reduced]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("mode", ["forward", "unrolled", "difference"])
def test_in_bfloat16_it_is_near(mode: str, network: str) -> None:
    exact = gradient(case(network, "cpu", torch.float64), "unrolled")
    with torch.autocast(DEVICE, torch.bfloat16):
        in_bfloat16 = gradient(case(network, DEVICE), mode)
    assert gap(in_bfloat16, exact) < 0.05


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "options"), [("forward", {}), ("reinforce", {"precision": "bfloat16"})]
)
def test_channels_last_and_compiled_passes_train_alike(mode: str, options: dict[str, Any]) -> None:
    """A report outlives the next step.

    Convolutions in TF32, CUDA's default, are rounded otherwise by each kernel: by 2e-4 on an H100.
    """
    ends = []
    outputs = []
    for is_compiled in (False, True):
        batches = case("convolutions", DEVICE)
        teacher = batches.pop("teacher")
        student = batches.pop("student")
        if is_compiled:
            teacher = teacher.to(memory_format=torch.channels_last)
            student = student.to(memory_format=torch.channels_last)
        generator = torch.Generator(DEVICE).manual_seed(2)
        trainer = metapl.BilevelTrainer(
            teacher, student, mode, compile=is_compiled, generator=generator, **options
        )
        with full_float32(torch.device(DEVICE)):
            reports = [trainer.step(**batches) for _ in range(2)]
        ends.append(torch.cat([p.detach().flatten() for p in student.parameters()]).double().cpu())
        outputs.append(reports[0].student_outputs.double().cpu())
    for pair in (ends, outputs):
        assert gap(*pair) < (1e-4 if not options else 2e-2)


def test_one_rank_with_its_weights_cut_is_the_step_of_one_process(tmp_path: Path) -> None:
    """The step is by NCCL or gloo, fully sharded; another process reads its checkpoint by DCP."""
    dist.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo",
        init_method=f"file://{tmp_path}/meeting",
        rank=0,
        world_size=1,
    )
    try:
        ends = []
        for is_sharded in (False, True):
            batches = case("convolutions", DEVICE, dropout=0.2)
            teacher = batches.pop("teacher")
            student = batches.pop("student")
            if is_sharded:
                mesh = init_device_mesh(DEVICE, (1,))
                fully_shard(teacher, mesh=mesh)
                fully_shard(student, mesh=mesh)
            trainer = metapl.BilevelTrainer(teacher, student, "forward")
            for _ in range(2):
                torch.manual_seed(3)
                trainer.step(**batches)
            state = get_model_state_dict(student)
            tensors = [t.full_tensor() if isinstance(t, DTensor) else t for t in state.values()]
            ends.append(torch.cat([t.detach().flatten() for t in tensors]).double().cpu())
            if is_sharded:
                dcp.save(state, checkpoint_id=tmp_path / "state")
        assert gap(*ends) < 1e-5
        on_cpu = case("convolutions", "cpu")["student"].state_dict()
        loaded = {name: torch.empty_like(t) for name, t in on_cpu.items()}
        dcp.load(loaded, checkpoint_id=tmp_path / "state")
        assert gap(torch.cat([t.flatten() for t in loaded.values()]).double(), ends[1]) == 0
    finally:
        dist.destroy_process_group()


class Recurrent(nn.Module):
    """An LSTM over the rows of a picture, by cuDNN where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, 16, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows, _ = self.lstm(x.transpose(1, 2).flatten(2))
        return self.head(rows[:, -1])


def recurrent(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    inputs = case("attention", device, dtype)
    torch.manual_seed(0)
    inputs["teacher"] = Recurrent().to(device, dtype)
    inputs["student"] = Recurrent().to(device, dtype)
    return inputs


@pytest.mark.skipif(
    DEVICE == "cpu", reason="needs CUDA: cuDNN's recurrent networks are not on the CPU"
)
@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_a_recurrent_network_of_cudnn_is_refused_with_what_to_do(mode: str) -> None:
    exact = gradient(recurrent("cpu", torch.float64), "unrolled")
    inputs = recurrent(DEVICE)
    with pytest.raises(metapl.MetaplError, match=r"torch\.backends\.cudnn\.flags\(enabled=False\)"):
        gradient(inputs, mode)
    # The flags are the outer block: they read the older switches, which raises where the newer ones
    # have been set.
    with torch.backends.cudnn.flags(enabled=False), full_float32(torch.device(DEVICE)):
        by_torch = gradient(inputs, mode)
    assert gap(by_torch, exact) < 1e-4


@pytest.mark.parametrize(
    "message",
    [
        "Double backwards is not supported for CuDNN RNNs due to limitations in the CuDNN API.",
        "Trying to use forward AD with _cudnn_rnn that does not support it because it has not "
        "been implemented yet.",
        "cudnn RNN backward can only be called in training mode",
    ],
)
def test_what_cudnn_says_of_recurrent_networks_names_the_remedy(message: str) -> None:
    with pytest.raises(metapl.MetaplError, match=r"torch\.backends\.cudnn\.flags\(enabled=False\)"):
        explain(RuntimeError(message))
    explain(RuntimeError("cudnn RNN: something else"))
