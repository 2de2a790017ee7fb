"""Folders, tars that are read in place, WebDataset shards, ImageNet's published tars: real files, really damaged."""
import io
import logging
import os
import random
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image, ImageOps
from torchvision.datasets import imagenet

import nano
from datasets import build_dataset, has_split
from errors import UnreadableImage, UsageError
from fast_transforms import FastTransform
from loader import ValidationDataset, build_loader
from samplers import TrainSampler
from sources import ImageFolder, TarImages, open_image, tar_index
from transforms import build_transform


def pack(path: Path, folder: Path, names=None, prefix='') -> Path:
    """Write a tar of the files in `folder`, in no order."""
    names = names or [str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()]
    random.Random(0).shuffle(names)
    with tarfile.open(path, 'w', format=tarfile.GNU_FORMAT) as tar:  # no headers but the files' own
        for name in names:
            tar.add(folder / name, prefix + name)
    return path


def members(path, *entries, mode='w'):
    """Write a tar of (name, bytes), or (name, type, link)."""
    with tarfile.open(path, mode, format=tarfile.GNU_FORMAT) as tar:
        for name, content, *link in entries:
            info = tarfile.TarInfo(name)
            if link:
                info.type, info.linkname = content, link[0]
            else:
                info.size = len(content)
            tar.addfile(info, None if link else io.BytesIO(content))
    return str(path)


def train_set(path, **kwargs):
    return build_dataset('IMNET', True, str(path), 32, **kwargs)


def val_set(path, **kwargs):
    return build_dataset('IMNET', False, str(path), 32, **kwargs)


