"""Folders, tars that are read in place, WebDataset shards, ImageNet's own tars: real files, really damaged."""
import io
import logging
import os
import random
import resource
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import imagenet

import nano
from datasets import build_dataset
from errors import UnreadableImage
from fast_transforms import FastTransform
from loader import ValidationDataset, build_loader
from samplers import TrainSampler
from sources import ImageFolder, Samples, TarImages, has_split, open_image, tar_index
from transforms import build_transform


def pack(path: Path, folder: Path, names=None, prefix='') -> Path:
    """A tar of the files in `folder`, in no order."""
    names = names or [str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()]
    random.Random(0).shuffle(names)
    with tarfile.open(path, 'w', format=tarfile.GNU_FORMAT) as tar:  # no headers beside the files' own
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


@pytest.mark.parametrize('form', [
    'folder of tars', 'train.tar', 'one tar', 'tar of class tars', 'folders of class tars', 'folders of tars'])
def test_a_tar_gives_the_samples_of_the_folder(images, tars, form, tmp_path):
    path = tars
    if form == 'train.tar':
        path = tars / 'train.tar'
    if form == 'one tar':
        path = pack(tmp_path / 'everything.tar', images, prefix='data/')
    for part in ('train', 'val'):
        folder = tmp_path / part
        if 'class tars' in form:
            folder.mkdir()
            for label in os.listdir(images / part):
                pack(folder / f'{label}.tar', images / part / label)
        if form == 'tar of class tars':  # as ImageNet's training images are published
            path = pack(tmp_path / f'ILSVRC2012_img_{part}.tar', folder)
            (tmp_path / f'{part}.tar').unlink()
            shutil.rmtree(folder)
        if form == 'folders of tars':
            folder.mkdir()
            names = sorted(str(p.relative_to(images / part)) for p in (images / part).rglob('*.*'))
            for i in range(3):
                pack(folder / f'{i}.tar', images / part, names[i::3])
    for is_train in (True, False):
        expected = build_dataset('IMNET', is_train, str(images), 32)
        for _ in range(2):  # the second time from the index
            same_samples(build_dataset('IMNET', is_train, str(path), 32), expected)


def test_batches_and_split_of_a_tar_are_those_of_the_folder(images, tars):
    (tars / 'val.tar').unlink()
    batches = []
    for path in (images / 'train', tars / 'train.tar'):
        dataset = build_dataset('IMNET', True, str(path), 64, FastTransform(build_transform(True, 64)), val_split=0.2)
        sampler = TrainSampler(len(dataset), 16, repeats=3, seed=5)
        batches.append([tuple(batch) for batch in build_loader(dataset, 16, sampler=sampler, num_workers=2)])
    assert nano.same(*batches) and len(dataset) == 80


def test_a_run_on_tars_is_that_on_folders(flags, whole, tars, tmp_path):
    nano.finish(nano.start([
        *flags, '--data-path', tars / 'train.tar', '--output-dir', tmp_path / 'out', '--num-workers', 2]))
    nano.assert_same_run(whole, tmp_path / 'out')


def test_shards_take_their_classes_from_cls_files(images, tmp_path):
    files = sorted((images / 'train').rglob('*.*'))
    for shard in range(3):
        members(tmp_path / f'train-{shard:03d}.tar', *(entry for i in range(shard, len(files), 3) for entry in (
            (f'{i:06d}{files[i].suffix}', files[i].read_bytes()), (f'{i:06d}.json', b'{}'),
            (f'{i:06d}.cls', f'{files[i].parent.name[-1]}\n'.encode()))))
    shutil.copy(tmp_path / 'train-001.tar', tmp_path / 'validation-000.tar')
    for name in ('IMNET', 'wds/imagenet'):
        train = build_dataset(name, True, str(tmp_path), 32)
        assert len(train) == 100 and train.classes == ['0', '1', '2']
        order = [i for shard in range(3) for i in range(shard, 100, 3)]
        assert train.targets == [int(files[i].parent.name[-1]) for i in order]
        assert [train.read(k) for k in range(100)] == [files[i].read_bytes() for i in order]
        val = build_dataset(name, False, str(tmp_path), 32, classes=train.classes)
        assert [val.read(k) for k in range(len(val))] == [files[i].read_bytes() for i in range(1, 100, 3)]
    members(tmp_path / 'train-000.tar', ('000000x.cls', b'cat'), mode='a')
    with pytest.raises(ValueError, match=r"000000x.cls holds 'cat', not the number"):
        build_dataset('IMNET', True, str(tmp_path), 32)


