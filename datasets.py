"""What a batch is: data sets, transforms and loaders.

A loader hands out uint8 images (B, 3, H, W) and class indices (B,); normalisation, random erasing and mixup happen on
the device, to the whole batch (engine.py).
"""
import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm.data.auto_augment as auto_augment
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.data.loader import fast_collate
from timm.utils import random_seed
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision import datasets as tv_datasets
from torchvision import transforms as tv_transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

from samplers import TrainSampler, eval_indices

logger = logging.getLogger(__name__)

DATA_SETS = ('IMNET', 'CIFAR10', 'CIFAR100', 'CARS', 'FLOWERS102', 'PETS', 'INAT18', 'INAT19', 'INAT21', 'DIGITS')
INAT_CATEGORIES = ('kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name')
SMALL = 32  # inputs up to here are treated as CIFAR is: padded random crops, no resizing for evaluation
BAD_IMAGES_IN_A_ROW = 10


def _posterize(img: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    # Pillow >= 13 refuses 0 bits, which rand-m9-mstd0.5-inc1 draws now and then; before, 0 bits gave a black image
    if bits_to_keep <= 0:
        return Image.new(img.mode, img.size)
    return auto_augment.posterize(img, bits_to_keep)


for _name in ('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'):
    auto_augment.NAME_TO_OP[_name] = _posterize


class ImageFolder(tv_datasets.DatasetFolder):
    """torchvision's ImageFolder, but able to use the class index of another folder and to lack some of its classes.

    Args:
        root: folder with one sub-folder a class.
        transform: applied to each RGB image.
        classes: names of the classes in the order of their index; those of `root`, sorted, where None.

    Raises:
        ValueError: no such folder, no classes, a class without images, or one that `classes` lacks.
    """

    def __init__(self, root: str | Path, transform: Callable | None = None, classes: list[str] | None = None):
        self.known_classes = classes
        super().__init__(
            str(root), default_loader, IMG_EXTENSIONS, transform=transform, allow_empty=True)
        counts = np.bincount(self.targets, minlength=len(self.classes))
        empty = [name for name, n in zip(self.classes, counts) if n == 0 and (Path(root) / name).is_dir()]
        if empty:
            raise ValueError(f'no images in {Path(root) / empty[0]}'
                             f'{f" and {len(empty) - 1} other class folders" if empty[1:] else ""}: '
                             'add images or remove the folder')

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        if not os.path.isdir(directory):
            raise ValueError(f'no folder {directory}: --data-path takes a folder that holds train/ and val/')
        found = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
        if not found:
            raise ValueError(f'no class folders in {directory}: images belong into {directory}/CLASS/')
        unknown = sorted(set(found) - set(self.known_classes or found))
        if unknown:
            raise ValueError(f'{directory} has classes that the training set lacks: {", ".join(unknown[:5])}')
        classes = self.known_classes or found
        return classes, {name: i for i, name in enumerate(classes)}


class INaturalist(Dataset):
    """iNaturalist 2018, 2019 or 2021 as its JSON files tell it, of which torchvision's class knows no validation part.

    Args:
        root: folder with train2018.json, val2018.json (2021 also: train.json, val.json), the images under the names
            in them, and categories.json where those files do not name the species.
        year: of the competition.
        train: training or validation part.
        category: rank of the classes, one of INAT_CATEGORIES.
        transform: applied to each RGB image.

    Raises:
        ValueError: no such file, or one without that category.
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
        self.samples = [(files[a['image_id']], index[names[a['category_id']]]) for a in part['annotations']]
        self.transform = transform

    @staticmethod
    def _read(root: Path, part: str, year: int) -> dict:
        paths = [root / f'{part}{year}.json', root / f'{part}.json']
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ValueError(f'no {paths[0]}: --data-path takes the folder that iNaturalist {year} was unpacked to, '
                             'https://github.com/visipedia/inat_comp')
        return json.loads(path.read_text())

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, target = self.samples[index]
        image = default_loader(path)
        return self.transform(image) if self.transform else image, target


class Digits(Dataset):
    """The 1,797 scanned digits of scikit-learn (8 x 8, 17 grey levels) as RGB images.

    360 of them, the same each time and the same share of each class, are held out for validation.

    Args:
        train: the 1,437 for training, or the 360 others.
        size: height and width of the images (pixels).
        transform: applied to each image.
    """

    def __init__(self, train: bool, size: int, transform: Callable | None = None):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        digits = load_digits()
        split = train_test_split(
            digits.images, digits.target, test_size=360, random_state=0, stratify=digits.target)
        images, targets = split[0::2] if train else split[1::2]
        # a margin of one pixel: the strokes reach the border, where the centre crop of evaluation would cut them
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


class KeyedDataset(Dataset):
    """Training samples by (index, seed): the augmentation of a sample follows from its seed alone.

    timm and torchvision draw from `random`, NumPy and torch, so all three are seeded for each sample. An image that
    can't be read is reported and the next one taken instead; ten in a row end the run.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]):
        index, seed = key
        for attempt in range(BAD_IMAGES_IN_A_ROW):
            random_seed(seed)
            current = (index + attempt) % len(self)
            try:
                return self.dataset[current]
            except Exception as error:  # Pillow's plugins raise whatever comes on damaged files
                name = image_name(self.dataset, current)
                logger.warning('cannot read %s (%s): taking the next image instead', name, error)
        raise RuntimeError(
            f'{BAD_IMAGES_IN_A_ROW} images in a row could not be read, the last one {name}: check the training data')


class NamedErrors(Dataset):
    """Validation samples; an image that can't be read is an error that names it: the score would be of other images."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        try:
            return self.dataset[index]
        except Exception as error:
            raise RuntimeError(
                f'cannot read validation image {image_name(self.dataset, index)} ({error})') from error


def image_name(dataset: Dataset, index: int) -> str:
    """What a person finds the sample by: its file, or its number."""
    samples = getattr(dataset, 'samples', None)
    return samples[index][0] if samples else f'image {index} of {type(dataset).__name__}'


def build_transform(
        is_train: bool,
        input_size: int,
        *,
        auto_augment: str | None = 'rand-m9-mstd0.5-inc1',
        color_jitter: float | None = 0.4,
        interpolation: str = 'bicubic',
        hflip: float = 0.5,
        scale: tuple[float, float] | None = None,
        ratio: tuple[float, float] | None = None,
) -> Callable:
    """PIL image to uint8 tensor (3, input_size, input_size).

    Evaluation resizes the short side to int(256 / 224 * input_size), bicubic, and crops the centre. Inputs up to 32 px
    are trained on random crops of the image padded by 4 and evaluated whole, as CIFAR is.
    """
    if not is_train:
        if input_size > SMALL:
            return create_transform(
                input_size, interpolation='bicubic', crop_pct=0.875, normalize=False)
        return tv_transforms.Compose([_fit(input_size), tv_transforms.PILToTensor()])
    transform = create_transform(
        input_size,
        is_training=True,
        color_jitter=color_jitter,
        auto_augment=auto_augment,
        interpolation=interpolation,
        hflip=hflip,
        scale=scale,
        ratio=ratio,
        normalize=False,
    )
    if input_size <= SMALL:
        transform.transforms[0:1] = [_fit(input_size), tv_transforms.RandomCrop(input_size, padding=4)]
    return transform


def _fit(size: int) -> Callable:
    """Nothing to an image that has `size` already; others, which have no business here, are made to fit a batch."""
    return tv_transforms.Compose([
        tv_transforms.Resize(size, tv_transforms.InterpolationMode.BICUBIC), tv_transforms.CenterCrop(size)])


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
    """A data set with `classes` (names in the order of their index) and (image, class index) samples.

    Args:
        name: one of DATA_SETS, or 'torch/NAME' for timm's readers of torchvision's data sets.
        is_train: training or validation part.
        data_path: for IMNET the folder that holds train/ and val/, for others where it lies or is downloaded to.
        input_size: height and width that DIGITS are drawn at.
        transform: applied to each PIL image.
        classes: class names in the order of their index, for a validation folder; those of the folder where None.
        val_split: share of each class of an IMNET folder without val/ that is the validation part.
        class_map: file with the class folders of IMNET in the order of their index, one a line.
        category: rank of INAT's classes.

    Raises:
        ValueError: data that is not there or not as it should be.
    """
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
        raise ValueError('--data-path is missing: the folder that holds train/ and val/ '
                         '(--data-set DIGITS needs none and no network)')
    if name.startswith('INAT'):
        return INaturalist(data_path, 2000 + int(name[4:]), is_train, category, transform)
    root = Path(data_path)
    if class_map:
        classes = [line.strip() for line in Path(class_map).read_text().splitlines() if line.strip()]
        if len(set(classes)) != len(classes) or not classes:
            raise ValueError(f'--class-map {class_map}: {"a class is there twice" if classes else "no classes in it"}')
    if not val_split:
        return ImageFolder(root / ('train' if is_train else 'val'), transform, classes)
    if (root / 'val').is_dir():
        raise ValueError(f'{root} has a val folder: leave --val-split out')
    dataset = ImageFolder(root / 'train' if (root / 'train').is_dir() else root, transform, classes)
    return _split(dataset, val_split, is_train)


def _split(dataset: ImageFolder, val_split: float, is_train: bool) -> ImageFolder:
    """Leave a folder's training or validation part: the same images whatever the seed of the run."""
    targets, kept = np.array(dataset.targets), []
    for label in np.unique(targets):
        order = np.random.RandomState(0).permutation(np.flatnonzero(targets == label))
        held_out = round(val_split * len(order))
        kept += (order[held_out:] if is_train else order[:held_out]).tolist()
    if not kept:
        raise ValueError(f'--val-split {val_split} leaves no images for {"training" if is_train else "validation"}')
    dataset.samples = dataset.imgs = [dataset.samples[i] for i in sorted(kept)]
    dataset.targets = [target for _, target in dataset.samples]
    return dataset


def _torchvision(name: str, root: str, is_train: bool, transform: Callable | None) -> Dataset:
    if name == 'CARS':  # no download: its address is gone
        return tv_datasets.StanfordCars(root, 'train' if is_train else 'test', transform)
    if name == 'PETS':
        return tv_datasets.OxfordIIITPet(root, 'trainval' if is_train else 'test', transform=transform, download=True)
    if name == 'FLOWERS102':  # trained on both small parts, as all who report on it do
        dataset = ConcatDataset([tv_datasets.Flowers102(root, part, transform, download=True)
                                 for part in (('train', 'val') if is_train else ('test',))])
        dataset.classes = list(tv_datasets.Flowers102.classes)
        return dataset
    if name.startswith('torch/'):
        transform = tv_transforms.Compose([_to_rgb, *([transform] if transform else [])])
        dataset = create_dataset(name, root, 'train' if is_train else 'validation', download=True, transform=transform)
        if not hasattr(dataset, 'classes'):
            raise ValueError(f'--data-set {name} does not name its classes')
        return dataset
    return getattr(tv_datasets, name)(root, train=is_train, transform=transform, download=True)


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert('RGB')  # MNIST and its like are grey


def _leave_signals_to_the_run(worker: int) -> None:
    """In a loader's process: be ended by the run alone.

    Ctrl-C, SLURM and `timeout` signal every process of a group, but a run that is about to save still needs its loader.
    """
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    if not hasattr(signal, 'sigwaitinfo'):  # macOS does not tell who sent a signal
        for number in signals - {signal.SIGTERM}:
            signal.signal(number, signal.SIG_IGN)
        return

    def wait() -> None:
        while True:
            received = signal.sigwaitinfo(signals)
            if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
                os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=wait, daemon=True).start()


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
) -> DataLoader:
    """Batches of uint8 images and class indices: training where a sampler is given, else this rank's share in order."""
    if sampler is None:
        dataset, order = NamedErrors(dataset), eval_indices(len(dataset), rank, world_size)
    else:
        dataset, order = KeyedDataset(dataset), sampler
    return DataLoader(
        dataset,
        batch_size,
        sampler=order,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=fast_collate,
        timeout=timeout if num_workers else 0,
        worker_init_fn=_leave_signals_to_the_run,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # the loader draws a base seed of its own: keep it off the global generator
    )
