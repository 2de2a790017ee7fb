"""python scripts/prepare_data.py imagenet imagenet-320

Copy images into tars for --data-path, large training images made smaller: a core then loads more of them.

SRC is a folder, a tar or shards as --data-path takes them, or a folder of classes. DST appears when everything is
written and has been read again. Until then the work is in DST.incomplete, where the same command resumes it. Each tar
depends on the source and the flags alone, so that interrupted runs and any number of processes write the same bytes.
"""
import argparse
import hashlib
import io
import itertools
import json
import os
import posixpath
import shutil
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import PIL
from PIL import Image
from torch.utils.data import Dataset, Subset

import _path
import processes
import utils
from checkpoints import atomic_write, lock_file, sync_folder
from datasets import open_unsplit
from errors import TrainingFault, UnreadableImage, UsageError, one_line, printable
from loader import build_loader
from options import Parser, count, in_range, path, positive
from sources import (
    DEVKIT,
    IGNORED,
    EncodedImages,
    TarImages,
    find_devkit,
    has_split,
    key_of,
    open_image,
    open_split,
)

assert _path.ROOT  # importing _path puts the repository on sys.path

RECORD, LEFT_OUT = 'prepared.json', 'left_out.txt'
JPEG_LIMIT = 65500  # pixels: the longest side that libjpeg writes


class Encoder(Dataset):
    """Read encoded images, and encode those anew whose short side is longer than `short_side` pixels (None: none).

    The rotation that EXIF asks for is left out, as in training, and so are EXIF's other data. If `skip_damaged`, the
    sample of an image that cannot be decoded is a string, the reason.

    Raises:
        UnreadableImage: a file that cannot be read, or without `skip_damaged` an image that cannot be decoded.
    """

    def __init__(self, images: EncodedImages, short_side: int | None, quality: int = 0, skip_damaged: bool = False):
        self.images = images
        self.short_side = short_side
        self.quality = quality
        self.skip_damaged = skip_damaged

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> bytes | str:
        name = printable(self.images.samples[index][0])
        try:
            data = self.images.read(index)
        except OSError as error:
            raise UnreadableImage(f'cannot read {name} ({error.strerror})') from error
        try:
            return self.encode(data)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's plugins raise exceptions of any type on damaged files
            if self.skip_damaged:
                return printable(one_line(error))
            raise UnreadableImage(
                f'cannot decode {name} ({one_line(error)}; --skip-damaged leaves such images out)') from error

    def encode(self, data: bytes) -> bytes:
        """Return the bytes of an image, encoded anew if its short side is too long."""
        image = open_image(data)
        shortest = min(image.size)
        if not self.short_side or shortest <= self.short_side or max(image.size) > JPEG_LIMIT:
            return data
        size = [round(side * self.short_side / shortest) for side in image.size]
        image, out = image.resize(size, Image.Resampling.LANCZOS), io.BytesIO()
        image.info.clear()  # Pillow would copy a JPEG's comment, and hangs on one of 64 KiB
        image.save(out, 'JPEG', quality=self.quality, subsampling='4:2:0')
        return out.getvalue()


def check_places(dst: Path, sources: list[str]) -> None:
    """Raise ValueError if DST exists, or is inside of one of `sources`."""
    if os.path.lexists(dst):
        raise ValueError(f'{dst} exists: remove it, or give a folder that does not exist yet')
    for source in sources:
        if Path(source).resolve() in dst.resolve().parents:
            raise ValueError(f'{dst} is inside of {source}, and would be taken for a part of it: give another folder')


