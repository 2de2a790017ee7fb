"""Find encoded images in folders, and in tar files that are read in place."""
import contextlib
import io
import logging
import math
import os
import posixpath
import re
import shutil
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image
from PIL.Image import Transpose
from torch.utils.data import Dataset, get_worker_info
from torchvision.datasets import imagenet
from torchvision.datasets.folder import IMG_EXTENSIONS

from errors import UsageError, printable

logger = logging.getLogger(__name__)

# Match dotfiles (such as macOS's ._NAME) except . and .., and what NAS devices and operating systems leave in folders.
IGNORED = re.compile(r'(?:^|/)(?:\.(?!\.?(?:/|$))|(?:@eaDir|__MACOSX|lost\+found|Thumbs\.db)(?:/|$))')
# Photo formats that Pillow decodes without a plugin.
EXTENSIONS = (*IMG_EXTENSIONS, '.apng', '.avif', '.avifs', '.dib', '.gif', '.j2c', '.j2k', '.jfif', '.jp2', '.jpc',
              '.jpe', '.jpf', '.jpx', '.mpo', '.pbm', '.pnm', '.qoi', '.tga')
HEIF = '.heic', '.heif'
with contextlib.suppress(ImportError):
    import pillow_heif
    pillow_heif.register_heif_opener()
    EXTENSIONS += HEIF
UPRIGHT = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
           6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}  # by EXIF orientation
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # check_pixels replaces this check.
# Open only these formats. Pillow would start Ghostscript for a PostScript file, whatever its extension.
FORMATS = sorted(
    {name for extension, name in Image.registered_extensions().items() if extension in EXTENSIONS} & set(Image.OPEN))


