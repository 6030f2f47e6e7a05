"""The paper's CIFAR architectures, registered with timm: `import apart_hf` suffices for `timm.create_model`.

Wide residual networks follow xternalz/WideResNet-pytorch (cited by the paper as its implementation): pre-activation
blocks of two 3x3 convolutions on a stride-1 stem.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


class WideBlock(nn.Module):
    """BN-ReLU-conv3x3 twice, plus the input; where the width changes, a 1x1 convolution of the activated input."""

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


class WideResNet(nn.Module):
    """WRN-depth-width for small images (Zagoruyko and Komodakis 2016).

    Args:
        depth: 6 n + 4 with n blocks a stage.
        width: multiplies the 16, 32 and 64 channels of the three stages.
        num_classes: 0 gives features.
        in_chans: channels of the images.
        global_pool: timm's name of a pooling.
        drop_rate: dropout between the two convolutions of a block.
    """

    def __init__(
        self, depth: int, width: int, num_classes: int = 1000, in_chans: int = 3, global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth={depth}: a wide ResNet has a depth of 6 n + 4.")
        blocks, widths = (depth - 4) // 6, [16 * width, 32 * width, 64 * width]
        self.num_classes, self.grad_checkpointing = num_classes, False
        self.num_features = self.head_hidden_size = widths[-1]
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        in_chs, self.feature_info = 16, []
        for stage, (out_chs, stride) in enumerate(zip(widths, (1, 2, 2)), start=1):
            layers = []
            for index in range(blocks):
                layers.append(WideBlock(in_chs, out_chs, stride if index == 0 else 1, drop_rate))
                in_chs = out_chs
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
            self.feature_info.append({"num_chs": out_chs, "reduction": 2 ** (stage - 1), "module": f"layer{stage}"})
        self.bn = nn.BatchNorm2d(in_chs)
        self.head = ClassifierHead(in_chs, num_classes, pool_type=global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self._init_classifier()

    def _init_classifier(self) -> None:
        if isinstance(self.head.fc, nn.Linear):
            self.head.fc.reset_parameters()
            nn.init.zeros_(self.head.fc.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^conv1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

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
        for stage in (self.layer1, self.layer2, self.layer3):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
        return F.relu(self.bn(x), inplace=True)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "", "num_classes": 100, "input_size": (3, 32, 32), "pool_size": (8, 8), "crop_pct": 1.0,
        "interpolation": "bicubic", "mean": CIFAR_MEAN, "std": CIFAR_STD, "first_conv": "conv1",
        "classifier": "head.fc", "license": "apache-2.0", **kwargs,
    }


def is_registered_here(model: nn.Module) -> bool:
    """Whether timm knows the architecture of `model` only after `import apart_hf`."""
    return model.pretrained_cfg["architecture"] in default_cfgs


default_cfgs = generate_default_cfgs({"wide_resnet40_2": _cfg()})


def _wide_resnet(variant: str, pretrained: bool, depth: int, width: int, **kwargs: Any) -> WideResNet:
    return build_model_with_cfg(
        WideResNet, variant, pretrained, depth=depth, width=width,
        feature_cfg={"out_indices": (0, 1, 2)}, **kwargs,
    )


@register_model
def wide_resnet40_2(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WRN-40-2: 2,255,156 parameters at 100 classes."""
    return _wide_resnet("wide_resnet40_2", pretrained, depth=40, width=2, **kwargs)