def open_parts(src: str) -> dict[str, EncodedImages]:
    """Open the parts 'train' and 'val' of a source; a folder of classes is 'train'.

    Raises:
        ValueError: one part alone, beside folders or tars that nobody would read.
    """
    parts = {part: open_split(src, part, None, None) for part in ('train', 'val') if has_split(src, part)}
    if not parts:
        return {'train': open_unsplit(src, None, None)}
    if os.path.isdir(src):
        read = {os.path.relpath(root, src).split('/')[0] for images in parts.values() for root in images.roots}
        left = sorted(entry.name for entry in os.scandir(src) if entry.name not in read
                      and (entry.is_dir() or entry.name.endswith('.tar')) and not IGNORED.search(entry.name))
        names = printable(', '.join(left[:5]) + ', ...' * (len(left) > 5))
        if left and len(parts) == 1:
            raise ValueError(f'{src} has {names} beside {min(parts)}, which would not be read: name the parts train '
                             'and val, and move away what is no part')
        if left:
            utils.logger.warning('not read: %s', names)
    return parts


def folders_of(images: EncodedImages) -> list[str]:
    """List the folders that a source's images are found in, class folders and links included."""
    if isinstance(images, TarImages):
        return []
    return [*images.roots, *(entry.path for entry in os.scandir(images.roots[0]) if entry.is_dir())]


def names_in_tars(images: EncodedImages, part: str) -> list[str]:
    """Return a name for each image by which its place in the order and its class are those of the source.

    That is PART/CLASS/..., the name in the source if its shards number the classes, and for ImageNet's published
    validation images PART/FILE.

    Raises:
        ValueError: images that would get the same name.
    """
    names, keys = [], []
    for i, (file, target) in enumerate(images.samples):
        root, label = images.root(i), images.classes[target]
        *folders, base = file[len(root) + 1:].lstrip('/').split('/')  # tars may have absolute names
        if images.has_labels:
            names.append('/'.join([*folders, base]))
            continue
        if label in folders:
            folders = [label, *folders[folders.index(label) + 1:]]
        elif Path(root).stem == label:  # CLASS.tar
            folders = [label, *folders]
        else:
            label, folders = '', []
        names.append('/'.join([part, *folders, base]))
        keys.append((label, *posixpath.split(names[-1])))  # the order of sources.TarImages
    for i, (key, after) in enumerate(itertools.pairwise(keys)):
        if key >= after:
            raise ValueError(f'{printable(images.samples[i][0])} and {printable(images.samples[i + 1][0])} would have '
                             f'one name or another order in tars ({printable(names[i])}): rename one of them')
    return names


def divide(images: EncodedImages, most: int) -> list[Sequence[int]]:
    """Divide the samples among tars of at most `most` images; keys of two shards stay apart."""
    groups = [list(group) for _, group in itertools.groupby(range(len(images)), images.root)] \
        if images.has_labels else [range(len(images))]
    return [group[i:i + most] for group in groups for i in range(0, len(group), most)]


def open_folder(folder: Path, settings: dict, skip_damaged: bool) -> BinaryIO:
    """Make the folder DST.incomplete, or check that it was begun with the same settings, and lock it.

    Raises:
        ValueError: a folder of other settings or of another command, or one that another process writes to.
    """
    record = folder / RECORD
    if record.exists():
        try:
            begun = dict(json.loads(record.read_text()))
        except (TypeError, ValueError):
            raise ValueError(f'{record} is damaged: remove {folder} to start over') from None
        other = [f'{key} {begun.get(key)}, now {value}' for key, value in settings.items()
                 if key not in ('images', 'names_sha256') and begun.get(key) != value]
        if other or settings != begun:
            raise ValueError(f'{folder} was begun with other '
                             f'{f"settings ({other[0]})" if other else "files in the source"}: remove it to start over')
    elif folder.exists() and any(not file.name.startswith('.') for file in folder.iterdir()):
        raise ValueError(f'{folder} is in the way: this command has not made it')
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_file(folder / '.lock')
    if not skip_damaged and (left_out := read_left_out(folder)):
        raise ValueError(f'{folder} leaves out {len(left_out)} images ({LEFT_OUT}): give --skip-damaged again, or '
                         'remove it to start over')
    write(record, json.dumps(settings, indent=1).encode() + b'\n')
    return lock


