"""Build data sets and loaders.

Loaders yield uint8 images (B, 3, H, W) and class indices (B,). Normalisation, random erasing and mixup are applied to
the whole batch on the device (engine.py).
"""
import contextlib
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_dataset
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate
from torchvision import datasets as tv_datasets
from torchvision import transforms as tv_transforms

from samplers import TrainSampler, eval_indices
from sources import EncodedImages, ImageFolder, Samples, find_part, has_part, open_image, printable

logger = logging.getLogger(__name__)

BAD_IMAGES_IN_A_ROW = 10
PREFETCH = 2  # batches that each loader process has ready, torch's default
SHARED_MEMORY = Path('/dev/shm')  # Linux


class INaturalist(EncodedImages):
    """Read iNaturalist 2018, 2019 or 2021 by its JSON files.

    torchvision's class of that name has no validation part.

    Args:
        root: folder with train2018.json and val2018.json (2021 also: train.json, val.json), the images under the
            names in these files, and categories.json if these files do not name the species.
        year: year of the competition.
        train: True for the training part, False for the validation part.
        category: rank of the classes, one of options.INAT_CATEGORIES.
        transform: as of EncodedImages.

    Raises:
        ValueError: no such file, or a file without that category.
    """

    def __init__(self, root: str | Path, year: int, train: bool, category: str = 'name',
                 transform: Callable | None = None):
        root = Path(root)
        part = self._read(root, 'train' if train else 'val', year)
        both = root / 'categories.json'
        categories = json.loads(both.read_text()) if both.is_file() else self._read(root, 'train', year)['categories']
        if not all(category in entry for entry in categories):
            raise ValueError(f'the categories of iNaturalist {year} in {root} have no {category}')
        names = {entry['id']: entry[category] for entry in categories}
        self.classes = sorted(set(names.values()))
        index = {name: i for i, name in enumerate(self.classes)}
        files = {image['id']: str(root / image['file_name']) for image in part['images']}
        super().__init__(Samples([files[a['image_id']] for a in part['annotations']],
                                 [index[names[a['category_id']]] for a in part['annotations']]), transform)

    @staticmethod
    def _read(root: Path, part: str, year: int) -> dict:
        paths = [root / f'{part}{year}.json', root / f'{part}.json']
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ValueError(f'no {paths[0]}: --data-path takes the folder that iNaturalist {year} was unpacked to, '
                             'https://github.com/visipedia/inat_comp')
        return json.loads(path.read_text())


class Digits(Dataset):
    """Read the 1,797 scanned digits of scikit-learn (8 x 8, 17 grey levels) as RGB images.

    The same 360 digits, a fifth of each class, are always held out for validation.

    Args:
        train: True for the 1,437 training images, False for the 360 validation images.
        size: height and width of the images (pixels).
        transform: applied to each image.
    """

    def __init__(self, train: bool, size: int, transform: Callable | None = None):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        digits = load_digits()
        split = train_test_split(digits.images, digits.target, test_size=360, random_state=0, stratify=digits.target)
        images, targets = split[0::2] if train else split[1::2]
        # a margin of one pixel: strokes reach the border, and evaluation's centre crop would cut them off
        images = np.pad(np.round(images * 255 / 16).astype(np.uint8), ((0, 0), (1, 1), (1, 1)))
        self.images = [
            Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC).convert('RGB') for image in images]
        self.targets = targets.tolist()
        self.classes = [str(name) for name in digits.target_names]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        image = self.images[index]
        return self.transform(image) if self.transform else image, self.targets[index]


class UnreadableImage(RuntimeError):
    """Report an image that the run cannot continue without."""

    @property
    def line(self) -> str:
        """Return the message alone: a loader process prepends its traceback to the message."""
        return str(self).strip().splitlines()[-1].removeprefix('datasets.UnreadableImage: ')


