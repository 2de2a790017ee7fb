"""Build data sets, find their splits, and hold out a validation split."""
import functools
import json
import logging
import os
import re
import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import datasets as tv_datasets
from torchvision import transforms as tv_transforms

import published
import sources
from errors import UsageError, first_line, one_line, printable
from sources import IGNORED, EncodedImages, ImageFolder, Samples, TarImages, index_of, open_image
from system import cores

logger = logging.getLogger(__name__)

PREPARED = 'prepared.json'  # file that scripts/prepare_data.py writes next to the tars; may list the classes

# A tar belongs to a split if its file name contains the split's word between non-letters, as in imagenet-val-000.tar.
SPLIT = re.compile(r'(?<![A-Za-z])(train|val)(?:ing|idation)?(?![A-Za-z])')


class INaturalist(EncodedImages):
    """Read iNaturalist 2018, 2019 or 2021 from its JSON files. torchvision's class has no validation split.

    Args:
        root: folder with train2018.json and val2018.json (2021 also: train.json, val.json), the images under the
            names in these files, and categories.json if these files do not name the species.
        year, train: year of the competition; True for the training split, False for the validation split.
        category: taxonomic rank of the classes, one of options.INAT_CATEGORIES.
        transform: as in EncodedImages.

    Raises:
        UsageError: a file is missing, is not from iNaturalist, or lacks the category.
    """

    def __init__(self, root: str | Path, year: int, train: bool, category: str = 'name',
                 transform: Callable | None = None):
        root, word = Path(root), 'train' if train else 'val'
        split = self._read(root, f'{word}{year}.json', f'{word}.json')
        categories = self._read(root, 'categories.json', f'train{year}.json', 'train.json')
        try:
            categories = categories['categories'] if isinstance(categories, dict) else categories
            names = {entry['id']: entry[category] for entry in categories}
            self.classes = sorted(set(names.values()))
            index = {name: i for i, name in enumerate(self.classes)}
            files = {image['id']: str(root / image['file_name']) for image in split['images']}
            samples = [(files[a['image_id']], index[names[a['category_id']]]) for a in split['annotations']]
        except (KeyError, TypeError) as error:
            raise UsageError(f'the iNaturalist {year} JSON files in {root} lack {error} or are structured differently: '
                             'download them again') from None
        if not samples:
            raise UsageError(f'{root} has no annotated images for {word}{year}')
        super().__init__(Samples(*zip(*samples)), transform)

    @staticmethod
    def _read(root: Path, *names: str) -> dict | list:
        """Read the first of these JSON files that exists."""
        path = next((root / name for name in names if (root / name).is_file()), None)
        if path is None:
            raise UsageError(f'{root / names[0]} not found: --data-path must be the folder where you extracted '
                             'iNaturalist (download: https://github.com/visipedia/inat_comp)')
        try:
            return json.loads(path.read_text('utf-8'))
        except (ValueError, RecursionError) as error:
            raise UsageError(f'{path}: {error}') from None


