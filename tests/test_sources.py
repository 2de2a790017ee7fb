"""Tars that are read in place, WebDataset shards, ImageNet's own tars, and the cache: real files, really damaged."""
import errno
import io
import multiprocessing
import os
import random
import re
import resource
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import imagenet

import datasets
import nano
import sources
from datasets import build_dataset, build_loader
from samplers import TrainSampler
from sources import Cache, ImageFolder, Samples, open_cache, tar_index
from transforms import build_transform


def pack(path: Path, folder: Path, names=None, prefix='') -> Path:
    """A tar of the files in `folder`, in no order."""
    names = names or [str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()]
    random.Random(0).shuffle(names)
    with tarfile.open(path, 'w', format=tarfile.GNU_FORMAT) as tar:  # no headers beside the files' own
        for name in names:
            tar.add(folder / name, prefix + name)
    return path


def same_samples(a, b) -> None:
    assert a.classes == b.classes and a.targets == b.targets and len(a) == len(b) > 0
    for i in range(len(a)):
        assert a.read(i) == b.read(i)
        (image, target), (other, label) = a[i], b[i]
        assert target == label and image.tobytes() == other.tobytes()


@pytest.fixture
def tars(images, tmp_path):
    """A folder with train.tar and val.tar."""
    for part in ('train', 'val'):
        pack(tmp_path / f'{part}.tar', images / part, prefix='./' if part == 'val' else '')
    return tmp_path


@pytest.mark.parametrize('form', ['folder of tars', 'train.tar', 'one tar', 'class tars', 'folders of tars'])
def test_a_tar_gives_the_samples_of_the_folder(images, tars, form, tmp_path):
    path = tars
    if form == 'train.tar':
        path = tars / 'train.tar'
    if form == 'one tar':
        path = pack(tmp_path / 'everything.tar', images, prefix='data/')
    if form == 'class tars':  # as ImageNet's training images are published
        for part in ('train', 'val'):
            folder = tmp_path / f'{part} classes'
            folder.mkdir()
            for label in os.listdir(images / part):
                pack(folder / f'{label}.tar', images / part / label)
            pack(tmp_path / f'my_{part}.tar', folder)
            (tmp_path / f'{part}.tar').unlink()
        path = tmp_path / 'my_train.tar'
    if form == 'folders of tars':
        for part in ('train', 'val'):
            (tmp_path / part).mkdir()
            names = sorted(str(p.relative_to(images / part)) for p in (images / part).rglob('*.*'))
            for i in range(3):
                pack(tmp_path / part / f'{i}.tar', images / part, names[i::3])
    for is_train in (True, False):
        expected = build_dataset('IMNET', is_train, str(images), 32)
        for _ in range(2):  # the second time from the index
            same_samples(build_dataset('IMNET', is_train, str(path), 32), expected)


def test_batches_and_split_of_a_tar_are_those_of_the_folder(images, tars):
    (tars / 'val.tar').unlink()
    batches = []
    for path in (images / 'train', tars / 'train.tar'):
        dataset = build_dataset('IMNET', True, str(path), 64, build_transform(True, 64, fast=True), val_split=0.2)
        sampler = TrainSampler(len(dataset), 16, repeats=3, seed=5)
        batches.append([tuple(batch) for batch in build_loader(dataset, 16, sampler=sampler, num_workers=2)])
    assert nano.same(*batches) and len(dataset) == 80


def test_a_run_on_tars_is_that_on_folders(flags, whole, tars, tmp_path):
    argv = [*flags, '--data-path', tars / 'train.tar', '--output-dir', tmp_path / 'out', '--cache', 'disk',
            '--cache-dir', tmp_path / 'cache', '--cache-size', '1M', '--num-workers', 2]
    nano.finish(nano.start(argv))
    nano.assert_same_run(whole, tmp_path / 'out')
    # three epochs of repeated augmentation see 34 images each
    assert len([p for p in (tmp_path / 'cache').rglob('*') if p.name.isdecimal() and p.is_file()]) > 50


