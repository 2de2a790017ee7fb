"""Build data sets and loaders.

Loaders yield uint8 images (B, 3, H, W) and class indices (B,). Normalisation, random erasing and mixup are applied to
the whole batch on the device (engine.py).
"""
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import ConcatDataset, Dataset
from torchvision import datasets as tv_datasets
from torchvision import transforms as tv_transforms

from sources import EncodedImages, ImageFolder, Samples, has_split, open_image, open_split

logger = logging.getLogger(__name__)


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
        data_path: for IMNET the folder or tar that contains both parts (sources.open_split); for other data sets the
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
        return open_split(data_path, 'train' if is_train else 'val', transform, classes)
    return _split(open_unsplit(data_path, transform, classes), val_split, is_train)


def _read_class_map(file: str) -> list[str]:
    try:
        classes = [line.strip() for line in Path(file).read_text('utf-8-sig').splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'--class-map {file}: {error}') from None
    if len(set(classes)) != len(classes) or not classes:
        raise ValueError(f'--class-map {file}: {"a class is there twice" if classes else "no classes in it"}')
    return classes


def open_unsplit(data_path: str, transform: Callable | None, classes: list[str] | None) -> EncodedImages:
    """Open the images that --val-split divides: train/, training tars, or class folders."""
    root = Path(data_path)
    if root.is_dir() and has_split(data_path, 'val'):
        raise ValueError(f'{root} has a validation part: leave --val-split out')
    folders = {path.name for path in root.glob('[!.]*') if path.is_dir()}
    if len(folders) > 1 and all(re.fullmatch('(train|test|val)(ing|id|idation)?', name.lower()) for name in folders):
        raise ValueError(f'{root} contains {" and ".join(sorted(folders))}: parts, not classes. Name them train and '
                         'val; --val-split is for folders of classes')
    if 'train' in folders or not folders and has_split(data_path, 'train'):
        return open_split(data_path, 'train', transform, classes)
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