class Digits(Dataset):
    """Read scikit-learn's 1,797 scanned digits (8 x 8, 17 gray levels) as RGB images.

    The same 360 digits, a fifth of each class, are always held out. `size` is the height and width in pixels."""

    def __init__(self, train: bool, size: int, transform: Callable | None = None):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        digits = load_digits()
        split = train_test_split(digits.images, digits.target, test_size=360, random_state=0, stratify=digits.target)
        images, targets = split[0::2] if train else split[1::2]
        # Strokes touch the border. Add a margin of one pixel, so that evaluation's center crop does not cut them off.
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
        name: str, is_train: bool, data_path: str | None, input_size: int, transform: Callable | None = None,
        classes: list[str] | None = None, val_split: float = 0., class_map: str | None = None, category: str = 'name',
        is_whole: bool = False, **reading) -> Dataset:
    """Build a data set of (image, class index) samples, with its class names in index order as `classes`.

    Args:
        name: one of options.DATA_SETS, 'torch/NAME' for timm's readers of torchvision's data sets, or 'wds/NAME'.
        is_train: True for the training split, False for the validation split.
        data_path: for IMNET, a folder or tar as open_split describes it; otherwise the folder of the data set.
        input_size: height and width of DIGITS images, in pixels.
        transform: applied to each image, as in sources.EncodedImages.
        classes: class names in index order, from the training set or a checkpoint; None to use those in the data.
        val_split: fraction of each class to hold out for validation, for IMNET data without val/.
        class_map: file with the IMNET class folders in index order, one per line.
        category: taxonomic rank of INAT's classes.
        is_whole: use all images of unsplit IMNET data, for evaluation.
        reading: keyword arguments of sources.open_image.

    Raises:
        UsageError: the data is missing or unusable.
    """
    if name.startswith('wds/'):
        name = 'IMNET'  # The IMNET reader recognizes shards by their .cls files.
    if name != 'IMNET' and (val_split or class_map):
        raise UsageError(f'--val-split and --class-map are for folders of images, not for --data-set {name}')
    if name == 'DIGITS':
        return Digits(is_train, input_size, transform)
    if name != 'IMNET' and not name.startswith('INAT'):
        dataset = _torchvision(name, data_path or 'data', is_train, tv_transforms.Compose(  # Open gray MNIST as RGB.
            [functools.partial(open_image, **reading), *([transform] if transform else [])]))
    elif not data_path:
        raise UsageError('--data-path is missing: give the folder that contains train/ and val/, or try '
                         '--data-set DIGITS, which needs no data and no network')
    elif name.startswith('INAT'):
        dataset = INaturalist(data_path, 2000 + int(name[4:]), is_train, category, transform)
    else:
        if published.needs_preparing(Path(data_path)):
            source, target = shlex.quote(str(data_path)), shlex.quote(f'{str(data_path).rstrip("/")}-tars')
            raise UsageError(f'{data_path} must be prepared: run python scripts/prepare_data.py {source} {target} '
                             'and use the new folder as --data-path')
        if class_map:
            classes = _read_class_map(class_map)
        names = prepared_classes(data_path)
        if is_whole or val_split:
            dataset = open_unsplit(data_path, transform, names or classes)
            dataset = dataset if is_whole else _split(dataset, val_split, is_train)
        else:
            dataset = open_split(data_path, 'train' if is_train else 'val', transform, names or classes)
        if names and classes:
            lookup = list(map(index_of(list(classes), names, data_path).get, names))
            dataset.samples.targets, dataset.classes = np.array(lookup)[dataset.samples.targets], list(classes)
    dataset.reading = reading
    return dataset


def prepared_classes(data_path: str) -> list[str] | None:
    """Return the classes in label order if scripts/prepare_data.py saved them in `data_path`, else None."""
    file = Path(data_path, PREPARED)
    return json.loads(file.read_text('utf-8')).get('classes') if file.is_file() else None


def _read_class_map(file: str) -> list[str]:
    try:
        classes = [line.strip() for line in Path(file).read_text('utf-8-sig').splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f'--class-map {file}: {error}') from None
    if len(set(classes)) != len(classes) or not classes:
        raise UsageError(f'--class-map {file} {"lists a class twice" if classes else "lists no classes"}')
    return classes


def open_split(data_path: str, split: str, transform: Callable | None, classes: list[str] | None) -> EncodedImages:
    """Open the split 'train' or 'val' of the images at `data_path`.

    `data_path` is a folder or a tar. A folder contains train/ and val/, which hold class folders or tars, or it
    contains tars of each split. A tar belongs to a split if its name has the word train (training) or val (validation)
    between non-letters, such as imagenet-val-000.tar. If `data_path` is a tar, the other split is in tars next to it,
    or the tar contains both splits as folders. A tar with any other name contains training images, or both splits.
    Raise UsageError if there are no images of that split, or a tar is damaged.
    """
    path = Path(data_path)
    tars = _tars(path, split)
    if tars:
        return TarImages(tars, split, transform, classes)
    if not path.is_file():
        return ImageFolder(path / split, transform, classes)
    raise UsageError(f'{path} has no {"training" if split == "train" else "validation"} images, judging by its name: '
                     'put train.tar and val.tar in one folder, or use --val-split 0.1')


