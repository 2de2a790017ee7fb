"""Compare the fast transforms to Pillow's: equal draws, close pixels, the same files read."""
import functools
import io
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import timm.data.auto_augment as auto_augment
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.utils import random_seed

import fast_transforms
from errors import UsageError
from fast_transforms import FastTransform, open_jpeg
from loader import SeededDataset
from sources import ImageFolder, open_image
from transforms import build_transform

OFF = dict(auto_augment=None, color_jitter=None)
PHOTOGRAPHS = load_sample_images().images  # two of 427 x 640, shipped with scikit-learn


def build_fast(size, **options):
    return FastTransform(build_transform(True, size, **options))


def jpeg(pixels, **options) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, 'JPEG', **{'quality': 95, **options})
    return file.getvalue()


def states() -> str:
    """Return the states of all generators."""
    name, *values = np.random.get_state()
    return repr((random.getstate(), values[0].tolist(), values[1:], torch.default_generator.get_state().tolist()))


def both(data, size=96, seeds=range(20), **options):
    """Yield the images (size, size, 3) of the reference and of the fast loader under each seed."""
    reference, fast = build_transform(True, size, **options), build_fast(size, **options)
    for seed in seeds:
        random_seed(seed)
        a, after = reference(open_image(data)), states()
        random_seed(seed)
        b = fast(fast.open_image(data) if isinstance(data, bytes) else data)
        assert states() == after  # as many draws
        assert a.shape == b.shape == (3, size, size) and a.dtype == b.dtype == torch.uint8
        yield [x.permute(1, 2, 0).numpy().astype(int) for x in (a, b)]


@pytest.mark.parametrize('options', [{}, dict(auto_augment=None)])
def test_the_reference_is_timms_transform_of_the_recipe(options):
    recipe = dict(auto_augment='rand-m9-mstd0.5-inc1', color_jitter=0.4, interpolation='bicubic', hflip=0.5)
    ours = build_transform(True, 64, **options)
    timms = create_transform(64, is_training=True, normalize=False, **{**recipe, **options})
    for seed in range(30):
        results = []
        for transform in (ours, timms):
            random_seed(seed)
            results += [transform(Image.fromarray(PHOTOGRAPHS[seed % 2])), states()]
        assert torch.equal(results[0], results[2]) and results[1] == results[3]


@pytest.mark.parametrize('policy', ['rand-m9-mstd0.5-inc1', 'augmix-m5', 'v0', 'originalr', '3a'])
def test_the_same_draws_give_the_same_image(policy):
    differences = [np.abs(a - b).mean() for a, b in both(
        jpeg(PHOTOGRAPHS[0]), seeds=range(60), auto_augment=policy, interpolation='random')]
    # Colors of an equalized or solarized image jump where a pixel differs by one.
    assert np.median(differences) < 4 and max(differences) < 40


@pytest.mark.parametrize('size', [32, 64])
@pytest.mark.parametrize('options', [{}, dict(auto_augment=None)])
def test_decoded_images_and_color_jitter_are_transformed_too(size, options):
    image = Image.fromarray(PHOTOGRAPHS[1]).resize((size + 8, size))
    differences = [np.abs(a - b).mean() for a, b in both(image, size, **options)]
    assert np.median(differences) < 1 and max(differences) < 20


OPERATIONS = [
    ('AutoContrast', (), 0), ('Equalize', (), 0), ('Invert', (), 0), ('PosterizeIncreasing', (2,), 0),
    ('PosterizeIncreasing', (0,), 0), ('PosterizeOriginal', (8,), 0), ('Solarize', (77,), 0), ('SolarizeAdd', (60,), 0),
    ('Contrast', (1.8,), 0), ('Contrast', (0.3,), 0), ('Brightness', (1.7,), 0), ('Brightness', (0.22,), 0),
    ('Color', (1.7,), 1), ('Color', (0.2,), 1), ('Sharpness', (1.8,), 1), ('Sharpness', (0.2,), 1),
    ('ShearX', (0.27,), 1), ('ShearX', (-0.13,), 1), ('ShearY', (0.3,), 1), ('ShearY', (-0.2,), 1),
    ('TranslateXRel', (0.33,), 1), ('TranslateXRel', (-0.123,), 1), ('TranslateYRel', (0.45,), 1),
    ('TranslateYRel', (-1.5,), 1), ('TranslateX', (100.3,), 0), ('Rotate', (27.3,), 90), ('Rotate', (-11.,), 90),
    ('Desaturate', (0.7,), 0), ('GaussianBlur', (1.5,), 0)]