def test_a_shard_gives_one_image_a_key(tmp_path, caplog):
    png = io.BytesIO()
    Image.new('RGB', (8, 8)).save(png, 'png')
    samples = [entry for i in range(3) for entry in (
        (f'{i}.seg.png', b'mask'), (f'{i}.jpg', png.getvalue()), (f'{i}.depth.png', b''), (f'{i}.cls', b'%d' % i))]
    members(tmp_path / 'train.tar', *samples)
    data = build_dataset('IMNET', True, str(tmp_path), 32)
    assert [name.rpartition('/')[2] for name, _ in data.samples] == ['0.jpg', '1.jpg', '2.jpg']
    assert data.targets == [0, 1, 2] and data.read(2) == png.getvalue()
    assert '6 more images of the same keys: ignored (.depth.png, .seg.png)' in caplog.text
    members(tmp_path / 'train.tar', *samples, ('1.webp', b''))
    with pytest.raises(ValueError, match='two images of one key, 1.jpg and 1.webp'):
        build_dataset('IMNET', True, str(tmp_path), 32)


def test_shards_without_cls_files_are_named(tmp_path):
    for i in range(2):
        members(tmp_path / f'train-{i}.tar', ('0.jpg', b''), ('0.json', b'{"label": 1}'))
    with pytest.raises(ValueError, match='KEY.cls with the number of the class beside each KEY.jpg'):
        build_dataset('wds/imagenet', True, str(tmp_path), 32)


def test_classes_are_below_the_folder_of_their_part(tmp_path):
    """Also if the part has one class, with folders below, or classes named train and val."""
    for part, names in (('train', ('train/a/x/0.png', 'train/a/y/1.png')), ('val', ('set/val/train/0.png',
                                                                                    'set/val/val/1.png'))):
        members(tmp_path / f'{part}.tar', *((name, b'') for name in names))
    assert build_dataset('IMNET', True, str(tmp_path), 32).classes == ['a']
    assert build_dataset('IMNET', False, str(tmp_path), 32).classes == ['train', 'val']
    members(tmp_path / 'train.tar', ('train/0.png', b''), ('bus/0.png', b''))
    assert build_dataset('IMNET', True, str(tmp_path), 32).classes == ['bus', 'train']


def test_files_that_a_tar_has_besides_images_are_counted(tmp_path, caplog):
    caplog.set_level('INFO')
    members(tmp_path / 'train.tar', ('a/0.png', b''), ('b/0.png', b''), ('b/1.heic', b''), ('b/.DS_Store', b''),
            ('a/1.heic', b''), ('notes.txt', b''))
    build_dataset('IMNET', True, str(tmp_path), 32)
    assert 'train.tar: 2 .heic, 1 .txt\n' in caplog.text


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