def save_images(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(root / name)


def assert_same_samples(a, b) -> None:
    assert a.classes == b.classes and a.targets == b.targets and len(a) == len(b) > 0
    for i in range(len(a)):
        assert a.read(i) == b.read(i)
        (image, target), (other, label) = a[i], b[i]
        assert target == label and image.tobytes() == other.tobytes()


def named(dataset):
    """List (name in the tar, class, bytes)."""
    return [(name.split('.tar/')[1], dataset.classes[target], dataset.read(i))
            for i, (name, target) in enumerate(dataset.samples)]


@pytest.fixture
def tars(images, tmp_path):
    """A folder with train.tar and val.tar."""
    for split in ('train', 'val'):
        pack(tmp_path / f'{split}.tar', images / split, prefix='./' if split == 'val' else '')
    return tmp_path


@pytest.mark.parametrize('form', [
    'folder of tars', 'train.tar', 'one tar', 'tar of class tars', 'folders of class tars', 'folders of tars'])
def test_a_tar_gives_the_samples_of_the_folder(images, tars, form, tmp_path):
    path = tars / 'train.tar' if form == 'train.tar' else tars
    if form == 'one tar':
        path = pack(tmp_path / 'everything.tar', images, prefix='data/')
    for split in ('train', 'val'):
        folder = tmp_path / split
        if 'class tars' in form:
            folder.mkdir()
            for label in os.listdir(images / split):
                pack(folder / f'{label}.tar', images / split / label)
        if form == 'tar of class tars':  # as ImageNet's training images are published
            path = pack(tmp_path / f'ILSVRC2012_img_{split}.tar', folder)
            (tmp_path / f'{split}.tar').unlink()
            shutil.rmtree(folder)
        if form == 'folders of tars':
            folder.mkdir()
            names = sorted(str(p.relative_to(images / split)) for p in (images / split).rglob('*.*'))
            for i in range(3):
                pack(folder / f'{i}.tar', images / split, names[i::3])
    for build in (train_set, val_set):
        for _ in range(2):  # the second time from the index
            assert_same_samples(build(path), build(images))


def test_a_run_on_tars_is_that_on_folders(flags, whole, tars, tmp_path):
    nano.finish(nano.start([
        *flags, '--data-path', tars / 'train.tar', '--output-dir', tmp_path / 'out', '--num-workers', 2]))
    nano.assert_same_run(whole, tmp_path / 'out')


def test_classes_are_the_uppermost_folders(tmp_path):
    labels = 'apple', 'train', 'val'
    path = members(tmp_path / 'both.tar', *(
        (f'd/{split}/{label}/{split}.png', split.encode()) for split in ('train', 'val') for label in labels))
    for build, split in ((train_set, 'train'), (val_set, 'val')):
        assert named(build(path)) == [(f'd/{split}/{label}/{split}.png', label, split.encode()) for label in labels]
    for prefix in ('', 'set/', 'set/of/'):
        path = members(tmp_path / 'deep.tar', *(
            (f'./{prefix}{name}', b'1') for name in ('a/y/0.png', 'b/0.png', 'a/x/0.png')))
        assert [(name, label) for name, label, _ in named(train_set(path))] == [
            (f'{prefix}a/x/0.png', 'a'), (f'{prefix}a/y/0.png', 'a'), (f'{prefix}b/0.png', 'b')]
    for names, labels in ((('set/a/0.png',), ['a']), (('train/a/x/0.png', 'train/a/y/1.png'), ['a']),
                          (('train/0.png', 'bus/0.png'), ['bus', 'train'])):
        path = members(tmp_path / 'train.tar', *((name, b'') for name in names))
        assert train_set(path).classes == labels
    path = members(tmp_path / 'val.tar', ('set/val/train/0.png', b''), ('set/val/val/1.png', b''))
    assert val_set(path).classes == ['train', 'val']


@pytest.mark.parametrize('kind', [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_and_sparse_images_in_a_tar_are_refused(tmp_path, kind):
    path = members(tmp_path / 'links.tar', ('a/0.png', b'zero'), ('a/1.png', kind, 'a/0.png'))
    with pytest.raises(UsageError, match='links.tar contains a/1.png as a link or a sparse file.*--dereference'):
        train_set(path)


AFTER = 'truncated or damaged after class_.*: copy it again'
DAMAGE = {  # of a tar, at one of its headers
    'truncated in an image': (lambda data, at: data[:at + 600], AFTER),
    'truncated before a header': (lambda data, at: data[:at], AFTER),
    'a hole': (lambda data, at: data[:at] + bytes(2 ** 21), AFTER),
    'text': (lambda *_: b'no tar ' * 200, 'is not a tar'),
    'compressed': (lambda data, _: b'\x1f\x8b' + data, r'compressed \(unpack it')}


@pytest.mark.parametrize('kind', DAMAGE)
@pytest.mark.parametrize('nested', [False, True])
def test_a_damaged_tar_names_its_fault(tars, kind, nested):
    path = tars / 'train.tar'
    (damage, words), data = DAMAGE[kind], path.read_bytes()
    headers = [i for i in range(0, len(data), 512) if data[i + 257:i + 262] == b'ustar']
    data = damage(data, headers[len(headers) // 2])
    path.write_bytes(data)
    if nested:
        (tars / 'class_a.tar').write_bytes(data)
        pack(path, tars, ['class_a.tar'])
    with pytest.raises(UsageError, match=words) as error:
        train_set(path)
    text = str(error.value)
    assert str(path) in text and '\n' not in text and nested == ('class_a.tar' in text)


def test_shards_take_their_classes_from_cls_files(images, tmp_path):
    files = sorted((images / 'train').rglob('*.*'))
    for shard in range(3):
        members(tmp_path / f'imagenet1k-train-{shard:04d}.tar', *(
            entry for i in range(shard, len(files), 3) for entry in (
                (f'{i:06d}{files[i].suffix}', files[i].read_bytes()), (f'{i:06d}.json', b'{}'),
                (f'{i:06d}.cls', f'{files[i].parent.name[-1]}\n'.encode()))))
    shutil.copy(tmp_path / 'imagenet1k-train-0001.tar', tmp_path / 'imagenet1k-validation-00.tar')
    for name in ('IMNET', 'wds/imagenet'):
        train = build_dataset(name, True, str(tmp_path), 32)
        assert len(train) == 100 and train.classes == ['0', '1', '2']
        order = [i for shard in range(3) for i in range(shard, 100, 3)]
        assert train.targets == [int(files[i].parent.name[-1]) for i in order]
        assert [train.read(k) for k in range(100)] == [files[i].read_bytes() for i in order]
        val = build_dataset(name, False, str(tmp_path), 32, classes=train.classes)
        assert [val.read(k) for k in range(len(val))] == [files[i].read_bytes() for i in range(1, 100, 3)]
    members(tmp_path / 'imagenet1k-train-0000.tar', ('000000x.cls', b'cat'), mode='a')
    with pytest.raises(UsageError, match=r"000000x.cls holds 'cat', not the number"):
        train_set(tmp_path)
    two = members(tmp_path / 'train.tar', ('0.seg.png', b'mask'), ('0.jpg', b'image'), ('0.cls', b'0'))
    with pytest.raises(UsageError, match='train.tar has several images of one key'):
        train_set(two)


def test_shards_number_the_classes_of_the_checkpoint(images, tmp_path):
    path = members(tmp_path / 'val.tar', *[(f'{i}.{extension}', data) for i in range(3) for extension, data in (
        ('png', (images / 'val' / 'class_1' / '01.png').read_bytes()), ('cls', str(i % 2).encode()))])
    assert [label for _, label, _ in named(val_set(path, classes=['n01', 'n02', 'n03']))] == ['n01', 'n02', 'n01']
    with pytest.raises(UsageError, match='classes that the training set, .* lacks: 0, 1'):
        val_set(path, classes=['n01'])


def publish_val(images, folder, monkeypatch) -> list[Path]:
    """Pack validation images as ImageNet publishes them, with a development kit, and return their files in order."""
    files = sorted((images / 'val').rglob('*.*'))
    random.Random(0).shuffle(files)
    members(folder / 'ILSVRC2012_img_val.tar', *(
        (f'ILSVRC2012_val_{i + 1:08d}.JPEG', file.read_bytes()) for i, file in enumerate(files)))
    classes = ['class_2', 'class_0', 'class_1']  # the kit numbers them in an order of its own, from 1
    synsets = np.array(
        [(i + 1, name, 'words, more', '', 0) for i, name in enumerate(classes)],
        dtype=[('ILSVRC2012_ID', int), ('WNID', object), ('words', object), ('gloss', object), ('num_children', int)])
    meta = io.BytesIO()
    scipy.io.savemat(meta, {'synsets': synsets})
    truth = ''.join(f'{classes.index(file.parent.name) + 1}\n' for file in files).encode()
    members(folder / 'ILSVRC2012_devkit_t12.tar.gz', *(
        (f'ILSVRC2012_devkit_t12/data/{name}', content) for name, content in (
            ('meta.mat', meta.getvalue()), ('ILSVRC2012_validation_ground_truth.txt', truth))), mode='w:gz')
    monkeypatch.setattr(imagenet, '_verify_archive', lambda *a: None)  # of the real kit
    return files


def test_the_published_val_tar_takes_classes_from_the_devkit(images, tmp_path, monkeypatch):
    files = publish_val(images, tmp_path, monkeypatch)
    kit = (tmp_path / 'ILSVRC2012_devkit_t12.tar.gz').rename(tmp_path / 'kit')
    with pytest.raises(UsageError, match='ILSVRC2012_devkit_t12.tar.gz next to'):
        val_set(tmp_path)
    kit.rename(tmp_path / 'ILSVRC2012_devkit_t12.tar.gz')
    before = sorted(os.listdir(tmp_path))
    val = val_set(tmp_path, classes=['class_0', 'class_1', 'class_2'])
    assert val.targets == [int(file.parent.name[-1]) for file in files]
    assert [val.read(i) for i in range(len(val))] == [file.read_bytes() for file in files]
    assert sorted(os.listdir(tmp_path)) in (before, sorted([*before, '.ILSVRC2012_img_val.tar.index.npz']))


@pytest.mark.parametrize('name, split', [
    ('training_2.tar', 'train'), ('train2017.tar', 'train'), ('val-000.tar', 'val'), ('my-validation-00.tar', 'val'),
    ('ILSVRC2012_img_train.tar', 'train'), ('trainval.tar', None), ('valley.tar', None), ('._imagenet-val.tar', None)])
def test_a_tar_belongs_to_the_split_in_its_name(tmp_path, name, split):
    (tmp_path / name).touch()
    assert [has_split(str(tmp_path), other) for other in ('train', 'val')] == [split == 'train', split == 'val']


def test_validation_is_never_the_training_tar(images, tmp_path):
    for name in ('train.tar', 'photos.tar'):
        train = pack(tmp_path / name, images / 'train')
        assert len(train_set(train)) == 100
        with pytest.raises(UsageError, match=f'{name} has no validation images.* --val-split 0.1'):
            val_set(train)
    val = pack(tmp_path / 'val.tar', images / 'val')
    for path in (tmp_path / 'train.tar', tmp_path, val):
        assert [train_set(path).roots, val_set(path).roots] == [[str(tmp_path / 'train.tar')], [str(val)]]
    (tmp_path / 'train.tar').unlink()
    assert not has_split(str(val), 'train') and len(val_set(val)) == 27
    with pytest.raises(UsageError, match='no training images'):
        train_set(val)


def test_tars_without_classes_or_beside_folders_are_refused(tmp_path):
    flat = members(tmp_path / 'train-flat.tar', ('0.png', b''), ('0.json', b'{"label": 1}'), ('1.png', b''))
    shutil.copy(flat, tmp_path / 'train-more.tar')
    text = members(tmp_path / 'text.tar', ('a/b.txt', b'none'))
    (tmp_path / 'both' / 'train' / 'class_0').mkdir(parents=True)
    members(tmp_path / 'both' / 'train' / 'class_0.tar', ('0.png', b''))
    for path, words in (
            (flat, 'has no classes: put images into class folders, or KEY.cls'),
            (tmp_path, 'has no classes'),  # several flat tars are not class tars outside of train/
            (tmp_path / 'nowhere.tar', 'no folder .*nowhere.tar'),
            (text, 'no images in .*text.tar'),
            (tmp_path / 'both', r'train contains both tars \(class_0.tar\) and folders \(class_0\): move')):
        with pytest.raises(UsageError, match=words):
            train_set(path)


@pytest.mark.parametrize('names', [('00000', '00001'), ('photos-000000', 'photos-000001')])
def test_shards_without_labels_are_not_classes(tmp_path, names):
    (tmp_path / 'train').mkdir()
    for name in names:
        members(tmp_path / 'train' / f'{name}.tar', (f'{name}.jpg', b''), (f'{name}.json', b'{}'))
    for _ in range(2):  # the second time from the index
        with pytest.raises(UsageError, match='has no classes: .* KEY.cls'):
            train_set(tmp_path)


@pytest.mark.parametrize('names', [('cat', 'dog'), ('0', '7', '10'), ('n00007846', 'n01440764')])
def test_tars_named_as_classes_are_classes(tmp_path, names):
    (tmp_path / 'train').mkdir()
    for name in names:
        members(tmp_path / 'train' / f'{name}.tar', ('a.jpg', b''), ('b.jpg', b''), ('list.txt', b''))
    train = train_set(tmp_path)
    assert train.classes == sorted(names) and np.bincount(train.targets).tolist() == [2] * len(names)


def test_a_folder_of_training_shards_can_be_split(images, tmp_path):
    (tmp_path / 'shards').mkdir()
    pack(tmp_path / 'shards' / 'train-0.tar', images / 'train')
    for build, count in ((train_set, 80), (val_set, 20)):
        expected = build(images / 'train', val_split=0.2)
        assert len(expected) == count
        assert_same_samples(build(tmp_path / 'shards', val_split=0.2), expected)


def scans(caplog, path) -> bool:
    """Whether asking for the index reads the whole tar."""
    caplog.clear()
    tar_index(path)
    return 'reading the index' in caplog.text


def test_the_index_follows_the_tar(tars, caplog):
    caplog.set_level(logging.INFO)
    path = tars / 'train.tar'
    assert scans(caplog, path) and not scans(caplog, path)
    first = tar_index(path)
    with tarfile.open(path, 'a') as tar:
        tar.add(tars / 'val.tar', 'class_0/more.png')
    assert scans(caplog, path) and len(tar_index(path)) == len(first) + 1


def test_an_index_that_cannot_be_beside_its_tar_goes_home(tars, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    (tars / '.train.tar.index.npz').mkdir()  # in the way
    assert scans(caplog, tars / 'train.tar') and not scans(caplog, tars / 'train.tar')


@pytest.mark.parametrize('repeats', [1, 3])
@pytest.mark.parametrize('fast', [False, True])
def test_batches_depend_on_neither_workers_ranks_nor_entry(images, repeats, fast):
    def batches(workers, seen=0, batch=8, rank=0, world_size=1):
        transform = build_transform(True, 64)
        dataset = ImageFolder(images / 'train', FastTransform(transform) if fast else transform)
        sampler = TrainSampler(len(dataset), batch, repeats=repeats, seed=3, rank=rank, world_size=world_size)
        sampler.set_position(2, seen)
        loaded = list(build_loader(dataset, batch, sampler=sampler, num_workers=workers))
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in loaded)
        return [torch.cat(values) for values in zip(*loaded)]

    x, targets = batches(0)
    assert len(x) == 96
    for workers in (1, 3):
        assert nano.same(batches(workers), [x, targets])
    assert nano.same(batches(2, seen=24), [x[24:], targets[24:]])
    assert nano.same(batches(0, batch=6), [x, targets])  # copies fall into other batches
    for rank in range(4):
        assert nano.same(batches(0, batch=4, rank=rank, world_size=4), [x[rank::4], targets[rank::4]])


def gray16(value, suffix, mode) -> bytes:
    """An image of 16 x 12 pixels around `value`."""
    file = io.BytesIO()
    pixels = (np.arange(192).reshape(12, 16) * 40 + value).astype(mode)
    Image.fromarray(pixels).save(file, {'png': 'PNG', 'tif': 'TIFF', 'pgm': 'PPM'}[suffix])
    return file.getvalue()


@pytest.mark.parametrize('suffix, mode', [('png', '<u2'), ('tif', '<u2'), ('tif', '>u2'), ('pgm', '<i4')])
def test_images_of_16_bits_keep_their_content(suffix, mode):
    """In both loaders. Pillow's conversion makes them white."""
    data = gray16(20_000, suffix, mode)
    want = (np.arange(192).reshape(12, 16) * 40 + 20_000) >> 8
    fast = FastTransform(build_transform(True, 64))
    for image in (open_image(data), open_image(Image.open(io.BytesIO(data))), fast.open_image(data)):
        assert np.array_equal(np.array(image), np.repeat(want[..., None], 3, 2))


@pytest.mark.parametrize('mode', [np.int32, np.float32])
def test_gray_values_of_unknown_range_are_refused(tmp_path, mode):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'x.tif').write_bytes(gray16(300, 'tif', mode))
    with pytest.raises(UnreadableImage, match='cannot read .*x.tif .* from 300 to 7'):
        ValidationDataset(ImageFolder(tmp_path))[0]


def test_what_pillow_opens_is_taken_and_the_rest_is_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / 'a' / 'deep').mkdir(parents=True)
    image = Image.new('RGB', (8, 8), 'red')
    for extension, kind in (('jfif', 'JPEG'), ('jpe', 'JPEG'), ('GIF', 'GIF'), ('avif', 'AVIF'), ('mpo', 'MPO'),
                            ('jp2', 'JPEG2000'), ('pbm', 'PPM'), ('tga', 'TGA'), ('qoi', 'QOI')):
        (image.convert('1') if extension == 'pbm' else image).save(tmp_path / 'a' / 'deep' / f'x.{extension}', kind)
    for name in ('a.txt', 'b.TXT', 'c.json', 'README', '.hidden', 'Thumbs.db'):
        (tmp_path / 'a' / name).touch()
    dataset = ImageFolder(tmp_path)
    assert len(dataset) == 9 and all(dataset[i][0].size == (8, 8) for i in range(9))
    assert [r.message for r in caplog.records] == [f'left out of {tmp_path}: 2 .txt, 1 no extension, 1 .json']
    assert len(TarImages([pack(tmp_path / 'train.tar', tmp_path)], 'train')) == 9
    assert f'left out of {tmp_path}/train.tar: 2 .txt, 1 ' in caplog.text


@pytest.mark.parametrize('name', ['.ipynb_checkpoints', '@eaDir', '__MACOSX', 'lost+found'])
def test_folders_of_systems_are_neither_classes_nor_searched(tmp_path, name):
    root = tmp_path / '.train'  # the root itself may be hidden
    save_images(root, 'a/x.png', f'a/{name}/x.png', 'b/x.png', 'b/._x.png', f'{name}/x.png')
    (root / 'b' / name).mkdir()  # empty
    dataset = ImageFolder(root)
    assert dataset.classes == ['a', 'b'] and len(dataset) == 2
    assert_same_samples(TarImages([pack(tmp_path / 'train.tar', root)], 'train'), dataset)


def test_links_to_folders_are_followed_and_loops_end(tmp_path, caplog):
    train = tmp_path / 'train'
    save_images(train, 'a/more/0.png', 'b/more/0.png')
    for link, target in (('a/loop', '..'), ('b/self', '.'), ('b/other', '../a/more'), ('b/twice', 'more'),
                         ('above', '..')):
        (train / link).symlink_to(target)
    assert [name.removeprefix(f'{train}/') for name, _ in ImageFolder(train).samples] == [
        'a/more/0.png', 'b/more/0.png', 'b/other/0.png']
    assert caplog.text.count('already listed') == 3


def test_folders_of_splits_are_not_classes(images, tmp_path):
    for name in ('Training', 'Testing'):
        (tmp_path / name).symlink_to(images / 'train')
    with pytest.raises(UsageError, match='contains Testing and Training'):
        train_set(tmp_path, val_split=0.2)


def rotated(kind: str, orientation: int, size=(12, 8), exif=None) -> bytes:
    """Return a noisy image with EXIF's orientation, or with the EXIF data `exif`."""
    data, file = Image.Exif(), io.BytesIO()
    data[0x0112] = orientation
    pixels = np.random.default_rng(orientation).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind, exif=exif or data)
    return file.getvalue()


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'MPO', 'TIFF'])
def test_images_of_a_folder_are_upright(tmp_path, kind):
    """Unless --ignore-exif asks for the pixels that are stored; Pillow turns a TIFF in any case."""
    files = {f'train/a/{i}.{kind.lower()}': rotated(kind, i) for i in range(1, 9)}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    upright, stored = train_set(tmp_path), train_set(tmp_path, ignore_exif=True)
    for i, data in enumerate(files.values()):
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert expected.size == ((12, 8) if i < 4 else (8, 12))
        assert upright[i][0].tobytes() == expected.convert('RGB').tobytes()
        assert stored[i][0].tobytes() == Image.open(io.BytesIO(data)).convert('RGB').tobytes()


