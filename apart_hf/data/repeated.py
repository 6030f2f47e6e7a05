"""The order of an epoch in which each image comes several times, in other augmentations."""

from __future__ import annotations

import numpy as np
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset


class RepeatedImages(RepeatAugSampler):
    """Draws by seed and epoch: timm's sampler, which draws by the epoch alone.

    The images come in random order, each of them `repeats` times in a row, and these go round the processes; an epoch
    ends where as many images have been shown as the split has, or a little fewer, so that the last ones do not come.

    Args:
        dataset: of the images.
        repeats: how often each comes, at least 1.
        seed: of the order.
        process, processes: whose share.
    """

    def __init__(self, dataset: Dataset, repeats: float, *, seed: int, process: int, processes: int):
        super().__init__(dataset, num_replicas=processes, rank=process, num_repeats=repeats)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from now on."""
        super().set_epoch(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]))