def test_the_published_validation_tar_finds_its_classes_in_the_development_kit(images, tmp_path, monkeypatch):
    files = publish_val(images, tmp_path, monkeypatch)
    kit = (tmp_path / 'ILSVRC2012_devkit_t12.tar.gz').rename(tmp_path / 'kit')
    with pytest.raises(ValueError, match='put ILSVRC2012_devkit_t12.tar.gz beside it'):
        build_dataset('IMNET', False, str(tmp_path), 32)
    kit.rename(tmp_path / 'ILSVRC2012_devkit_t12.tar.gz')
    before = sorted(os.listdir(tmp_path))
    val = build_dataset('IMNET', False, str(tmp_path), 32, classes=['class_0', 'class_1', 'class_2'])
    assert val.targets == [int(file.parent.name[-1]) for file in files]
    assert [val.read(i) for i in range(len(val))] == [file.read_bytes() for file in files]
    assert sorted(os.listdir(tmp_path)) in (before, sorted([*before, '.ILSVRC2012_img_val.tar.index.npz']))


AFTER = 'damaged after class_.*at byte .*: copy it again'
DAMAGE = {  # of a tar, at one of its headers
    'truncated in an image': (lambda data, at: data[:at + 600], 'truncated in class_.*, at byte .* copy it again'),
    'truncated in a header': (lambda data, at: data[:at + 200], AFTER),
    'truncated before a header': (lambda data, at: data[:at], AFTER),
    'a bit': (lambda data, at: data[:at + 20] + bytes([data[at + 20] ^ 4]) + data[at + 21:], AFTER),
    'zeros': (lambda data, at: data[:at] + bytes(1024) + data[at + 1024:], AFTER),
    'a hole': (lambda data, at: data[:at] + bytes(2 ** 21), AFTER),
    'empty': (lambda *_: b'', 'is no tar'), 'text': (lambda *_: b'no tar ' * 200, 'is no tar, or damaged'),
    'zip': (lambda data, _: b'PK\x03\x04' + data, 'is no tar, or damaged'),
    'compressed': (lambda data, _: b'\x1f\x8b' + data, 'compressed: unpack it')}


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
    with pytest.raises(ValueError, match=words) as error:
        build_dataset('IMNET', True, str(path), 32)
    assert str(path) in str(error.value) and '\n' not in str(error.value)
    assert nested is False or 'class_a.tar' in str(error.value)


def test_tars_without_classes_or_beside_folders_are_refused(tmp_path):
    flat = members(tmp_path / 'train-flat.tar', ('0.png', b''), ('1.png', b''))
    shutil.copy(flat, tmp_path / 'train-more.tar')
    text = members(tmp_path / 'text.tar', ('a/b.txt', b'none'))
    (tmp_path / 'both' / 'train' / 'class_0').mkdir(parents=True)
    members(tmp_path / 'both' / 'train' / 'class_0.tar', ('0.png', b''))
    for path, words in (
            (flat, 'has no classes: put images into class folders, or KEY.cls'),
            (tmp_path, 'has no classes'),  # several flat tars are not class tars outside of train/
            (tmp_path / 'nowhere.tar', 'no file .*nowhere.tar'),
            (text, 'no images in .*text.tar'), (text, 'no images in .*text.tar'),  # the second time from the index
            (tmp_path / 'both', r'train holds both tars \(class_0.tar\) and folders \(class_0\): move')):
        with pytest.raises(ValueError, match=words):
            build_dataset('IMNET', True, str(path), 32)


@pytest.mark.parametrize('name, part', [
    ('train.tar', 'train'), ('train-000.tar', 'train'), ('training_2.tar', 'train'), ('val.tar', 'val'),
    ('validation.tar', 'val'), ('ILSVRC2012_img_train.tar', 'train'), ('ILSVRC2012_img_val.tar', 'val'),
    ('trainval.tar', None), ('valley.tar', None), ('my_train.tar', None), ('.train.tar', None)])
def test_a_folders_tars_belong_to_the_part_that_their_names_begin_with(tmp_path, name, part):
    (tmp_path / name).touch()
    assert [has_split(str(tmp_path), other) for other in ('train', 'val')] == [part == 'train', part == 'val']


