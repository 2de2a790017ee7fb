"""The fast path of one image against Pillow's: the same draws, nearly the same pixels, the same files read."""
import io
import pickle
import random

import cv2
import numpy as np
import pytest
import simplejpeg
import timm.data.auto_augment as auto_augment
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.utils import random_seed

import transforms
from transforms import build_transform, decode_jpeg, frame_of, open_image

OFF = dict(auto_augment=None, color_jitter=None)
PHOTOGRAPHS = load_sample_images().images  # two of 427 x 640, shipped with scikit-learn


def jpeg(pixels, **options) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, 'JPEG', **{'quality': 95, **options})
    return file.getvalue()


def both(data, size=96, seeds=range(20), **options):
    """(reference, fast) images (size, size, 3) under each seed."""
    reference, fast = (build_transform(True, size, fast=fast, **options) for fast in (False, True))
    for seed in seeds:
        random_seed(seed)
        a = reference(open_image(data))
        random_seed(seed)
        b = fast(data)
        assert a.shape == b.shape == (3, size, size) and a.dtype == b.dtype == torch.uint8
        assert random.random() == pytest.approx(_next(reference, data, seed))  # as many draws
        yield (x.permute(1, 2, 0).numpy().astype(int) for x in (a, b))


def _next(transform, data, seed):
    random_seed(seed)
    transform(open_image(data))
    return random.random()


@pytest.mark.parametrize('subsampling', [0, 1, 2])
@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear', 'random'])
@pytest.mark.parametrize('progressive', [False, True])
def test_pixels_without_augmentation(subsampling, interpolation, progressive):
    for size in (64, 224):  # larger crops are decoded at half the size for the first
        differences = [
            np.abs(a - b).mean() for pixels in PHOTOGRAPHS for a, b in both(
                jpeg(pixels, subsampling=subsampling, progressive=progressive), size, range(8),
                interpolation=interpolation, **OFF)]
        assert np.mean(differences) < 1 and max(differences) < 3


@pytest.mark.parametrize('policy', ['rand-m9-mstd0.5-inc1', 'rand-m7-n3-mstd1', 'augmix-m5', 'v0', 'originalr', '3a'])
def test_the_same_draws_give_the_same_picture(policy):
    differences = [np.abs(a - b).mean() for a, b in both(
        jpeg(PHOTOGRAPHS[0]), seeds=range(60), auto_augment=policy, interpolation='random')]
    # colours of an equalised or solarised image jump where a pixel differs by one
    assert np.median(differences) < 4 and max(differences) < 40


@pytest.mark.parametrize('size', [32, 64])
def test_decoded_images_and_colour_jitter_take_the_fast_path_too(size):
    image = Image.fromarray(PHOTOGRAPHS[1]).resize((size + 8, size))
    for auto_augment_, jitter in (('rand-m9-mstd0.5-inc1', None), (None, 0.4)):
        differences = [np.abs(a - b).mean() for a, b in both(
            image, size, auto_augment=auto_augment_, color_jitter=jitter)]
        assert np.median(differences) < 1 and max(differences) < 20


OPERATIONS = [
    ('AutoContrast', (), 0), ('Equalize', (), 0), ('Invert', (), 0), ('PosterizeIncreasing', (2,), 0),
    ('PosterizeIncreasing', (0,), 0), ('PosterizeOriginal', (8,), 0), ('Solarize', (77,), 0), ('SolarizeAdd', (60,), 0),
    ('Contrast', (1.8,), 0), ('Contrast', (0.3,), 0), ('Brightness', (1.7,), 0), ('Brightness', (0.22,), 0),
    ('Color', (1.7,), 1), ('Color', (0.2,), 1), ('Sharpness', (1.8,), 1), ('Sharpness', (0.2,), 1),
    ('ShearX', (0.27,), 1), ('ShearX', (-0.13,), 1), ('ShearY', (0.3,), 1), ('ShearY', (-0.2,), 1),
    ('TranslateXRel', (0.33,), 1), ('TranslateXRel', (-0.123,), 1), ('TranslateYRel', (0.45,), 1),
    ('TranslateYRel', (-0.37,), 1), ('TranslateX', (100.3,), 1), ('TranslateY', (-250.,), 1),
    ('Rotate', (27.3,), 90), ('Rotate', (-11.,), 90), ('Desaturate', (0.7,), 0), ('GaussianBlur', (1.5,), 0)]