def test_shards(images, tmp_path):
    files = sorted((images / 'train').rglob('*.*'))
    for shard in range(3):
        with tarfile.open(tmp_path / f'my-train-{shard:03d}.tar', 'w') as tar:
            for i in range(shard, len(files), 3):
                label = files[i].parent.name[-1]
                for suffix, data in ((files[i].suffix, files[i].read_bytes()), ('.cls', f'{label}\n'.encode()),
                                     ('.json', b'{}')):
                    info = tarfile.TarInfo(f'{i:06d}{suffix}')
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    shutil.copy(tmp_path / 'my-train-001.tar', tmp_path / 'my-validation-000.tar')
    for name in ('IMNET', 'wds/imagenet'):
        train = build_dataset(name, True, str(tmp_path), 32)
        assert len(train) == 100 and train.classes == ['0', '1', '2']
        order = [i for shard in range(3) for i in range(shard, 100, 3)]
        assert train.targets == [int(files[i].parent.name[-1]) for i in order]
        assert [train.read(k) for k in range(100)] == [files[i].read_bytes() for i in order]
        val = build_dataset(name, False, str(tmp_path), 32, classes=train.classes)
        assert [val.read(k) for k in range(len(val))] == [files[i].read_bytes() for i in range(1, 100, 3)]
    with tarfile.open(tmp_path / 'my-train-000.tar', 'a') as tar:
        info = tarfile.TarInfo('000000x.cls')
        info.size = 3
        tar.addfile(info, io.BytesIO(b'cat'))
    with pytest.raises(ValueError, match=r"000000x.cls holds 'cat', not the number"):
        build_dataset('IMNET', True, str(tmp_path), 32)


def test_the_published_validation_tar_finds_its_classes_in_the_development_kit(images, tmp_path, monkeypatch):
    files = sorted((images / 'val').rglob('*.*'))
    random.Random(0).shuffle(files)
    with tarfile.open(tmp_path / 'ILSVRC2012_img_val.tar', 'w') as tar:
        for i, file in enumerate(files):
            tar.add(file, f'ILSVRC2012_val_{i + 1:08d}.JPEG')
    with pytest.raises(ValueError, match='put ILSVRC2012_devkit_t12.tar.gz beside it'):
        build_dataset('IMNET', False, str(tmp_path), 32)
    classes = ['class_2', 'class_0', 'class_1']  # the kit numbers them in an order of its own, from 1
    kit = tmp_path / 'kit' / 'ILSVRC2012_devkit_t12' / 'data'
    kit.mkdir(parents=True)
    synsets = np.array(
        [(i + 1, name, 'words, more', '', 0) for i, name in enumerate(classes)],
        dtype=[('ILSVRC2012_ID', int), ('WNID', object), ('words', object), ('gloss', object), ('num_children', int)])
    scipy.io.savemat(kit / 'meta.mat', {'synsets': synsets})
    (kit / 'ILSVRC2012_validation_ground_truth.txt').write_text(
        ''.join(f'{classes.index(file.parent.name) + 1}\n' for file in files))
    with tarfile.open(tmp_path / 'ILSVRC2012_devkit_t12.tar.gz', 'w:gz') as tar:
        tar.add(tmp_path / 'kit' / 'ILSVRC2012_devkit_t12', 'ILSVRC2012_devkit_t12')
    shutil.rmtree(tmp_path / 'kit')
    monkeypatch.setattr(imagenet, '_verify_archive', lambda *a: None)  # of the real kit
    before = sorted(os.listdir(tmp_path))
    val = build_dataset('IMNET', False, str(tmp_path), 32, classes=['class_0', 'class_1', 'class_2'])
    assert val.targets == [int(file.parent.name[-1]) for file in files]
    assert [val.read(i) for i in range(len(val))] == [file.read_bytes() for file in files]
    assert sorted(os.listdir(tmp_path)) in (before, sorted([*before, '.ILSVRC2012_img_val.tar.index.npz']))