class KeyedDataset(Dataset):
    """Read training samples by (index, seed): the seed alone determines a sample's augmentation.

    timm and torchvision draw from `random`, NumPy and torch, so all three are seeded for each sample. torch is seeded
    on the CPU alone: torch.manual_seed takes a tenth of a millisecond to look for devices. An unreadable image is
    reported and the next image is read instead.

    Raises:
        UnreadableImage: ten unreadable images in a row.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]):
        index, seed = key
        for attempt in range(BAD_IMAGES_IN_A_ROW):
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            current = (index + attempt) % len(self)
            try:
                return self.dataset[current]
            except Exception as error:  # Pillow's plugins raise exceptions of any type on damaged files
                name = image_name(self.dataset, current)
                logger.warning('cannot read %s (%s): taking the next image instead', name, one_line(error))
        raise UnreadableImage(
            f'{BAD_IMAGES_IN_A_ROW} images in a row could not be read, the last one {name}: check the training data')


class NamedErrors(Dataset):
    """Read validation samples; raise UnreadableImage for an image that cannot be read.

    Leaving the image out would give the score of other images.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        try:
            return self.dataset[index]
        except UnreadableImage:
            raise
        except Exception as error:
            raise UnreadableImage(f'cannot read validation image {image_name(self.dataset, index)} '
                                  f'({one_line(error)}): replace or remove it, since the score would be of '
                                  'other images') from error


def one_line(error: Exception) -> str:
    """Return the reason why an image cannot be read, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return 'no image'  # Pillow's own message names an object in memory
    return ' '.join(str(error).split()) or type(error).__name__


def image_name(dataset: Dataset, index: int) -> str:
    """Return the file of a sample, or its index if the data set has no files."""
    samples = getattr(dataset, 'samples', None)
    return printable(samples[index][0]) if samples else f'image {index} of {type(dataset).__name__}'


def build_dataset(
        name: str,
        is_train: bool,
        data_path: str | None,
        input_size: int,
        transform: Callable | None = None,
        classes: list[str] | None = None,
        val_split: float = 0.,
        class_map: str | None = None,
        category: str = 'name',
) -> Dataset:
    """Build a data set of (image, class index) samples.

    Its `classes` are the class names in the order of their index.

    Args:
        name: one of options.DATA_SETS, 'torch/NAME' for timm's readers of torchvision's data sets, or 'wds/NAME' for
            tar shards.
        is_train: True for the training part, False for the validation part.
        data_path: for IMNET the folder or tar that contains both parts (sources.find_part); for other data sets the
            folder to read from or to download to.
        input_size: height and width of the images of DIGITS, in pixels.
        transform: applied to each PIL image, or to the bytes of its file (sources.EncodedImages).
        classes: class names in the order of their index, for a validation folder; those of the folder if None.
        val_split: share of each class of an IMNET folder without val/ that is held out for validation.
        class_map: file with the class folders of IMNET in the order of their index, one a line.
        category: rank of INAT's classes.

    Raises:
        ValueError: data that is missing or unusable.
    """
    if name.startswith('wds/'):
        name = 'IMNET'  # shards are recognised by their .cls files
    if name != 'IMNET' and (val_split or class_map):
        raise ValueError(f'--val-split and --class-map are for folders of images, not for --data-set {name}')
    if name == 'DIGITS':
        return Digits(is_train, input_size, transform)
    if name != 'IMNET' and not name.startswith('INAT'):
        root = data_path or 'data'
        try:
            return _torchvision(name, root, is_train, transform)
        except (OSError, RuntimeError, AssertionError) as error:
            raise ValueError(f'{name} is not in {root} and could not be downloaded '
                             f'({(str(error).strip() or repr(error)).splitlines()[0]})') from error
    if not data_path:
        raise ValueError('--data-path is missing: the folder that contains train/ and val/ '
                         '(--data-set DIGITS needs none and no network)')
    if name.startswith('INAT'):
        return INaturalist(data_path, 2000 + int(name[4:]), is_train, category, transform)
    if class_map:
        classes = _read_class_map(class_map)
    if not val_split:
        return find_part(data_path, 'train' if is_train else 'val', transform, classes)
    return _split(open_undivided(data_path, transform, classes), val_split, is_train)


def _read_class_map(file: str) -> list[str]:
    try:
        classes = [line.strip() for line in Path(file).read_text('utf-8-sig').splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'--class-map {file}: {error}') from None
    if len(set(classes)) != len(classes) or not classes:
        raise ValueError(f'--class-map {file}: {"a class is there twice" if classes else "no classes in it"}')
    return classes


def open_undivided(data_path: str, transform: Callable | None, classes: list[str] | None) -> EncodedImages:
    """Open the images that --val-split divides: train/, training tars, or class folders."""
    root = Path(data_path)
    if root.is_dir() and has_part(data_path, 'val'):
        raise ValueError(f'{root} has a validation part: leave --val-split out')
    folders = {path.name for path in root.glob('[!.]*') if path.is_dir()}
    if len(folders) > 1 and all(re.fullmatch('(train|test|val)(ing|id|idation)?', name.lower()) for name in folders):
        raise ValueError(f'{root} contains {" and ".join(sorted(folders))}: parts, not classes. Name them train and '
                         'val; --val-split is for folders of classes')
    if 'train' in folders or not folders and has_part(data_path, 'train'):
        return find_part(data_path, 'train', transform, classes)
    return ImageFolder(root, transform, classes)


def _split(dataset: EncodedImages, val_split: float, is_train: bool) -> EncodedImages:
    """Keep a folder's training or validation part: the same images for every seed of the run."""
    targets, kept = np.array(dataset.targets), []
    for label in np.unique(targets):
        order = np.random.RandomState(0).permutation(np.flatnonzero(targets == label))
        held_out = round(val_split * len(order))
        kept += (order[held_out:] if is_train else order[:held_out]).tolist()
    if not kept:
        raise ValueError(f'--val-split {val_split} leaves no images for {"training" if is_train else "validation"}')
    dataset.keep(sorted(kept))
    return dataset


