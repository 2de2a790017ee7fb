"""python scripts/prepare_data.py imagenet imagenet-320

Copy images into tars for --data-path, and resize large training images, so that a core loads more of them per second.

SRC is a folder, a tar or shards as --data-path takes them, or a folder of classes. Each tar is written, indexed, and
moved to DST.incomplete, which becomes DST after the last tar. The same command resumes, and replaces tars that
have other images than the source. The bytes of a tar depend only on the source and the flags, so an interrupted run, or
any number of workers, writes the same tars.
"""
import argparse
import contextlib
import io
import itertools
import json
import os
import posixpath
import shutil
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import _path
from errors import TrainingFault, UnreadableImage, UsageError, one_line, printable
from options import Parser, count, in_range, path, positive
from system import atomic_write, cores, lock_file, remove_temporary_files, sync_folder, write_file


@_path.parse_first
def build_parser() -> Parser:
    """Build the command-line parser."""
    parser = Parser(prog='prepare_data.py', description=__doc__.split('\n\n')[1], allow_abbrev=False)
    parser.add_argument('src', type=path, metavar='SRC', help="folder, tar or shards, as for train.py's --data-path")
    parser.add_argument('dst', type=path, metavar='DST', help='folder to create, for --data-path')
    parser.add_argument('--short-side', type=count, default=320, metavar='PIXELS', help='resize images whose short '
                        'side is longer; others are copied byte for byte (default: 320; 0: copy all)')
    parser.add_argument('--quality', type=in_range(int, 1, 100), default=92, help='JPEG quality (default: 92)')
    parser.add_argument('--resize-val', action='store_true',
                        help='resize validation images too; without the flag they are copied byte for byte')
    parser.add_argument('--skip-damaged', action='store_true', help='leave out images that cannot be decoded')
    parser.add_argument('--images-per-tar', type=positive, default=5000, help='maximum images per tar (default: 5000)')
    parser.add_argument('--num-workers', type=count, metavar='N',
                        help='processes that read and encode; 0 uses only the main one (default: the number of cores)')
    return parser


import PIL
from PIL import Image
from torch.utils.data import Dataset, Subset

import processes
import published
import sources
import utils
from datasets import PREPARED, has_split, open_split, open_unsplit, prepared_classes
from loader import build_loader
from sources import IGNORED, EncodedImages, TarImages, find_devkit, key_of, open_header, open_image, orientation


class Encoder(Dataset):
    """Read encoded images, and re-encode those with a short side longer than `short_side` pixels (None: no limit).

    Images with an EXIF rotation are re-encoded too, upright and without EXIF data. If `skip_damaged`, a string with the
    reason replaces the bytes of an image that cannot be decoded.

    Raises:
        UnreadableImage: a file cannot be read, or without `skip_damaged` cannot be decoded.
    """

    def __init__(self, images: EncodedImages, short_side: int | None, quality: int, skip_damaged: bool):
        self.images = images
        self.short_side = short_side
        self.quality = quality
        self.skip_damaged = skip_damaged

    def __getitem__(self, index: int) -> bytes | str:
        try:
            return self.encode(self.images.read(index))
        except Exception as error:  # Pillow can raise exceptions of any type on damaged files.
            is_damage = not getattr(error, 'errno', None) and not isinstance(error, (MemoryError, UsageError))
            if self.skip_damaged and is_damage:
                return one_line(error)
            raise UnreadableImage(printable(
                f'cannot read {self.images.samples[index][0]} ({one_line(error)}): repair or remove it, or use '
                '--skip-damaged')) from error

    def encode(self, data: bytes) -> bytes:
        """Return the bytes of an image, re-encoded if its short side is too long or EXIF rotates it."""
        image = open_image(data)
        shortest = min(image.size)
        short = min(self.short_side or shortest, shortest)
        if short == shortest and orientation(open_header(data)) == 1 or max(image.size) > 65500:  # libjpeg's limit
            return data
        size = [round(side * short / shortest) for side in image.size]
        image, out = image.resize(size, Image.Resampling.LANCZOS), io.BytesIO()
        image.info.clear()  # Pillow would copy a JPEG's comment, and hangs on one of 64 KiB.
        image.save(out, 'JPEG', quality=self.quality, subsampling='4:2:0')
        open_image(out.getvalue())  # Check that the result can be decoded.
        return out.getvalue()