def damage(data: bytes, kind: str) -> bytes:
    headers = [i for i in range(0, len(data), 512) if data[i + 257:i + 262] == b'ustar']
    at = headers[len(headers) // 2]
    return {
        'truncated in an image': data[:at + 600], 'truncated in a header': data[:at + 200],
        'truncated before a header': data[:at], 'zeros': data[:at] + bytes(1024) + data[at + 1024:],
        'a hole': data[:at] + bytes(2 ** 21),
        'a bit': data[:at + 20] + bytes([data[at + 20] ^ 4]) + data[at + 21:], 'empty': b'', 'text': b'no tar ' * 200,
        'compressed': b'\x1f\x8b' + data, 'zip': b'PK\x03\x04' + data}[kind]


@pytest.mark.parametrize('kind, words', [
    ('truncated in an image', 'truncated in class_.*, at byte .* copy it again'),
    ('truncated in a header', 'damaged behind class_.*at byte .*: copy it again'),
    ('truncated before a header', 'damaged behind class_.*at byte .*: copy it again'),
    ('a bit', 'damaged behind class_.*at byte .*: copy it again'),
    ('zeros', 'damaged behind class_.*at byte .*: copy it again'),
    ('a hole', 'damaged behind class_.*at byte .*: copy it again'),
    ('empty', 'is no tar'), ('text', 'is no tar, or damaged'), ('zip', 'is no tar, or damaged'),
    ('compressed', 'compressed: unpack it')])
@pytest.mark.parametrize('nested', [False, True])
def test_a_damaged_tar_names_its_fault(tars, kind, words, nested):
    path = tars / 'train.tar'
    data = damage(path.read_bytes(), kind)
    path.write_bytes(data)
    if nested:
        (tars / 'class_a.tar').write_bytes(data)
        pack(path, tars, ['class_a.tar'])
    with pytest.raises(ValueError, match=words) as error:
        build_dataset('IMNET', True, str(path), 32)
    assert str(path) in str(error.value) and '\n' not in str(error.value)
    assert nested is False or 'class_a.tar' in str(error.value)


def test_a_damaged_tar_ends_a_run_with_one_line(tars, capfd):
    path = tars / 'train.tar'
    path.write_bytes(damage(path.read_bytes(), 'truncated in an image'))
    nano.finish(nano.start([*nano.FLAGS, '--data-path', path, '--output-dir', tars / 'out'],
                           output=tars / 'said'), status=2)
    said = (tars / 'said').read_text().strip().splitlines()
    assert len([line for line in said if 'error' in line]) == 1 and 'truncated' in said[-1]
    assert not (tars / 'out').exists()


def test_tars_that_say_no_classes(tmp_path, images):
    flat = tmp_path / 'flat_train.tar'
    with tarfile.open(flat, 'w') as tar:
        for i, file in enumerate(sorted(images.rglob('*.png'))[:5]):
            tar.add(file, f'{i}.png')
    with pytest.raises(ValueError, match='put ILSVRC2012_devkit'):
        build_dataset('IMNET', True, str(flat), 32)
    with pytest.raises(ValueError, match='no file .*nowhere.tar'):
        build_dataset('IMNET', True, str(tmp_path / 'nowhere.tar'), 32)
    text = tmp_path / 'text_train.tar'
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'b.txt').write_text('none')
    pack(text, tmp_path, ['a/b.txt'])
    with pytest.raises(ValueError, match='no images in .*text_train.tar'):
        build_dataset('IMNET', True, str(text), 32)


def test_validation_is_never_the_training_tar(images, tmp_path, caplog):
    train = pack(tmp_path / 'retrieval-train.tar', images / 'train')
    with pytest.raises(ValueError, match='has no validation images: put retrieval-val.tar beside it, or .*--val-split'):
        build_dataset('IMNET', False, str(train), 32)
    for name in ('val', 'validation'):
        val = pack(tmp_path / f'retrieval-{name}.tar', images / 'val')
        for path in (train, tmp_path):
            assert build_dataset('IMNET', False, str(path), 32).paths == [str(val)]
            assert build_dataset('IMNET', True, str(path), 32).paths == [str(train)]
        val.unlink()
    (tmp_path / 'alone').mkdir()
    val = pack(tmp_path / 'alone' / 'x_val.tar', images / 'val')
    assert not sources.has_part(str(val), 'train') and len(build_dataset('IMNET', False, str(val), 32)) > 0
    with pytest.raises(ValueError, match='validation set by its name'):
        build_dataset('IMNET', True, str(val), 32)
    assert not caplog.records
    both = pack(tmp_path / 'trainval.tar', images / 'val')
    assert sources.part_in_name(both) is None and sources.part_in_name(Path('Training_2.tar')) == 'train'
    build_dataset('IMNET', False, str(both), 32)
    assert 'all images of' in caplog.text


