"""Find encoded images: in folders, and in tar files that are read in place."""
import contextlib
import io
import logging
import os
import posixpath
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import imagenet
from torchvision.datasets.folder import IMG_EXTENSIONS

from errors import printable

logger = logging.getLogger(__name__)

# a tar's name that begins with the word of its part, or is the published one
PART = re.compile(r'(?:ILSVRC2012_img_)?(train|val)(?:ing|idation)?(?![A-Za-z])')
# a path component that begins with a dot, as ._NAME of macOS, except . and ..; folders of NAS boxes and file systems
IGNORED = re.compile(r'(?:^|/)(?:\.(?!\.?(?:/|$))|(?:@eaDir|__MACOSX|lost\+found|Thumbs\.db)(?:/|$))')
# photographs that Pillow decodes by itself; torchvision's list lacks the second line
EXTENSIONS = (*IMG_EXTENSIONS, '.apng', '.avif', '.avifs', '.dib', '.gif', '.j2c', '.j2k', '.jfif', '.jp2', '.jpc',
              '.jpe', '.jpf', '.jpx', '.mpo', '.pbm', '.pnm', '.qoi', '.tga')


def open_image(image: bytes | Image.Image) -> Image.Image:
    """Open an image as torchvision's loader does: RGB, without the rotation that EXIF asks for.

    16-bit grey images keep their upper 8 bits; Pillow's conversion would make them white.

    Raises:
        ValueError: grey values of unknown range (32-bit integers, floats).
    """
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    if image.mode.startswith('I;16') or image.mode == 'I' and image.format == 'PPM':  # a PGM of 16 bits
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert('RGB')
    if image.mode in ('I', 'F'):
        low, high = image.getextrema()
        raise ValueError(f'grey values of {"32-bit integers" if image.mode == "I" else "floats"} from {low:g} to '
                         f'{high:g}, whose black and white are unknown: convert the image to 8 or 16 bits')
    return image.convert('RGB')


