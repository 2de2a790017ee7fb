"""Where encoded images lie: in folders, in tar files that are read in place, in a cache of either."""
import contextlib
import fcntl
import hashlib
import logging
import os
import posixpath
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from torch.utils.data import Dataset
from torchvision import datasets as tv_datasets
from torchvision.datasets import imagenet
from torchvision.datasets.folder import IMG_EXTENSIONS

from transforms import open_image

logger = logging.getLogger(__name__)


class Samples(Sequence):
    """(name, class index) pairs in three blocks of memory.

    A list of 1.3 million tuples would be copied into every loader process page by page, as Python counts references.
    """

    def __init__(self, names: list[str], targets: list[int]):
        encoded = [os.fsencode(name) for name in names]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.names = b''.join(encoded)
        self.targets = np.array(targets, np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[str, int]:
        index = range(len(self))[index]
        return os.fsdecode(self.names[self.ends[index]:self.ends[index + 1]]), int(self.targets[index])


class EncodedImages(Dataset):
    """Images as the bytes of their files.

    Args:
        samples: (name, class index) pairs.
        transform: applied to the RGB image, or to the bytes where it has `takes_bytes`.
    """
    cache: 'Cache | None' = None
    paths: Sequence[str] = ()  # tars that the samples lie in; none where each is a file

    def __init__(self, samples: Samples, transform: Callable | None):
        self.samples = samples
        self.transform = transform
        self.last = (-1, b'')  # copies of repeated augmentation come in a row

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        if self.last[0] != index:
            if self.cache:
                file = None if self.paths else self.samples[index][0]
                self.last = index, self.cache.get(index, self.read, file)
            else:
                self.last = index, self.read(index)
        image = self.last[1] if getattr(self.transform, 'takes_bytes', False) else open_image(self.last[1])
        return self.transform(image) if self.transform else image, self.samples[index][1]

    def read(self, index: int) -> bytes:
        with open(self.samples[index][0], 'rb') as file:
            return file.read()

    def keep(self, kept: Sequence[int]) -> None:
        """Be these samples only."""
        pairs = [self.samples[i] for i in kept]
        self.samples = Samples([name for name, _ in pairs], [target for _, target in pairs])

    @property
    def targets(self) -> list[int]:
        return self.samples.targets.tolist()


def index_of(classes: list[str], found: list[str], where: str | Path) -> dict[str, int]:
    """Index of each class by its name, once `found` are known to be among `classes`."""
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise ValueError(f'{where} has classes that the training set, or --class-map, lacks: {", ".join(unknown[:5])}')
    return {name: i for i, name in enumerate(classes)}


def _is_image(name: str) -> bool:
    """By its ending."""
    return PurePosixPath(name).suffix.lower() in IMG_EXTENSIONS and not _is_apples(name)


def _is_apples(name: str) -> bool:
    """macOS leaves ._NAME beside NAME on disks and in archives that are not its own."""
    return PurePosixPath(name).name.startswith('._')


class ImageFolder(EncodedImages):
    """torchvision's ImageFolder, but able to use the class index of another folder and to lack some of its classes.

    Args:
        root: folder with one sub-folder a class.
        transform: as of EncodedImages.
        classes: names of the classes in the order of their index; those of `root`, sorted, where None.

    Raises:
        ValueError: no such folder, no classes, a class without images, or one that `classes` lacks.
    """

    def __init__(self, root: str | Path, transform: Callable | None = None, classes: list[str] | None = None):
        if not os.path.isdir(root):
            raise ValueError(f'no folder {root}: --data-path takes a folder that holds train/ and val/')
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not found:
            raise ValueError(f'no class folders in {root}: images belong into {root}/CLASS/')
        self.classes = classes or found
        index = index_of(self.classes, found, root)
        pairs = tv_datasets.folder.make_dataset(
            str(root), {name: index[name] for name in found}, is_valid_file=_is_image, allow_empty=True)
        counts = np.bincount([target for _, target in pairs], minlength=len(self.classes))
        empty = [name for name in found if counts[index[name]] == 0]
        if empty:
            raise ValueError(f'no images in {Path(root) / empty[0]}'
                             f'{f" and {len(empty) - 1} other class folders" if empty[1:] else ""}: '
                             'add images or remove the folder')
        super().__init__(Samples([name for name, _ in pairs], [target for _, target in pairs]), transform)


# ---------------------------------------------------------------------------------------------------------------------
# tar files: torchvision has none, and the webdataset library streams them, which can't be resumed in mid-epoch

class TarImages(EncodedImages):
    """Images in tar files, read where they lie: one tar or many, of class folders, of class tars (as ImageNet's
    training images are published), or WebDataset shards (KEY.jpg beside KEY.cls).

    Samples of class folders come in the order of ImageFolder, those of shards in the order of the tars.

    Args:
        paths: the tars.
        part: 'train' or 'val', where they hold folders of both names.
        transform: as of EncodedImages.
        classes: names of the classes in the order of their index; those found, sorted, where None.

    Raises:
        ValueError: a tar that is damaged, compressed, or holds no images with classes.
    """

    def __init__(
            self, paths: list[Path], part: str, transform: Callable | None = None, classes: list[str] | None = None):
        self.paths = [str(path) for path in paths]
        members = []  # (tar, name, offset, size)
        for tar, path in enumerate(paths):
            members += [(tar, *member) for member in tar_index(path)]
        images = [m for m in members if _is_image(m[1])]
        both = has_both(m[1] for m in images)
        if both:
            images = [m for m in images if _part_folder(m[1]) == part]
        where = self.paths[0] + (f' and {len(paths) - 1} more' if paths[1:] else '')
        if not images:
            raise ValueError(f'no images in {where}')
        labels = self._labels(members)
        if labels:
            names = [labels.get((m[0], _key(m[1]))) for m in images]
        else:
            names = _class_folders([m[1] for m in images], both)
            if not any(names) and paths[1:]:  # class tars, of an outer one that was unpacked
                names = [Path(paths[m[0]]).stem for m in images]
            order = sorted(range(len(images)), key=lambda i: (names[i], *os.path.split(images[i][1])))
            images, names = [images[i] for i in order], [names[i] for i in order]
            if not any(names):
                names = published_val_classes(paths[0], [m[1] for m in images])
        unlabelled = [m[1] for m, name in zip(images, names) if not name]
        if unlabelled:
            raise ValueError(f'{where} does not say the class of {unlabelled[0]}: images belong into class folders, '
                             'or beside a KEY.cls file each')
        found = sorted(set(names), key=lambda name: (int(name), name) if labels else name)
        if labels and classes is None:  # shards number their classes
            found = [str(i) for i in range(int(found[-1]) + 1)]
        self.classes = classes or found
        index = index_of(self.classes, names, where)
        self.tars, self.offsets, self.sizes = (np.array([m[i] for m in images], np.int64) for i in (0, 2, 3))
        super().__init__(
            Samples([f'{self.paths[m[0]]}/{m[1]}' for m in images], [index[name] for name in names]), transform)

    def _labels(self, members: list[tuple[int, str, int, int]]) -> dict[tuple[int, str], str]:
        """Class number by tar and key, where there are .cls files."""
        labels = {}
        for tar, name, offset, size in members:
            if name.endswith('.cls'):
                text = self._bytes(tar, offset, size).decode('ascii', 'replace').strip()
                if not text.isdecimal():
                    raise ValueError(f'{self.paths[tar]}/{name} holds {text[:20]!r}, not the number of a class')
                labels[tar, _key(name)] = str(int(text))
        return labels

    def _bytes(self, tar: int, offset: int, size: int) -> bytes:
        with open(self.paths[tar], 'rb') as file:
            file.seek(offset)
            return file.read(size)

    def read(self, index: int) -> bytes:
        return self._bytes(self.tars[index], self.offsets[index], self.sizes[index])

    def keep(self, kept: Sequence[int]) -> None:
        super().keep(kept)
        self.tars, self.offsets, self.sizes = (array[kept] for array in (self.tars, self.offsets, self.sizes))


def _key(name: str) -> str:
    """WebDataset's: the path up to the first dot of the file's name."""
    folder, _, file = name.rpartition('/')
    return f'{folder}/{file.split(".", 1)[0]}'


def _part_folder(name: str) -> str | None:
    """'train' or 'val', whichever comes first: a class may have such a name too."""
    return next((folder for folder in PurePosixPath(name).parts[:-1] if folder in ('train', 'val')), None)


def has_both(names: Iterable[str]) -> bool:
    return {'train', 'val'} <= {_part_folder(name) for name in names if _is_image(name)}


def _class_folders(names: list[str], both: bool) -> list[str]:
    """Class of each image as of ImageFolder: the uppermost folder, '' for none.

    It is looked for in train/ and val/ where a tar has `both`, else behind the folders that are common to all images.
    """
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    if both:
        folders = [parts[parts.index(_part_folder(name)) + 1:] for name, parts in zip(names, folders)]
    common = () if both else os.path.commonprefix(folders)  # works on any sequences
    start = max(len(common) - (set(folders) == {common}), 0)  # all in one folder, which is a class
    return [parts[start] if parts[start:] else '' for parts in folders]


BLOCKING = 2 ** 20  # bytes that tar fills up to with zeros at the most, by its usual blocking factors


# what reading a missing or damaged index raises
DAMAGE = OSError, EOFError, KeyError, NotImplementedError, ValueError, zipfile.BadZipFile


def tar_index(path: Path) -> list[tuple[str, int, int]]:
    """(name, offset, size) of each file in a tar, and in the tars in it, in their order.

    Kept beside the tar, or where that can't be written in ~/.cache/cmt, for as long as the tar does not change.
    """
    stat = path.stat()
    beside = path.with_name(f'.{path.name}.index.npz')
    elsewhere = Path.home() / '.cache' / 'cmt' / (str(path.resolve()).replace('/', '%')[-200:] + '.index.npz')
    stamp = np.array([stat.st_size, stat.st_mtime_ns, 2])  # and the version of what is kept
    for file in (beside, elsewhere):
        with contextlib.suppress(*DAMAGE), np.load(file) as saved:
            if np.array_equal(saved['stamp'], stamp):
                names = os.fsdecode(saved['names'].tobytes()).split('\0')
                return list(zip(names, saved['offsets'].tolist(), saved['sizes'].tolist()))
    logger.info('reading the index of %s', path)
    members = _scan(path)
    if not members:
        raise ValueError(f'{path} is empty')
    names, offsets, sizes = zip(*members)
    for file in (beside, elsewhere):
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
                np.savez(temporary, stamp=stamp, names=np.frombuffer(os.fsencode('\0'.join(names)), np.uint8),
                         offsets=offsets, sizes=sizes)
            os.replace(temporary.name, file)
            break
    return members


class TarFault(ValueError):
    """What is wrong with a tar, and what to do."""


def _scan(path: Path, start: int = 0, end: int | None = None, name: str | None = None) -> list[tuple[str, int, int]]:
    """Members of the tar that lies at bytes start to end of a file; tarfile takes damage for the end of a tar.

    Of members of the same name the last one counts, as when a tar is unpacked.
    """
    name = name or str(path)
    end = path.stat().st_size if end is None else end
    members, links, where = {}, {}, 'at its start'  # (offset, size) by name
    with open(path, 'rb') as file:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode='r:') as tar:
                for member in tar:
                    own = posixpath.normpath(member.name)
                    wanted = _is_image(own) or own.endswith(('.tar', '.cls')) and not _is_apples(own)
                    if member.issparse():
                        if wanted:
                            raise TarFault(f'{name} holds {own} without its zeros: pack it without -S (--sparse)')
                        continue
                    behind = member.offset_data + member.size
                    if behind > end:
                        raise TarFault(f'{name} is truncated in {member.name}, at byte {end - start} of at least '
                                       f'{behind - start}: copy it again')
                    if wanted:
                        links.pop(own, None)
                        members.pop(own, None)
                    if member.isfile() and wanted and own.endswith('.tar'):
                        position = file.tell()
                        folder = own.removesuffix('.tar')
                        members.update({f'{folder}/{inner}': (offset, size) for inner, offset, size in _scan(
                            path, member.offset_data, behind, f'{name}/{member.name}')})
                        file.seek(position)
                    elif member.isfile() and not _is_apples(own):
                        members[own] = member.offset_data, member.size
                    elif member.islnk() and wanted:
                        target = posixpath.normpath(member.linkname)
                        if target in members:  # as it is now, whatever comes under that name later
                            members[own] = members[target]
                        else:
                            links[own] = target
                    elif member.issym() and wanted:
                        links[own] = posixpath.normpath(posixpath.join(posixpath.dirname(own), member.linkname))
                    where = f'behind {member.name}'
                at = tar.offset
        except TarFault:
            raise
        except (tarfile.TarError, OverflowError, MemoryError, ValueError) as error:  # the others of sizes by damage
            rest, reason = b'', str(error) or type(error).__name__
        else:
            file.seek(at)
            rest, reason = file.read(min(end - at, BLOCKING + 1)), f'at byte {at - start}'
        # an interrupted download may leave zeros, which are the end of a tar, in the place of the rest
        if len(rest) < 512 or any(rest) or len(rest) > BLOCKING:
            file.seek(start)
            if file.read(6).startswith((b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd')) and not members:
                raise TarFault(f'{name} is compressed: unpack it to a plain .tar, whose images can be read in place')
            raise TarFault(f'{name} is no tar, or damaged {where} ({reason}): copy it again')
    for own, target in links.items():
        for _ in links:  # a link may lead to another
            target = links.get(target, target)
        if target not in members:
            raise TarFault(f'{name} holds {own}, a link to {target}, but not that: pack it with -h (--dereference)')
        members[own] = members[target]
    return [(own, *place) for own, place in members.items()]


def published_val_classes(path: Path, names: list[str]) -> list[str]:
    """WordNet ids of ImageNet's validation images, whose published tar has no folders, from the development kit."""
    kit = path.parent / imagenet.ARCHIVE_META['devkit'][0]
    if not kit.is_file():
        raise ValueError(f'{path} has no class folders: put {kit.name} beside it, which says the classes of '
                         "ImageNet's validation images")
    with tempfile.TemporaryDirectory() as folder:  # torchvision unpacks into the folder that the kit is in
        (Path(folder) / kit.name).symlink_to(kit.resolve())
        try:
            imagenet.parse_devkit_archive(folder)
            ids = imagenet.load_meta_file(folder)[1]
        except (RuntimeError, OSError) as error:
            raise ValueError(f'{kit}: {error}') from None
    try:  # ILSVRC2012_val_00000001.JPEG is the first
        return [ids[int(PurePosixPath(name).stem.split('_')[-1]) - 1] for name in names]
    except (ValueError, IndexError):
        raise ValueError(f'{path} has no class folders, and other names than the published validation images') from None


WORDS = {'train': ['train', 'training'], 'val': ['val', 'validation']}


def find_part(data_path: str, part: str, transform: Callable | None, classes: list[str] | None) -> EncodedImages:
    """The part 'train' or 'val' of what lies at `data_path`.

    A folder with folders train/ and val/, of class folders or of tars; a folder with tars in whose names 'train'
    ('training') and 'val' ('validation') are words, as of my-train-000.tar; a tar that holds folders train/ and val/;
    or a tar with one of these words in its name, beside one with the other instead.

    Raises:
        ValueError: nothing of that kind.
    """
    path = Path(data_path)
    if path.is_file() or path.suffix == '.tar':
        if not path.is_file():
            raise ValueError(f'no file {path}')
        tar = _tar_of(path, part)
        if tar is None and part == 'val':
            raise ValueError(f'{path} has no validation images: put {_renamed(path, "val")} beside it, '
                             'or hold out a share of it by --val-split 0.1')
        if tar is None:
            raise ValueError(f'{path} is a validation set by its name: --data-path takes the tar of training images')
        images = TarImages([tar], part, transform, classes)
        if part == 'val' and part_in_name(tar) is None and not has_both(name for name, _, _ in tar_index(tar)):
            logger.warning('all images of %s are validation images: --val-split holds out a share', tar)
        return images
    tars = _tars(path, part)
    return TarImages(tars, part, transform, classes) if tars else ImageFolder(path / part, transform, classes)


def has_part(data_path: str, part: str) -> bool:
    path = Path(data_path)
    if path.is_file():
        return _tar_of(path, part) is not None
    return (path / part).is_dir() or bool(_tars(path, part))


def part_in_name(path: Path) -> str | None:
    """'train' or 'val' by the words of a tar's name, None for neither or both."""
    words = re.findall('[a-z]+', path.stem.lower())
    parts = [part for part in WORDS if set(words) & set(WORDS[part])]
    return parts[0] if len(parts) == 1 else None


def _renamed(path: Path, word: str) -> str:
    """Its name with this word for that of its part."""
    return re.sub('(?<![a-z])(training|train|validation|val)(?![a-z])', word, path.name, flags=re.IGNORECASE)


def _tar_of(path: Path, part: str) -> Path | None:
    """The tar that the part lies in: this one or its sibling."""
    if part_in_name(path) in (part, None):  # one that does not tell holds both, or is all there is to evaluate
        return path
    siblings = [path.with_name(_renamed(path, word)) for word in WORDS[part]]
    both = has_both(name for name, _, _ in tar_index(path))
    return next((tar for tar in siblings if tar.is_file()), path if both else None)


def _tars(path: Path, part: str) -> list[Path]:
    folder = path / part
    if not folder.is_dir():
        return sorted(tar for tar in path.glob('*.tar') if part_in_name(tar) == part and not _is_apples(tar.name))
    tars = sorted(tar for tar in folder.glob('*.tar') if not _is_apples(tar.name))
    folders = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith('.')]
    if tars and folders:
        raise ValueError(f'{folder} holds both tars ({tars[0].name}) and folders ({min(folders)}): '
                         'move away what is not to be read')
    return tars


# ---------------------------------------------------------------------------------------------------------------------

class Cache:
    """Files of a data set, kept as they are read, where reading is faster: in memory (a tmpfs) or on a local disk.

    All processes of a machine share it: a file a sample, and a count of bytes that stops at the limit.

    Args:
        folder: made where it is not there; what an earlier run of the same data left in it is used.
        limit: bytes that may lie there.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder = folder
        self.limit = limit
        self.full = False

    def get(self, index: int, read: Callable[[int], bytes], file: str | None = None) -> bytes:
        """What `read(index)` gives; what was kept of a `file` counts as long as that does not change."""
        path, stamp = self.folder / str(index // 1000) / str(index), None
        with contextlib.suppress(OSError):
            stamp = _stamp(file) if file else None  # before it is read: a file that changes meanwhile is read again
            if _is_kept(path, stamp):
                return path.read_bytes()
        data = read(index)
        if not self.full and (stamp or not file):
            try:
                self._keep(path, data, stamp)
            except (FileNotFoundError, FileExistsError):
                pass  # another run on the same data has ended and removed the folder
            except OSError as error:
                self.full = True
                logger.warning('no more is cached in %s (%s)', self.folder, error)
        return data

    def _keep(self, path: Path, data: bytes, stamp: tuple[int, int] | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.NamedTemporaryFile(dir=path.parent, delete=False)
        try:
            with temporary:
                temporary.write(data)
            if stamp:
                os.utime(temporary.name, ns=(stamp[1], stamp[1]))
            with open(self.folder / 'bytes', 'a+b') as counter:
                fcntl.flock(counter, fcntl.LOCK_EX)
                if _is_kept(path, stamp):  # another process has kept it since
                    return
                counter.seek(0)
                text = counter.read()
                used = int(text) if text.isdigit() else self._count()
                used += len(data) - (path.stat().st_size if path.exists() else 0)
                if used > self.limit:
                    self.full = True
                    return
                os.replace(temporary.name, path)
                counter.truncate(0)
                counter.write(b'%d' % used)
        finally:
            with contextlib.suppress(FileNotFoundError):  # where it was not kept
                os.unlink(temporary.name)

    def _count(self) -> int:
        return sum(file.stat().st_size for file in self.folder.glob('*/*') if file.name.isdecimal())

    def used(self) -> int:
        """Bytes that lie there."""
        with contextlib.suppress(OSError):
            text = (self.folder / 'bytes').read_bytes()
            return int(text) if text.isdigit() else self._count()
        return 0

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _stamp(file: str | Path) -> tuple[int, int]:
    stat = os.stat(file)
    return stat.st_size, stat.st_mtime_ns


def _is_kept(path: Path, stamp: tuple[int, int] | None) -> bool:
    """Whether the file is there, with the size and time of what it was read from if that has one of its own."""
    with contextlib.suppress(OSError):
        found = _stamp(path)
        return found == stamp if stamp else found[0] > 0  # a power cut leaves empty files
    return False


in_memory: list[Cache] = []  # to be removed when the run ends


def open_cache(kind: str, folder: str | None, size: int | None, dataset: EncodedImages) -> Cache:
    """The cache of `dataset` in memory ('ram') or on disk.

    Args:
        folder: that it is made in; /dev/shm, or the user's cache folder.
        size: bytes; half of what is free where None.

    Raises:
        ValueError: less room than `size`, or a data set that is not made of files.
    """
    if not isinstance(dataset, EncodedImages):
        raise ValueError('--cache keeps files, and this --data-set is not read from files')
    root = Path(folder or ('/dev/shm' if kind == 'ram' else Path.home() / '.cache' / 'cmt'))
    if kind == 'ram' and not folder and not root.is_dir():
        raise ValueError('--cache ram needs /dev/shm: give a folder in memory by --cache-dir')
    # by the names of all samples, since files are kept by their index; names may be relative, and tars may change
    key = hashlib.sha256(dataset.samples.names + dataset.samples.ends.tobytes())
    key.update(os.fsencode(os.path.abspath(dataset.samples[0][0])))
    for tar in dataset.paths:
        key.update(repr((os.path.abspath(tar), *_stamp(tar))).encode())
    cache = Cache(root / f'cmt-cache-{key.hexdigest()[:16]}', 0)
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f'--cache {kind}: {there} is no folder that can be written to: give another --cache-dir')
    free = shutil.disk_usage(there).free + cache.used()
    if size is not None and size > free:
        raise ValueError(f'--cache-size {size / 2 ** 30:.1f}G: {root} has {free / 2 ** 30:.1f}G free')
    cache.limit = free // 2 if size is None else size
    if kind == 'ram' and os.environ.get('LOCAL_RANK', '0') == '0':
        in_memory.append(cache)
    return cache
