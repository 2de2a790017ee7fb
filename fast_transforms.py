"""Transform training images with libjpeg-turbo, torch and OpenCV.

The random draws are those of transforms.build_transform: with the same seed, both loaders crop, flip and augment alike.
"""
import copy
import functools
import random
from collections.abc import Callable

import numpy as np
import timm.data.auto_augment as auto_augment
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation, str_to_pil_interp
from torchvision import transforms as tv_transforms

from errors import UsageError
from sources import UPRIGHT, check_pixels, open_header, open_image, orientation

try:
    import cv2
    import simplejpeg
    cv2.setNumThreads(0)  # Run OpenCV in one thread: a worker has one core, and threads do not survive a fork.
    HAS_FAST = True
except ImportError:
    HAS_FAST = False


class Jpeg:
    """Keep a JPEG file and its last decoded pixels, so that repeated augmentation need not decode them for each copy.

    Args:
        data: bytes of the file.
        size: (width, height) of the stored image in pixels.
        ignore_exif: ignore the EXIF orientation.
    """

    def __init__(self, data: bytes, size: tuple[int, int], ignore_exif: bool):
        self.data = data
        self.orientation = 1 if ignore_exif else _jpeg_orientation(data)
        self.stored_size, self.size = size, size if self.orientation < 5 else size[::-1]
        self.scale, self.pixels = 0, None

    def decode(self, scale: int = 1) -> np.ndarray:
        """Return the pixels at 1 / scale of the size: (ceil(H / scale), ceil(W / scale), 3) uint8.

        If libjpeg-turbo fails or warns, Pillow decodes the file, so that a damaged file gives the same pixels or error
        as in the reference loader.

        Raises:
            OSError: Pillow cannot read the file either.
        """
        if self.scale != scale:
            width, height = (-(-side // scale) for side in self.stored_size)
            try:
                # Two options stay off. The fast inverse DCT darkens images by 0.8 gray levels and saves 4 % of the
                # decoding time. Fast chroma upsampling changes pixels by a gray level and saves nothing.
                pixels = simplejpeg.decode_jpeg(self.data, 'RGB', min_height=height, min_width=width)
            except ValueError:
                image = open_image(self.data, ignore_exif=True)
                pixels = np.array(image.reduce(scale) if scale > 1 else image)
            if self.orientation > 1:
                pixels = np.array(Image.fromarray(pixels).transpose(UPRIGHT[self.orientation]))
            self.scale, self.pixels = scale, pixels
        return self.pixels


def _jpeg_orientation(data: bytes) -> int:
    """Return the EXIF orientation. Call Pillow, which is slow, only if the header has EXIF or XMP (0xe1) or damage."""
    start = 2
    while b'\xff\xc0' <= data[start:start + 2] < b'\xff\xff' and data[start + 1] not in (0xda, 0xe1):
        start += 2 + int.from_bytes(data[start + 2:start + 4], 'big')
    return 1 if data[start:start + 2] == b'\xff\xda' else orientation(open_header(data))


def open_jpeg(data: bytes, ignore_exif: bool = False, max_pixels: int | None = None) -> Jpeg | Image.Image:
    """Open an image file: as a Jpeg if libjpeg-turbo can decode it, else with sources.open_image."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # not a JPEG, damaged, or with a chroma subsampling that simplejpeg does not support
        return open_image(data, ignore_exif, max_pixels=max_pixels)
    check_pixels(width, height, max_pixels)
    is_supported = colors in ('Gray', 'YCbCr', 'RGB')
    return Jpeg(data, (width, height), ignore_exif) if is_supported else open_image(
        data, ignore_exif, max_pixels=max_pixels)


class FastTransform:
    """Run timm's training transform on arrays, with the same random draws, in less time.

    A JPEG is decoded at 1/2, 1/4 or 1/8 scale if the crop is far larger than the input size. Pillow decodes all other
    files, and applies the transforms that have no fast counterpart here.

    Args:
        transform: returned by transforms.build_transform(is_train=True); it is copied.

    Raises:
        UsageError: simplejpeg or OpenCV is not installed.
    """

    open_image = staticmethod(open_jpeg)  # sources.EncodedImages opens files with this function.

    def __init__(self, transform: tv_transforms.Compose):
        if not HAS_FAST:
            raise UsageError(
                '--loader fast needs simplejpeg and opencv-python-headless: pip install -r requirements.txt')
        steps = copy.deepcopy(transform.transforms)
        self.crop = steps.pop(0) if isinstance(steps[0], RandomResizedCropAndInterpolation) else None
        self.steps = [_fast_step(step) for step in steps
                      if not isinstance(step, (MaybePILToTensor, tv_transforms.PILToTensor))]

    def __call__(self, image: Jpeg | Image.Image) -> torch.Tensor:
        """Return a uint8 tensor (3, H, W) in channels-last memory."""
        pixels = self._crop(image) if self.crop else _decode(image)
        for step in self.steps:
            pixels = step(pixels)
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)

    def _crop(self, image: Jpeg | Image.Image) -> np.ndarray:
        """Draw a crop, and return it at the input size, (H, W, 3)."""
        blank = torch.empty(1).expand(1, *image.size[::-1])  # get_params reads only the image's size.
        box = top, left, height, width = self.crop.get_params(blank, self.crop.scale, self.crop.ratio)
        modes = self.crop.interpolation
        mode = (random.choice(modes) if isinstance(modes, (list, tuple)) else modes).value
        # Decode so that the crop has at least 1.5 times the target size. With less, pixels differ by 1.5 gray levels.
        least = 1.5 * max(self.crop.size)
        scale = next(s for s in (8, 4, 2, 1) if s == 1 or min(height, width) >= s * least)
        if scale > 1 and isinstance(image, Jpeg):  # Use Pillow: only it can crop at fractions of a pixel.
            top, left, height, width = (value / scale for value in box)
            pixels = image.decode(scale)  # A flip moves the incomplete last block to the start, so shift the crop.
            left += (image.orientation in (2, 3, 6, 7)) * (pixels.shape[1] - image.size[0] / scale)
            top += (image.orientation in (3, 4, 7, 8)) * (pixels.shape[0] - image.size[1] / scale)
            return np.array(Image.fromarray(pixels).resize(
                self.crop.size[::-1], str_to_pil_interp(mode), box=(left, top, left + width, top + height)))
        if not (height and width):  # In an image of one or two pixels, a crop can be empty. Pillow returns black.
            return np.zeros((*self.crop.size, 3), np.uint8)
        # torch matches Pillow to 0.005 gray levels, and takes a quarter of the time if the memory is channels-last.
        x = torch.from_numpy(_decode(image)[top:top + height, left:left + width])[None].permute(0, 3, 1, 2)
        x = F.interpolate(x, size=self.crop.size, mode=mode, antialias=True, align_corners=False)  # (1, 3, H, W)
        return x.permute(0, 2, 3, 1)[0].numpy()


def _decode(image: Jpeg | Image.Image) -> np.ndarray:
    return image.decode() if isinstance(image, Jpeg) else np.array(image)


def _fast_step(step: Callable) -> Callable:
    """Return timm's `step` for arrays, in a form that can be pickled for a worker."""
    if isinstance(step, tv_transforms.RandomHorizontalFlip):
        return functools.partial(_flip, step.p)
    if isinstance(step, auto_augment.RandAugment):
        ops = step.ops
    elif isinstance(step, auto_augment.AutoAugment):
        ops = {id(op): op for policy in step.policy for op in policy}.values()
    else:
        return functools.partial(_apply_by_pillow, step)
    for op in ops:
        op.aug_fn = FAST_OPS.get(op.aug_fn.__name__.strip('_')) or functools.partial(_apply_by_pillow, op.aug_fn)
    return step


def _apply_by_pillow(function: Callable, image: np.ndarray, *args, **kwargs) -> np.ndarray:
    return np.array(function(Image.fromarray(image), *args, **kwargs))


def _flip(probability: float, image: np.ndarray) -> np.ndarray:
    return cv2.flip(image, 1) if torch.rand(1).item() < probability else image


# timm's augmentation operations, reimplemented under timm's names. Results equal those of Pillow's C code.

LEVELS = np.arange(256)


def _apply_table(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Map gray levels with a table (256,) or (256, 3), truncated to integers."""
    table = np.clip(table, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table if table.ndim == 1 else table[None])


def _histograms(image: np.ndarray) -> np.ndarray:
    """Count the gray levels of each channel: (3, 256)."""
    return np.stack([cv2.calcHist([image], [c], None, [256], [0, 256]).ravel() for c in range(3)]).astype(np.int64)


def auto_contrast(image, **_):
    tables = []
    for counts in _histograms(image):
        used = np.flatnonzero(counts)
        low, high = used[0], used[-1]
        scale = 255. / (high - low) if high > low else 1.
        tables.append((LEVELS * scale - (low * scale if high > low else 0.)).astype(int))
    return _apply_table(image, np.stack(tables, axis=1))


def equalize(image, **_):
    tables = []
    for counts in _histograms(image):
        used = counts[counts > 0]
        step = (used.sum() - used[-1]) // 255
        tables.append((step // 2 + np.cumsum(counts) - counts) // step if step else LEVELS)
    return _apply_table(image, np.stack(tables, axis=1))


def invert(image, **_):
    return ~image


def solarize(image, thresh, **_):
    return _apply_table(image, np.where(LEVELS < thresh, LEVELS, 255 - LEVELS))


def solarize_add(image, add, thresh=128, **_):
    return _apply_table(image, np.where(LEVELS < thresh, LEVELS + add, LEVELS))


def posterize(image, bits_to_keep, **_):
    return image if bits_to_keep >= 8 else _apply_table(image, LEVELS & (256 - 2 ** (8 - max(bits_to_keep, 0))))


def contrast(image, factor, **_):
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _apply_table(image, mean + np.float32(factor) * (LEVELS - mean).astype(np.float32))


def brightness(image, factor, **_):
    return _apply_table(image, np.float32(factor) * LEVELS.astype(np.float32))


TRUNCATE = -0.499  # added to a result, this turns OpenCV's rounding into Pillow's truncation


def color(image, factor, **_):
    gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, gray, 1 - factor, TRUNCATE)


def sharpness(image, factor, **_):
    kernel = np.full((3, 3), (1 - factor) / 13)  # Pillow's SMOOTH kernel has 5 / 13 in the middle.
    kernel[1, 1] = 5 * (1 - factor) / 13 + factor
    out = cv2.filter2D(image, -1, kernel, delta=TRUNCATE)
    for border in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):  # Pillow leaves the border unchanged.
        out[border] = image[border]
    return out


def _shift_rows(image: np.ndarray, shifts: np.ndarray, fillcolor: tuple[int, ...], resample) -> np.ndarray:
    """Shift row y of an image to the left by shifts[y] pixels, interpolated as in Pillow.

    OpenCV's warpAffine takes four times as long, and its cubic coefficient is -0.75 instead of Pillow's -1.
    """
    resample = random.choice(resample) if isinstance(resample, (list, tuple)) else resample
    height, width, channels = image.shape
    first, weights = _interpolation_taps(shifts - np.floor(shifts), resample)
    whole = np.clip(np.floor(shifts), -width - 4, width + 4).astype(int)
    edge = len(weights) // 2  # repeated pixels at the border, so that every tap of an inner column has a value
    margin = int(np.abs(whole).max()) + 1
    padded = cv2.copyMakeBorder(image, 0, 0, edge, edge, cv2.BORDER_REPLICATE)
    padded = cv2.copyMakeBorder(padded, 0, 0, margin, margin, cv2.BORDER_CONSTANT, value=fillcolor).reshape(height, -1)
    starts = (margin + edge + whole + first) * channels
    span = (width + len(weights) - 1) * channels
    if (shifts == shifts[0]).all():  # With one filter for all rows, OpenCV is faster than the loop below.
        taps = np.array([[weight[0] for weight in weights]])
        out = cv2.filter2D(padded[:, starts[0]:starts[0] + span].reshape(height, -1, channels), -1, taps,
                           anchor=(0, 0), delta=TRUNCATE)[:, :width]
    else:
        rows = np.lib.stride_tricks.sliding_window_view(padded, span, axis=1)[np.arange(height), starts]
        rows, weights = torch.from_numpy(rows).float(), torch.from_numpy(np.stack(weights))[:, :, None]
        out = torch.full((height, width * channels), 1e-3)  # 1e-3, so that rounding errors do not lose a gray level
        for i, weight in enumerate(weights):
            out.addcmul_(rows[:, i * channels:(width + i) * channels], weight)
        out = out.clamp_(0, 255).to(torch.uint8).numpy().reshape(height, width, channels)
    # Pillow fills every column that comes from outside the image. Those next to the border are still blends: fill them.
    mixed = np.arange(2 * edge + 1)
    left, right = np.ceil(-0.5 - shifts).astype(int), np.ceil(width - 0.5 - shifts).astype(int)
    columns = np.concatenate([left[:, None] - 1 - mixed, right[:, None] + mixed], axis=1)
    y, i = np.nonzero((columns >= 0) & (columns < width))
    out[y, columns[y, i]] = fillcolor
    return out


def _interpolation_taps(t: np.ndarray, resample: Image.Resampling) -> tuple[int, list[np.ndarray]]:
    """Return the offset of the first tap and the weights of all taps for shifts t (H,)."""
    t = t.astype(np.float32)
    if resample == Image.Resampling.BICUBIC:
        return -1, [-t ** 3 + 2 * t ** 2 - t, t ** 3 - 2 * t ** 2 + 1, -t ** 3 + t ** 2 + t, t ** 3 - t ** 2]
    return 0, [1 - t, t]


def _shift_columns(image, shifts, fillcolor, resample):
    return cv2.transpose(_shift_rows(cv2.transpose(image), shifts, fillcolor, resample))


def shear_x(image, factor, fillcolor, resample):
    return _shift_rows(image, factor * (np.arange(image.shape[0]) + 0.5), fillcolor, resample)


def shear_y(image, factor, fillcolor, resample):
    return _shift_columns(image, factor * (np.arange(image.shape[1]) + 0.5), fillcolor, resample)


def translate_x_rel(image, pct, fillcolor, resample):
    return _shift_rows(image, np.full(image.shape[0], pct * image.shape[1]), fillcolor, resample)


def translate_y_rel(image, pct, fillcolor, resample):
    return _shift_columns(image, np.full(image.shape[1], pct * image.shape[0]), fillcolor, resample)


def rotate(image, degrees, fillcolor, resample):
    """Rotate with OpenCV. Its cubic kernel is a little sharper than Pillow's."""
    resample = random.choice(resample) if isinstance(resample, (list, tuple)) else resample
    height, width = image.shape[:2]
    flags = cv2.INTER_CUBIC if resample == Image.Resampling.BICUBIC else cv2.INTER_LINEAR
    # OpenCV places pixel centers at integer coordinates, so the center of the image is at (size - 1) / 2.
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.)
    return cv2.warpAffine(image, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_CONSTANT,
                          borderValue=fillcolor)


FAST_OPS = {function.__name__: function for function in (
    auto_contrast, equalize, invert, solarize, solarize_add, posterize, contrast, brightness, color, sharpness,
    shear_x, shear_y, translate_x_rel, translate_y_rel, rotate)}