def test_validation_is_never_the_training_tar(images, tmp_path):
    for name in ('train.tar', 'photos.tar'):
        train = pack(tmp_path / name, images / 'train')
        assert len(build_dataset('IMNET', True, str(train), 32)) == 100
        with pytest.raises(ValueError, match=f'{name} has no validation images: put val.tar .* --val-split 0.1'):
            build_dataset('IMNET', False, str(train), 32)
    val = pack(tmp_path / 'val.tar', images / 'val')
    for path in (tmp_path / 'train.tar', tmp_path, val):
        assert [build_dataset('IMNET', is_train, str(path), 32).roots for is_train in (True, False)] == [
            [str(tmp_path / 'train.tar')], [str(val)]]
    with pytest.raises(ValueError, match='photos.tar has no validation images'):  # whose val.tar is not known
        build_dataset('IMNET', False, str(tmp_path / 'photos.tar'), 32)
    (tmp_path / 'train.tar').unlink()
    assert not has_split(str(val), 'train') and len(build_dataset('IMNET', False, str(val), 32)) == 27
    with pytest.raises(ValueError, match='validation set by its name'):
        build_dataset('IMNET', True, str(val), 32)


def test_a_tar_and_a_link_to_it_are_read_once(tars, images):
    (tars / 'train.tar').rename(tars / 'ILSVRC2012_img_train.tar')
    (tars / 'train.tar').symlink_to('ILSVRC2012_img_train.tar')
    same_samples(build_dataset('IMNET', True, str(tars), 32), build_dataset('IMNET', True, str(images), 32))


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
    path = members(tmp_path / 'single.tar', *(
        (f'd/{part}/dog/{folder}/0.png', b'1') for part in ('train', 'val') for folder in ('s1', 's2')))
    assert [label for is_train in (True, False) for _, label, _ in named(path, is_train)] == ['dog'] * 4
    for prefix in ('', 'set/', 'set/of/'):
        path = members(tmp_path / 'deep.tar', *(
            (f'./{prefix}{name}', b'1') for name in ('a/y/0.png', 'b/0.png', 'a/x/0.png')))
        assert [(name, label) for name, label, _ in named(path)] == [
            (f'{prefix}a/x/0.png', 'a'), (f'{prefix}a/y/0.png', 'a'), (f'{prefix}b/0.png', 'b')]
    path = members(tmp_path / 'one.tar', ('set/a/0.png', b'1'))
    assert [label for _, label, _ in named(path)] == ['a']


def test_links_lead_to_other_members_and_dangling_ones_are_named(tmp_path):
    path = members(
        tmp_path / 'links.tar', ('a/0.png', b'zero'), ('./a/1.png', tarfile.LNKTYPE, 'a/0.png'),
        ('b/0.png', tarfile.SYMTYPE, '../a/2.png'), ('a/2.png', b'two'))
    assert [(name, data) for name, _, data in named(path)] == [
        ('a/0.png', b'zero'), ('a/1.png', b'zero'), ('a/2.png', b'two'), ('b/0.png', b'two')]
    for kind, target in ((tarfile.LNKTYPE, 'b/0.png'), (tarfile.SYMTYPE, '1.png'), (tarfile.SYMTYPE, '/b/0.png')):
        path = members(tmp_path / 'broken.tar', ('a/0.png', b'0'), ('a/1.png', kind, target))
        with pytest.raises(ValueError, match='broken.tar holds a/1.png, a link to .*, but not that: pack'):
            named(path)


