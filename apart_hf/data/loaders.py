"""DataLoaders for the two splits: batches from memory for small images, worker processes for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from apart_hf.data.loading import ImageData, labels_of
from apart_hf.data.memory import InMemoryImages, OtherSize, decode, fits_in_memory
from apart_hf.data.transforms import SMALL, TransformedImages, eval_transform, train_transform
from apart_hf.errors import ApartError

LOADERS = ("auto", "memory", "workers")


@dataclass(frozen=True)
class LoaderSettings:
    """How batches are made.

    Args:
        images: timm's description of the images, see `data_config`.
        batch_size, eval_batch_size: of one process.
        loader: "memory": images are decoded once; "workers": at every use; "auto": memory where that gives the same.
        workers: loader processes, of the second kind.
        seed: of order and augmentation.
        device: where batches from memory are made.
        augmentation: arguments of `train_transform`: aa, color_jitter, reprob.
    """

    images: dict[str, Any]
    batch_size: int
    eval_batch_size: int
    loader: str
    workers: int
    seed: int
    device: torch.device
    augmentation: dict[str, Any]


def make_loaders(data: ImageData, settings: LoaderSettings) -> tuple[DataLoader, DataLoader, str]:
    """Loaders of the training and the evaluation split, and which kind they are: "memory" or "workers".

    Raises: ApartError where "memory" is asked for and cannot be had, or an image cannot be decoded.
    """
    kind, reason = settings.loader, _no_memory(data, settings)
    if kind == "memory" and reason:
        raise ApartError(f"--loader memory: {reason}; use --loader workers.")
    if kind == "auto":
        kind = "workers" if reason else "memory"
    if kind == "memory":
        try:
            return *_from_memory(data, settings), kind
        except OtherSize:
            if settings.loader == "memory":
                raise
    return *_from_workers(data, settings), "workers"


def _no_memory(data: ImageData, settings: LoaderSettings) -> str | None:
    """Why the images cannot be kept in memory; None: they can."""
    edge, images = settings.images["input_size"][-1], len(data.train) + len(data.val)
    if data.image_size != (edge, edge) or edge > SMALL:
        width, height = data.image_size
        return f"images of {width}x{height} pixels are not small squares of the network's input size ({edge}x{edge})"
    used = [f"--{name.replace('_', '-')}" for name, value in settings.augmentation.items() if value]
    if used:
        return f"{', '.join(used)} works on single images"
    if settings.loader == "auto" and not fits_in_memory(images, edge, data.spec.padding):
        return f"{images} images are too many to keep unasked"
    return None


def _from_memory(data: ImageData, settings: LoaderSettings) -> tuple[DataLoader, DataLoader]:
    edge, spec = settings.images["input_size"][-1], data.spec
    mean, std = settings.images["mean"], settings.images["std"]
    loaders = []
    for split, name, training in ((data.train, spec.train_split, True), (data.val, spec.val_split, False)):
        decoded = decode(split, name, spec.input_key, edge, progress=f"decoding split {name}")
        dataset = InMemoryImages(
            decoded, labels_of(split, spec.target_key), mean, std, seed=settings.seed, device=settings.device,
            **({"padding": spec.padding, "flip": True} if training else {}),
        )
        loaders.append(_loader(dataset, training, settings, collate_fn=InMemoryImages.collate))
    return tuple(loaders)


def _from_workers(data: ImageData, settings: LoaderSettings) -> tuple[DataLoader, DataLoader]:
    keys = (data.spec.input_key, data.spec.target_key)
    augmented = train_transform(settings.images, data.image_size, data.spec.padding, **settings.augmentation)
    plain = eval_transform(settings.images)
    common = {
        "num_workers": settings.workers, "persistent_workers": settings.workers > 0,
        "pin_memory": settings.device.type == "cuda",
    }
    return (
        _loader(TransformedImages(data.train, *keys, augmented), True, settings, **common),
        _loader(TransformedImages(data.val, *keys, plain), False, settings, **common),
    )


def _loader(dataset, training: bool, settings: LoaderSettings, **more: Any) -> DataLoader:
    order = {"shuffle": True, "drop_last": True, "generator": torch.Generator().manual_seed(settings.seed)}
    size = settings.batch_size if training else settings.eval_batch_size
    return DataLoader(dataset, batch_size=size, **(order if training else {}), **more)