@pytest.mark.parametrize('name, args, most', OPERATIONS)
@pytest.mark.parametrize('resample', [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_operations_equal_pillows(name, args, most, resample):
    function = auto_augment.NAME_TO_OP[name]
    step = auto_augment.RandAugment([auto_augment.AugmentOp(name)])
    fast = fast_transforms._fast_step(step).ops[0].aug_fn
    for pixels in (PHOTOGRAPHS[0][100:300, 50:274], np.full((37, 50, 3), 200, np.uint8)):
        kwargs = dict(fillcolor=(124, 116, 104), resample=resample)
        expected = np.asarray(function(Image.fromarray(pixels), *args, **kwargs)).astype(int)
        difference = np.abs(expected - fast(pixels, *args, **kwargs))
        # OpenCV's rotation has a blended border of a pixel and another cubic kernel.
        assert difference.max() <= most and difference.mean() < 2


def test_every_operation_of_the_published_policy_has_a_fast_form():
    for step in build_fast(64).steps:
        for op in getattr(step, 'ops', []):
            assert op.aug_fn in fast_transforms.FAST_OPS.values(), op


@pytest.mark.parametrize('subsampling, options', [
    *itertools.product([0, 1, 2], [{}, {'progressive': True}, {'restart_marker_rows': 2}]), ('440', {})])
def test_decoded_pixels_are_pillows(subsampling, options):
    pixels = np.ascontiguousarray(PHOTOGRAPHS[0][:203, :301])
    if subsampling == '440':  # Pillow does not write these
        data = simplejpeg.encode_jpeg(pixels, colorsubsampling=subsampling)
    else:
        data = jpeg(pixels, subsampling=subsampling, **options)
    image = open_jpeg(data)
    assert image.size == (301, 203) and (image.decode() == np.asarray(open_image(data))).all()
    for scale in (2, 4, 8):
        expected = np.asarray(open_image(data).reduce(scale)).astype(int)
        assert image.decode(scale).shape == expected.shape and np.abs(image.decode(scale) - expected).mean() < 3


@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear', 'random'])
def test_large_crops_are_decoded_at_a_scale(interpolation):
    files = [jpeg(pixels) for pixels in (PHOTOGRAPHS[0][:300], np.tile(PHOTOGRAPHS[0], (3, 3, 1)))]
    options = dict(interpolation=interpolation, **OFF)
    reference, fast, scales, differences = build_transform(True, 64, **options), build_fast(64, **options), set(), []
    for seed in range(60):
        image = open_jpeg(files[seed % 2])
        random_seed(seed)
        out = fast(image).float()
        random_seed(seed)
        differences.append((reference(open_image(image.data)) - out).abs().mean().item())
        assert image.pixels.shape[:2] == tuple(-(-side // image.scale) for side in image.size[::-1])
        scales.add(image.scale)
    assert scales == {1, 2, 4, 8} and np.mean(differences) < 1 and max(differences) < 4


@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize('extension', ['jpg', 'png'])
def test_copies_in_a_row_are_read_and_decoded_once(tmp_path, monkeypatch, fast, extension):
    for i, pixels in enumerate(PHOTOGRAPHS):
        (tmp_path / str(i)).mkdir()
        Image.fromarray(pixels).save(tmp_path / str(i) / f'x.{extension}')
    transform, calls = build_fast(224) if fast else build_transform(True, 224), []
    keys = list(enumerate((0, 0, 0, 1, 1, 1, 0)))  # three copies each, as repeated augmentation gives them
    expected = [SeededDataset(ImageFolder(tmp_path, transform))[index, seed][0] for seed, index in keys]

    def count(owner, name, event):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(event) or call(*args, **kwargs))
    count(Path, 'read_bytes', 'read')
    count(Image, 'open', 'decode')
    count(simplejpeg, 'decode_jpeg', 'decode')
    dataset = SeededDataset(ImageFolder(tmp_path, transform))
    assert all(torch.equal(dataset[index, seed][0], image) for (seed, index), image in zip(keys, expected))
    assert calls == ['read', 'decode'] * 3


def odd_files() -> dict[str, bytes]:
    pixels = PHOTOGRAPHS[0][:200, :150]
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6  # turn it to the right
    good = jpeg(pixels)

    def saved(image, kind, **options):
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    return {
        'gray': jpeg(image.convert('L')), 'cmyk': jpeg(image.convert('CMYK')), 'exif': jpeg(image, exif=exif),
        'one pixel wide': jpeg(pixels[:, :1]), 'one pixel high': jpeg(pixels[:1]),
        'png': saved(image, 'PNG'), 'palette': saved(image.convert('P'), 'PNG'), 'gif': saved(image, 'GIF'),
        'transparent': saved(image.convert('RGBA'), 'PNG'), 'webp': saved(image, 'WEBP'),
        '16 bits': saved(Image.fromarray(pixels[..., 0].astype(np.uint16) * 200), 'PNG'),
        'truncated': good[:len(good) // 2], 'without its end': good[:-2], 'with a tail': good + b'tail',
        'noise inside': good[:4000] + bytes(500) + good[4500:], 'empty': b'', 'text': b'no image',
        'rgb': jpeg(image, keep_rgb=True)}


@pytest.mark.parametrize('kind', odd_files())
def test_odd_files_are_read_as_the_reference_reads_them(kind):
    data = odd_files()[kind]
    try:
        open_image(data)
    except Exception as expected:
        with pytest.raises(type(expected)):
            build_fast(64)(open_jpeg(data))
        return
    for a, b in both(data, 64, range(6), **OFF):
        assert np.abs(a - b).mean() < 4


@pytest.mark.parametrize('draws', [300, pytest.param(20000, marks=pytest.mark.soak)])
def test_both_loaders_draw_alike(monkeypatch, draws):
    """Crops, flips and operations are equal, means and deviations of channels with 99.9 % confidence."""
    boxes, flips, names = [], [], []
    for owner, name, drawn in ((RandomResizedCropAndInterpolation, 'get_params', boxes), (torch, 'rand', flips)):
        monkeypatch.setattr(owner, name, functools.partial(
            lambda draw, drawn, *args: drawn.append(draw(*args)) or drawn[-1], getattr(owner, name), drawn))
    call = auto_augment.AugmentOp.__call__
    monkeypatch.setattr(auto_augment.AugmentOp, '__call__', lambda op, image: names.append(op.name) or call(op, image))
    files = [jpeg(pixels[y:y + 150, x:x + 200]) for pixels in PHOTOGRAPHS for y in (0, 200) for x in (0, 200, 400)]
    moments = np.array([
        [[*image.mean((0, 1)), *image.std((0, 1))] for image in images]
        for i, file in enumerate(files) for images in both(file, 64, range(i, draws, len(files)))])  # (draws, 2, 6)
    for drawn in (boxes, flips, list(zip(names[::2], names[1::2]))):
        assert len(drawn) == 2 * draws and drawn[::2] == drawn[1::2]
    difference = moments[:, 1] - moments[:, 0]
    bound = np.abs(difference.mean(axis=0)) + 3.3 * difference.std(axis=0) / np.sqrt(draws)
    assert bound.max() < (0.3 if draws > 1000 else 1.)  # gray levels


def test_without_its_packages_the_fast_loader_is_refused(monkeypatch):
    monkeypatch.setattr(fast_transforms, 'HAS_FAST', False)
    with pytest.raises(UsageError, match='pip install'):
        build_fast(64)
    build_transform(True, 64)


def turned(pixels, orientation) -> bytes:
    """Return a JPEG with an orientation in its EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(pixels, exif=exif)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_both_loaders_turn_images_upright(orientation):
    """With the same draws and close pixels, from whole crops, scaled crops and files that only Pillow decodes."""
    large, small = np.tile(PHOTOGRAPHS[0], (3, 3, 1))[:1277, :1909], PHOTOGRAPHS[1][:301, :203]
    good, cmyk = (turned(image, orientation) for image in (small, Image.fromarray(small).convert('CMYK')))
    damaged = good[:-4000] + bytes(99) + good[-3901:]
    for data, size in ((turned(large, orientation), 64), (damaged, 96), (cmyk, 96), (good, 96), (good, 256)):
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert('RGB')
        for image in (open_image(data), open_jpeg(data)):
            assert image.size == expected.size
        assert np.array_equal(open_image(data), expected)
        differences = [np.abs(a - b).mean() for a, b in both(data, size, **OFF)]
        assert np.mean(differences) < 1 and max(differences) < 4
    assert open_jpeg(data, ignore_exif=True).size == (203, 301)


def test_orientation_is_found_behind_other_segments():
    """Photoshop's data may hold a thumbnail, and markers may be padded with 0xff."""
    data = turned(PHOTOGRAPHS[0], 6)
    block = jpeg(PHOTOGRAPHS[0][:40, :40])
    for before in (b'\xff\xed' + (len(block) + 2).to_bytes(2, 'big') + block, b'\xff\xff\xff'):
        file = data[:2] + before + data[2:]
        assert open_jpeg(file).size == open_image(file).size == (427, 640)