def read_left_out(folder: Path) -> dict[str, str]:
    """Map the source's images that were left out to the reasons."""
    file = folder / LEFT_OUT
    return dict(line.split('\t', 1) for line in file.read_text().splitlines()) if file.exists() else {}


def write(path: Path, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write(data)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file to a tar, with a header that depends on the name and the size alone."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_part(folder: Path, part: str, images: EncodedImages, names: list[str], args: argparse.Namespace) -> None:
    """Write the tars of a part that are not there yet.

    Raises:
        UsageError: an image that cannot be read.
    """
    tars = {folder / f'{part}-{i:06d}.tar': indices for i, indices in enumerate(divide(images, args.images_per_tar))}
    todo = {tar: indices for tar, indices in tars.items() if not tar.exists()}
    left = [i for indices in todo.values() for i in indices]
    encoder = Encoder(
        images, args.short_side if part == 'train' or args.resize_val else None, args.quality, args.skip_damaged)
    loader = build_loader(Subset(encoder, left), 4, num_workers=args.num_workers, collate_fn=list)
    encoded = itertools.chain.from_iterable(loader)
    progress = utils.Progress(f'write {part}', len(names), len(names) - len(left), every=5000)
    for tar, indices in todo.items():
        left_out = {}
        with atomic_write(tar) as file:
            with tarfile.open(fileobj=file, mode='w', format=tarfile.GNU_FORMAT) as out:
                for i in indices:
                    data, source = next(encoded), printable(images.samples[i][0])
                    if isinstance(data, str):
                        utils.logger.warning('left out: %s (%s)', source, data)
                        left_out[source] = data
                    else:
                        if images.has_labels:
                            add(out, key_of(names[i]).lstrip('/') + '.cls', str(images.samples[i][1]).encode())
                        add(out, names[i], data)
                    progress.step({'tar': tar.name} if progress.due() else None)
            # before the tar is there; a kill in between leaves lines of images that may be mended by now
            before, own = read_left_out(folder), {printable(images.samples[i][0]) for i in indices}
            after = {name: reason for name, reason in before.items() if name not in own} | left_out
            if after != before:
                write(folder / LEFT_OUT, ''.join(f'{name}\t{reason}\n' for name, reason in after.items()).encode())
    progress.close()
    del encoded
    loader.stop()
    if names[0].count('/') == 1 and not images.has_labels:  # published validation images, without class folders
        write(folder / DEVKIT, find_devkit(Path(images.root(0))).read_bytes())


def verify_part(folder: Path, part: str, images: EncodedImages, names: list[str], num_workers: int) -> None:
    """Read the tars of a part as training does.

    Raises:
        UsageError: a class without images.
        TrainingFault: names, classes or order are not those of the source, or an image cannot be read.
    """
    left_out = read_left_out(folder)
    kept = [(name, images.classes[label]) for name, (source, label) in zip(names, images.samples)
            if printable(source) not in left_out]
    if not kept:
        raise UsageError(f'no image of {part} can be decoded')
    # classes of shards are numbers below the largest
    missing = set(images.classes[-1:] if images.has_labels else images.classes) - {label for _, label in kept}
    if missing:
        raise UsageError(f'no image of class {min(missing)} can be decoded: remove the class from the source, and '
                         f'{folder} to start over')
    try:
        written = open_split(str(folder), part, None, None)
        if kept != [(file[len(written.root(i)) + 1:], written.classes[label])
                    for i, (file, label) in enumerate(written.samples)]:
            raise TrainingFault(f'the images of {part} in {folder} are not those of the source, in its order')
        loader = build_loader(Encoder(written, None), 16, num_workers=num_workers, collate_fn=len)
        progress = utils.Progress(f'verify {part}', len(loader), every=500)
        for images_in_batch in loader:
            progress.step({'batch': str(images_in_batch)} if progress.due() else None)
        progress.close()
        loader.stop()
    except (UnreadableImage, ValueError) as error:
        raise TrainingFault(f'{getattr(error, "line", error)}, as written by this command: check the disk, remove that '
                            'tar, and give the same command again') from None


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog='prepare_data.py', description=__doc__.split('\n\n')[1], allow_abbrev=False)
    parser.add_argument('src', type=path, metavar='SRC', help='folder, tar or shards as --data-path of train.py takes')
    parser.add_argument('dst', type=path, metavar='DST', help='folder to make, for --data-path')
    parser.add_argument('--short-side', type=positive, default=320, metavar='PIXELS',
                        help='images whose short side is longer are made smaller, others are copied byte for byte '
                        '(default: 320)')
    parser.add_argument('--quality', type=in_range(int, 1, 100), default=92, help='of the JPEGs (default: 92)')
    parser.add_argument('--resize-val', action='store_true',
                        help='make validation images smaller too; without the flag they are copied byte for byte')
    parser.add_argument('--skip-damaged', action='store_true',
                        help=f'leave out images that cannot be decoded, and list them in {LEFT_OUT} in DST')
    parser.add_argument('--images-per-tar', type=positive, default=5000, help='most images in a tar (default: 5000)')
    parser.add_argument('--num-workers', type=count, default=utils.cores(), metavar='N',
                        help='processes that read and encode; 0 for none but the main one (default: the cores here)')
    return parser


