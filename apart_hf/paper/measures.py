"""What is measured of a trained network beyond its accuracy: calibration, shifted BN statistics, corrupted images."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from apart_hf.data import ImageData
from apart_hf.data.dataset_memory import decode
from apart_hf.paper.bn_robustness import robustness
from apart_hf.paper.corruptions import CorruptedImages
from apart_hf.paper.recalibration import halves, recalibrate

BINS = 15
RADII = (0.1, 0.2, 0.3, 0.4)  # of the scaled statistics
DRAWS = 3  # directions of each
_BATCH = 500
LOGITS = "evaluation_logits.npz"


def measure(
    model: nn.Module, data: ImageData, corrupted: CorruptedImages, logits_file: Path | None = None
) -> dict[str, Any]:
    """Measure a trained network on the CPU, in float32.

    Args:
        model: with BatchNorm and a `pretrained_cfg` that names its input; left as it is.
        data: `data.val` is evaluated; its images have the input's size.
        corrupted: images of `data.val` under corruptions.
        logits_file: where the logits (N, classes) float16 and the labels (N,) of the evaluation are written.

    Returns:
        images, top1, eval_loss and ece (accuracies and the calibration error in per cent); "statistics", the rows of
        `bn_robustness.robustness`; "corruptions", rows with corruption, severity, top1, and top1_recalibrated, by
        running statistics that were estimated on the other half of the same corrupted images; "corrupted_images",
        their hash.
    """
    network = copy.deepcopy(model).eval()
    config = resolve_model_data_config(network)
    decoded, _ = decode(data.val, config["input_size"][-1])
    labels = torch.from_numpy(np.array(data.val.labels(), dtype=np.int64))
    pixels = decoded[..., :3].numpy()
    batches = [(normalised(pixels[rows], config), labels[rows]) for rows in torch.arange(len(labels)).split(_BATCH)]
    with torch.no_grad():
        logits = torch.cat([network(images).float() for images, _ in batches])
    if logits_file is not None:
        np.savez(logits_file, logits=logits.half().numpy(), labels=labels.numpy())
    return {
        "images": len(labels),
        "top1": top1(logits, labels),
        "eval_loss": nn.functional.cross_entropy(logits.double(), labels).item(),
        "ece": calibration_error(logits, labels),
        "statistics": robustness(network, batches, epsilons=RADII, draws=DRAWS),
        "corruptions": list(_under_corruptions(network, corrupted, config)),
        "corrupted_images": corrupted.digest,
    }


def _under_corruptions(
    network: nn.Module, corrupted: CorruptedImages, config: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    labels = torch.from_numpy(np.array(corrupted.labels, dtype=np.int64))
    for name, severity, images in corrupted:
        plain = top1(predict(network, images, config), labels)
        hits = 0
        for estimated, evaluated in halves(len(labels)):
            recalibrated = recalibrate(network, normalised(images[estimated], config))
            found = predict(recalibrated, images[evaluated], config).argmax(-1)
            hits += int((found == labels[evaluated]).sum())
        yield {"corruption": name, "severity": severity, "top1": plain, "top1_recalibrated": 100 * hits / len(labels)}


def normalised(images: np.ndarray, config: dict[str, Any]) -> Tensor:
    """Normalise (N, edge, edge, 3) uint8 to (N, 3, edge, edge) float32, by mean and standard deviation of `config`."""
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)


@torch.no_grad()
def predict(network: nn.Module, images: np.ndarray, config: dict[str, Any]) -> Tensor:
    """Compute logits (N, classes) float32 of images (N, edge, edge, 3) uint8."""
    return torch.cat(
        [
            network(normalised(part, config)).float()
            for part in np.array_split(images, max(1, -(-len(images) // _BATCH)))
        ]
    )


def top1(logits: Tensor, labels: Tensor) -> float:
    """Compute the accuracy in per cent of logits (N, classes) against class indices (N,)."""
    return 100 * (logits.argmax(-1) == labels).double().mean().item()


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Compute the expected calibration error in per cent (Naeini et al., 2015; Guo et al., 2017).

    Predictions are sorted by their confidence, the largest probability, into `bins` equal intervals (a, b] of [0, 1].
    The error is the mean distance of accuracy and confidence of a bin, weighted by its number of predictions.

    Args:
        logits: (N, classes).
        labels: (N,) class indices.
        bins: how many.
    """
    confidence, found = logits.double().softmax(-1).max(-1)
    of_bin = (confidence * bins).ceil().long().clamp(1, bins) - 1
    hits = (found == labels).double()
    distance = torch.zeros(bins, dtype=torch.float64).index_add_(0, of_bin, hits - confidence)
    return 100 * distance.abs().sum().item() / len(labels)