def _torchvision(name: str, root: str, is_train: bool, transform: Callable | None) -> Dataset:
    if name == 'CARS':  # without download: the address no longer exists
        return tv_datasets.StanfordCars(root, 'train' if is_train else 'test', transform)
    if name == 'PETS':
        return tv_datasets.OxfordIIITPet(root, 'trainval' if is_train else 'test', transform=transform, download=True)
    if name == 'FLOWERS102':  # published results train on both small parts
        dataset = ConcatDataset([tv_datasets.Flowers102(root, part, transform, download=True)
                                 for part in (('train', 'val') if is_train else ('test',))])
        dataset.classes = list(tv_datasets.Flowers102.classes)
        return dataset
    if name.startswith('torch/'):
        # MNIST and others are grey
        transform = tv_transforms.Compose([open_image, *([transform] if transform else [])])
        dataset = create_dataset(name, root, 'train' if is_train else 'validation', download=True, transform=transform)
        if not hasattr(dataset, 'classes'):
            raise ValueError(f'--data-set {name} does not name its classes')
        return dataset
    return getattr(tv_datasets, name)(root, train=is_train, transform=transform, download=True)


_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


@contextlib.contextmanager
def _signals_blocked():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Loader(DataLoader):
    """Protect the processes of torch's DataLoader from signals that the run itself did not send.

    Ctrl-C, SLURM and `timeout` signal every process of a group, but a run that saves its state still needs its loader.
    Any SIGTERM before `worker_init_fn` would end a process of torch's, so signals are blocked before the fork.
    """
    started = None

    def start(self) -> None:
        """Load the first batch of the next iteration now, so that faults of the loader come before long work."""
        batches = iter(self)
        self.started = itertools.chain(list(itertools.islice(batches, 1)), batches)

    def stop(self) -> None:
        """End the loader processes; the next iteration starts others."""
        with _signals_blocked():  # Python ignores a KeyboardInterrupt in __del__
            self.started = self._iterator = None

    def __iter__(self):
        if self.started is not None:
            batches, self.started = self.started, None
            return batches
        with _signals_blocked():
            return super().__iter__()


