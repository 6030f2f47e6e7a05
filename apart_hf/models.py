"""The paper's CIFAR architectures, registered with timm: `import apart_hf` suffices for `timm.create_model`.

All are pre-activation residual networks on a stride-1 stem. Wide ones follow xternalz/WideResNet-pytorch (cited by the
paper as its implementation); PreAct-ResNet-18 follows kuangliu/pytorch-cifar, with BN and ReLU after the stem as in the
authors' code, and no BN after the last block.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


class PreActBlock(nn.Module):
    """Adds BN-ReLU-conv3x3, twice, to the input; where the width changes, to its 1x1 convolution after activation."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, drop_rate: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False) if in_chs != out_chs else None
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        residual = F.relu(self.bn2(self.conv1(activated)), inplace=True)
        residual = self.conv2(F.dropout(residual, self.drop_rate, self.training))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class PreActResNet(nn.Module):
    """Stacks pre-activation residual blocks, for small images (He et al. 2016; Zagoruyko and Komodakis 2016).

    Args:
        widths: channels of each stage; from the second on, a stage halves the resolution.
        blocks: blocks of each stage.
        stem_width: channels of the stem.
        stem_norm: BN and ReLU after the stem.
        final_norm: BN and ReLU after the last block.
        he_init: convolutions by He's initialisation over fan-out and no classifier bias at first (xternalz); else
            torch's own initialisation (kuangliu).
        num_classes: 0 gives features.
        in_chans: channels of the images.
        global_pool: timm's name of a pooling.
        drop_rate: dropout between the two convolutions of a block.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        blocks: int,
        stem_width: int,
        stem_norm: bool = False,
        final_norm: bool = True,
        he_init: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans  # by which timm knows the network's form
        self.grad_checkpointing, self.he_init = False, he_init
        self.num_features = self.head_hidden_size = widths[-1]
        self.conv1 = nn.Conv2d(in_chans, stem_width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width) if stem_norm else None
        self.act1 = nn.ReLU(inplace=True) if stem_norm else None  # a module, for timm's feature extraction
        in_chs, self.feature_info = stem_width, []
        for stage, out_chs in enumerate(widths, start=1):
            layers = []
            for index in range(blocks):
                layers.append(PreActBlock(in_chs, out_chs, 2 if stage > 1 and index == 0 else 1, drop_rate))
                in_chs = out_chs
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
            self.feature_info.append({"num_chs": out_chs, "reduction": 2 ** (stage - 1), "module": f"layer{stage}"})
        self.bn = nn.BatchNorm2d(in_chs) if final_norm else None
        self.head = ClassifierHead(in_chs, num_classes, pool_type=global_pool)
        if he_init:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self._init_classifier()

    def _init_classifier(self) -> None:
        if isinstance(self.head.fc, nn.Linear):
            self.head.fc.reset_parameters()
            if self.he_init:
                nn.init.zeros_(self.head.fc.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self._init_classifier()

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.bn1 is not None and self.act1 is not None:
            x = self.act1(self.bn1(x))
        for info in self.feature_info:
            stage = getattr(self, info["module"])
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
        return x if self.bn is None else F.relu(self.bn(x), inplace=True)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": "conv1",
        "classifier": "head.fc",
        "license": "apache-2.0",
        **kwargs,
    }


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Return timm's description of a network and its images, which each of its models carries."""
    return cast(dict[str, Any], model.pretrained_cfg)


def num_classes(model: nn.Module) -> int:
    """Return how many classes a network of timm tells apart."""
    return cast(int, model.num_classes)


def is_registered_here(architecture: str) -> bool:
    """Tell whether timm knows an architecture only after `import apart_hf`."""
    return architecture in default_cfgs


default_cfgs = generate_default_cfgs(
    {
        "wide_resnet16_2": _cfg(),
        "wide_resnet40_2": _cfg(),
        "wide_resnet28_10": _cfg(),
        "preact_resnet18": _cfg(pool_size=(4, 4)),
    }
)


def _create(variant: str, pretrained: bool, widths: tuple[int, ...], **kwargs: Any) -> PreActResNet:
    return build_model_with_cfg(
        PreActResNet,
        variant,
        pretrained,
        widths=widths,
        feature_cfg={"out_indices": tuple(range(len(widths)))},
        **kwargs,
    )


def _wide_resnet(variant: str, pretrained: bool, depth: int, width: int, **kwargs: Any) -> PreActResNet:
    """Build WRN-depth-width: depth = 6 n + 4 with n blocks a stage."""
    widths = (16 * width, 32 * width, 64 * width)
    return _create(variant, pretrained, widths, blocks=(depth - 4) // 6, stem_width=16, **kwargs)


@register_model
def wide_resnet16_2(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Build WRN-16-2: 703,284 parameters at 100 classes."""
    return _wide_resnet("wide_resnet16_2", pretrained, depth=16, width=2, **kwargs)


@register_model
def wide_resnet40_2(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Build WRN-40-2: 2,255,156 parameters at 100 classes."""
    return _wide_resnet("wide_resnet40_2", pretrained, depth=40, width=2, **kwargs)


@register_model
def wide_resnet28_10(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Build WRN-28-10: 36,536,884 parameters at 100 classes."""
    return _wide_resnet("wide_resnet28_10", pretrained, depth=28, width=10, **kwargs)


@register_model
def preact_resnet18(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Build PreAct-ResNet-18: 11,171,274 parameters at 10 classes."""
    return _create(
        "preact_resnet18",
        pretrained,
        (64, 128, 256, 512),
        blocks=2,
        stem_width=64,
        stem_norm=True,
        final_norm=False,
        he_init=False,
        **kwargs,
    )
