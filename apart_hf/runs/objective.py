"""What the output is compared with: mixed or smoothed labels, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from apart_hf.config.train_config import FilledConfig


class EpochMixup(Mixup):
    """Mixes as timm does, in the first epochs alone where that is asked for; labels are smoothed in all of them.

    Args:
        *arguments, **options: of timm's `Mixup`.
        epochs: in which it mixes; 0: in all.
    """

    def __init__(self, *arguments: Any, epochs: int = 0, **options: Any):
        super().__init__(*arguments, **options)
        self.epochs = epochs

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, which is counted from 0."""
        self.mixup_enabled = not self.epochs or epoch < self.epochs


def make_mixup(config: FilledConfig, classes: int) -> EpochMixup | None:
    """Make timm's mixup and cutmix, which smooth the labels too; None: both are off."""
    if not (config.mixup or config.cutmix):
        return None
    return EpochMixup(
        config.mixup,
        config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=classes,
        epochs=config.mixup_off_epoch,
    )


def make_criterion(config: FilledConfig, mixup: EpochMixup | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Make the loss, which smooths the labels where they are not mixed."""
    smoothing = config.smoothing if mixup is None else 0.0
    return BinaryCrossEntropy(smoothing) if config.bce_loss else nn.CrossEntropyLoss(label_smoothing=smoothing)