def open_header(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """Open an image file without decoding it; for `max_pixels`, see check_pixels."""
    if max_pixels and Image.MAX_IMAGE_PIXELS:  # Raise Pillow's own limit.
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    check_pixels(*image.size, max_pixels)
    return image


def check_pixels(width: int, height: int, max_pixels: int | None) -> None:
    """Raise DecompressionBombError for more than `max_pixels` pixels (None: twice Pillow's MAX_IMAGE_PIXELS)."""
    if width * height > (max_pixels or 2 * (Image.MAX_IMAGE_PIXELS or math.inf)):
        raise Image.DecompressionBombError(f'{width} x {height} pixels, too many to decode: resize the image, or raise '
                                           "train.py's --max-image-pixels")


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image: 2 to 8, or 1 if it is upright or its EXIF data is damaged."""
    with contextlib.suppress(Exception):  # Pillow can raise exceptions of any type on damaged data.
        value = image.getexif().get(ExifTags.Base.Orientation)
        return value if value in UPRIGHT else 1
    return 1


def open_image(image: bytes | Image.Image, ignore_exif: bool = False, rotated: Any = None,
               max_pixels: int | None = None) -> Image.Image:
    """Open an image as RGB and apply its EXIF orientation; `ignore_exif` keeps the stored pixels, as torchvision does.

    16-bit gray images keep their upper 8 bits; Pillow's conversion would make them white. `rotated` counts the images
    that EXIF rotates, in one element per worker, and in the last for the main process.

    Raises:
        ValueError: the range of gray values is unknown (32-bit integers, floats).
        DecompressionBombError: the image has more than `max_pixels` pixels.
    """
    if isinstance(image, bytes):
        image = open_header(image, max_pixels)
    image.load()  # Loading applies the orientation of a TIFF, so load before the check below.
    if not ignore_exif and orientation(image) != 1:
        image = image.transpose(UPRIGHT[orientation(image)])  # ImageOps.exif_transpose fails on damaged EXIF data.
        if rotated is not None:
            rotated[worker.id if (worker := get_worker_info()) else -1] += 1
    if image.mode.startswith('I;16') or image.mode == 'I' and image.format == 'PPM':  # a 16-bit PGM
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert('RGB')
    if image.mode in ('I', 'F'):
        low, high = image.getextrema()
        raise ValueError(f'gray values are {"32-bit integers" if image.mode == "I" else "floats"} from {low:g} to '
                         f'{high:g}, with unknown black and white levels: convert the image to 8 or 16 bits')
    return image.convert('RGB')


class Samples(Sequence):
    """Store (name, class index) pairs in two blocks of memory.

    Workers would copy a list of 1.3 million tuples page by page, since Python counts references.
    """

    def __init__(self, names: list[str] | list[bytes], targets: list[int]):
        self.names = np.array([os.fsencode(name) for name in names], np.bytes_)
        self.targets = np.array(targets, np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return os.fsdecode(self.names[index]), int(self.targets[index])


class EncodedImages(Dataset):
    """Read image files.

    Keep the last image open, since repeated augmentation reads the copies of an image in a row. Each image is thus read
    and decoded only once.

    Args:
        samples: (name, class index) pairs.
        transform: applied to the image as `open_image` returns it, or as the transform's own `open_image` does.
    """

    has_labels = False  # True if .cls files give the class indices
    reading = {}  # arguments of open_image

    def __init__(self, samples: Samples, transform: Callable | None):
        self.samples = samples
        self.transform = transform
        self.last = None, None  # index, opened image

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        if self.last[0] != index:
            self.last = None, None  # Free the memory before the next image is decoded.
            self.last = index, getattr(self.transform, 'open_image', open_image)(self.read(index), **self.reading)
        image = self.last[1]
        return self.transform(image) if self.transform else image, self.samples[index][1]

    def read(self, index: int) -> bytes:
        """Read the encoded image of a sample."""
        return Path(self.samples[index][0]).read_bytes()

    def root(self, index: int) -> str:
        """Return the folder or tar that contains a sample's file."""
        return self.roots[0]

    def select(self, indices: Sequence[int]) -> None:
        """Keep only the samples of these indices."""
        self.samples.names, self.samples.targets = self.samples.names[indices], self.samples.targets[indices]

    @property
    def targets(self) -> list[int]:
        """List the class index of each sample."""
        return self.samples.targets.tolist()


def index_of(classes: list[str], names: Iterable[str], where: str | Path) -> dict[str, int]:
    """Map each class to its index; raise UsageError if `classes` lacks one of `names`."""
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UsageError(f'{where} has classes that the training set, the checkpoint or --class-map lacks: '
                         f'{", ".join(unknown[:5])}{f" and {len(unknown) - 5} more" if unknown[5:] else ""}')
    return {name: i for i, name in enumerate(classes)}


def is_image(name: str) -> bool:
    """Return whether a path, relative to the data's root, has an image extension and is not ignored."""
    return name.lower().endswith(EXTENSIONS) and not IGNORED.search(name)


def log_left_out(files: Iterable[str], where: str | Path) -> None:
    """Log how many files are not images, by extension, with advice on HEIF."""
    counts = Counter(printable(os.path.splitext(file)[1].lower()) or 'no extension' for file in files)
    if counts:
        logger.info('left out of %s: %s%s%s', printable(str(where)),
                    ', '.join(f'{count} {extension}' for extension, count in counts.most_common(5)),
                    ', ...' * (len(counts) > 5), '; pip install pillow-heif to read HEIC' * any(map(counts.get, HEIF)))


def walk(folder: str, visited: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield `folder` and the folders below it, following links, with the names of their files.

    Skip folders with real paths in `visited`, which ends link loops, and add the others to it.
    """
    def fail(error: OSError):  # Without this, os.walk would silently skip folders that cannot be listed.
        raise error

    for path, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(path)
        if real in visited:
            logger.warning('skipping %s, a link to %s, which is already listed', path, real)
            folders.clear()
        else:
            visited.add(real)
            folders[:] = sorted(name for name in folders if not IGNORED.search(name))
            yield path.replace(os.sep, '/'), sorted(files)


class ImageFolder(EncodedImages):
    """List the images in a folder's class folders, in the order of torchvision's ImageFolder.

    torchvision's class does not report unlistable folders, link loops, or files that are left out. It also cannot
    use the class indices of another folder (`classes`, in index order), which a validation set needs. Raise UsageError
    for a missing folder, no classes, a class without images, or a class that `classes` lacks.
    """

    def __init__(self, root: str | Path, transform: Callable | None = None, classes: list[str] | None = None):
        root = str(root)
        if not os.path.isdir(root):
            parent = Path(root).parent
            raise UsageError(f'no folder {root if parent.is_dir() else parent}: --data-path takes a folder with train/ '
                             'and val/, or with tars that have these words in their names; to train on a folder of '
                             'classes, add --val-split 0.1')
        above = {os.path.realpath(root), *map(str, Path(root).resolve().parents)}  # Skip links to these: they loop.
        names = [name for name in sorted(os.listdir(root)) if not IGNORED.search(name)]
        folders = [name for name in names if os.path.isdir(f'{root}/{name}')
                   and os.path.realpath(f'{root}/{name}') not in above]
        if not folders:
            raise UsageError(f'no class folders in {root}: put images into {root}/CLASS/')
        dangling = [name for name in names if not os.path.exists(f'{root}/{name}')]
        if dangling:
            raise UsageError(f'{root}/{dangling[0]} is a broken link: fix or remove it')
        self.classes = classes or folders
        self.roots = [root]
        index = index_of(self.classes, folders, root)
        names, targets, left_out = [], [], []
        for label in folders:
            count = len(names)
            for folder, files in sorted(walk(f'{root}/{label}', set(above))):
                images = [file for file in files if file.lower().endswith(EXTENSIONS) and not file.startswith('.')]
                names += [os.fsencode(f'{folder}/{file}') for file in images]  # Bytes take half the memory of str.
                if len(images) < len(files):
                    left_out += [file for file in files if not is_image(file) and not IGNORED.search(file)]
            targets += [index[label]] * (len(names) - count)
        log_left_out(left_out, root)
        present = set(targets)
        empty = [label for label in folders if index[label] not in present]
        if empty:
            raise UsageError(f'no images in {Path(root) / empty[0]}'
                             f'{f" and {len(empty) - 1} other class folders" if empty[1:] else ""}: '
                             'add images or remove the folder')
        super().__init__(Samples(names, targets), transform)


# ---------------------------------------------------------------------------------------------------------------------
# Tars. torchvision cannot read them. The webdataset library streams them, so it cannot resume in mid-epoch.

class Member(NamedTuple):
    """Locate a file in a tar."""
    tar: int  # index of the tar in the data set
    name: str
    offset: int  # bytes from the start of the tar
    size: int  # bytes


class TarImages(EncodedImages):
    """Read images from one or many tars in place.

    A tar contains class folders, class tars (as in ImageNet's published training tar), or the files of a WebDataset
    shard (KEY.jpg and KEY.cls). Samples in class folders are in ImageFolder's order; samples in shards are in the
    order of the tars.

    Args:
        paths: the tars. Damaged or compressed tars, and tars without images or classes, raise UsageError.
        split: 'train' or 'val'; the folder to read if the tars contain folders of both names.
        transform: as in EncodedImages.
        classes: class names in index order; None for those of the tars, sorted.
    """

    def __init__(
            self, paths: list[Path], split: str, transform: Callable | None = None, classes: list[str] | None = None):
        self.roots = [str(path) for path in paths]
        where = self.roots[0] + (f' and {len(paths) - 1} more' if paths[1:] else '')
        members = [
            Member(tar, name, *place) for tar, path in enumerate(paths) for name, place in tar_index(path).items()]
        images = [m for m in members if is_image(m.name)]
        log_left_out((m.name for m in members if m.name.lower().endswith(HEIF) and not is_image(m.name)), where)
        if {split_folder(m.name) for m in images} >= {'train', 'val'}:
            images = [m for m in images if split_folder(m.name) == split]
        if not images:
            raise UsageError(f'no images in {where}')
        labels = {(m.tar, key_of(m.name)): self._label(m) for m in members if m.name.endswith('.cls')}
        self.has_labels = bool(labels)
        if labels:
            if len({(m.tar, key_of(m.name)) for m in images}) < len(images):
                raise UsageError(f'{where} has several images of one key: keep one per key')
            names = [labels.get((m.tar, key_of(m.name)), '') for m in images]
        else:
            images, names = self._by_class(images, split)
        if '' in names:
            raise UsageError(f'{where} has no classes: put images into class folders, or KEY.cls with the number of '
                             f"the class next to each KEY.jpg, or {DEVKIT} next to ImageNet's validation tar. Numbered "
                             f'tars are not classes, so {images[names.index("")].name} has no class')
        if labels:
            indices = list(map(int, names))
            classes = classes or [str(i) for i in range(max(indices) + 1)]
            if max(indices) < len(classes):
                names = [classes[i] for i in indices]
        self.classes = classes or sorted(set(names))
        index = index_of(self.classes, names, where)
        self.places = np.array([(m.tar, m.offset, m.size) for m in images], np.int64)
        super().__init__(
            Samples([f'{self.roots[m.tar]}/{m.name}' for m in images], [index[name] for name in names]), transform)

    def _label(self, member: Member) -> str:
        """Read the class index in a .cls file."""
        text = self._read_bytes(member.tar, member.offset, member.size).decode('ascii', 'replace').strip()
        if not text.isdecimal():
            raise UsageError(f'{self.roots[member.tar]}/{member.name} holds {text[:20]!r}, not the number of a class')
        return text

    def _by_class(self, images: list[Member], split: str) -> tuple[Sequence[Member], Sequence[str]]:
        """Return the images in the order of ImageFolder, and the class name of each.

        The class is the top folder below the folder `split`, or below the folders that all images share, or what the
        development kit lists; '' for none.
        """
        paths = [m.name.split('/')[:-1] for m in images]
        if all(split_folder(m.name) == split for m in images):
            paths = [folders[folders.index(split) + 1:] for folders in paths]
        else:
            shared = len(os.path.commonprefix(paths))  # commonprefix also compares lists, item by item.
            if max(map(len, paths)) == shared > 0:
                shared -= 1  # All images are in one folder, which is the only class.
            paths = [folders[shared:] for folders in paths]
        names = [''.join(folders[:1]) for folders in paths]
        if not any(names) and self.roots[1:] and Path(self.roots[0]).parent.name == split:
            stems = [Path(root).stem for root in self.roots]  # SPLIT/CLASS.tar, unless numbered from 000 or 001 on
            names = names if re.fullmatch(r'(.*\D)?000*[01]', stems[0]) else [stems[m.tar] for m in images]
        names, images = zip(*sorted(zip(names, images), key=lambda pair: (pair[0], *os.path.split(pair[1].name))))
        kit = find_devkit(Path(self.roots[0]))
        if kit and not any(names):  # ImageNet's validation tar
            ids = devkit_classes(kit)
            names = [ids.get(f'{posixpath.basename(m.name)[:23]}.JPEG', '') for m in images]
        return images, names

    def _read_bytes(self, tar: int, offset: int, size: int) -> bytes:
        with open(self.roots[tar], 'rb') as file:
            file.seek(offset)
            return file.read(size)

    def read(self, index: int) -> bytes:
        return self._read_bytes(*self.places[index])

    def root(self, index: int) -> str:
        return self.roots[self.places[index, 0]]

    def select(self, indices: Sequence[int]) -> None:
        super().select(indices)
        self.places = self.places[indices]


def key_of(name: str) -> str:
    """Return WebDataset's key: the path up to the first dot of the file's name."""
    folder, _, file = name.rpartition('/')
    return f'{folder}/{file.split(".", 1)[0]}'


def split_folder(name: str) -> str | None:
    """Return the first folder named train or val in a path; a class may have such a name too."""
    return next((folder for folder in name.split('/')[:-1] if folder in ('train', 'val')), None)


def tar_index(path: Path) -> dict[str, tuple[int, int]]:
    """Map each image (also HEIF) and label in a tar, and in its inner tars, to (offset, size) in bytes.

    The index is saved next to the tar, else in ~/.cache/cmt, and used until the tar's size or modification time
    changes. Raise UsageError for a tar that is damaged or compressed.
    """
    stat = path.stat()
    stamp = [1, stat.st_size, stat.st_mtime_ns]  # 1 is the version of the index.
    name = re.sub(r'[/\\:]', '%', str(path.resolve()))[-200:]
    index_files = (path.with_name(f'.{path.name}.index.npz'),
                   Path(os.path.expanduser('~/.cache/cmt'), f'{name}.index.npz'))
    for index_file in index_files:
        with contextlib.suppress(Exception), np.load(index_file) as saved:  # The index may be missing or damaged.
            if saved['stamp'].tolist() == stamp:
                names = os.fsdecode(saved['names'].tobytes()).split('\0')
                return dict(zip(names, map(tuple, saved['places'].tolist())))
    logger.info('reading the index of %s', path)
    with open(path, 'rb') as tar:
        files = dict(_files(tar, 0, stat.st_size, str(path)))
    index = {name: place for name, place in files.items() if name.lower().endswith((*EXTENSIONS, *HEIF, '.cls'))}
    log_left_out((name for name in files if name not in index), path)
    names = np.frombuffer(os.fsencode('\0'.join(index)), np.uint8)
    for index_file in index_files:
        with contextlib.suppress(OSError):
            index_file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix='.', dir=index_file.parent) as folder:  # Never leave half a file.
                np.savez(f'{folder}/index.npz', stamp=stamp, names=names, places=list(index.values()))
                os.replace(f'{folder}/index.npz', index_file)
            return index
    logger.warning('the index of %s could not be saved: each process will read the whole tar at startup', path)
    return index


def _files(file: BinaryIO, start: int, end: int, where: str, depth: int = 1) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (name, (offset, size)) for the files of the tar at bytes `start` to `end`, and of its inner tars."""
    for info in _headers(file, start, end, where):
        name = posixpath.normpath(info.name)
        is_tar = name.endswith('.tar')
        if info.isdir() or IGNORED.search(name):
            continue
        if (info.issparse() or not info.isfile()) and (is_tar or is_image(name)):
            raise UsageError(f'{where} contains {name} as a link or a sparse file, which cannot be read: create the '
                             'tar with --dereference --hard-dereference and without --sparse')
        if is_tar and depth:
            stop = info.offset_data + info.size
            for inner, place in _files(file, info.offset_data, stop, f'{where}/{info.name}', depth - 1):
                yield f'{name.removesuffix(".tar")}/{inner}', place
        else:
            yield name, (info.offset_data, info.size)


PADDING = 2 ** 20  # bytes: the most zeros that tar appends with its usual blocking factors


def _headers(file: BinaryIO, start: int, end: int, where: str) -> Iterator[tarfile.TarInfo]:
    """Yield a tar's headers; raise UsageError on damage, which tarfile would mistake for the end of the tar."""
    last = 'at its start'
    file.seek(start)
    with contextlib.suppress(tarfile.TarError, OverflowError, MemoryError, ValueError):  # raised by damaged headers
        tar = tarfile.open(fileobj=file, mode='r:')
        for header in iter(tar.next, None):
            yield header
            last = f'after {header.name}'
        file.seek(tar.offset)
        rest = file.read(max(min(end - tar.offset, PADDING + 1), 0))
        # A tar ends with zeros. More zeros than tar would write indicate an interrupted download.
        if 512 <= len(rest) <= PADDING and not rest.strip(b'\0'):
            return
    raise UsageError(f'{where} is compressed (unpack it to a plain .tar), is not a tar, or is truncated or damaged '
                     f'{last}: copy it again')


DEVKIT = imagenet.ARCHIVE_META['devkit'][0]  # lists the classes of the published validation images


def find_devkit(path: Path) -> Path | None:
    """Return ImageNet's development kit next to the tar `path` or to its link target, or None."""
    folders = path.parent, path.resolve().parent
    return next((folder / DEVKIT for folder in folders if (folder / DEVKIT).is_file()), None)


def devkit_classes(kit: Path) -> dict[str, str]:
    """Map ILSVRC2012_val_00000001.JPEG and so on to their WordNet ids, which the development kit lists."""
    with tempfile.TemporaryDirectory() as folder:  # Copy the kit, since torchvision unpacks it in place.
        shutil.copy(kit, Path(folder) / DEVKIT)
        try:
            imagenet.parse_devkit_archive(folder)
            ids = imagenet.load_meta_file(folder)[1]
        except (RuntimeError, OSError) as error:
            raise UsageError(f'{kit}: {error}') from None
    return {f'ILSVRC2012_val_{number:08d}.JPEG': name for number, name in enumerate(ids, 1)}
