"""Corrupted images of the part of a dataset that a scale takes."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np

from apart_hf.config.train_config import TrainConfig
from apart_hf.data import load_image_data
from apart_hf.paper.corruptions import CorruptedImages, check_installed, corrupt_images
from apart_hf.paper.request import TableRequest
from apart_hf.paper.scales import SCALES
from apart_hf.paper.subset import evaluation_images
from apart_hf.runs.components import data_settings

_log = logging.getLogger(__name__)


def corrupted_part(request: TableRequest, config: TrainConfig) -> CorruptedImages | None:
    """Load the scale's corrupted images, made once and kept beside the runs; None: it has none."""
    scale = SCALES[request.scale]
    part = scale.reduction
    if not scale.corruptions or part is None:
        return None
    file = Path(f"{config.data_dir}-corrupted.npz")
    if file.exists():
        return CorruptedImages.load(file)
    check_installed()
    _log.info(
        "making %s: %d images under 15 corruptions and %d severities", file, scale.corruptions, len(scale.severities)
    )
    evaluated = len(load_image_data(data_settings(config)).val)
    chosen = np.sort(np.random.default_rng(0).permutation(evaluated)[: scale.corruptions])
    whole = dataclasses.replace(data_settings(config), data_dir=request.data_dir)
    images, labels = evaluation_images(whole, classes=part.classes, images=part.images, chosen=chosen.tolist())
    found = corrupt_images(images, labels, severities=scale.severities, edge=part.edge)
    found.save(file)
    return found