def members(path, *entries):
    """A tar of (name, bytes), or (name, type, link)."""
    with tarfile.open(path, 'w', format=tarfile.GNU_FORMAT) as tar:
        for name, content, *link in entries:
            info = tarfile.TarInfo(name)
            if link:
                info.type, info.linkname = content, link[0]
            else:
                info.size = len(content)
            tar.addfile(info, None if link else io.BytesIO(content))
    return str(path)


def named(path, is_train=True):
    dataset = build_dataset('IMNET', is_train, str(path), 32)
    return [(name.split('.tar/')[1], dataset.classes[target], dataset.read(i))
            for i, (name, target) in enumerate(dataset.samples)]


def test_classes_are_the_uppermost_folders(tmp_path):
    labels = 'apple', 'train', 'val'
    path = members(tmp_path / 'parts.tar', *(
        (f'd/{part}/{label}/{part}.png', part.encode()) for part in ('train', 'val') for label in labels))
    for part in ('train', 'val'):
        assert named(path, part == 'train') == [
            (f'd/{part}/{label}/{part}.png', label, part.encode()) for label in labels]
    for prefix in ('', 'set/', 'set/of/'):
        path = members(tmp_path / 'deep.tar', *(
            (f'./{prefix}{name}', b'1') for name in ('a/y/0.png', 'b/0.png', 'a/x/0.png')))
        assert [(name, label) for name, label, _ in named(path)] == [
            (f'{prefix}a/x/0.png', 'a'), (f'{prefix}a/y/0.png', 'a'), (f'{prefix}b/0.png', 'b')]
    path = members(tmp_path / 'one.tar', ('set/a/0.png', b'1'))
    assert [label for _, label, _ in named(path)] == ['a']


def test_links_and_repeated_members(tmp_path):
    path = members(
        tmp_path / 'links.tar', ('a/0.png', b'old'), ('./a/1.png', tarfile.LNKTYPE, 'a/0.png'),
        ('b/0.png', tarfile.SYMTYPE, '../a/2.png'), ('a/2.png', tarfile.SYMTYPE, '3.png'), ('a/3.png', b'three'),
        ('b/1.png', tarfile.SYMTYPE, 'nowhere.png'), ('b/1.png', b'one'), ('a/0.png', b'new'))
    assert [(name, data) for name, _, data in named(path)] == [
        ('a/0.png', b'new'), ('a/1.png', b'old'), ('a/2.png', b'three'), ('a/3.png', b'three'), ('b/0.png', b'three'),
        ('b/1.png', b'one')]
    for kind, target in ((tarfile.LNKTYPE, 'b/0.png'), (tarfile.SYMTYPE, '1.png'), (tarfile.SYMTYPE, '/b/0.png')):
        path = members(tmp_path / 'broken.tar', ('a/0.png', b'0'), ('a/1.png', kind, target))
        with pytest.raises(ValueError, match='broken.tar holds a/1.png, a link to .*, but not that: pack'):
            named(path)


def test_members_that_macos_adds_are_none(tmp_path):
    inner = Path(members(tmp_path / 'inner.tar', ('0.png', b'0'))).read_bytes()
    path = members(
        tmp_path / 'classes.tar', ('._a.tar', b'x'), ('a.tar', inner), ('a/._0.png', b'x'), ('b/1.png', b'1'))
    assert named(path) == [('a/0.png', 'a', b'0'), ('b/1.png', 'b', b'1')]
    path = members(tmp_path / 'shard.tar', ('._0.cls', b'\0'), ('0.cls', b'0'), ('._0.png', b'x'), ('0.png', b'0'))
    assert named(path) == [('0.png', '0', b'0')]


