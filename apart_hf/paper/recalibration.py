"""Running statistics of BatchNorm, estimated anew on other images than those of the training (Schneider et al., 2020).

Of some images one half gives the statistics, and the other half is evaluated with them; then the halves change places,
so that every image is evaluated once, and never by statistics that it had a part in.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf.errors import ApartError, first_line


def has_running_statistics(network: nn.Module) -> bool:
    """Tell whether a layer of a network keeps running statistics, which can be estimated."""
    return bool(_layers(network))


def _layers(network: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]


def halves(images: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (positions to estimate on, positions to evaluate), twice, for so many images."""
    first, second = torch.arange(images).tensor_split([(images + 1) // 2])
    return (first, second), (second, first)


class Estimate:
    """Estimates running statistics batch by batch: the means, by numbers of images, of those of the batches.

    Args:
        network: of which a copy gets them.
    """

    def __init__(self, network: nn.Module):
        self._network = copy.deepcopy(network).eval()
        self._momenta = {layer: layer.momentum for layer in _layers(self._network)}
        self._seen = 0
        for layer in self._momenta:
            layer.training = True  # .train() would turn on the dropout within a BatchNormAct2d

    @torch.no_grad()
    def add(self, images: Tensor) -> None:
        """Take in a batch (N, channels, height, width).

        Raises:
            ApartError: where a layer sees one value per channel in it, of which there is no variance.
        """
        self._seen += len(images)
        for layer in self._momenta:
            layer.momentum = len(images) / self._seen
        try:
            self._network(images)
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            raise ApartError(
                f"a BatchNorm layer has one value per channel in a batch of {len(images)} image(s) "
                f"({first_line(error)}); take more images, or a larger --batch-size."
            ) from error

    def finish(self) -> nn.Module:
        """Return the copy, in eval mode, with the statistics of all batches."""
        for layer, momentum in self._momenta.items():
            layer.training, layer.momentum = False, momentum
        return self._network


def recalibrate(network: nn.Module, images: Tensor) -> nn.Module:
    """Copy a network, with the running statistics of one batch of images (N, 3, height, width), in eval mode."""
    estimate = Estimate(network)
    estimate.add(images)
    return estimate.finish()
