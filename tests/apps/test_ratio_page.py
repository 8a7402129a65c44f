"""feedback_ratio is the ratio of the norms of the two gradients in the teacher's parameters, whatever the network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import metapl

FIRST = ("pooled_cnn", "small_cnn", "resnet18", "efficientnet_b0_svhn", "timm:resnet10t", "timm:test_vit")
"""One of each kind; the others are built of the same blocks, and ``make test-long`` tries those."""

HUGE = ("b6_wide", "l2", "vit_l_", "vit_h_", "vit_1b_")
"""Networks of more than 300 million weights, of the blocks of smaller ones, which are not run."""

OTHERS = [n for n in metapl.apps.networks.NAMES if n not in FIRST and not any(part in n for part in HUGE)]
OTHERS += ["timm:resnet18", "timm:vit_tiny_patch16_224"]

TIMM = """
    test_byobnet test_convnext test_efficientnet test_mambaout test_coatnet test_nfnet test_resnet
    beit_base_patch16_224 halonet_h1 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32
    cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deit_tiny_patch16_224 densenet121
    dla46x_c dpn48b
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0 efficientvit_m0
    vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hardcorenas_b
    hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2
    inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 poolformerv2_s12 gmlp_ti16_224 lcnet_035
    mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nest_tiny nextvit_small pit_ti_224
    pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d resnetv2_18 rexnet_100 selecsls42
    legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_cr_tiny_224 swinv2_tiny_window8_256 tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_svt_small vgg11
    visformer_tiny vit_tiny_r_s16_p8_224 test_vit_relpos vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw
    legacy_xception xception41 xcit_nano_12_p16_224
"""
"""The smallest of most families of timm. Not here: nasnet, pnasnet, samvit, deepseek, gemma4, qwen3, some hybrids."""


NAMES = [*FIRST, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)]
NAMES += [
    f"timm:{n}" if n.startswith("test_") else pytest.param(f"timm:{n}", marks=pytest.mark.long) for n in TIMM.split()
]


@pytest.mark.parametrize("name", NAMES)
def test_the_two_gradients_of_every_network_have_the_ratio(name: str) -> None:
    """In its parameters; many of these networks have layers without a bias, or draw masks."""
    shape, of_timm = (3, 32, 32), name.removeprefix("timm:")
    if of_timm != name:
        timm = pytest.importorskip("timm")
        if not timm.is_model(of_timm):
            pytest.skip(f"timm {timm.__version__} has no {of_timm}")
        shape = timm.get_pretrained_cfg(of_timm).input_size
    draws = torch.Generator().manual_seed(1)
    (x, u), y = (torch.randn(2, *shape, generator=draws) for _ in range(2)), torch.tensor([0, 2])

    def gradient(**size: float) -> tuple[Tensor, metapl.StepReport]:
        """What a step leaves in the teacher, from the same weights and masks."""
        torch.manual_seed(0)
        teacher = metapl.apps.networks.create(name, 3, image_size=shape[-1])
        student = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3))
        at_rest = torch.optim.SGD(teacher.parameters(), lr=0.0)
        losses = (metapl.CrossEntropy(),)
        trainer = metapl.BilevelTrainer(
            teacher, student, "forward", teacher_losses=losses, outer_optimizer=at_rest, verify=False, **size
        )
        found = list[Tensor]()
        at_rest.register_step_pre_hook(
            lambda *_: found.extend(p.new_zeros(p.shape) if p.grad is None else p.grad for p in teacher.parameters())
        )
        report = trainer.step((x, y), u)
        return torch.cat([g.flatten().double() for g in found]), report

    own, _ = gradient(feedback_weight=0.0)
    both, report = gradient(feedback_ratio=0.5)
    assert float((both - own).norm() / own.norm()) == pytest.approx(0.5, rel=1e-3)
    assert 0 < report.feedback_weight < float("inf")
