"""Data sets, transforms and loaders."""
import io
import logging
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm.data.auto_augment as auto_augment
import torch
from PIL import Image, ImageOps
from timm.utils import random_seed
from torchvision import datasets as tv_datasets

from datasets import Digits, build_dataset, limit
from errors import UnreadableImage, UsageError
from fast_transforms import FastTransform
from loader import SeededDataset, build_loader
from samplers import TrainSampler
from sources import ImageFolder
from transforms import build_transform


def noise(width=8, height=8, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_classes_are_the_training_sets_or_the_class_maps(tmp_path):
    for folder in ('train/a', 'train/b', 'train/c', 'val/c', 'val/b'):
        (tmp_path / folder).mkdir(parents=True)
        noise().save(tmp_path / folder / 'x.png')
    train = build_dataset('IMNET', True, tmp_path, 32)
    val = build_dataset('IMNET', False, tmp_path, 32, classes=train.classes)
    assert train.classes == val.classes == ['a', 'b', 'c'] and val.targets == [1, 2]
    (tmp_path / 'map').write_bytes(b'\xef\xbb\xbfc\r\nb\r\na\r\n')  # a byte order mark
    assert build_dataset('IMNET', True, tmp_path, 32, class_map=str(tmp_path / 'map')).classes == ['c', 'b', 'a']
    (tmp_path / 'val' / 'd').mkdir()
    with pytest.raises(UsageError, match='--class-map lacks: d'):
        build_dataset('IMNET', False, tmp_path, 32, classes=train.classes)
    with pytest.raises(UsageError, match=r'no images in .*val/d'):
        build_dataset('IMNET', False, tmp_path, 32)


def test_digits_are_split_once_and_evenly():
    train, val = Digits(True, 16), Digits(False, 16)
    assert (len(train), len(val)) == (1437, 360) and train.classes == list('0123456789')
    counts = np.bincount(train.targets), np.bincount(val.targets)
    assert np.abs(counts[1] - sum(counts) / 5).max() < 1
    image, _ = val[0]
    assert image.mode == 'RGB' and image.size == (16, 16)
    pixels = {split: [np.asarray(image).tobytes() for image in split.images] for split in (train, val)}
    assert len(set(pixels[val])) == 360 and not set(pixels[val]) & set(pixels[train])
    assert val.targets[:8] == [7, 6, 3, 7, 7, 3, 2, 8]  # the split that every run shares


def test_cifar_that_can_not_be_had_is_one_line(tmp_path, monkeypatch):
    def no_network(self):
        raise OSError('no network')
    monkeypatch.setattr(tv_datasets.CIFAR10, 'download', no_network)
    with pytest.raises(UsageError, match=f'^CIFAR10 is not in {tmp_path} and could not be downloaded .no network.$'):
        build_dataset('CIFAR10', True, tmp_path, 32)


@pytest.mark.parametrize('name', ['CIFAR10', 'PETS', 'torch/mnist'])
@pytest.mark.parametrize('layout', ['train/{}/x.png', '{}/x.png', 'train.tar', 'images.tar'])
def test_images_are_not_taken_for_a_place_to_download_to(images, tmp_path, monkeypatch, name, layout):
    """Nothing is fetched, and nothing is written among the images."""
    for label in 'ab':
        (tmp_path / layout.format(label)).parent.mkdir(parents=True, exist_ok=True)
        if layout.endswith('.tar'):
            with tarfile.open(tmp_path / layout, 'w') as tar:
                tar.add(images / 'train', '.')
        else:
            noise().save(tmp_path / layout.format(label))
    monkeypatch.setattr(socket, 'create_connection', None)
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(UsageError, match='--data-set IMNET'):
        build_dataset(name, True, tmp_path / layout if layout == 'images.tar' else tmp_path, 32)
    assert sorted(tmp_path.rglob('*')) == before


def test_a_limit_takes_the_first_images_of_each_class(images):
    """As many of each class as of the others while there are."""
    whole = build_dataset('IMNET', True, images, 32)  # 40, 24 and 36 images
    for number, counts in ((3, [1, 1, 1]), (5, [2, 2, 1]), (72, [24, 24, 24]), (90, [33, 24, 33]), (500, [40, 24, 36])):
        subset = limit(build_dataset('IMNET', True, images, 32), number)
        assert np.bincount(subset.targets).tolist() == counts and len(subset) == sum(counts)
        names = [name for label, count in enumerate(counts)
                 for name in [name for name, target in whole.samples if target == label][:count]]
        assert [name for name, _ in subset.samples] == names and subset.classes == whole.classes
        assert [subset.read(i) for i in (0, -1)] == [Path(names[i]).read_bytes() for i in (0, -1)]
    digits = limit(Digits(True, 16), 25)
    assert np.bincount(digits.targets).tolist() == [3] * 5 + [2] * 5 and digits.classes == list('0123456789')
    assert [digits[i][1] for i in range(25)] == digits.targets
    for dataset in (whole, digits):
        with pytest.raises(UsageError, match='--max-train-images'):
            limit(dataset, 2)


@pytest.mark.parametrize('size', [64, 192, 224, 256])
def test_evaluation_resizes_the_short_side_and_crops_the_center(size):
    transform, side = build_transform(False, size), int(256 / 224 * size)
    assert transform.transforms[0].size == side and 'bicubic' in str(transform.transforms[0])
    image = noise(side + 40, side)
    out = transform(image).numpy().transpose(1, 2, 0)
    left, top = round((side + 40 - size) / 2), round((side - size) / 2)
    assert out.dtype == np.uint8 and (out == np.asarray(image)[top:top + size, left:left + size]).all()


def test_small_inputs_train_on_padded_crops_and_evaluate_whole():
    image = noise(32, 32)
    pixels = np.asarray(image).transpose(2, 0, 1)
    assert (build_transform(False, 32)(image).numpy() == pixels).all()

    transform = build_transform(True, 32, auto_augment=None, color_jitter=None, hflip=0.)
    padded = np.pad(pixels, ((0, 0), (4, 4), (4, 4)))
    windows = {padded[:, y:y + 32, x:x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    random_seed(0)
    drawn = {windows[transform(image).numpy().tobytes()] for _ in range(100)}
    assert len(drawn) > 30 and {0, 8} <= {y for y, _ in drawn} and {0, 8} <= {x for _, x in drawn}


def test_flags_reach_the_transform():
    text = str(build_transform(True, 64, auto_augment=None, hflip=0., scale=(0.5, 0.6), interpolation='bilinear'))
    assert '0.5, 0.6' in text and 'bilinear' in text and 'Flip' not in text and 'ColorJitter' in text


def test_posterize_to_0_bits_is_black_in_pillow_13_too(monkeypatch):
    """The published policy draws 0 bits at times, which Pillow 13 refuses."""
    def strict(image, bits, posterize=ImageOps.posterize):
        if not 1 <= bits <= 8:
            raise ValueError('bits must be from 1 to 8')
        return posterize(image, bits)
    monkeypatch.setattr(ImageOps, 'posterize', strict)
    build_transform(True, 32)
    for name in ('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'):
        posterize, image = auto_augment.NAME_TO_OP[name], noise(32, 32)
        assert not np.asarray(posterize(image, 0)).any()
        assert (np.asarray(posterize(image, 3)) == np.asarray(image) & 0xE0).all()


def test_loaders_hand_out_batches_in_order(images):
    dataset = build_dataset('IMNET', True, images, 32, build_transform(True, 32))
    sampler = TrainSampler(len(dataset), 8, seed=1)
    sampler.set_position(2, 16)
    batches = list(build_loader(dataset, 8, sampler=sampler))
    pairs = list(sampler)
    assert torch.cat([targets for _, targets in batches]).tolist() == [dataset.targets[index] for index, _ in pairs]
    assert all(x.shape == (8, 3, 32, 32) and x.dtype == torch.uint8 for x, _ in batches)
    assert torch.equal(batches[1][0][2], SeededDataset(dataset)[pairs[10]][0])
    val = build_dataset('IMNET', False, images, 32, build_transform(False, 32))
    targets = [torch.cat([t for _, t in build_loader(val, 4, rank=r, world_size=2)]).tolist() for r in range(2)]
    batches = [val.targets[i:i + 4] for i in range(0, len(val), 4)]
    assert targets == [sum(batches[0::2], []), sum(batches[1::2], [])]


def test_fast_transforms_work_in_the_workers_of_a_forkserver(images):
    """Python 3.14 starts workers so."""
    dataset = ImageFolder(images / 'train', FastTransform(build_transform(True, 64)))
    loader = build_loader(dataset, 8, sampler=TrainSampler(16, 8), num_workers=1)
    expected = [x for x, _ in build_loader(dataset, 8, sampler=TrainSampler(16, 8))]
    loader.multiprocessing_context = 'forkserver'
    assert all(torch.equal(x, y) for (x, _), y in zip(loader, expected, strict=True))


def damage(folder, count, good=1, loader='reference'):
    """Make a folder of damaged images, then good ones."""
    folder.mkdir(parents=True)
    file = io.BytesIO()
    noise(16, 16).save(file, 'BMP')
    huge = bytearray(file.getvalue())
    huge[18:26] = (60_000).to_bytes(4, 'little') * 2  # width and height: Pillow takes the damage for an attack
    for i in range(count + good):
        path = folder / f'{i:02d}.png'
        noise(16, 16, seed=i).save(path)
        if i < count:
            path.write_bytes(
                (path.read_bytes()[:60], b'', b'not an image', b'\x89PNG\r\n\x1a\n' + bytes(20), huge)[i % 5])
    transform = build_transform(True, 32)
    return ImageFolder(folder.parent, FastTransform(transform) if loader == 'fast' else transform)


@pytest.mark.parametrize('loader', ['reference', 'fast'])
def test_a_damaged_training_image_is_named_and_the_next_taken(tmp_path, caplog, loader):
    seeded = SeededDataset(damage(tmp_path / 'a', 9, 2, loader))
    with caplog.at_level(logging.WARNING):
        image, _ = seeded[0, 5]
    assert torch.equal(image, seeded[9, 5][0])
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 9 and all(f'cannot read {tmp_path / "a"}/{i:02d}.png' in warnings[i] for i in range(9))
    seeded = SeededDataset(damage(tmp_path / 'b' / 'c', 10, 2, loader))
    with pytest.raises(UnreadableImage, match=r'10 images in a row .*c/09\.png'):
        seeded[0, 5]


@pytest.mark.parametrize('loader', ['reference', 'fast'])
def test_photographs_of_torchvisions_sets_are_upright(tmp_path, loader):
    """As Oxford's pets, whose files torchvision converts to RGB before this project sees them."""
    root = tmp_path / 'oxford-iiit-pet'
    (root / 'images').mkdir(parents=True)
    (root / 'annotations').mkdir()
    files = [f'Abyssinian_{i}' for i in range(1, 9)]
    (root / 'annotations' / 'trainval.txt').write_text(''.join(f'{name} 1 1 1\n' for name in files))
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[:40, :60] = 255
    for i, name in enumerate(files, 1):
        exif = Image.Exif()
        exif[0x0112] = i
        Image.fromarray(pixels).save(root / 'images' / f'{name}.jpg', exif=exif)
    transform = build_transform(True, 32, auto_augment=None, color_jitter=None, hflip=0., scale=(1., 1.))
    transform = FastTransform(transform) if loader == 'fast' else transform
    for ignore_exif in (False, True):
        dataset = build_dataset('PETS', True, tmp_path, 32, transform, ignore_exif=ignore_exif)
        for i, name in enumerate(files):
            image = Image.open(root / 'images' / f'{name}.jpg')
            image = (image if ignore_exif else ImageOps.exif_transpose(image)).convert('RGB')
            random_seed(i)
            expected = transform(image)
            random_seed(i)
            assert torch.equal(dataset[i][0], expected)