def test_sparse_members_and_sizes_that_damage_made_are_refused(tmp_path):
    def patched(at, text):
        data = bytearray(Path(path).read_bytes())
        head = [i for i in range(0, len(data), 512) if data[i + 257:i + 262] == b'ustar'][-2 if len(text) > 1 else -1]
        data[head + at:head + at + len(text)] = text
        data[head + 148:head + 156] = b' ' * 8
        data[head + 148:head + 156] = b'%06o\0 ' % sum(data[head:head + 512])
        Path(path).write_bytes(data)

    path = members(tmp_path / 'large.tar', ('a/0.png', b'0'), ('b/' + 'x' * 200 + '.png', b'1'))  # of a long name
    patched(124, b'\x80' + bytes(2) + b'\x10' + bytes(8))
    with pytest.raises(ValueError, match='large.tar is no tar, or damaged behind a/0.png .*: copy it again'):
        named(path)
    path = members(tmp_path / 'sparse.tar', ('a/0.png', b'0'), ('b/1.png', b'1'))
    patched(156, b'S')
    with pytest.raises(ValueError, match='sparse.tar holds b/1.png without its zeros: pack it without -S'):
        named(path)


def test_folders_of_class_tars_and_of_tars_beside_folders(images, tmp_path):
    (tmp_path / 'train').mkdir()
    for label in os.listdir(images / 'train'):
        pack(tmp_path / 'train' / f'{label}.tar', images / 'train' / label)
    same_samples(build_dataset('IMNET', True, str(tmp_path), 32), build_dataset('IMNET', True, str(images), 32))
    shutil.copytree(images / 'train' / 'class_0', tmp_path / 'train' / 'class_0')
    with pytest.raises(ValueError, match=r'train holds both tars \(class_0.tar\) and folders \(class_0\): move'):
        build_dataset('IMNET', True, str(tmp_path), 32)


def test_a_folder_of_training_shards_can_be_split(images, tmp_path):
    pack(tmp_path / 'train-0.tar', images / 'train')
    parts = [build_dataset('IMNET', is_train, str(tmp_path), 32, val_split=0.2) for is_train in (True, False)]
    assert [len(part) for part in parts] == [80, 20]
    mixed = shutil.copytree(images / 'train', tmp_path / 'mixed')
    pack(mixed / 'old_train.tar', images / 'val')
    assert len(build_dataset('IMNET', True, str(mixed), 32, val_split=0.2)) == 80
    shutil.rmtree(mixed)
    pack(tmp_path / 'val-0.tar', images / 'val')
    with pytest.raises(ValueError, match='has a validation part: leave --val-split out'):
        build_dataset('IMNET', True, str(tmp_path), 32, val_split=0.2)


def test_the_index_follows_the_tar_and_survives_damage(tars, monkeypatch):
    path, scans = tars / 'train.tar', []
    scan = sources._scan
    monkeypatch.setattr(sources, '_scan', lambda path, *a: scans.append(path) or scan(path, *a))
    first = tar_index(path)
    assert tar_index(path) == first and len(scans) == 1
    index = tars / '.train.tar.index.npz'
    whole = index.read_bytes()
    for left, count in ((100, 2), (0, 3)):
        index.write_bytes(whole[:left])
        assert tar_index(path) == first and len(scans) == count
    with tarfile.open(path, 'a') as tar:
        tar.add(tars / 'val.tar', 'class_0/more.png')
    assert len(tar_index(path)) == len(first) + 1 and len(scans) == 4