class Samples(Sequence):
    """Store (name, class index) pairs in two blocks of memory.

    A list of 1.3 million tuples would be copied into every loader process page by page, as Python counts references.
    """

    def __init__(self, names: list[str] | list[bytes], targets: list[int]):
        self.names = np.array([os.fsencode(name) for name in names], np.bytes_)
        self.targets = np.array(targets, np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return os.fsdecode(self.names[index]), int(self.targets[index])


class EncodedImages(Dataset):
    """Read images as the bytes of their files.

    Args:
        samples: (name, class index) pairs.
        transform: applied to the RGB image, or to the file's bytes if the transform has `takes_bytes`.
    """

    has_labels = False  # whether classes are the numbers in .cls files

    def __init__(self, samples: Samples, transform: Callable | None):
        self.samples = samples
        self.transform = transform
        self.last = (-1, b'')  # (index, bytes): copies of repeated augmentation follow each other

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        if self.last[0] != index:
            self.last = index, self.read(index)
        image = self.last[1] if getattr(self.transform, 'takes_bytes', False) else open_image(self.last[1])
        return self.transform(image) if self.transform else image, self.samples[index][1]

    def read(self, index: int) -> bytes:
        """Read the encoded image of a sample."""
        return Path(self.samples[index][0]).read_bytes()

    def keep(self, kept: Sequence[int]) -> None:
        """Keep only the samples of the indices `kept`."""
        self.samples = Samples(*zip(*(self.samples[i] for i in kept)))

    @property
    def targets(self) -> list[int]:
        """List the class index of each sample."""
        return self.samples.targets.tolist()


def index_of(classes: list[str], found: Iterable[str], where: str | Path) -> dict[str, int]:
    """Map each class name to its index; raise ValueError if `classes` lacks a name of `found`."""
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise ValueError(f'{where} has classes that the training set, the checkpoint or --class-map lacks: '
                         f'{", ".join(unknown[:5])}{f" and {len(unknown) - 5} more" if unknown[5:] else ""}')
    return {name: i for i, name in enumerate(classes)}


def is_image(name: str) -> bool:
    """Return whether a path below the data's root is an image: by its ending, unless ignored."""
    return name.lower().endswith(EXTENSIONS) and not IGNORED.search(name)


def walk(top: str) -> list[tuple[str, list[str]]]:
    """List `top` and the folders below it, through links, with the names of their files; both sorted.

    os.walk alone passes over folders that cannot be listed, and follows a link to a folder above without end.

    Raises:
        ValueError: a folder cannot be listed.
    """
    def fail(error: OSError) -> None:
        raise ValueError(f'{error.filename} cannot be listed ({error.strerror})')

    def is_read(folder: str, name: str) -> bool:
        path = os.path.join(folder, name)
        if IGNORED.search(name) or leads_back(path, way[folder]):
            return False
        way[path] = (*way[folder], os.path.realpath(folder), os.path.realpath(path)) if os.path.islink(path) \
            else way[folder]
        return True

    found = []
    way = {top: (os.path.realpath(top),)}  # both ends of all links from `top` down to each folder
    for folder, folders, files in os.walk(top, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if is_read(folder, name)]
        found.append((folder, sorted(files)))
    return sorted(found)


def leads_back(path: str, way: Iterable[str]) -> bool:
    """Return whether a link leads to a folder that contains the link, or to one of `way`; log such a link."""
    if not os.path.islink(path):
        return False
    target = os.path.join(os.path.realpath(path), '')
    places = os.path.realpath(os.path.dirname(path)), *way
    if any(os.path.join(place, '').startswith(target) for place in places):
        logger.warning('%s leads back to %s: ignored', path, target)
        return True
    return False


def log_left_out(files: Iterable[str], where: str | Path) -> None:
    """Log how many files are no images, by their endings."""
    endings = Counter(printable(os.path.splitext(file)[1].lower()) or 'no ending' for file in files)
    if endings:
        logger.info('left out of %s: %s', where, ', '.join(
            f'{count} {ending}' for ending, count in endings.most_common(5)) + (', ...' if len(endings) > 5 else ''))


class ImageFolder(EncodedImages):
    """List a folder's images as torchvision's ImageFolder does, without ignored ones.

    torchvision's is silent about folders that cannot be listed, loops of links and files that are left out.
    The class index of another folder can be given, as a validation set needs.

    Args:
        root: folder with one sub-folder a class.
        transform: as of EncodedImages.
        classes: class names in the order of their index; those of `root`, sorted, if None. `root` may lack some.

    Raises:
        ValueError: no such folder, no classes, a class without images, or a class that `classes` lacks.
    """

    def __init__(self, root: str | Path, transform: Callable | None = None, classes: list[str] | None = None):
        root = str(root)
        if not os.path.isdir(root):
            above = Path(root).parent
            raise ValueError(f'no folder {root if above.is_dir() else above}: --data-path takes a folder that contains '
                             'train/ and val/, or tars whose names begin with train and val; a folder of classes needs '
                             '--val-split 0.1 too')
        with os.scandir(root) as listed:
            entries = [entry for entry in listed if not IGNORED.search(entry.name)]
        found = sorted(entry.name for entry in entries if entry.is_dir() and not leads_back(entry.path, ()))
        if not found:
            raise ValueError(f'no class folders in {root}: images belong into {root}/CLASS/')
        dangling = [entry.path for entry in entries if entry.is_symlink() and not os.path.exists(entry.path)]
        if dangling:
            raise ValueError(f'{dangling[0]} is a link to nothing: mend or remove it')
        self.classes = classes or found
        index = index_of(self.classes, found, root)
        names, targets, left_out = [], [], []
        for name in found:
            for folder, files in walk(os.path.join(root, name)):
                images = [file for file in files if file.lower().endswith(EXTENSIONS) and not file.startswith('.')]
                names += [os.fsencode(f'{folder}/{file}') for file in images]  # half the memory of str
                targets += [index[name]] * len(images)
                if len(images) < len(files):
                    left_out += [file for file in files if not is_image(file) and not IGNORED.search(file)]
        log_left_out(left_out, root)
        super().__init__(Samples(names, targets), transform)
        self.roots = [root]
        present = set(self.targets)
        empty = [name for name in found if index[name] not in present]
        if empty:
            raise ValueError(f'no images in {Path(root) / empty[0]}'
                             f'{f" and {len(empty) - 1} other class folders" if empty[1:] else ""}: '
                             'add images or remove the folder')

    def root(self, index: int) -> str:
        """Return the folder below which a sample's file lies."""
        return self.roots[0]


# ---------------------------------------------------------------------------------------------------------------------
# tar files: torchvision has none, and the webdataset library streams them, which can't be resumed in mid-epoch

class Member(NamedTuple):
    """Locate a file in a tar."""
    tar: int  # index of the tar among all of a data set
    name: str
    offset: int  # bytes from the start of the tar
    size: int  # bytes


class TarImages(EncodedImages):
    """Read images from one or many tars in place.

    A tar contains class folders, class tars (as ImageNet's published training images), or the files of a WebDataset
    shard (KEY.jpg and KEY.cls). Samples of class folders have the order of ImageFolder, samples of shards the order of
    the tars.

    Args:
        paths: the tars.
        part: 'train' or 'val'; the folder to read if the tars contain folders of both names.
        transform: as of EncodedImages.
        classes: class names in the order of their index; those found, sorted, if None.

    Raises:
        ValueError: a tar that is damaged, compressed or sparse, or that contains no images with classes.
    """

    def __init__(
            self, paths: list[Path], part: str, transform: Callable | None = None, classes: list[str] | None = None):
        self.roots = [str(path) for path in paths]
        members = [
            Member(tar, name, *place) for tar, path in enumerate(paths) for name, place in tar_index(path).items()]
        images = [m for m in members if is_image(m.name)]
        of_part = [m for m in images if _part_folder(m.name) == part]
        if has_both(m.name for m in images):
            images = of_part
        where = self.roots[0] + (f' and {len(paths) - 1} more' if paths[1:] else '')
        if not images:
            raise ValueError(f'no images in {where}')
        labels = self._labels(members)
        self.has_labels = bool(labels)
        if labels:
            images = _one_image_a_key(images, where)
            names = [labels.get((m.tar, key_of(m.name)), '') for m in images]
        else:
            images, names = self._by_class(images, part, has_part_folder=len(of_part) == len(images))
        unlabelled = [m.name for m, name in zip(images, names) if not name]
        if unlabelled:
            raise ValueError(f'{where} has no class for {unlabelled[0]}: images belong into class folders, '
                             'or beside a KEY.cls file each')
        if labels:  # shards number their classes
            numbers = list(map(int, names))
            if classes is None:
                classes = [str(i) for i in range(max(numbers) + 1)]
            elif max(numbers) < len(classes):
                if classes != [str(i) for i in range(len(classes))]:
                    logger.info('%s numbers its classes: 0 is %s, 1 is %s, ...', where, *[*classes, '(none)'][:2])
                names = [classes[i] for i in numbers]
        self.classes = classes or sorted(set(names))
        index = index_of(self.classes, names, where)
        self.places = np.array([(m.tar, m.offset, m.size) for m in images], np.int64)
        super().__init__(
            Samples([f'{self.roots[m.tar]}/{m.name}' for m in images], [index[name] for name in names]), transform)

    def _labels(self, members: list[Member]) -> dict[tuple[int, str], str]:
        """Map (tar, key) to the class number that a .cls file contains."""
        labels = {}
        for tar, name, offset, size in members:
            if name.endswith('.cls'):
                text = self._bytes(tar, offset, size).decode('ascii', 'replace').strip()
                if not text.isdecimal():
                    raise ValueError(f'{self.roots[tar]}/{name} holds {text[:20]!r}, not the number of a class')
                labels[tar, key_of(name)] = str(int(text))
        return labels

    def _by_class(
            self, images: Sequence[Member], part: str, has_part_folder: bool) -> tuple[Sequence[Member], Sequence[str]]:
        """Return the images in the order of ImageFolder, and the class name of each."""
        names = _class_folders([m.name for m in images], part if has_part_folder else None)
        if not any(names) and self.roots[1:] and Path(self.roots[0]).parent.name == part:  # part/CLASS.tar
            names = [Path(self.roots[m.tar]).stem for m in images]
        pairs = sorted(zip(names, images), key=lambda pair: (pair[0], *os.path.split(pair[1].name)))
        names, images = zip(*pairs)
        if not any(names):
            names = _published_val_classes(Path(self.roots[0]), [m.name for m in images])
        return images, names

    def _bytes(self, tar: int, offset: int, size: int) -> bytes:
        with open(self.roots[tar], 'rb') as file:
            file.seek(offset)
            return file.read(size)

    def read(self, index: int) -> bytes:
        return self._bytes(*self.places[index])

    def root(self, index: int) -> str:
        """Return the tar that contains a sample's file."""
        return self.roots[self.places[index, 0]]

    def keep(self, kept: Sequence[int]) -> None:
        super().keep(kept)
        self.places = self.places[kept]


def key_of(name: str) -> str:
    """Return WebDataset's key: the path up to the first dot of the file's name."""
    folder, _, file = name.rpartition('/')
    return f'{folder}/{file.split(".", 1)[0]}'


def _one_image_a_key(images: list[Member], where: str) -> list[Member]:
    """Keep the image of each key whose ending has the fewest parts: KEY.jpg, not the mask KEY.seg.png.

    Raises:
        ValueError: a key with two such images.
    """
    kept, left_out = {}, []
    for image in sorted(images, key=lambda m: posixpath.basename(m.name).count('.')):
        first = kept.setdefault((image.tar, key_of(image.name)), image)
        if first is not image:
            left_out.append(posixpath.basename(image.name).split('.', 1)[1])
            if first.name.count('.') == image.name.count('.'):
                raise ValueError(f'{where} has two images of one key, {first.name} and {image.name}: keep one of them')
    if left_out:
        logger.warning('%s has %d more images of the same keys: ignored (.%s)', where, len(left_out),
                       ', .'.join(sorted(set(left_out))[:5]))
    return [image for image in images if kept[image.tar, key_of(image.name)] is image]


def _part_folder(name: str) -> str | None:
    """Return the first folder named train or val: a class may have such a name too."""
    return next((folder for folder in name.split('/')[:-1] if folder in ('train', 'val')), None)


def has_both(names: Iterable[str]) -> bool:
    """Return whether there are images in folders named train and in folders named val."""
    return {'train', 'val'} <= {_part_folder(name) for name in names if is_image(name)}


def _class_folders(names: list[str], part: str | None) -> list[str]:
    """Return each image's class: the uppermost folder below the folder `part`, '' for none.

    If `part` is None, it is the uppermost folder below those that all images share.
    """
    folders = [name.split('/')[:-1] for name in names]
    if part is not None:
        return [(parts[parts.index(part) + 1:] or [''])[0] for parts in folders]
    start = len(os.path.commonprefix(folders))  # accepts any sequences
    if start and all(len(parts) == start for parts in folders):
        start -= 1  # all images are in one folder: the only class
    return [parts[start] if parts[start:] else '' for parts in folders]


def tar_index(path: Path) -> dict[str, tuple[int, int]]:
    """Map each image and label in a tar, and in its inner tars, to (offset, size) in bytes.

    The index is saved beside the tar, else in ~/.cache/cmt, and used until the tar's size or time changes.

    Raises:
        ValueError: a tar that is damaged, compressed or sparse.
    """
    stat = path.stat()
    stamp = np.array([stat.st_size, stat.st_mtime_ns, 4])  # 4: version of the index
    files = [path.with_name(f'.{path.name}.index.npz')]
    with contextlib.suppress(RuntimeError):  # neither HOME nor a passwd entry
        files.append(Path.home() / '.cache' / 'cmt' / (str(path.resolve()).replace('/', '%')[-200:] + '.index.npz'))
    for file in files:
        with contextlib.suppress(Exception), np.load(file) as saved:  # missing or damaged
            if np.array_equal(saved['stamp'], stamp):
                names = os.fsdecode(saved['names'].tobytes()).split('\0')
                return dict(zip(names, map(tuple, saved['places'].tolist())))
    logger.info('reading the index of %s', path)
    left_out: list[str] = []
    with open(path, 'rb') as tar:
        members = _scan(tar, 0, stat.st_size, str(path), left_out)
    log_left_out(left_out, path)
    names = np.frombuffer(os.fsencode('\0'.join(members)), np.uint8)
    for file in files:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix='.', dir=file.parent) as folder:  # others never see half a file
                np.savez(f'{folder}/index.npz', stamp=stamp, names=names, places=list(members.values()))
                os.replace(f'{folder}/index.npz', file)
            return members
    logger.warning('the index of %s could not be saved: each process reads the whole tar at its start', path)
    return members