def test_names_that_begin_with_a_dot_are_ignored_everywhere(tmp_path):
    inner = Path(members(tmp_path / 'inner.tar', ('0.png', b'0'))).read_bytes()
    path = members(
        tmp_path / 'classes.tar', ('._a.tar', b'x'), ('a.tar', inner), ('a/._0.png', b'x'), ('./b/1.png', b'1'),
        ('b/.thumbnails/1.png', b'x'), ('.trash/2.png', b'x'))
    assert named(path) == [('a/0.png', 'a', b'0'), ('b/1.png', 'b', b'1')]
    path = members(tmp_path / 'above.tar', ('../a/0.png', b'0'), ('../b/1.png', b'1'))
    assert named(path) == [('../a/0.png', 'a', b'0'), ('../b/1.png', 'b', b'1')]
    path = members(tmp_path / 'shard.tar', ('._0.cls', b'\0'), ('0.cls', b'0'), ('._0.png', b'x'), ('0.png', b'0'))
    assert named(path) == [('0.png', '0', b'0')]
    root = tmp_path / '.data'  # the root itself may be hidden
    for name in ('a/0.png', 'a/._0.png', 'a/.thumbnails/0.png', '.ipynb_checkpoints/0.png'):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b'x')
    folder = ImageFolder(root)
    assert folder.classes == ['a'] and list(folder.samples) == [(f'{root}/a/0.png', 0)]


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
    with pytest.raises(ValueError, match='large.tar is no tar, or damaged after a/0.png .*: copy it again'):
        named(path)
    path = members(tmp_path / 'sparse.tar', ('a/0.png', b'0'), ('b/1.png', b'1'))
    patched(156, b'S')
    with pytest.raises(ValueError, match='sparse.tar holds b/1.png without its zeros: pack it without -S'):
        named(path)


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


def scans(caplog, path) -> bool:
    """Whether asking for the index reads the whole tar."""
    caplog.clear()
    tar_index(path)
    return 'reading the index' in caplog.text


def test_the_index_follows_the_tar_and_survives_damage(tars, caplog):
    caplog.set_level(logging.INFO)
    path, index = tars / 'train.tar', tars / '.train.tar.index.npz'
    assert scans(caplog, path) and not scans(caplog, path)
    first, whole = tar_index(path), index.read_bytes()
    for left in (100, 0):
        index.write_bytes(whole[:left])
        assert scans(caplog, path) and tar_index(path) == first
    with tarfile.open(path, 'a') as tar:
        tar.add(tars / 'val.tar', 'class_0/more.png')
    assert scans(caplog, path) and len(tar_index(path)) == len(first) + 1