def main(args: argparse.Namespace) -> None:
    utils.setup_logging()
    args.src, dst = os.path.abspath(args.src), Path(os.path.abspath(args.dst))
    folder = dst.with_name(f'{dst.name}.incomplete')
    with processes.usage_errors():
        check_places(dst, [args.src])
        parts = open_parts(args.src)
        names = {part: names_in_tars(images, part) for part, images in parts.items()}
        # again: another process may have made DST in the meantime
        check_places(dst, [args.src, *(folder for images in parts.values() for folder in folders_of(images))])
    began = time.monotonic()
    for part, images in parts.items():
        is_resized = part == 'train' or args.resize_val
        utils.logger.info('%s: %d images of %d classes, %s', part, len(images), len(images.classes),
                          f'short sides of at most {args.short_side} pixels' if is_resized
                          else 'copied byte for byte (--resize-val makes them smaller too)')
    try:
        lock = open_folder(folder, {
            'source': args.src, 'short_side': args.short_side, 'quality': args.quality,
            'resize_val': args.resize_val, 'images_per_tar': args.images_per_tar, 'Pillow': PIL.__version__,
            'images': {part: len(images) for part, images in parts.items()},
            'names_sha256': {part: hashlib.sha256(os.fsencode('\0'.join(names[part]))).hexdigest() for part in parts},
        }, args.skip_damaged)
        for part, images in parts.items():
            write_part(folder, part, images, names[part], args)
        for part, images in parts.items():
            verify_part(folder, part, images, names[part], args.num_workers)
        for rest in folder.glob('.*tmp*'):  # of processes that were killed
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        folder.rename(dst)
        (dst / '.lock').unlink()
        sync_folder(dst.parent)
        lock.close()
    except UnreadableImage as error:
        raise UsageError(f'{error.line}: mend the image; the same command then resumes') from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise TrainingFault(processes.explain(error) or f'cannot write to {folder} ({error.strerror}): make room or '
                            'mend the disk; the same command then resumes') from None
    size = sum(tar.stat().st_size for tar in dst.glob('*.tar'))
    utils.logger.info('%s: %.3f GB in tars, written and read again in %.1f s, for train.py --data-path %s',
                      dst, size / 1e9, time.monotonic() - began, dst)
    if left_out := read_left_out(dst):
        utils.logger.warning('%d images are left out: %s', len(left_out), dst / LEFT_OUT)


def cli(argv: list[str] | None = None) -> int:
    """Run main with the flags `argv` (default: of the command line), and return the exit status."""
    return processes.run_main('prepare_data.py', main, build_parser().parse_args(argv))


if __name__ == '__main__':
    sys.exit(cli())