def _scan(file: BinaryIO, start: int, end: int, name: str, left_out: list[str]) -> dict[str, tuple[int, int]]:
    """Map images and labels of the tar at bytes `start` to `end` of a file to (offset, size).

    The names of other files are appended to `left_out`.
    """
    members, links = {}, {}
    for info in _headers(file, start, end, name):
        own, stop = posixpath.normpath(info.name), info.offset_data + info.size
        if not is_image(own) and (not own.endswith(('.tar', '.cls')) or IGNORED.search(own)):
            left_out += [own] if info.isfile() and not IGNORED.search(own) else []
            continue
        if info.issparse():
            raise ValueError(f'{name} holds {own} without its zeros: pack it without -S (--sparse)')
        if info.isfile() and stop > end:
            raise ValueError(f'{name} is truncated in {info.name}, at byte {end - start} of at least '
                             f'{stop - start}: copy it again')
        if info.isfile() and own.endswith('.tar'):
            inner = _scan(file, info.offset_data, stop, f'{name}/{info.name}', left_out)
            members.update((f'{own[:-len(".tar")]}/{found}', place) for found, place in inner.items())
        elif info.isfile():
            members[own] = info.offset_data, info.size
        elif info.islnk():
            links[own] = posixpath.normpath(info.linkname)
        elif info.issym():
            links[own] = posixpath.normpath(posixpath.join(posixpath.dirname(own), info.linkname))
    for own, target in links.items():
        if target not in members:
            raise ValueError(f'{name} holds {own}, a link to {target}, but not that: pack it with -h (--dereference)')
        members[own] = members[target]
    return members