def _leave_signals_to_the_run(worker: int) -> None:
    """Ignore signals in a loader process, but for SIGTERM from the run."""
    if not multiprocessing.parent_process().is_alive():  # torch looks for a parent that dies later
        os._exit(1)
    if not hasattr(signal, 'sigwaitinfo'):  # macOS does not report the sender of a signal
        for number in _SIGNALS - {signal.SIGTERM}:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # a forkserver's processes do not inherit the run's mask
    run = multiprocessing.parent_process()  # os.getppid() would be the forkserver

    def wait() -> None:
        while True:
            received = signal.sigtimedwait(_SIGNALS, 2)
            if received is None:
                if not run.is_alive():  # torch looks too, but then waits for a pipe that nobody empties any more
                    os._exit(1)
            elif received.si_signo == signal.SIGTERM and received.si_pid == run.pid:
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack samples to uint8 images (B, 3, H, W) and class indices (B,).

    Images keep their memory format.
    torch's default_collate writes a batch to shared memory. timm's fast_collate writes to the heap of the loader
    process: the batch is copied once more, and the heap grows without end by the holes that batches leave.
    """
    images, targets = zip(*samples)
    if images[0].is_contiguous():
        return default_collate(images), torch.tensor(targets)
    return default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2), torch.tensor(targets)


def check_shared_memory(images: int, size: int, num_workers: int) -> None:
    """Check that batches of loader processes fit into shared memory.

    torch reports a shortage by 25 lines of traceback, or ends the loader process by SIGBUS.

    Args:
        images: number of images in all batches that are ready at a time on this host.
        size: height and width of the images (pixels).
        num_workers: loader processes; 0 needs no shared memory.

    Raises:
        ValueError: shared memory that is too small, or cannot be written to.
    """
    if not num_workers or not SHARED_MEMORY.is_dir():
        return
    if not os.access(SHARED_MEMORY, os.W_OK):
        raise ValueError(f'{SHARED_MEMORY} cannot be written to, and loader processes need it: use --num-workers 0')
    found, needed = os.statvfs(SHARED_MEMORY), images * 3 * size ** 2
    free = found.f_bavail * found.f_frsize
    if needed > free:
        raise ValueError(
            f'{SHARED_MEMORY} has {free / 1e6:.0f} MB free, but loader processes need {needed / 1e6:.0f} MB: use fewer '
            f'--num-workers (0 needs none), or give docker --shm-size={math.ceil(needed / 2 ** 30)}g or --ipc=host')


def build_loader(
        dataset: Dataset,
        batch_size: int,
        *,
        sampler: TrainSampler | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        timeout: float = 0,
        collate_fn: Callable = collate,
) -> DataLoader:
    """Build a loader: for training with a sampler, else for validation.

    Args:
        dataset: samples, for `collate` uint8 images (3, H, W) and class indices.
        batch_size: images of this rank a batch.
        sampler: order and seeds of training; without a sampler, this rank's share of the data set in order.
        rank, world_size: this process, and the number of processes that share the data set.
        num_workers: loader processes; 0 loads in this process.
        pin_memory: copy batches to page-locked memory.
        timeout: seconds to wait for a batch of a loader process; 0 waits for ever.
        collate_fn: makes a batch of samples.
    """
    if sampler is None:
        dataset, order = NamedErrors(dataset), eval_indices(len(dataset), rank, world_size)
    else:
        dataset, order = KeyedDataset(dataset), sampler
    warnings.filterwarnings('ignore', 'This DataLoader will create')  # train.py reports waiting, with advice
    return _Loader(
        dataset,
        batch_size,
        sampler=order,
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_the_run,
        pin_memory=pin_memory,
        collate_fn=collate_fn,
        timeout=timeout if num_workers else 0,
        prefetch_factor=PREFETCH if num_workers else None,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # the loader draws a base seed, not from the global generator
    )
