"""Which networks are converted: the smallest of every timm family, and torchvision's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SMALLEST = """
    beit_base_patch16_224 halonet_h1 mobileone_s1 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32
    convnext_atto_rms cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny
    deepseek_vit_412m deit3_small_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1
    efficientformerv2_s0 efficientnet_b0 efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224
    fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b
    hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2
    inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 test_mambaout coatnet_nano_cc_224
    poolformer_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny
    naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small nf_ecaresnet26 pit_ti_224
    pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50
    resnest14d resnet10t resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18
    starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window16_256 swinv2_cr_small_224
    tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny
    beit3_base_patch16_224 vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224
    volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224
""".split()  # noqa: SIM905 - one name per line would be a screen and more
"""By number of parameters, of timm 1.0.31. A family without an entry is run with its first network."""

SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
DETECTION = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn",
    "fcos_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
)


def names() -> list[str]:
    """Return ``timm:NAME`` and ``torchvision:NAME`` of every network of the zoo."""
    return [*(f"timm:{name}" for name in _of_timm()), *(f"torchvision:{name}" for name in _of_torchvision())]


def _of_timm() -> Iterator[str]:
    import timm

    for family in timm.list_modules():
        members = timm.list_models(module=family)
        if members:
            yield next((name for name in SMALLEST if name in members), members[0])


def _of_torchvision() -> Iterator[str]:
    """Yield the classifiers whose name is the shortest of their builder's module, then segmentation and detection."""
    from torchvision import models

    first: dict[str, str] = {}
    for name in sorted(models.list_models(module=models), key=len):
        first.setdefault(models.get_model_builder(name).__module__, name)
    return chain(first.values(), SEGMENTATION, DETECTION)


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a network in eval mode, with random statistics that hide no mistake, and an example for it."""
    library, _, name = name.partition(":")
    torch.manual_seed(0)
    network, size = (_timm if library == "timm" else _torchvision)(name)
    example = (torch.randn(1, *size),)
    for norm in network.modules():
        if isinstance(norm, _BatchNorm) and norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
    _settle_statistics(network, example[0])
    return network.eval(), example


def _timm(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    import timm

    network = timm.create_model(name, pretrained=False)
    return network, tuple(network.pretrained_cfg["input_size"])


def _torchvision(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network; a detector as its backbone, whose outputs are feature maps by name."""
    from torchvision import models

    fixed = {"weights": None, "weights_backbone": None} if name in (*SEGMENTATION, *DETECTION) else {"weights": None}
    network = models.get_model(name, **fixed)
    if name in DETECTION:
        return network.backbone, (3, 320, 320)
    return network, (3, 299, 299) if "inception" in name else (3, 224, 224)


@torch.no_grad()
def _settle_statistics(network: nn.Module, x: Tensor) -> None:
    """Make the statistics those of what flows through, so that activations neither vanish nor grow over the depth."""
    norms = [norm for norm in network.modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    if norms:
        network(torch.randn(2, *x.shape[1:]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