BLOCKING = 2 ** 20  # bytes: the most zeros that tar appends, by its usual blocking factors
COMPRESSED = b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd'  # magic numbers of gzip, bzip2, xz and zstd


def _headers(file: BinaryIO, start: int, end: int, name: str) -> Iterator[tarfile.TarInfo]:
    """Yield a tar's headers; raise ValueError on damage, which ends a tar for tarfile."""
    last = 'at its start'
    file.seek(start)
    try:
        tar = tarfile.open(fileobj=file, mode='r:')
        for header in iter(tar.next, None):
            yield header
            last = f'after {header.name}'
        file.seek(tar.offset)
        rest = file.read(max(min(end - tar.offset, BLOCKING + 1), 0))
        # an interrupted download may leave zeros, which are the end of a tar, in place of the rest
        if 512 <= len(rest) <= BLOCKING and not rest.strip(b'\0'):
            return
        reason = f'at byte {tar.offset - start}'
    except (tarfile.TarError, OverflowError, MemoryError, ValueError) as error:  # the others by damaged sizes
        reason = str(error) or type(error).__name__
    file.seek(start)
    if last == 'at its start' and file.read(6).startswith(COMPRESSED):
        raise ValueError(f'{name} is compressed: unpack it to a plain .tar, whose images can be read in place')
    raise ValueError(f'{name} is no tar, or damaged {last} ({reason}): copy it again')