def open_splits(src: str) -> dict[str, EncodedImages]:
    """Open the splits 'train' and 'val' of a source; raise UsageError for one split next to folders of other names."""
    if published.needs_preparing(Path(src)):
        return published.open_published(Path(src))
    classes = prepared_classes(src)
    splits = {split: open_split(src, split, None, classes) for split in ('train', 'val') if has_split(src, split)}
    if not splits:
        return {'train': open_unsplit(src, None, classes)}  # a folder of classes
    if len(splits) == 1 and os.path.isdir(src):
        unread = sorted(entry.name for entry in os.scandir(src)
                        if entry.is_dir() and entry.name not in splits and not IGNORED.search(entry.name))
        if unread:
            raise UsageError(f'{src} has {", ".join(unread)} next to {min(splits)}: name the splits train and val, and '
                             'move the rest elsewhere')
    return splits


def names_in_tars(images: EncodedImages, split: str) -> list[str]:
    """Return names that preserve the classes and the order: SPLIT/CLASS/...

    Published validation images get SPLIT/FILE. Shards that number their classes keep their names. Raise UsageError for
    images that would get the same name or another order.
    """
    if images.has_labels:
        return [file[len(images.root(i)) + 1:].lstrip('/') for i, (file, _) in enumerate(images.samples)]
    names, keys = [], []
    for i, (file, target) in enumerate(images.samples):
        root, label = images.root(i), images.classes[target]
        *folders, base = file[len(root) + 1:].lstrip('/').split('/')  # Names in tars may begin with /.
        if label in folders:
            folders = folders[folders.index(label):]
        else:
            # Add the class of CLASS.tar or of a flat folder's table. ImageNet's validation tar has no folders.
            folders = [label, *folders] if Path(root).stem == label or not isinstance(images, TarImages) else []
        names.append('/'.join([split, *folders, base]))
        keys.append((*folders[:1], *posixpath.split(names[-1])))  # TarImages sorts by this key.
    for i, (key, after) in enumerate(itertools.pairwise(keys)):
        if key >= after:
            raise UsageError(f'{images.samples[i][0]} and {images.samples[i + 1][0]} would get the same name '
                             f'({names[i]}) or change their order in tars: rename one of them')
    return names


def divide(images: EncodedImages, split: str, most: int) -> dict[str, list[int]]:
    """Map tar names to the indices of at most `most` samples each. Never mix samples of two shards in a tar."""
    groups = itertools.groupby(range(len(images)), images.root if images.has_labels else lambda index: split)
    tars = [indices[i:i + most] for indices in (list(group) for _, group in groups)
            for i in range(0, len(indices), most)]
    return {f'{split}-{i:06d}.tar': indices for i, indices in enumerate(tars)}


def write_tar(tar: Path, images: EncodedImages, names: list[str], samples: Iterable, progress: utils.Progress) -> None:
    """Write (index, Encoder sample) pairs to a tar, and the tar's index. Log the images that are left out."""
    with atomic_write(tar) as file, tarfile.open(fileobj=file, mode='w', format=tarfile.GNU_FORMAT) as out:
        for i, data in samples:
            progress.step({'tar': tar.name} if progress.due() else None)
            if isinstance(data, str):
                utils.logger.warning('left out: %s', printable(f'{images.samples[i][0]} ({data})'))
                continue
            members = [(names[i], data)]
            if images.has_labels:
                members.insert(0, (f'{key_of(names[i]).lstrip("/")}.cls', str(images.samples[i][1]).encode()))
            for member, content in members:
                info = tarfile.TarInfo(member)  # The header depends only on the name and the size.
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))
    sources.tar_index(tar)


