"""Images read as they come, for data that are too large to hold or to copy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image as PIL
from torch import Tensor
from torch.utils.data import get_worker_info

from apart_hf.data.dataset_base import EpochDataset, seeded
from apart_hf.data.decoding import IGNORED, BadImage, bad_image, rgb
from apart_hf.data.splits import Split
from apart_hf.errors import OneProcessError

_BLACK = PIL.new("RGB", (64, 64))


class StreamedImages(EpochDataset, torch.utils.data.IterableDataset):
    """Gives (image tensor (3, H, W), class index) of one process's share of a stream, which its loader processes split.

    In training an epoch has a fixed number of batches on every process, all of them full: shards are shuffled, then
    images through a buffer, by (seed, epoch), and a process that runs out goes over its share again. In evaluation
    every image comes once.

    Args:
        split: a stream.
        transform: from an RGB image to a tensor.
        classes: class indices are below.
        process, processes: whose share.
        workers: loader processes.
        batches, batch_size: of an epoch of training, on this process; None: evaluation.
        buffer: images that are shuffled among themselves.
        seed: of order and augmentation.
        skip_bad: pass over images that cannot be decoded (in evaluation: a row of class `IGNORED`); else they are an
            ApartError.
    """

    def __init__(
        self,
        split: Split,
        transform: Callable,
        *,
        classes: int,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
        batches: int | None = None,
        batch_size: int = 1,
        buffer: int = 2048,
        seed: int = 0,
        skip_bad: bool = False,
    ):
        super().__init__(workers)
        self._skipped = torch.zeros(workers + 1, dtype=torch.int64).share_memory_()  # one writer each
        self.split, self.transform, self.classes = split, transform, classes
        self.process, self.processes = process, processes
        self.batches, self.batch_size, self.buffer, self.seed = batches, batch_size, buffer, seed
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        """Count the images of an epoch on this process; of training alone."""
        if self.batches is None:
            raise TypeError("the number of images of an evaluation stream is not known")
        return self.batches * self.batch_size

    def take_skipped(self) -> int:
        """Count the images passed over since the last call."""
        count = int(self._skipped.sum())
        self._skipped.zero_()
        return count

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        samples = self._samples(number)
        if self.batches is None:
            yield from samples
        else:  # batches go round the loader processes
            share = len(range(number, self.batches, workers))
            yield from itertools.islice(samples, share * self.batch_size)

    def _pass(self, again: int) -> IterableDataset:
        """Open this process's share, for the first time in this epoch or once more, in another order.

        Not by the stream's own `set_epoch`: that is shared by all loader processes, which need not be in the same pass.
        """
        stream = self.split.data
        if self.batches is not None:
            order = np.random.SeedSequence([self.seed, self.epoch, again]).generate_state(1)[0]
            stream = stream.shuffle(seed=int(order), buffer_size=self.buffer)
        return split_dataset_by_node(stream, self.process, self.processes)

    def _samples(self, worker: int) -> Iterator[tuple[Tensor, int]]:
        training, position = self.batches is not None, 0
        for again in itertools.count():
            stream, good = self._pass(again), 0
            for cell in self.split.read(stream):
                position += 1
                encoded, label = cell[self.split.input_key], cell[self.split.target_key]
                place = self._place(position, encoded, worker)
                self._check_label(label, place)
                label = label if self.split.relabel is None else int(self.split.relabel[label])
                try:
                    image = rgb(encoded)
                except BadImage as error:
                    if not self.skip_bad:
                        raise bad_image(place, error) from error
                    self._skipped[0 if get_worker_info() is None else worker + 1] += 1
                    if not training:
                        yield torch.zeros_like(self.transform(_BLACK)), IGNORED
                    continue
                good += 1
                if training:
                    with seeded(self.seed, self.epoch, self.process, worker, position):
                        sample = self.transform(image)
                else:
                    sample = self.transform(image)
                yield sample, label
            if not training:
                return
            if not good:
                raise OneProcessError(
                    f"no image of split {self.split.name!r} can be read by process {self.process} in loader process "
                    f"{worker}: the stream has {stream.num_shards} parts there; use fewer --workers."
                )

    def _place(self, position: int, encoded: dict | None, worker: int) -> str:
        """Say where an image is: its index where the stream comes in order, else how many were read."""
        if self.batches is None and self.processes == 1 and get_worker_info() is None:
            return self.split.place(position - 1)
        path = (encoded or {}).get("path")
        return (
            f"the {position}. image{f' ({path})' if path else ''} of split {self.split.name!r} that process "
            f"{self.process} has read in loader process {worker}"
        )

    def _check_label(self, label: int | None, place: str) -> None:
        if label is None or not 0 <= label < self.classes:
            raise OneProcessError(
                f"{place} has label {label}, outside 0..{self.classes - 1}; correct it, or choose a labelled split."
            )
