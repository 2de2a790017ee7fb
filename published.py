"""Read data sets as they are published, for scripts/prepare_data.py: parquet, and validation images in one folder."""
import contextlib
import csv
import json
import re
from pathlib import Path

import numpy as np
from timm.data import ImageNetInfo

from errors import UsageError, first_line
from sources import DEVKIT, EncodedImages, ImageFolder, Samples, devkit_classes, find_devkit, index_of, is_image

PARQUET = '*.parquet', '*/*.parquet', '*/train/*.parquet', '*/val*/*.parquet', '*/test/*.parquet'


def needs_preparing(path: Path) -> bool:
    """Return whether scripts/prepare_data.py must convert `path` before training; raise UsageError for a zip file."""
    entries = [entry for entry in path.glob('[!.]*') if entry.is_dir() or entry.suffix in ('.zip', '.tar', '.parquet')]
    if path.suffix == '.zip' or entries and all(entry.suffix == '.zip' for entry in entries):
        raise UsageError(f'{(entries or [path])[0]} is a zip archive: unzip it, and use the folder')
    return bool(_parquet_files(path)) or _flat_val(path) is not None


def open_published(path: Path) -> dict[str, EncodedImages]:
    """Open the splits 'train' and 'val' of `path`; raise UsageError if files or classes are missing or damaged."""
    files = _parquet_files(path)
    if files:
        splits = {split: ParquetImages(files[split]) for split in ('train', 'val') if split in files}
        names = next(iter(splits.values())).classes
        if any(images.classes != names[:len(images.classes)] for images in splits.values()):
            raise UsageError(f'the splits of {path} have different class names')
        return splits
    folder, table = _flat_val(path)
    train, class_of = ImageFolder(folder / 'train'), _read_table(table)
    pairs = sorted((class_of.get(file.name, ''), str(file)) for file in (folder / 'val').rglob('[!.]*.JPEG'))
    if not pairs or not pairs[0][0]:
        raise UsageError(f'{table} has no class for {pairs[0][1] if pairs else "any image"}')
    index = index_of(train.classes, (name for name, _ in pairs), table)
    val = EncodedImages(Samples([file for _, file in pairs], [index[name] for name, _ in pairs]), None)
    val.roots, val.classes = [str(folder / 'val')], train.classes
    return {'train': train, 'val': val}


def _flat_val(path: Path) -> tuple[Path, Path] | None:
    """Return the folder of train/ and a flat val/, and the file that lists the classes of val/."""
    for folder in (path, path / 'Data' / 'CLS-LOC', path / 'ILSVRC' / 'Data' / 'CLS-LOC'):
        tiny, kit = folder / 'val' / 'val_annotations.txt', find_devkit(folder / 'val') or find_devkit(folder)
        if tiny.is_file() and next(folder.glob('val/images/*.JPEG'), None):
            return folder, tiny
        if next(folder.glob('val/ILSVRC2012_val_*.JPEG'), None):
            tables = [place / 'LOC_val_solution.csv' for place in (folder, *folder.resolve().parents[:3])]
            table = next(filter(Path.is_file, tables), kit)
            if table is None:
                raise UsageError(f'{folder / "val"} has no class folders: put LOC_val_solution.csv or {DEVKIT} next to '
                                 'it')
            return folder, table
    return None


def _read_table(file: Path) -> dict[str, str]:
    """Map the names of validation images to their classes."""
    if file.name == DEVKIT:
        return devkit_classes(file)
    try:
        lines = file.read_text('utf-8-sig').splitlines()
        if file.suffix == '.txt':
            return dict(line.split('\t')[:2] for line in lines)
        return {f'{name}.JPEG': boxes.split()[0] for name, boxes in csv.reader(lines[1:])}
    except (ValueError, IndexError):
        raise UsageError(f'{file} is damaged: copy it again') from None


def _parquet_files(path: Path) -> dict[str, list[Path]]:
    """Map splits to their parquet files; raise UsageError if one of several numbered files is missing."""
    found = sorted({file for pattern in PARQUET for file in path.glob(pattern)})
    mixed = {folder for folder in {file.parent for file in found} - {path} if any(map(Path.is_dir, folder.iterdir()))}
    files: dict[str, list[Path]] = {}
    for file in found:
        words = re.findall('(?<![a-z])(train|val|test)', str(file.relative_to(path)).lower())
        if words and file.parent not in mixed:  # Skip parquet files next to class folders.
            files.setdefault(words[0], []).append(file)
    files = {'val' if split == 'test' else split: files[split] for split in sorted(files)
             if split != 'test' or 'val' not in files}
    for split in files.values():
        total = re.search(r'-of-(\d+)', split[0].name)
        if total and int(total[1]) != len(split):
            raise UsageError(f'{split[0].parent} has {len(split)} of the {int(total[1])} files like {split[0].name}: '
                             'download the others')
    return files