def test_an_index_goes_elsewhere_where_the_tar_cannot_be_written_beside(tars, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    replace = os.replace

    def read_only(source, target):
        if Path(target).parent == tars:
            raise PermissionError('read-only')
        replace(source, target)
    monkeypatch.setattr(os, 'replace', read_only)
    first = tar_index(tars / 'train.tar')
    assert len(list((tmp_path / 'home').rglob('*.npz'))) == 1
    monkeypatch.setattr(sources, '_scan', None)
    assert tar_index(tars / 'train.tar') == first


def test_samples_keep_names_and_classes():
    names = ['a.png', 'ü/b.png', os.fsdecode(b'\xff.png'), '']
    samples = Samples(names, [3, 1, 2, 0])
    assert list(samples) == list(zip(names, [3, 1, 2, 0])) and samples[-1] == ('', 0) and len(samples) == 4
    with pytest.raises(IndexError):
        samples[4]
    assert all(not isinstance(value, (list, tuple)) for value in vars(samples).values())


# ---------------------------------------------------------------------------------------------------------------------

def fill(cache, indices, sizes):
    for i in indices:
        assert cache.get(i, lambda i: bytes([i % 251]) * sizes) == bytes([i % 251]) * sizes


def used(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob('*') if p.is_file() and p.name.isdecimal())


def test_the_cache_keeps_what_was_read_up_to_its_budget_in_all_processes(tmp_path):
    cache, reads = Cache(tmp_path / 'c', 10_000), []
    for _ in range(3):
        for i in range(8):
            assert cache.get(i, lambda i: reads.append(i) or b'x' * 1000) == b'x' * 1000
    assert reads == list(range(8)) and used(tmp_path) == 8000
    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=fill, args=(Cache(tmp_path / 'd', 50_000), range(k, 400, 3), 1000))
                 for k in range(4)]
    for process in processes:
        process.start()
    nano.finish(processes)
    assert used(tmp_path / 'd') == Cache(tmp_path / 'd', 0).used() == 50_000  # the first and the last read the same


def test_a_cache_that_was_damaged_or_taken_away_reads_again(tmp_path, caplog):
    cache = Cache(tmp_path / 'c', 10_000)
    fill(cache, [1], 100)
    (tmp_path / 'c' / '0' / '1').write_bytes(b'')
    fill(cache, [1], 100)
    cache.remove()
    fill(cache, [1, 2], 100)
    assert not caplog.records
    cache.remove()
    (tmp_path / 'c').write_text('in the way')
    fill(cache, [1, 2], 100)
    assert len(caplog.records) == 1 and 'no more is cached' in caplog.text


def test_a_file_that_changed_is_read_again(tmp_path):
    file, cache = tmp_path / 'a.png', Cache(tmp_path / 'c', 250)
    for data, time in ((b'a' * 100, 1), (b'b' * 100, 2), (b'c' * 200, 2), (b'd' * 200, 1)):
        file.write_bytes(data)
        os.utime(file, ns=(time, time))
        for _ in range(2):
            assert cache.get(0, lambda i: file.read_bytes(), str(file)) == data
        assert used(tmp_path) == cache.used() == len(data)
    assert cache.get(0, None, str(file)) == data


def test_data_of_the_same_names_has_another_cache(tmp_path, images, monkeypatch):
    folders = set()
    for name in 'ab':
        shutil.copytree(images / 'train', tmp_path / name / 'data' / 'train')
        pack(tmp_path / name / 'train.tar', images / 'train')
        monkeypatch.chdir(tmp_path / name)
        for path in ('data', 'train.tar'):
            for _ in range(2):
                folders.add(open_cache('disk', str(tmp_path), None, build_dataset('IMNET', True, path, 32)).folder)
    assert len(folders) == 4
    os.utime('train.tar', ns=(1, 1))
    assert open_cache('disk', str(tmp_path), None, build_dataset('IMNET', True, path, 32)).folder not in folders


@pytest.mark.parametrize('text', [b'', b'\0\0\0', b'-5', b'many'])
def test_a_damaged_count_is_made_anew(tmp_path, text):
    cache = Cache(tmp_path / 'c', 1000)
    fill(cache, range(6), 100)
    (tmp_path / 'c' / 'bytes').write_bytes(text)
    assert cache.used() == 600
    fill(cache, range(20), 100)
    assert used(tmp_path) == cache.used() == 1000


def test_a_full_disk_keeps_no_halves_and_a_removed_cache_starts_again(tmp_path, monkeypatch):
    cache = Cache(tmp_path / 'c', 10_000)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', lambda source, target: Path(source).rename(Path(target).parent / 'no' / 'where'))
        fill(cache, [1], 100)
    assert not cache.full
    fill(cache, [1], 100)
    assert used(tmp_path) == 100

    class Full(tempfile._TemporaryFileWrapper):
        def write(self, data):
            raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(tempfile, '_TemporaryFileWrapper', Full)
    fill(cache, [2], 100)
    assert cache.full and sorted(p.name for p in (tmp_path / 'c' / '0').iterdir()) == ['1']