DEVKIT = imagenet.ARCHIVE_META['devkit'][0]  # lists the classes of the published validation images


def find_devkit(path: Path) -> Path | None:
    """Return ImageNet's development kit beside the tar `path`, or beside the target of that link; None without one."""
    return next((folder / DEVKIT for folder in (path.parent, path.resolve().parent) if (folder / DEVKIT).is_file()),
                None)


def _published_val_classes(path: Path, names: list[str]) -> list[str]:
    """Return the WordNet ids of ILSVRC2012_val_00000001.JPEG and so on, whose tar `path` has no folders."""
    if not all(re.match('(?:.*/)?ILSVRC2012_val_[0-9]{8}', name) for name in names):
        raise ValueError(f'{path} has no classes: put images into class folders, or KEY.cls with the number of the '
                         'class beside each KEY.jpg')
    kit = find_devkit(path)
    if not kit:
        raise ValueError(f'{path} has no class folders: put {DEVKIT} beside it, which lists the classes of '
                         "ImageNet's validation images")
    with tempfile.TemporaryDirectory() as folder:  # torchvision unpacks into the folder that the kit is in
        (Path(folder) / DEVKIT).symlink_to(kit.resolve())
        try:
            imagenet.parse_devkit_archive(folder)
            ids = imagenet.load_meta_file(folder)[1]
        except (RuntimeError, OSError) as error:
            raise ValueError(f'{kit}: {error}') from None
    try:
        return [ids[int(PurePosixPath(name).stem.split('_')[-1]) - 1] for name in names]
    except IndexError:
        raise ValueError(f'{path} has more images than the validation set that {kit} describes') from None