def has_split(data_path: str, split: str) -> bool:
    """Return whether `open_split` can open the split 'train' or 'val'."""
    path = Path(data_path)
    return bool(_tars(path, split)) or (path / split).is_dir()


def is_unsplit(data_path: str) -> bool:
    """Return whether `data_path` is a folder of classes, or a tar without a split in its name."""
    path = Path(data_path)
    return not has_split(data_path, 'val') and (
        not has_split(data_path, 'train') or path.is_file() and _split_of(path) is None)


def _tars(path: Path, split: str) -> list[Path]:
    """List the tars of a split, following the rules of `open_split`."""
    if path.is_file():
        named = _split_of(path)
        if split == (named or 'train'):
            return [path]
        others = _named_tars(path.parent, split) if named else []
        return others or ([path] if set(map(sources.split_folder, sources.tar_index(path))) >= {'train', 'val'} else [])
    folder = path / split
    if not folder.is_dir():
        return _named_tars(path, split)
    tars = sorted(folder.glob('[!.]*.tar'))
    folders = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not IGNORED.search(entry.name)]
    if tars and folders:
        raise UsageError(f'{folder} contains both tars ({tars[0].name}) and folders ({min(folders)}): '
                         'move the tars or the folders elsewhere')
    return tars


def _named_tars(folder: Path, split: str) -> list[Path]:
    """List the tars of a split in a folder; a tar and a link to it count once."""
    tars = [tar for tar in sorted(folder.glob('[!.]*.tar')) if _split_of(tar) == split]
    return list({tar.resolve(): tar for tar in tars}.values())


def _split_of(tar: Path) -> str | None:
    """Return the split in a tar's file name; None if the name contains neither or both."""
    words = set(SPLIT.findall(tar.name))
    return words.pop() if len(words) == 1 else None


def open_unsplit(data_path: str, transform: Callable | None, classes: list[str] | None) -> EncodedImages:
    """Open the images that --val-split divides: train/, training tars, or class folders."""
    root = Path(data_path)
    folders = {path.name for path in root.glob('[!.]*') if path.is_dir()}
    if len(folders) > 1 and all(re.fullmatch('(train|test|val)(ing|id|idation)?', name.lower()) for name in folders):
        raise UsageError(f'{root} contains {" and ".join(sorted(folders))}, which are splits, not classes: rename them '
                         'to train and val, and omit --val-split, which is for folders of classes')
    if 'train' in folders or not folders and has_split(data_path, 'train'):
        return open_split(data_path, 'train', transform, classes)
    return ImageFolder(root, transform, classes)


def _split(dataset: EncodedImages, val_split: float, is_train: bool) -> EncodedImages:
    """Select the training or validation split of a folder. The split does not depend on the run's seed."""
    targets, selected = np.array(dataset.targets), []
    for label in np.unique(targets):
        order = np.random.RandomState(0).permutation(np.flatnonzero(targets == label))
        held_out = round(val_split * len(order))
        selected += (order[held_out:] if is_train else order[:held_out]).tolist()
    if not selected:
        raise UsageError(f'--val-split {val_split} leaves no images for {"training" if is_train else "validation"}')
    dataset.select(sorted(selected))
    return dataset


def limit(dataset: Dataset, number: int) -> Dataset:
    """Keep `number` images: the first ones of each class, balanced over the classes."""
    if np.ndim(getattr(dataset, 'targets', None)) != 1:
        raise UsageError('--max-train-images: this data set does not list the classes of its images; omit the flag')
    targets = np.array(dataset.targets)
    order = np.argsort(targets, kind='stable')
    position = np.argsort(order) - np.searchsorted(targets[order], targets)  # each image's rank within its class
    if number < np.sum(position == 0):
        raise UsageError(f'--max-train-images {number}: use at least {np.sum(position == 0)}, one for each class')
    indices = np.sort(np.lexsort((targets, position))[:number]).tolist()
    if isinstance(dataset, EncodedImages):
        dataset.select(indices)
        return dataset
    subset = Subset(dataset, indices)
    subset.classes, subset.targets = dataset.classes, targets[indices].tolist()
    return subset