def write_split(folder: Path, split: str, images: EncodedImages, names: list[str], args: argparse.Namespace) -> int:
    """Write the tars of a split that are missing or have other images; return how many images are left out."""
    short_side = (args.short_side or None) if split == 'train' or args.resize_val else None
    utils.logger.info('%s: %d images of %d classes, %s', split, len(images), len(images.classes), f'short sides of at '
                      f'most {short_side} pixels' if short_side else 'copied byte for byte (see --resize-val)')
    if names[0].count('/') == 1 and not images.has_labels:  # published validation images, without class folders
        kit = find_devkit(Path(images.root(0)))
        write_file(folder / kit.name, kit.read_bytes())
    tars = divide(images, split, args.images_per_tar)
    written = {}  # names of the images in each tar
    for tar in folder.glob(f'{split}-*.tar'):
        expected, present = {names[i] for i in tars.get(tar.name, [])}, None
        with contextlib.suppress(UsageError):  # A damaged tar stays None, and is written again.
            present = {name for name in sources.tar_index(tar) if not name.endswith('.cls')}
        if present == expected or args.skip_damaged and present and present < expected:
            written[tar.name] = present
        else:
            tar.unlink()
    todo = [i for tar, indices in tars.items() if tar not in written for i in indices]
    encoder = Encoder(images, short_side, args.quality, args.skip_damaged)
    batch_size = 100 if isinstance(images, published.ParquetImages) else 4  # Each worker reads whole row groups.
    workers = cores() if args.num_workers is None else args.num_workers
    loader = build_loader(Subset(encoder, todo), batch_size, num_workers=workers, collate_fn=list)
    encoded = itertools.chain.from_iterable(loader)
    progress = utils.Progress(f'write {split}', len(names), len(names) - len(todo), every=5000)
    for tar, indices in tars.items():
        if tar not in written:
            write_tar(folder / '.work' / tar, images, names, zip(indices, encoded), progress)
            for name in f'.{tar}.index.npz', tar:
                os.replace(folder / '.work' / name, folder / name)
            sync_folder(folder)
            written[tar] = sources.tar_index(folder / tar).keys()
    progress.close()
    targets = images.targets
    kept = [targets[i] for tar, indices in tars.items() for i in indices if names[i] in written[tar]]
    missing = set(targets) - set(kept)
    if missing:
        raise UsageError(f'no image of class {images.classes[min(missing)]} can be decoded: remove the class from the '
                         'source; the same command then resumes')
    return len(targets) - len(kept)


def main(args: argparse.Namespace) -> None:
    utils.setup_logging()
    args.src, dst = os.path.abspath(args.src), Path(os.path.abspath(args.dst))
    folder = dst.with_name(f'{dst.name}.incomplete')
    if os.path.lexists(dst):
        raise UsageError(f'{dst} exists: remove it, or choose a new folder')
    if Path(args.src).resolve() in dst.resolve().parents:
        raise UsageError(f'{dst} is inside {args.src}, and would be read as part of it: choose another folder')
    with processes.usage_errors():
        splits = open_splits(args.src)
    names = {split: names_in_tars(images, split) for split, images in splits.items()}
    classes = [images.classes for images in splits.values() if images.has_labels]
    file, settings = folder / PREPARED, json.dumps({
        'classes': max(classes, key=len, default=None), 'source': args.src, 'splits': list(splits),
        'Pillow': PIL.__version__, 'short_side': args.short_side, 'quality': args.quality,
        'resize_val': args.resize_val, 'images_per_tar': args.images_per_tar}, indent=1) + '\n'
    if file.exists() and file.read_text('utf-8') != settings:
        raise UsageError(f'{folder} was started with other settings, see {file.name}: remove {folder} to start over')
    if not file.exists() and any(folder.glob('[!.]*')):
        raise UsageError(f'{folder} contains files that this command did not create: move it, or choose another DST')
    try:
        (folder / '.work').mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder / '.work' / 'lock')
        remove_temporary_files(folder / '.work')
        write_file(file, settings.encode())
        left_out = sum(write_split(folder, split, images, names[split], args) for split, images in splits.items())
        lock.close()  # Close the lock first: Windows cannot rename a folder with an open file.
        folder.rename(dst)
        shutil.rmtree(dst / '.work')
        sync_folder(dst.parent)
    except OSError as error:
        raise TrainingFault(processes.explain(error) or f'{error.filename or folder}: {error.strerror}. Free space or '
                            'repair the disk; the same command then resumes') from None
    utils.logger.info('%s is ready for train.py --data-path', dst)
    if left_out:
        utils.logger.warning('left out %d images', left_out)


def cli(argv: list[str] | None = None) -> int:
    """Run main with the flags `argv` (default: sys.argv), and return the exit status."""
    return processes.run_main('prepare_data.py', main, build_parser().parse_args(argv), 2, exits=argv is None)


if __name__ == '__main__':
    sys.exit(cli())