def open_split(data_path: str, part: str, transform: Callable | None, classes: list[str] | None) -> EncodedImages:
    """Open the part 'train' or 'val' of the images at `data_path`.

    `data_path` is a folder or a tar. A folder contains train/ and val/ (of class folders, or of tars), or tars for
    each part. A tar belongs to a part if its name begins with the word train (training) or val (validation), as
    val-000.tar does, or is ImageNet's published name. A tar given as `data_path` is the part of its name; tars of the
    other part are looked for beside it. A tar of another name contains training images. Without tars of the other
    part, folders train/ and val/ inside the tar are the two parts.

    Raises:
        ValueError: no images of that part; a tar that is damaged.
    """
    path = Path(data_path)
    if path.suffix == '.tar' and not path.exists():
        raise ValueError(f'no file {path}')
    tars = _tars(path, part)
    if tars:
        return TarImages(tars, part, transform, classes)
    if not path.is_file():
        return ImageFolder(path / part, transform, classes)
    if part == 'train':
        raise ValueError(f'{path} is a validation set by its name: --data-path takes the tar of training images')
    raise ValueError(f'{path} has no validation images: put val.tar beside train.tar, hold out a share by '
                     '--val-split 0.1, or name the tar val.tar to evaluate all of it')


def has_split(data_path: str, part: str) -> bool:
    """Return whether there is a part 'train' or 'val' for `open_split`."""
    path = Path(data_path)
    return bool(_tars(path, part)) or (path / part).is_dir()


def _tars(path: Path, part: str) -> list[Path]:
    """List the tars of a part by the rule of `open_split`."""
    if path.is_file():
        own = PART.match(path.name)
        if part == (own[1] if own else 'train'):
            return [path]
        beside = _named_tars(path.parent, part) if own else []
        return beside or ([path] if has_both(tar_index(path)) else [])
    folder = path / part
    if not folder.is_dir():
        return _named_tars(path, part)
    tars = sorted(folder.glob('[!.]*.tar'))
    folders = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not IGNORED.search(entry.name)]
    if tars and folders:
        raise ValueError(f'{folder} holds both tars ({tars[0].name}) and folders ({min(folders)}): '
                         'move away what is not to be read')
    return tars


def _named_tars(folder: Path, part: str) -> list[Path]:
    """List the tars of a part in a folder; a tar and a link to it are one."""
    named = [(tar, PART.match(tar.name)) for tar in sorted(folder.glob('*.tar'))]
    return list({tar.resolve(): tar for tar, found in named if found and found[1] == part}.values())