def drop_damaged(dataset: EncodedImages, rank: int = 0, world_size: int = 1, gather: Callable = lambda x: [x]) -> None:
    """Drop unreadable images, and log their names. Each rank reads its share, and `gather` collects the results."""
    def fault(index: int) -> str | None:
        try:
            open_image(dataset.read(index), max_pixels=dataset.reading.get('max_pixels'))
        except Exception as error:  # Pillow can raise exceptions of any type on damaged data.
            return f'leaving out {printable(dataset.samples[index][0])} ({one_line(error)})'

    share = range(rank, len(dataset), world_size)
    with ThreadPoolExecutor(cores()) as pool:
        found = gather({i: line for i, line in zip(share, pool.map(fault, share)) if line})
    faults = {i: line for part in found for i, line in part.items()}
    for i in sorted(faults):
        logger.info(faults[i])
    readable = [i for i in range(len(dataset)) if i not in faults]
    if not readable:
        raise UsageError(f'{dataset.roots[0]} has no readable images')
    dataset.select(readable)


def check_two_classes(dataset: Dataset, data_path: str) -> None:
    """Raise UsageError if all images of a training set belong to one class."""
    present = set(getattr(dataset, 'targets', ()))
    if len(present) == 1:
        folders = {Path(name).parent.name for name, _ in getattr(dataset, 'samples', ())} - set(dataset.classes)
        folders = sorted(folder for folder in folders if not folder.endswith('.tar'))
        hint = f', with the folders {", ".join(folders[:5])}: if these are classes, move them up' if folders else ''
        raise UsageError(f'training needs two classes, but {data_path} has only {dataset.classes[present.pop()]}{hint}')


def _holds_images(root: str) -> bool:
    """Return whether `root` has splits or class folders for --data-set IMNET."""
    return has_split(root, 'train') or sum(path.is_dir() and os.access(path, os.R_OK) and any(
        map(tv_datasets.folder.is_image_file, os.listdir(path))) for path in Path(root).glob('[!.]*')) > 1


def _torchvision(name: str, root: str, is_train: bool, transform: Callable | None) -> Dataset:
    splits, settings = [{'train': is_train}], {'download': not _holds_images(root)}
    if name == 'CARS':  # Do not download: the URL no longer exists.
        dataset_class, splits, settings = tv_datasets.StanfordCars, [{'split': 'train' if is_train else 'test'}], {}
    elif name == 'PETS':
        dataset_class, splits = tv_datasets.OxfordIIITPet, [{'split': 'trainval' if is_train else 'test'}]
    elif name == 'FLOWERS102':  # Published results are trained on train + val.
        dataset_class = tv_datasets.Flowers102
        splits = [{'split': split} for split in (('train', 'val') if is_train else ('test',))]
    elif name.startswith('torch/'):
        dataset_class, splits = create_dataset, [{'name': name, 'split': 'train' if is_train else 'validation'}]
    else:
        dataset_class = getattr(tv_datasets, name)
    try:
        loaded = [dataset_class(root=root, transform=transform, **split, **settings) for split in splits]
    except (OSError, RuntimeError, AssertionError, ValueError) as error:
        if _holds_images(root):
            raise UsageError(f'{root} contains folders of images, not {name}: use --data-set IMNET or another '
                             '--data-path') from None
        raise UsageError(f'{name} is not in {root} and could not be downloaded ({first_line(error)})') from error
    dataset = loaded[0] if len(loaded) == 1 else ConcatDataset(loaded)
    if not hasattr(loaded[0], 'classes'):
        raise UsageError(f'--data-set {name} does not name its classes')
    dataset.classes = list(loaded[0].classes)
    return dataset
