"""Images read as they come, for data that are too large to hold or to copy."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image as PIL
from torch import Tensor
from torch.utils.data import get_worker_info

from apart_hf.data.dataset_base import EpochDataset, seeded
from apart_hf.data.decoding import IGNORED, BadImage, bad_image, rgb
from apart_hf.data.label_order import LabelOrder
from apart_hf.data.splits import Split
from apart_hf.errors import OneProcessError

if TYPE_CHECKING:
    from datasets import IterableDataset

_BLACK = PIL.new("RGB", (64, 64))


class StreamedImages(EpochDataset, torch.utils.data.IterableDataset):
    """Gives (image tensor (C, H, W), class index) of one process's share of a stream, which its loader processes split.

    In training an epoch has a fixed number of batches on every process, all of them full, and a process that runs out
    goes over its share again. In evaluation every image comes once. Where the rows are known, as of a folder of images,
    all of them are shuffled by (seed, epoch), and batches are the same for any number of loader processes. Else shards
    are shuffled and interleaved, then images through a buffer; where that leaves an order, `warning` says so.

    Args:
        split: a stream.
        transform: from an RGB image to a tensor.
        classes: class indices are below.
        process, processes: whose share.
        workers: loader processes.
        batches, batch_size: of an epoch of training, on this process; batches None: evaluation.
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
        self._order = LabelOrder(classes, workers + 1)
        self._warned = False
        self.split, self.transform, self.classes = split, transform, classes
        self.process, self.processes = process, processes
        self.batches, self.batch_size, self.buffer, self.seed = batches, batch_size, buffer, seed
        self.skip_bad, self.workers = skip_bad, workers

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

    def warning(self) -> str | None:
        """Say once, when it shows, that training images come in the order of their classes, with the cure."""
        found = None if self._warned else self._order.same()
        if found is None:
            return None
        self._warned = True
        share = -(-len(self.split) // (self.processes * max(self.workers, 1)))
        same, by_chance = (f"{100 * part:.2g} %" if part < 0.99 else f"{100 * part:.1f} %" for part in found)
        return (
            f"split {self.split.name!r} comes in the order of its classes, which spoils training: {same} of the images "
            f"are of the class of the one before them, {by_chance} would be by chance; take a larger --shuffle-buffer "
            f"than {self.buffer} (about {share} mend any order), shuffle the files' rows, or leave --streaming out."
        )

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        samples = self._samples(number, workers)
        if self.batches is None:
            yield from samples
        else:  # batches go round the loader processes
            share = len(range(number, self.batches, workers))
            yield from itertools.islice(samples, share * self.batch_size)

    def _pass(self, again: int) -> IterableDataset:
        """Open this process's share, for the first time in this epoch or once more, in another order.

        Not by the stream's own `set_epoch`: that is shared by all loader processes, which need not be in the same pass.
        """
        from datasets.distributed import split_dataset_by_node  # which data whose rows are known do without

        stream = self.split.data
        if self.batches is not None:
            order = np.random.SeedSequence([self.seed, self.epoch, again]).generate_state(1)[0]
            stream = stream.shuffle(seed=int(order), buffer_size=self.buffer)
        return split_dataset_by_node(stream, self.process, self.processes)

    def _rows(self, again: int, number: int, workers: int) -> np.ndarray:
        """Return which of the rows that are known a loader process gives, in order: whole batches, in turn."""
        rows = np.arange(len(self.split.data))
        if self.batches is not None:
            rows = np.random.default_rng([self.seed, self.epoch, again]).permutation(rows)
        own = rows[self.process :: self.processes]
        return own[np.arange(len(own)) // self.batch_size % workers == number]

    def _read(self, again: int, number: int, workers: int) -> Iterator[tuple[int | None, dict[str, Any]]]:
        """Read the rows of a pass with their indices; None: where they are in the split is not known."""
        if self.split.rows_known:
            yield from self.split.read_rows(self._rows(again, number, workers))
            return
        in_order = self.batches is None and self.processes == 1 and get_worker_info() is None
        for position, cell in enumerate(self.split.read(self._pass(again))):
            yield position if in_order else None, cell

    def _samples(self, worker: int, workers: int) -> Iterator[tuple[Tensor, int]]:
        training, position = self.batches is not None, 0
        slot = 0 if get_worker_info() is None else worker + 1
        for again in itertools.count():
            good = 0
            for index, cell in self._read(again, worker, workers):
                position += 1
                encoded, label = cell[self.split.input_key], cell[self.split.target_key]
                place = functools.partial(self._place, index, encoded, position, worker)
                index_of = range(self.classes) if self.split.relabel is None else self.split.relabel
                if label is None or not 0 <= label < len(index_of) or index_of[label] < 0:
                    raise OneProcessError(
                        f"{place(self.split.target_key)} has label {label}, outside 0..{len(index_of) - 1}; correct "
                        "it, or choose a labelled split."
                    )
                label = int(index_of[label])
                try:
                    image = rgb(encoded)
                except BadImage as error:
                    if not self.skip_bad:
                        raise bad_image(place(self.split.input_key), error) from error
                    self._skipped[slot] += 1
                    if not training:
                        yield torch.zeros_like(self.transform(_BLACK)), IGNORED
                    continue
                good += 1
                if training:
                    drawn_by = (self.process, worker, position) if index is None else (again, index)
                    with seeded(self.seed, self.epoch, *drawn_by):
                        sample = self.transform(image)
                    self._order.add(slot, label)
                else:
                    sample = self.transform(image)
                yield sample, label
            if not training:
                return
            if not good:
                raise OneProcessError(
                    f"no image of split {self.split.name!r} can be read by process {self.process} in loader process "
                    f"{worker}: the stream has {self.split.parts} parts there; use fewer --workers."
                )

    def _place(self, index: int | None, encoded: dict | None, position: int, worker: int, key: str) -> str:
        """Say where an image is: its index in the split where that is known or found, else how many were read."""
        if index is None:
            index = self.split.find(encoded)
        if index is not None:
            return self.split.place(index, encoded, key)
        return (
            f"the {position}. image of split {self.split.name!r} that process {self.process} has read in loader "
            f"process {worker} ({self.split.origin(None, key, encoded)})"
        )