TURN = 0x0112, 3, 1, struct.pack('<HH', 6, 0)  # the orientation's tag, type, count and value


def damaged_exif(*tags) -> bytes:
    body = struct.pack('<2sHIH', b'II', 42, 8, len(tags)) + b''.join(struct.pack('<HHI4s', *tag) for tag in tags)
    return b'Exif\0\0' + body + bytes(4)


@pytest.mark.parametrize('exif, turns', [
    (b'Exif\0\0noise, not a header', False), (damaged_exif(TURN, (0x0100, 2, 4, b'abc\0')), True)])
@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
def test_damaged_exif_data_leave_an_image_readable(exif, turns):
    data = rotated('JPEG', 6, exif=exif)
    fast = FastTransform(build_transform(True, 32))
    for image in (open_image(data), fast.open_image(data)):
        assert image.size == ((8, 12) if turns else (12, 8))
        assert fast(image).shape == (3, 32, 32)


WITHOUT_HEIF = """
import logging, sys
sys.modules['pillow_heif'] = None  # as if it were not installed
logging.basicConfig(level='INFO', format='%(message)s')
from datasets import build_dataset
for path in sys.argv[1:]:
    print(len(build_dataset('IMNET', True, path, 32)))"""


def test_without_its_package_heic_is_counted_with_advice(tmp_path):
    """In each run, whether or not the tar has an index."""
    save_images(tmp_path / 'train', 'a/0.png', 'b/1.png')
    for name in ('a/1.heic', 'b/2.HEIC', 'b/3.heif'):
        (tmp_path / 'train' / name).write_bytes(b'not read')
    (tmp_path / 'tar').mkdir()
    pack(tmp_path / 'tar' / 'train.tar', tmp_path / 'train')
    run = subprocess.run([sys.executable, '-c', WITHOUT_HEIF, tmp_path, tmp_path / 'tar', tmp_path / 'tar'],
                         cwd=Path(__file__).parents[1], text=True, capture_output=True, timeout=120)
    lines = [line for line in run.stderr.splitlines() if ' .heic' in line]
    assert run.stdout.split() == ['2', '2', '2'] and len(lines) == 3, run.stderr
    assert all('2 .heic, 1 .heif' in line and 'pip install pillow-heif' in line for line in lines)


def test_with_its_package_heic_is_an_image(tmp_path):
    pytest.importorskip('pillow_heif')
    save_images(tmp_path / 'train', 'a/0.png')
    for name in ('b/1.HEIC', 'b/2.heif'):
        (tmp_path / 'train' / 'b').mkdir(exist_ok=True)
        Image.new('RGB', (64, 48), 'red').save(tmp_path / 'train' / name, 'HEIF')
    dataset = train_set(tmp_path)
    assert [dataset[i][0].size for i in range(3)] == [(8, 8), (64, 48), (64, 48)]
    assert np.abs(np.array(dataset[1][0], int) - (255, 0, 0)).max() < 9
