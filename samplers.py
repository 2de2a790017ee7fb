"""Order an epoch's samples, divide them among ranks, and resume in the middle of an epoch."""
from collections.abc import Iterator

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Sampler


class TrainSampler(Sampler):
    """Yield an epoch's samples for one rank, as (index, seed) pairs.

    The epoch is one sequence of positions, the same for every world size: position p is the sample `order[p]`,
    augmented with `seeds[p]`. Both depend only on (seed, epoch). Rank r of W yields the positions r, r + W,
    r + 2 W, ... counted from the first position not yet seen. After any number of steps the samples seen are thus a
    prefix of the sequence, and a run can resume there with a different number of ranks. The distributed samplers of
    timm and torch can neither start in mid-epoch nor yield seeds.

    With repeated augmentation the order is that of DeiT's RASampler (timm's RepeatAugSampler): each sample `repeats`
    times in a row, cut to the length of the data set, rounded down to a multiple of 256. With 3 repeats an epoch sees a
    third of the samples three times.

    Args:
        length: samples in the data set.
        batch_size: samples of one rank and one forward pass.
        accum_steps: forward passes of an optimizer step.
        repeats: copies of each sample (3 with repeated augmentation).
        rank, world_size: this process, and the number of processes that share the epoch.
        seed: seed of the run.
        even: yield an even number of samples, which mixup needs, even if the only batch is partial.
    """

    def __init__(self, length: int, batch_size: int, accum_steps: int = 1, repeats: int = 1, rank: int = 0,
                 world_size: int = 1, seed: int = 0, even: bool = False):
        self.length = length
        self.batch_size = batch_size
        self.accum_steps = accum_steps
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.even = even
        self.epoch = 0
        self.samples_seen = 0
        self.repeated = None
        if repeats > 1:  # With one replica, timm's sampler returns the samples of all ranks together.
            self.repeated = RepeatAugSampler(range(length), num_replicas=1, rank=0, num_repeats=repeats)
        self.epoch_length = len(self.repeated) if self.repeated else length

    def set_position(self, epoch: int, samples_seen: int = 0) -> None:
        """Set the epoch, and the number of its samples that all ranks together have seen."""
        self.epoch = epoch
        self.samples_seen = samples_seen

    @property
    def samples_per_update(self) -> int:
        """Count the samples of an optimizer step over all ranks."""
        return min(self.batch_size * self.accum_steps, self._partial()) * self.world_size

    @property
    def updates(self) -> int:
        """Count the optimizer steps left in the epoch. A partial step counts only if the epoch has no full step."""
        if self.epoch_length >= self.batch_size * self.accum_steps * self.world_size:
            return (self.epoch_length - self.samples_seen) // self.samples_per_update
        return int(self.samples_seen == 0)

    def _partial(self) -> int:
        """Count one rank's samples in an epoch that is shorter than an optimizer step."""
        batch = min(self.batch_size, self.epoch_length // self.world_size)
        if self.even:
            batch -= batch % 2
        batch = max(batch, 1 + self.even)
        return batch * max(1, self.epoch_length // self.world_size // batch)

    def __len__(self) -> int:
        return self.updates * self.samples_per_update // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        entropy = np.random.SeedSequence((self.seed, self.epoch))
        order_seed = int(entropy.generate_state(1)[0])
        if self.repeated:
            self.repeated.set_epoch(order_seed)
            order = list(self.repeated)
        else:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(order_seed)).tolist()
        seeds = np.random.default_rng(entropy).integers(2 ** 32, size=self.epoch_length)
        for i in range(len(self)):
            position = (self.samples_seen + self.rank + i * self.world_size) % self.epoch_length
            yield order[position], int(seeds[position])


def eval_indices(length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[int]:
    """Return this rank's share of a validation set, without padding, so that counts are exact.

    Ranks take whole batches in turn, so any number of ranks computes the same batches, with the same rounding.
    """
    return [i for i in range(length) if i // batch_size % world_size == rank]
