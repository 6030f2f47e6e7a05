"""DataLoaders for the splits: batches from memory for small images, loader processes for others, or a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from apart_hf.data.dataset_map import TransformedImages
from apart_hf.data.dataset_memory import InMemoryImages, OtherSize, decode, fits_in_memory
from apart_hf.data.dataset_stream import StreamedImages
from apart_hf.data.decoded_cache import DecodedCache, cache_folder
from apart_hf.data.decoding import IGNORED
from apart_hf.data.loading import ImageData
from apart_hf.data.packed import PackedTable
from apart_hf.data.repeated import RepeatedImages
from apart_hf.data.settings import CHANNELS, LoaderSettings
from apart_hf.data.splits import Split
from apart_hf.data.transforms import ON_SINGLE_IMAGES, SMALL, eval_transform, train_transform
from apart_hf.errors import ApartError
from apart_hf.utils.processes import in_a_group_of_its_own


class Loaders:
    """Makes the loaders of a run, one a split, for one process of an `accelerator`.

    A training loader has full batches only, as many on every process. An evaluation loader has this process's own
    share, so that every image comes once: shares may differ by a batch. Rows of class `IGNORED` stand for no image.

    Args:
        data: the splits.
        settings: how.
        accelerator: places batches on its device.

    Raises:
        ApartError: where "memory" is asked for and cannot be had, the network takes other images than grey and RGB
            ones, or the data have less than one step.
    """

    def __init__(self, data: ImageData, settings: LoaderSettings, accelerator: Accelerator):
        self.data, self.settings, self.accelerator = data, settings, accelerator
        keeps = settings.decoded_cache and not isinstance(data.train.data, PackedTable)
        self._cache = DecodedCache(cache_folder()) if keeps else None
        self._made: list[DataLoaderShard] = []
        channels = settings.images["input_size"][0]
        if channels not in CHANNELS:
            raise ApartError(f"the network takes images of {channels} channels, and they are read with 1 or 3 only.")
        reason, self.kind = self._no_memory(), settings.loader
        if self.kind == "memory" and reason:
            raise ApartError(f"--loader memory: {reason}; use --loader workers.")
        if self.kind == "auto":
            self.kind = "workers" if reason else "memory"
        if data.train.size is not None:
            self._check_size(data.train.size, "")

    def train(self) -> DataLoaderShard:
        """Make shuffled, augmented batches of (images, class indices)."""
        self._made.append(self._train())
        return self._made[-1]

    def evaluation(self, split: Split) -> DataLoaderShard:
        """Make plain batches of this process's share of a split, in its order."""
        self._made.append(self._evaluation(split))
        return self._made[-1]

    def close(self) -> None:
        """End the loader processes of all that was made.

        They would end by themselves where the garbage is collected, but only after five seconds each: what wakes them
        is collected before.
        """
        for loader in self._made:
            loader.base_dataloader._iterator = None  # torch has no public way
        self._made.clear()

    def _train(self) -> DataLoaderShard:
        if self.data.train.streamed:
            return self._stream(self.data.train, training=True)
        dataset = self._dataset(self.data.train, training=True)
        self._check_size(len(dataset), " that can be decoded")
        order = torch.Generator().manual_seed(self.settings.seed)
        size, arguments = self.settings.batch_size, self._arguments(dataset) | {"drop_last": True, "generator": order}
        if self.settings.repeats:
            sampler = self._repeated(dataset)
            device = self.accelerator.device
            return DataLoaderShard(dataset, device, batch_size=size, sampler=sampler, **arguments)
        return self.accelerator.prepare(DataLoader(dataset, size, shuffle=True, **arguments))

    def _evaluation(self, split: Split) -> DataLoaderShard:
        if split.streamed:
            return self._stream(split, training=False)
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        share = split if processes == 1 else split.part(np.arange(process, len(split), processes))
        dataset = self._dataset(share, training=False)
        return DataLoaderShard(
            dataset, self.accelerator.device, batch_size=self.settings.eval_batch_size, **self._arguments(dataset)
        )

    def _repeated(self, dataset: Dataset) -> RepeatedImages:
        """Make the order of a training split whose images come several times, of this process's share.

        Raises:
            ApartError: where the share has less than one batch.
        """
        settings, accelerator = self.settings, self.accelerator
        sampler = RepeatedImages(
            dataset,
            settings.repeats,
            seed=settings.seed,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        if len(sampler) < settings.batch_size:
            raise ApartError(
                f"--aug-repeats {settings.repeats:g}: {len(sampler)} images are shown to each of "
                f"{accelerator.num_processes} process(es) in an epoch, fewer than --batch-size {settings.batch_size}; "
                "use a smaller batch."
            )
        return sampler

    def _check_size(self, images: int, which: str) -> None:
        processes = self.accelerator.num_processes
        needed = self.settings.batch_size * processes
        if images < needed:
            raise ApartError(
                f"split {self.data.train.name!r} has {images} images{which}, fewer than one step of {needed} "
                f"(--batch-size {self.settings.batch_size} x {processes} process(es)); use a smaller batch."
            )

    @property
    def _padding(self) -> int:
        return self.data.spec.padding if self.settings.padding is None else self.settings.padding

    @property
    def _augmentation(self) -> dict[str, Any]:
        return self.settings.augmentation or {}

    @property
    def _seed(self) -> int:
        """Return the seed of what is drawn for a batch; repeated images come to several processes, and differ there."""
        if not self.settings.repeats or self.accelerator.num_processes == 1:
            return self.settings.seed
        entropy = np.random.SeedSequence([self.settings.seed, self.accelerator.process_index])
        return int(entropy.generate_state(1)[0])

    def _no_memory(self) -> str | None:
        """Say why the images cannot be kept in memory; None: they can."""
        if self.data.train.streamed:
            return "a stream is not kept"
        channels, _, edge = self.settings.images["input_size"]
        images = len(self.data.train) + len(self.data.val)
        if self.data.image_size != (edge, edge) or edge > SMALL:
            width, height = self.data.image_size
            return f"images of {width}x{height} pixels are no small squares of the network's input size ({edge}x{edge})"
        used = [f"--{name.replace('_', '-')}" for name in ON_SINGLE_IMAGES if self._augmentation.get(name)]
        if used:
            return f"{', '.join(used)} works on single images"
        if self.settings.images["crop_pct"] != 1:
            return f"--crop-pct {self.settings.images['crop_pct']} resizes single images"
        if self.settings.loader == "auto" and not fits_in_memory(images, edge, self._padding, channels):
            return f"{images} images are too many to keep unasked"
        return None

    def _dataset(self, split: Split, training: bool) -> TransformedImages | InMemoryImages:
        if self.kind == "memory":
            try:
                return self._from_memory(split, training)
            except OtherSize:
                if self.settings.loader == "memory":
                    raise
                self.kind = "workers" if training else self.kind
        return TransformedImages(
            split,
            self._transform(training),
            training=training,
            seed=self._seed,
            skip_bad=self.settings.skip_bad,
            workers=self.settings.workers,
        )

    def _from_memory(self, split: Split, training: bool) -> InMemoryImages:
        decoded, good = decode(
            split,
            self.settings.images["input_size"][-1],
            channels=self.settings.images["input_size"][0],
            skip_bad=self.settings.skip_bad,
            progress=f"decoding split {split.name}",
            cache=self._cache,
        )
        labels, skipped = split.labels(), int((~good).sum())
        if training:
            decoded, labels = (decoded[good], labels[good.numpy()]) if skipped else (decoded, labels)
        else:
            labels = np.where(good.numpy(), labels, IGNORED)  # so that the others keep their places
        if training and not self.accelerator.is_main_process:
            skipped = 0  # every process decodes all of them, and one reports
        return InMemoryImages(
            decoded,
            labels,
            self.settings.images["mean"],
            self.settings.images["std"],
            seed=self._seed,
            device=self.accelerator.device,
            skipped=skipped,
            padding=self._padding if training and not self._augmentation.get("no_aug") else 0,
            flip=training and not self._augmentation.get("no_aug"),
            **{name: self._augmentation[name] for name in ("hflip", "vflip") if name in self._augmentation},
        )

    def _transform(self, training: bool) -> Callable[[Image], Tensor]:
        if not training:
            return eval_transform(self.settings.images)
        return train_transform(self.settings.images, self.data.image_size, self._padding, **self._augmentation)

    def _arguments(self, dataset: Dataset) -> dict[str, Any]:
        if isinstance(dataset, InMemoryImages):
            return {"collate_fn": InMemoryImages.collate}
        return self._processes(self.settings.workers)

    def _processes(self, workers: int) -> dict[str, Any]:
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "worker_init_fn": in_a_group_of_its_own if workers else None,
            "pin_memory": self.accelerator.device.type == "cuda",
        }

    def _stream(self, split: Split, training: bool) -> DataLoaderShard:
        settings, processes = self.settings, self.accelerator.num_processes
        size = settings.batch_size if training else settings.eval_batch_size
        parts = split.parts
        workers = min(settings.workers, parts // processes if parts % processes == 0 else parts)  # one part each
        dataset = StreamedImages(
            split,
            self._transform(training),
            classes=len(self.data.class_names),
            workers=workers,
            process=self.accelerator.process_index,
            processes=processes,
            seed=settings.seed,
            batches=len(split) // (size * processes) if training else None,
            batch_size=size,
            buffer=settings.shuffle_buffer,
            skip_bad=settings.skip_bad,
        )
        return DataLoaderShard(
            dataset, self.accelerator.device, batch_size=size, drop_last=training, **self._processes(workers)
        )