def test_an_index_that_cannot_be_beside_its_tar_goes_home_if_there_is_a_home(tars, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    (tars / '.train.tar.index.npz').mkdir()  # in the way
    before = sorted(os.listdir(tars))
    assert scans(caplog, tars / 'train.tar') and not scans(caplog, tars / 'train.tar')
    assert len([p for p in (tmp_path / 'home').rglob('*') if p.is_file()]) == 1
    shutil.rmtree(tmp_path / 'home')
    monkeypatch.delenv('HOME')
    monkeypatch.setattr('pwd.getpwuid', {}.__getitem__)  # a user without an entry, as in containers
    for _ in range(2):
        assert scans(caplog, tars / 'train.tar') and 'could not be saved' in caplog.text
    assert sorted(os.listdir(tars)) == before
    assert scans(caplog, tars / 'val.tar') and not scans(caplog, tars / 'val.tar')


def test_samples_keep_names_and_classes():
    names = ['a.png', 'ü/b.png', os.fsdecode(b'\xff.png'), '']
    samples = Samples(names, [3, 1, 2, 0])
    assert list(samples) == list(zip(names, [3, 1, 2, 0])) and samples[-1] == ('', 0) and len(samples) == 4
    with pytest.raises(IndexError):
        samples[4]
    assert all(not isinstance(value, (list, tuple)) for value in vars(samples).values())


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
        dataset = ImageFolder(photographs, FastTransform(build_transform(True, 64)))
        sampler = TrainSampler(len(dataset), batch, repeats=repeats, seed=3, rank=rank, world_size=world_size)
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


class Resident(ImageFolder):
    """In the place of classes, the most memory that the process has had so far."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize('fast', [False, True])
def test_loaders_do_not_grow(photographs, fast):
    dataset = Resident(photographs, FastTransform(build_transform(True, 224)) if fast else build_transform(True, 224))
    sampler = TrainSampler(len(dataset), 48, repeats=3)
    loader, most = build_loader(dataset, 48, sampler=sampler, num_workers=1), []
    for epoch in range(12):
        sampler.set_position(epoch)
        most.append(max(int(targets.max()) for _, targets in loader))
    assert most[-1] < 1.05 * most[3]


# folders as people have them

def grey16(value, suffix='png', mode=np.uint16) -> bytes:
    """An image of 16 x 12 pixels around `value`."""
    pixels = (np.arange(192).reshape(12, 16) * 40 + value).astype(mode)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {'png': 'PNG', 'tif': 'TIFF', 'pgm': 'PPM'}[suffix])
    return file.getvalue()


@pytest.mark.parametrize('suffix, mode', [('png', '<u2'), ('tif', '<u2'), ('tif', '>u2'), ('pgm', '<i4')])
def test_images_of_16_bits_keep_their_content(tmp_path, suffix, mode):
    """In both loaders. Pillow's conversion makes them white."""
    data = grey16(20_000, suffix, mode)
    want = (np.arange(192).reshape(12, 16) * 40 + 20_000) >> 8
    assert np.array_equal(np.array(open_image(data)), np.repeat(want[..., None], 3, 2))
    assert np.array_equal(np.array(open_image(Image.open(io.BytesIO(data)))), np.repeat(want[..., None], 3, 2))
    transforms = [build_transform(True, 64, auto_augment=None, color_jitter=None)]
    transforms.append(FastTransform(transforms[0]))
    for transform, argument in zip(transforms, (open_image(data), data)):
        random.seed(1)
        image = transform(argument).float()
        assert want.min() - 3 <= image.min() and image.max() <= want.max() + 3


@pytest.mark.parametrize('mode, name', [(np.int32, '32-bit integers'), (np.float32, 'floats')])
def test_grey_values_of_unknown_range_are_refused(tmp_path, mode, name):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'x.tif').write_bytes(grey16(300, 'tif', mode))
    with pytest.raises(UnreadableImage, match=f'cannot read .*x.tif .grey values of {name} from 300 to 7'):
        ValidationDataset(ImageFolder(tmp_path))[0]


def test_what_pillow_opens_is_taken_and_the_rest_is_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / 'a' / 'deep').mkdir(parents=True)
    image = Image.new('RGB', (8, 8), 'red')
    for ending, kind in (('jfif', 'JPEG'), ('jpe', 'JPEG'), ('GIF', 'GIF'), ('avif', 'AVIF'), ('mpo', 'MPO'),
                         ('jp2', 'JPEG2000'), ('pbm', 'PPM'), ('tga', 'TGA'), ('qoi', 'QOI')):
        (image.convert('1') if ending == 'pbm' else image).save(tmp_path / 'a' / 'deep' / f'x.{ending}', kind)
    for name in ('a.txt', 'b.TXT', 'c.json', 'README', '.hidden', 'Thumbs.db'):
        (tmp_path / 'a' / name).touch()
    dataset = ImageFolder(tmp_path)
    assert len(dataset) == 9 and all(dataset[i][0].size == (8, 8) for i in range(9))
    assert [r.message for r in caplog.records] == [f'left out of {tmp_path}: 2 .txt, 1 no ending, 1 .json']
    packed = TarImages([pack(tmp_path / 'train.tar', tmp_path, [f'a/deep/{p.name}' for p in (
        tmp_path / 'a' / 'deep').iterdir()])], 'train')
    assert len(packed) == 9


@pytest.mark.parametrize('name', ['.ipynb_checkpoints', '@eaDir', '__MACOSX', 'lost+found', '.Trash-1000'])
def test_folders_of_systems_are_neither_classes_nor_searched(tmp_path, name):
    for folder in ('a', f'a/{name}', 'b', name):
        (tmp_path / 'train' / folder).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'train' / folder / 'x.png')
    (tmp_path / 'train' / 'b' / name).mkdir()  # empty
    dataset = ImageFolder(tmp_path / 'train')
    assert dataset.classes == ['a', 'b'] and len(dataset) == 2
    same_samples(TarImages([pack(tmp_path / 'train.tar', tmp_path / 'train')], 'train'), dataset)