class ParquetImages(EncodedImages):
    """Read images from Hugging Face parquet files, in file order, with class indices from the label column.

    The classes are the names in the files' metadata. ImageNet's 1,000 names become its WordNet ids.

    Raises:
        UsageError: pyarrow is missing, or a file is damaged, or lacks images or labels.
    """
    has_labels = True

    def __init__(self, files: list[Path]):
        self.roots, self.cached = list(map(str, files)), (None, None)  # (file, row group) last read, its encoded images
        names, targets, places, first = [], [], [], None
        for i, file in enumerate(self.roots):
            with _parquet(file) as parquet:
                self.column, label, classes = columns = _columns(parquet.schema_arrow, file)
                if columns != (first := first or columns):
                    raise UsageError(f'{file} and {files[0]} have different columns or class names')
                for group in range(parquet.num_row_groups):
                    rows = parquet.read_row_group(group, columns=[f'{self.column}.path', label]).flatten()
                    names += [Path(path or '').name for path in rows.column(f'{self.column}.path').to_pylist()]
                    targets += rows.column(label).to_pylist()
                    places.append(np.stack(np.broadcast_arrays(i, group, np.arange(rows.num_rows)), axis=1))
        names = [name if is_image(name) else f'{name}.jpg' for name in names]
        if not targets or None in targets or min(targets) < 0 or classes and max(targets) >= len(classes):
            raise UsageError(f'{files[0]} has images without labels')
        self.classes = classes or [str(i) for i in range(max(targets) + 1)]
        self.places = np.concatenate(places)  # (N, 3): file, row group, row in the group
        if len({name.partition('.')[0] for name in names} - {''}) < len(names):  # Keys in a shard must differ: add i.
            names = [f'{i:08d}{"_" * (name[0] != ".")}{name}' for i, name in enumerate(names)]
        paths = [f'{self.roots[i]}/{name}' for i, name in zip(self.places[:, 0], names)]
        super().__init__(Samples(paths, targets), None)

    def read(self, index: int) -> bytes:
        file, group, row = self.places[index].tolist()
        if self.cached[0] != (file, group):  # Rows can be read only in whole groups, so cache one group.
            with _parquet(self.roots[file]) as parquet:
                rows = parquet.read_row_group(group, columns=[f'{self.column}.bytes'])
            self.cached = (file, group), rows.flatten().column(0)
        return self.cached[1][row].as_py()

    def root(self, index: int) -> str:
        return self.roots[self.places[index, 0]]


@contextlib.contextmanager
def _parquet(file: str):
    """Open a parquet file; raise UsageError if it cannot be read here or in the block."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(f'reading {file} needs pyarrow: install it with pip install pyarrow') from None
    try:
        yield parquet.ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise UsageError(f'{file} is damaged, or not a parquet file ({first_line(error)})') from None


def _columns(schema, file: str) -> tuple[str, str, list[str] | None]:
    """Return the columns of the images and of the labels, and the class names if the file has them."""
    features = json.loads((schema.metadata or {}).get(b'huggingface', b'{}')).get('info', {}).get('features', {})
    kinds = {field.name: str(field.type) for field in schema}
    images = [name for name in kinds if re.fullmatch('struct<(?=.*path: ).*bytes: (large_)?binary.*>', kinds[name])]
    labels = ['label', *(name for name, feature in features.items() if "'ClassLabel'" in str(feature))]
    labels = [name for name in labels if re.fullmatch('u?int[0-9]+', kinds.get(name, ''))]
    if not images or not labels:
        raise UsageError(f'{file} has no {"labels" if images else "images"}: its columns are {kinds}')
    names = features.get(labels[0], {}).get('names')
    if isinstance(names, list) and len(names) == 1000 and names[0].startswith('tench'):
        names = ImageNetInfo('imagenet-1k').label_names()
    if isinstance(names, list):  # Append the index to names that several classes share.
        names = [f'{name} ({i})' if names.count(name) > 1 else name for i, name in enumerate(map(str, names))]
    return images[0], labels[0], names
