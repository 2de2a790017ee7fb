"""Load batches in workers. Handle their seeds, signals and shared memory.

Loaders yield uint8 images (B, 3, H, W) and class indices (B,). Normalization, random erasing and mixup are applied to
the whole batch on the device (engine.py).
"""
import itertools
import logging
import random
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from errors import UnreadableImage, one_line, printable
from samplers import TrainSampler, eval_indices
from system import leave_signals_to_the_run, signals_blocked

logger = logging.getLogger(__name__)

BAD_IMAGES_IN_A_ROW = 10


class _Wrapper(Dataset):

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)


class SeededDataset(_Wrapper):
    """Read training samples by (index, seed): a sample's augmentation depends only on the seed.

    timm and torchvision draw from `random`, NumPy and torch, so each sample seeds all three. torch is seeded only on
    the CPU, as torch.manual_seed takes 0.1 ms to find other devices. An unreadable image is logged, and the next image
    is read instead; ten in a row raise UnreadableImage.
    """

    def __getitem__(self, key: tuple[int, int]):
        index, seed = key
        for attempt in range(BAD_IMAGES_IN_A_ROW):
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            current = (index + attempt) % len(self)
            try:
                return self.dataset[current]
            except Exception as error:  # Pillow can raise exceptions of any type on damaged files.
                name = image_name(self.dataset, current)
                logger.warning('cannot read %s (%s): using the next image instead', name, one_line(error))
        raise UnreadableImage(
            f'{BAD_IMAGES_IN_A_ROW} images in a row could not be read, the last one {name}: check the training data')


class ValidationDataset(_Wrapper):
    """Read validation samples; raise UnreadableImage for a damaged one, since skipping it would change the score."""

    def __getitem__(self, index: int):
        try:
            return self.dataset[index]
        except UnreadableImage:
            raise
        except Exception as error:
            raise UnreadableImage(f'cannot read validation image {image_name(self.dataset, index)} '
                                  f'({one_line(error)}): replace or remove it, since skipping it would change '
                                  'the score') from error


def image_name(dataset: Dataset, index: int) -> str:
    """Return the file of a sample, or its index if the data set has no files."""
    samples = getattr(dataset, 'samples', None)
    return printable(samples[index][0]) if samples else f'image {index} of {type(dataset).__name__}'


class SignalSafeLoader(DataLoader):
    """Protect the workers of torch's DataLoader from signals that the run did not send.

    Ctrl-C, SLURM and `timeout` signal a whole process group, but a run that saves its state still needs its workers. A
    SIGTERM before `worker_init_fn` would kill a worker, so signals are blocked before the fork.
    """
    started = None

    def start(self) -> None:
        """Load the first batch of the next iteration now, so that loading errors appear before long work."""
        batches = iter(self)
        self.started = itertools.chain(list(itertools.islice(batches, 1)), batches)

    def __iter__(self):
        if self.started is not None:
            batches, self.started = self.started, None
            return batches
        with signals_blocked():
            return super().__iter__()


def collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack samples into uint8 images (B, 3, H, W) in the samples' memory format, and class indices (B,).

    torch's default_collate writes a batch to shared memory. timm's fast_collate writes to the worker's heap: the batch
    is copied again, and fragmentation makes the heap grow without bound.
    """
    images, targets = zip(*samples)
    if images[0].is_contiguous():
        return default_collate(images), torch.tensor(targets)
    return default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2), torch.tensor(targets)


def build_loader(
        dataset: Dataset, batch_size: int, *, sampler: TrainSampler | None = None, rank: int = 0, world_size: int = 1,
        num_workers: int = 0, pin_memory: bool = False, timeout: float = 0, collate_fn: Callable = collate
) -> SignalSafeLoader:
    """Build a loader, for training if `sampler` is given, else for validation.

    Args:
        dataset: samples; for `collate`, uint8 images (3, H, W) and class indices.
        batch_size: images in a batch of this rank.
        sampler: yields (index, seed) pairs for training; None for this rank's share of the data set, in order.
        rank, world_size: this process, and the number of processes that share the data set.
        num_workers, pin_memory, timeout, collate_fn: as in torch's DataLoader.
    """
    if sampler is None:
        dataset, order = ValidationDataset(dataset), eval_indices(len(dataset), batch_size, rank, world_size)
    else:
        dataset, order = SeededDataset(dataset), sampler
    warnings.filterwarnings('ignore', 'This DataLoader will create')  # train.py gives its own advice on workers.
    return SignalSafeLoader(
        dataset, batch_size, sampler=order, num_workers=num_workers, pin_memory=pin_memory, collate_fn=collate_fn,
        worker_init_fn=leave_signals_to_the_run,
        timeout=timeout if num_workers else 0,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # Draw the loader's base seed without advancing the global generator.
    )