def test_a_link_to_a_folder_above_is_passed_over(tmp_path, caplog):
    for name in ('a', 'b'):
        (tmp_path / 'train' / name / 'more').mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'train' / name / 'more' / 'x.png')
    for link, target in (('a/loop', '..'), ('a/more/up', '../..'), ('b/self', '.'), ('b/other', '../a/more')):
        (tmp_path / 'train' / link).symlink_to(target)
    dataset = ImageFolder(tmp_path / 'train')
    assert [name.removeprefix(f'{tmp_path}/train/') for name, _ in dataset.samples] == [
        'a/more/x.png', 'b/more/x.png', 'b/other/x.png']
    assert len([r for r in caplog.records if 'leads back to' in r.message]) == 4  # up is found by two ways


def test_links_that_lead_back_through_each_other_or_from_a_class_are_passed_over(tmp_path, caplog):
    for name in ('train/a/x', 'train/b/y'):
        (tmp_path / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / name / '0.png')
    (tmp_path / 'train/a/x/to_b').symlink_to('../../b/y')
    (tmp_path / 'train/b/y/to_a').symlink_to('../../a/x')
    (tmp_path / 'train/dog').symlink_to('.')
    (tmp_path / 'train/all').symlink_to(tmp_path)
    data = ImageFolder(tmp_path / 'train')
    names = [name.removeprefix(f'{tmp_path}/train/') for name, _ in data.samples]
    assert data.classes == ['a', 'b'] and names == ['a/x/0.png', 'a/x/to_b/0.png', 'b/y/0.png', 'b/y/to_a/0.png']
    assert caplog.text.count('leads back') == 4


def test_folders_that_cannot_be_listed_and_links_to_nothing_are_errors(tmp_path, monkeypatch):
    for name in ('a/more', 'b'):
        (tmp_path / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / name / 'x.png')

    def scandir(path, listed=os.scandir):
        if str(path).endswith('a/more'):
            raise PermissionError(13, 'Permission denied', str(path))
        return listed(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'scandir', scandir)
        with pytest.raises(ValueError, match=r'a/more cannot be listed \(Permission denied\)'):
            ImageFolder(tmp_path)
    (tmp_path / 'zebra').symlink_to('/nowhere')
    with pytest.raises(ValueError, match='zebra is a link to nothing'):
        ImageFolder(tmp_path)


def test_a_list_with_a_byte_order_mark_is_read(images, tmp_path):
    (tmp_path / 'map').write_bytes(b'\xef\xbb\xbfclass_2\r\nclass_0\r\nclass_1\r\n')
    dataset = build_dataset('IMNET', True, str(images), 32, class_map=str(tmp_path / 'map'))
    assert dataset.classes == ['class_2', 'class_0', 'class_1']


def test_folders_of_parts_are_no_classes(images, tmp_path):
    for name in ('Training', 'Testing'):
        (tmp_path / name).symlink_to(images / 'train')
    with pytest.raises(ValueError, match='contains Testing and Training: parts, not classes'):
        build_dataset('IMNET', True, str(tmp_path), 32, val_split=0.2)


def test_numbers_of_shards_are_the_checkpoints_indices(images, tmp_path):
    members(tmp_path / 'val.tar', *[(f'{i}.{end}', data) for i in range(3) for end, data in (
        ('png', (images / 'val' / 'class_1' / '01.png').read_bytes()), ('cls', str(i % 2).encode()))])
    dataset = TarImages([tmp_path / 'val.tar'], 'val', classes=['n01', 'n02', 'n03'])
    assert dataset.classes == ['n01', 'n02', 'n03'] and dataset.targets == [0, 1, 0]