def test_caches_are_for_files_and_for_what_is_free(images, tmp_path):
    folder = build_dataset('IMNET', True, str(images), 32)
    with pytest.raises(ValueError, match='--cache-size 8589934592.0G: .* free'):
        open_cache('disk', str(tmp_path), 2 ** 63, folder)
    with pytest.raises(ValueError, match='not read from files'):
        open_cache('ram', None, None, build_dataset('DIGITS', True, None, 32))
    cache = open_cache('disk', str(tmp_path), None, folder)
    assert cache.limit > 2 ** 20
    other = open_cache('disk', str(tmp_path), None, build_dataset('IMNET', False, str(images), 32))
    assert other.folder != cache.folder  # another data set has a folder of its own


def test_memory_is_given_back_after_a_run(flags, whole, tmp_path):
    nano.finish(nano.start([*flags, '--cache', 'ram', '--cache-dir', tmp_path / 'ram', '--output-dir', tmp_path / 'a']))
    nano.assert_same_run(whole, tmp_path / 'a')
    assert list((tmp_path / 'ram').iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """48 JPEGs of 60 to 200 pixels in two classes."""
    root, rng = tmp_path_factory.mktemp('photographs'), np.random.default_rng(1)
    for label in 'ab':
        (root / label).mkdir()
        for i in range(24):
            small = rng.integers(0, 256, (12, 15, 3), dtype=np.uint8)
            size = rng.integers(60, 200, 2).tolist()
            Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(
                root / label / f'{i}.jpg', quality=92, subsampling=i % 3)
    return root


@pytest.mark.parametrize('repeats', [1, 3])
def test_batches_do_not_depend_on_workers_ranks_or_where_an_epoch_is_entered(photographs, repeats):
    def batches(workers, seen=0, batch=8, rank=0, world_size=1):
        transform = build_transform(True, 64, fast=True, keep_decoded=repeats > 1 and world_size < 3)
        dataset = ImageFolder(photographs, transform)
        sampler = TrainSampler(
            len(dataset), batch, repeats=repeats, seed=3, rank=rank, world_size=world_size)
        sampler.set_position(2, seen)
        loaded = list(build_loader(dataset, batch, sampler=sampler, num_workers=workers))
        assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in loaded)
        return [torch.cat(parts) for parts in zip(*loaded)]

    images, targets = batches(0)
    assert len(images) == 48
    for workers in (1, 3):
        assert nano.same(batches(workers), [images, targets])
    assert nano.same(batches(2, seen=24), [images[24:], targets[24:]])
    assert nano.same(batches(0, batch=6), [images, targets])  # copies fall into other batches
    for rank in range(4):
        assert nano.same(batches(0, batch=4, rank=rank, world_size=4), [images[rank::4], targets[rank::4]])


def test_a_bad_file_is_reported_by_name_and_the_next_one_taken(photographs, tmp_path, caplog):
    root = shutil.copytree(photographs, tmp_path / 'p')
    bad = root / 'a' / '5.jpg'
    bad.write_bytes(bad.read_bytes()[:300])
    dataset = datasets.KeyedDataset(ImageFolder(root, build_transform(True, 64, fast=True)))
    names = [name for name, _ in dataset.dataset.samples]
    at = names.index(str(bad))
    assert torch.equal(dataset[at, 7][0], dataset[at + 1, 7][0])
    assert len(caplog.records) == 1 and re.search(r'cannot read .*/a/5.jpg .*taking the next', caplog.text)


class Resident(ImageFolder):
    """In the place of classes, the most memory that the process has had so far."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize('fast', [False, True])
def test_loaders_do_not_grow(photographs, fast):
    dataset = Resident(photographs, build_transform(True, 224, fast=fast))
    sampler = TrainSampler(len(dataset), 48, repeats=3)
    loader, most = build_loader(dataset, 48, sampler=sampler, num_workers=1), []
    for epoch in range(12):
        sampler.set_position(epoch)
        most.append(max(int(targets.max()) for _, targets in loader))
    assert most[-1] < 1.05 * most[3]