@pytest.mark.parametrize('name, args, most', OPERATIONS)
@pytest.mark.parametrize('resample', [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_operations_equal_pillows(name, args, most, resample):
    function = auto_augment.NAME_TO_OP[name]
    fast = transforms._fast_op(function)
    for pixels in (PHOTOGRAPHS[0][100:300, 50:274], np.full((37, 50, 3), 200, np.uint8)):
        kwargs = dict(fillcolor=(124, 116, 104), resample=resample)
        expected = np.asarray(function(Image.fromarray(pixels), *args, **kwargs)).astype(int)
        difference = np.abs(expected - fast(pixels, *args, **kwargs))
        # rotation by OpenCV has a blended border of a pixel and another cubic
        assert difference.max() <= most and difference.mean() < 2


def test_every_operation_of_the_published_policy_has_a_fast_form():
    for step in build_transform(True, 64, fast=True).steps:
        for op in getattr(step, 'ops', []):
            assert op.aug_fn in transforms.FAST_OPS.values(), op


@pytest.mark.parametrize('subsampling', ['444', '422', '420', '440'])
@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'restart_marker_rows': 2}])
def test_upper_rows_are_those_of_the_whole(subsampling, options):
    pixels = np.ascontiguousarray(PHOTOGRAPHS[0][:203, :301])
    if subsampling == '440' and not options:  # which Pillow does not write
        data = simplejpeg.encode_jpeg(pixels, colorsubsampling='440')
    else:
        data = jpeg(pixels, subsampling=['444', '422', '420', '440'].index(subsampling) % 3, **options)
    frame = frame_of(data)
    assert frame.size == (301, 203) and frame.block == (16 if data[frame.offset + 6] & 15 == 2 else 8)
    assert (decode_jpeg(data, frame) == np.asarray(open_image(data))).all()
    for scale in (1, 2, 4, 8):
        whole = decode_jpeg(data, frame, scale)
        assert whole.shape == (-(-203 // scale), -(-301 // scale), 3)
        for rows in (1, 8, 15, 16, 17, 32, 100, 160, 202, 203):
            part = decode_jpeg(data, frame, scale, rows)
            assert len(part) == -(-rows // scale) and (part == whole[:len(part)]).all()


@pytest.mark.parametrize('size', [32, 96, 224])
def test_pixels_do_not_depend_on_how_far_an_image_is_decoded(size):
    data = jpeg(PHOTOGRAPHS[1], subsampling=2)
    cut, whole = (build_transform(True, size, fast=True, keep_decoded=keep) for keep in (False, True))
    for seed in range(40):
        random_seed(seed)
        expected = cut(data)
        random_seed(seed)
        assert torch.equal(whole(data), expected)


def test_what_libjpeg_gives_up_on_is_no_image():
    data = bytearray(jpeg(PHOTOGRAPHS[0], progressive=True))
    data[data.rfind(b'\xff\xc4') + 1] = 0xc8  # with a warning before it, of rows left over
    data = bytes(data)
    for rows in (100, 427):
        with pytest.raises(ValueError):
            decode_jpeg(data, frame_of(data), 1, rows)


def test_an_image_that_pillow_finds_too_large_is_left_to_it(monkeypatch):
    data = jpeg(PHOTOGRAPHS[0])
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 427 * 640 // 2)
    assert frame_of(data)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 427 * 640 // 2 - 1)
    with pytest.raises(Image.DecompressionBombError):
        build_transform(True, 64, fast=True)(data)


def test_crops_are_decoded_at_a_scale_and_no_further_than_they_reach():
    small, large = jpeg(PHOTOGRAPHS[0][:300]), jpeg(np.tile(PHOTOGRAPHS[0], (3, 3, 1)))
    fast, seen = build_transform(True, 64, fast=True, **OFF), set()
    for seed in range(60):
        data = large if seed % 2 else small
        random_seed(seed)
        plan = fast.plan(data)
        pixels = fast.decode(plan)
        top, _, height, width = plan.box
        assert min(height, width) < 192 * plan.scale
        assert len(pixels) == -(-(top + height) // plan.scale)
        seen.add(plan.scale)
    assert seen == {1, 2, 4, 8}


def test_copies_in_a_row_are_decoded_once(monkeypatch):
    decoded = []
    monkeypatch.setattr(transforms, 'decode_jpeg', lambda *a: decoded.append(a) or decode_jpeg(*a))
    data, other = (jpeg(pixels) for pixels in PHOTOGRAPHS)
    images = {}
    for keep in (False, True):
        fast = build_transform(True, 224, fast=True, keep_decoded=keep)
        images[keep] = []
        for i, image in enumerate([data, data, data, other, data]):
            random_seed(i)
            images[keep].append(fast(image))
    assert len(decoded) == 5 + 3
    assert all(torch.equal(a, b) for a, b in zip(*images.values()))


def test_it_can_be_sent_to_a_loader_process():
    for size in (32, 64):
        fast = build_transform(True, size, fast=True)
        random_seed(5)
        expected = fast(jpeg(PHOTOGRAPHS[0]))
        random_seed(5)
        assert torch.equal(pickle.loads(pickle.dumps(fast))(jpeg(PHOTOGRAPHS[0])), expected)


def odd_files() -> dict[str, bytes]:
    pixels = PHOTOGRAPHS[0][:200, :150]
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6  # turn it to the right
    good = jpeg(pixels)

    def saved(image, kind, **options):
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    offset = frame_of(good).offset
    twelve = bytearray(good)
    twelve[offset - 1] = 12
    return {
        'grey': jpeg(image.convert('L')), 'cmyk': jpeg(image.convert('CMYK')), 'exif': jpeg(image, exif=exif),
        'one pixel wide': jpeg(pixels[:, :1]), 'one pixel high': jpeg(pixels[:1]),
        'png': saved(image, 'PNG'), 'palette': saved(image.convert('P'), 'PNG'), 'gif': saved(image, 'GIF'),
        'transparent': saved(image.convert('RGBA'), 'PNG'), 'webp': saved(image, 'WEBP'),
        '16 bits': saved(Image.fromarray(pixels[..., 0].astype(np.uint16) * 200), 'PNG'),
        'truncated': good[:len(good) // 2], 'without its end': good[:-2], 'with a tail': good + b'tail',
        '12 bits': bytes(twelve), 'noise inside': good[:4000] + bytes(500) + good[4500:],
        'empty': b'', 'text': b'no image', 'header alone': good[:offset + 2], 'no rows': good[:offset] + bytes(2) +
        good[offset + 2:], 'rgb': jpeg(image, keep_rgb=True), 'arithmetic': good.replace(b'\xff\xc0', b'\xff\xc9', 1),
        'filled': good[:2] + b'\xff\xff' + good[2:], 'a comment': jpeg(image, comment=b'\xff\xc0' * 50)}


@pytest.mark.parametrize('kind', odd_files())
def test_odd_files_are_read_as_the_reference_reads_them(kind):
    data = odd_files()[kind]
    try:
        open_image(data)
    except Exception as expected:
        with pytest.raises(type(expected)):
            build_transform(True, 64, fast=True)(data)
        return
    limit = 12 if kind == 'noise inside' else 4
    for a, b in both(data, 64, range(6), **OFF):
        assert np.abs(a - b).mean() < limit


def test_a_single_pixel_is_read_though_a_crop_of_it_may_have_none():
    images = [a for a, b in both(jpeg(PHOTOGRAPHS[0][:1, :1]), 64, range(30), **OFF) if np.abs(a - b).max() <= 1]
    assert len(images) == 30 and {image.max() == 0 for image in images} == {False, True}


def recorded(monkeypatch, fast, draws, size):
    """(crop area, aspect), flips, names of operations, and mean and deviation by channel, over so many draws."""
    boxes, flips, names, moments = [], [], [], []
    get_params, rand, call = (
        RandomResizedCropAndInterpolation.get_params, torch.rand, auto_augment.AugmentOp.__call__)
    monkeypatch.setattr(RandomResizedCropAndInterpolation, 'get_params', staticmethod(
        lambda *a: boxes.append(get_params(*a)) or boxes[-1]))
    monkeypatch.setattr(torch, 'rand', lambda *a: flips.append(rand(*a)) or flips[-1])
    monkeypatch.setattr(auto_augment.AugmentOp, '__call__', lambda op, image: names.append(op.name) or call(op, image))
    transform = build_transform(True, size, fast=fast)
    files = [jpeg(pixels[y:y + 150, x:x + 200]) for pixels in PHOTOGRAPHS for y in (0, 200) for x in (0, 200, 400)]
    for seed in range(draws):
        random_seed(seed)
        data = files[seed % len(files)]
        image = transform(data if fast else open_image(data)).float()
        moments.append(torch.cat([image.mean((1, 2)), image.std((1, 2))]))
    monkeypatch.undo()
    return boxes, [bool(f < 0.5) for f in flips], names, torch.stack(moments).numpy()


@pytest.mark.parametrize('draws', [300, pytest.param(20000, marks=pytest.mark.soak)])
def test_the_distribution_is_the_same(monkeypatch, draws):
    """Under the same seeds both loaders crop, flip and choose operations alike, so that their frequencies are equal;
    means and deviations of channels differ by less than 0.3 grey levels, with 99.9 % confidence.
    """
    reference, fast = (recorded(monkeypatch, kind, draws, 64) for kind in (False, True))
    assert len(reference[0]) == len(reference[1]) == draws and len(reference[2]) == 2 * draws
    assert reference[:3] == fast[:3]
    difference = fast[3] - reference[3]
    bound = np.abs(difference.mean(axis=0)) + 3.3 * difference.std(axis=0) / np.sqrt(draws)
    print(f'{draws} draws: differences of means and deviations at most {bound.max():.3f} grey levels')
    assert bound.max() < (0.3 if draws > 1000 else 1.)


def test_without_its_packages_the_fast_loader_is_refused(monkeypatch):
    monkeypatch.setattr(transforms, 'HAS_FAST', False)
    with pytest.raises(ValueError, match='pip install'):
        build_transform(True, 64, fast=True)
    build_transform(True, 64)


def test_opencv_starts_no_threads():
    assert cv2.getNumThreads() <= 1
