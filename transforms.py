"""What happens to one image, from encoded bytes to a uint8 tensor, by Pillow (reference) or by faster libraries (fast),
and then to a batch on its device.

Both loaders make the same draws from `random`, NumPy and torch, in the same order: under one seed they crop, flip and
augment alike, and their pixels differ by rounding, and where a JPEG is decoded at a scale.
"""
import functools
import io
import math
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import timm.data.auto_augment as auto_augment
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torchvision import transforms as tv_transforms

try:
    import cv2
    import simplejpeg
    cv2.setNumThreads(0)  # a loader's process has one core, and OpenCV's threads do not survive a fork
    HAS_FAST = True
except ImportError:
    HAS_FAST = False

# of libjpeg, behind which the pixels are there as Pillow's are
WARNINGS = ('Corrupt JPEG data', 'Premature end of JPEG file', 'Inconsistent progression', 'Invalid SOS parameters')

SMALL = 32  # inputs up to here are treated as CIFAR is: padded random crops, no resizing for evaluation


def _posterize(img: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    # Pillow >= 13 refuses 0 bits, which rand-m9-mstd0.5-inc1 draws now and then; before, 0 bits gave a black image
    if bits_to_keep <= 0:
        return Image.new(img.mode, img.size)
    return auto_augment.posterize(img, bits_to_keep)


for _name in ('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'):
    auto_augment.NAME_TO_OP[_name] = _posterize


def build_transform(
        is_train: bool,
        input_size: int,
        *,
        auto_augment: str | None = 'rand-m9-mstd0.5-inc1',
        color_jitter: float | None = 0.4,
        interpolation: str = 'bicubic',
        hflip: float = 0.5,
        scale: tuple[float, float] | None = None,
        ratio: tuple[float, float] | None = None,
        fast: bool = False,
        keep_decoded: bool = False,
) -> Callable:
    """PIL image, or with `fast` also the bytes of its file, to uint8 tensor (3, input_size, input_size).

    Evaluation resizes the short side to int(256 / 224 * input_size), bicubic, and crops the centre. Inputs up to 32 px
    are trained on random crops of the image padded by 4 and evaluated whole, as CIFAR is.

    Args:
        fast: for training, Fast in the place of Pillow.
        keep_decoded: of Fast.

    Raises:
        ValueError: `fast` without the packages that it needs.
    """
    if fast and not HAS_FAST:
        raise ValueError('--loader fast needs simplejpeg and opencv-python-headless: pip install -r requirements.txt')
    if not is_train:
        if input_size > SMALL:
            return create_transform(
                input_size, interpolation='bicubic', crop_pct=0.875, normalize=False)
        return tv_transforms.Compose([_fit(input_size), tv_transforms.PILToTensor()])
    transform = create_transform(
        input_size,
        is_training=True,
        color_jitter=color_jitter,
        auto_augment=auto_augment,
        interpolation=interpolation,
        hflip=hflip,
        scale=scale,
        ratio=ratio,
        normalize=False,
    )
    if input_size <= SMALL:
        transform.transforms[0:1] = [_fit(input_size), tv_transforms.RandomCrop(input_size, padding=4)]
    return Fast(transform.transforms, keep_decoded) if fast else transform


def _fit(size: int) -> Callable:
    """Nothing to an image that has `size` already; others, which have no business here, are made to fit a batch."""
    return tv_transforms.Compose([
        tv_transforms.Resize(size, tv_transforms.InterpolationMode.BICUBIC), tv_transforms.CenterCrop(size)])


def open_image(image: bytes | Image.Image) -> Image.Image:
    """An image as torchvision's loader gives it: RGB, as it lies in the file whatever EXIF says."""
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    return image.convert('RGB')


# ---------------------------------------------------------------------------------------------------------------------
# a batch, on its device

class Prepare:
    """Move a uint8 batch to the device, normalise it, erase and mix.

    Args:
        device: where the model is.
        mixup: timm's Mixup, which turns class indices into soft targets.
        erasing: timm's RandomErasing for this device.
        mean, std: per channel, of images in [0, 1].
    """

    def __init__(
            self,
            device: torch.device,
            mixup: Mixup | None = None,
            erasing: RandomErasing | None = None,
            mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
            std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    ):
        self.device = device
        self.mixup = mixup
        self.erasing = erasing
        self.mean = torch.tensor(mean, device=device) * 255
        self.std = torch.tensor(std, device=device) * 255

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) uint8 and (B,) indices to float32 in channels-last memory, and (B,) or (B, classes) targets."""
        images = images.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        images = self.normalise(images)
        if self.erasing is not None:
            images = self.erasing(images)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        return images, targets

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        B, C, H, W = images.shape
        # a row of W pixels at a time: over the channels of each pixel, the innermost loop would have three steps
        rows = images.permute(0, 2, 3, 1).reshape(B, H, W * C)
        mean, std = self.mean.repeat(W), self.std.repeat(W)
        out = torch.empty_like(rows, dtype=torch.float32)
        # a CPU takes image by image: its cache holds one
        for source, result in zip(rows, out) if images.device.type == 'cpu' else [(rows, out)]:
            result.copy_(source).sub_(mean).div_(std)
        return out.view(B, H, W, C).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# the fast path: (H, W, 3) uint8 arrays instead of PIL images

class Fast:
    """timm's training transform on arrays: the same draws, with libjpeg-turbo's, torch's and OpenCV's arithmetic.

    A JPEG is decoded down to the last row that the crop needs, at 1/2, 1/4 or 1/8 scale where the crop is far larger
    than the input size. What is no plain JPEG, and transforms that have no fast form here, go through Pillow.

    Args:
        steps: of timm's create_transform(is_training=True), from PIL image to tensor.
        keep_decoded: decode whole images and keep the last one: copies of repeated augmentation come in a row.
    """
    takes_bytes = True

    def __init__(self, steps: list[Callable], keep_decoded: bool = False):
        self.crop = steps[0] if isinstance(steps[0], RandomResizedCropAndInterpolation) else None
        self.steps = [_fast_step(step) for step in (steps[1:] if self.crop else steps)
                      if not isinstance(step, (MaybePILToTensor, tv_transforms.PILToTensor))]
        self.keep_decoded = keep_decoded
        self.last = (None, 0, None)  # encoded, scale, decoded

    def __call__(self, image: bytes | Image.Image) -> torch.Tensor:
        """Uint8 tensor (3, H, W) whose memory is (H, W, 3)."""
        plan = self.plan(image)
        return self.augment(self.resize(self.decode(plan), plan))

    def plan(self, image: bytes | Image.Image) -> 'Plan':
        """What is to be done with an image before it is decoded; the crop and the interpolation are drawn here."""
        frame = frame_of(image)
        if frame is None:
            image = open_image(image)
        if self.crop is None:
            return Plan(image, frame)
        size = frame.size if frame else image.size
        blank = torch.empty(1).expand(1, *size[::-1])  # get_params wants an image for its size
        box = self.crop.get_params(blank, self.crop.scale, self.crop.ratio)
        modes = self.crop.interpolation
        mode = random.choice(modes) if isinstance(modes, (list, tuple)) else modes
        # still half as many pixels again: by less, what the decoder leaves out can be seen (1.5 grey levels on average)
        least = 1.5 * max(self.crop.size)
        scale = next(s for s in (8, 4, 2, 1) if s == 1 or min(box[2:]) >= s * least) if frame else 1
        return Plan(image, frame, scale, box, mode.value)

    def decode(self, plan: 'Plan') -> np.ndarray:
        """(H, W, 3) of the image, or of its upper part, at 1 / plan.scale of its size."""
        if plan.frame is None:
            return np.array(plan.image)
        if self.last[0] is plan.image and self.last[1] == plan.scale:
            return self.last[2]
        rows = plan.box[0] + plan.box[2] if plan.box and not self.keep_decoded else plan.frame.size[1]
        try:
            pixels = decode_jpeg(plan.image, plan.frame, plan.scale, rows)
        except ValueError:  # sampling factors that libjpeg-turbo's own interface does not take
            image = open_image(plan.image)
            pixels = np.array(image.reduce(plan.scale) if plan.scale > 1 else image)
        if self.keep_decoded:
            self.last = plan.image, plan.scale, pixels
        return pixels

    def resize(self, pixels: np.ndarray, plan: 'Plan') -> np.ndarray:
        """The crop at the input size."""
        if plan.box is None:
            return pixels
        if plan.scale > 1:  # a crop's border may lie within a pixel, which Pillow alone can do
            top, left, height, width = (value / plan.scale for value in plan.box)
            pixels = pixels[:math.ceil(top + height)]  # so that the filter sees what a cut decode holds
            mode = {'bicubic': Image.Resampling.BICUBIC, 'bilinear': Image.Resampling.BILINEAR}[plan.mode]
            return np.array(Image.fromarray(pixels).resize(
                self.crop.size[::-1], mode, box=(left, top, left + width, top + height)))
        top, left, height, width = plan.box
        if not (height and width):  # of an image of a pixel or two; Pillow makes it black
            return np.zeros((*self.crop.size, 3), np.uint8)
        # Pillow's arithmetic to 0.005 grey levels, in a quarter of its time as long as the memory is channels-last
        x = torch.from_numpy(pixels[top:top + height, left:left + width])[None].permute(0, 3, 1, 2)
        x = F.interpolate(x, size=self.crop.size, mode=plan.mode, antialias=True, align_corners=False)
        return x.permute(0, 2, 3, 1)[0].numpy()

    def augment(self, pixels: np.ndarray) -> torch.Tensor:
        for step in self.steps:
            pixels = step(pixels)
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


PROGRESSIVE = 0xC2  # marker of its frame


class Frame(NamedTuple):
    """What a JPEG says of itself before its pixels."""
    offset: int  # of the two bytes that hold the height
    size: tuple[int, int]  # width, height
    block: int  # rows that are decoded together


class Plan(NamedTuple):
    image: bytes | Image.Image
    frame: Frame | None  # of the JPEG; None for a decoded image
    scale: int = 1  # it is decoded at 1 / scale
    box: tuple[int, int, int, int] | None = None  # top, left, height, width of the crop in the image as it is
    mode: str = ''  # of the interpolation


def frame_of(data: bytes | Image.Image) -> Frame | None:
    """The frame of a whole, 8-bit, grey or three-colour JPEG of the Huffman kinds; None for all else."""
    if not isinstance(data, bytes) or data[:3] != b'\xff\xd8\xff' or data[-2:] != b'\xff\xd9':
        return None
    at = 2
    while at + 10 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        if marker in (0xC0, 0xC1, PROGRESSIVE):  # the others are baseline and extended
            height, width = (int.from_bytes(data[at + i:at + i + 2], 'big') for i in (5, 7))
            components = data[at + 9]
            most = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)  # Pillow refuses what has more
            if data[at + 4] != 8 or components not in (1, 3) or not 0 < height * width <= most:
                return None
            # of a single component, blocks are 8 rows whatever its sampling factor
            factor = max(data[at + 11 + 3 * i] & 15 for i in range(components)) if components == 3 else 1
            return Frame(at + 5, (width, height), 8 * factor)
        if marker == 0xDA:
            return None
        at += 2 + int.from_bytes(data[at + 2:at + 4], 'big')
    return None


def decode_jpeg(data: bytes, frame: Frame, scale: int = 1, rows: int = 2 ** 16) -> np.ndarray:
    """The first `rows` rows of a JPEG, at 1 / scale of its size: (ceil(rows / scale), ceil(width / scale), 3) uint8.

    No package that pip installs gives access to libjpeg-turbo's partial decoding. A frame that says it is lower than it
    is has the same effect: the decoder stops behind the last row, at a third of its time for a third of the rows.

    Raises:
        ValueError: damage that libjpeg does not go on from, or sampling factors that its own interface does not take.
    """
    width, height = frame.size
    wanted = -(-min(rows, height) // scale)
    # the last row's colours are made with the row below it, and smoothed with two blocks where scans are missing
    reach = 2 * scale + (2 * frame.block if data[frame.offset - 4] == PROGRESSIVE else 0)
    rows = min(height, -(-(rows + reach) // frame.block) * frame.block)
    if rows < height:
        data = bytearray(data)
        data[frame.offset:frame.offset + 2] = rows.to_bytes(2, 'big')
    options = {} if scale == 1 else dict(min_height=-(-rows // scale), min_width=-(-width // scale), min_factor=scale)
    pixels = np.empty((-(-rows // scale), -(-width // scale), 3), np.uint8)
    try:  # strict: without it, a fatal error behind a warning is not told, and the pixels are what lay in memory
        # The fast inverse DCT is left alone: it darkens images by 0.8 grey levels, for 4 % of the time. The fast
        # upsampling of colours changes pixels by a grey level and saves nothing.
        simplejpeg.decode_jpeg(data, 'RGB', buffer=pixels, **options)
    except ValueError as error:
        if not str(error).startswith(WARNINGS):  # rows left over are one
            raise
        simplejpeg.decode_jpeg_header(data)  # raises where the header was warned of: nothing is decoded then
    return pixels[:wanted]


def _fast_step(step: Callable) -> Callable:
    """`step` of timm's on arrays; what it returns can be pickled, as loader processes need it on macOS."""
    if isinstance(step, tv_transforms.RandomHorizontalFlip):
        return functools.partial(_flip, step.p)
    if isinstance(step, auto_augment.RandAugment):
        for op in step.ops:
            op.aug_fn = _fast_op(op.aug_fn)
        return step
    if isinstance(step, auto_augment.AutoAugment):
        for op in {id(op): op for policy in step.policy for op in policy}.values():
            op.aug_fn = _fast_op(op.aug_fn)
        return step
    return functools.partial(_through_pillow, step)


def _fast_op(function: Callable) -> Callable:
    return FAST_OPS.get(function.__name__.strip('_')) or functools.partial(_through_pillow, function)


def _through_pillow(function: Callable, image: np.ndarray, *args, **kwargs) -> np.ndarray:
    return np.array(function(Image.fromarray(image), *args, **kwargs))


def _flip(probability: float, image: np.ndarray) -> np.ndarray:
    return cv2.flip(image, 1) if torch.rand(1).item() < probability else image


# timm's operations by the name of its functions; the arithmetic, truncation included, is that of Pillow's C code

LEVELS = np.arange(256)


def _by_table(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """table: (256,) or, by channel, (256, 3); values are truncated to whole grey levels."""
    table = np.clip(table, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table if table.ndim == 1 else table[None])


def _histograms(image: np.ndarray) -> np.ndarray:
    """(3, 256) counts."""
    return np.stack([cv2.calcHist([image], [c], None, [256], [0, 256]).ravel() for c in range(3)]).astype(np.int64)


def auto_contrast(image, **_):
    tables = []
    for counts in _histograms(image):
        used = np.flatnonzero(counts)
        low, high = used[0], used[-1]
        scale = 255. / (high - low) if high > low else 1.
        tables.append((LEVELS * scale - (low * scale if high > low else 0.)).astype(int))
    return _by_table(image, np.stack(tables, axis=1))


def equalize(image, **_):
    tables = []
    for counts in _histograms(image):
        used = counts[counts > 0]
        step = (used.sum() - used[-1]) // 255
        tables.append((step // 2 + np.cumsum(counts) - counts) // step if step else LEVELS)
    return _by_table(image, np.stack(tables, axis=1))


def invert(image, **_):
    return ~image


def solarize(image, thresh, **_):
    return _by_table(image, np.where(LEVELS < thresh, LEVELS, 255 - LEVELS))


def solarize_add(image, add, thresh=128, **_):
    return _by_table(image, np.where(LEVELS < thresh, LEVELS + add, LEVELS))


def posterize(image, bits_to_keep, **_):
    return image if bits_to_keep >= 8 else _by_table(image, LEVELS & (256 - 2 ** (8 - max(bits_to_keep, 0))))


def contrast(image, factor, **_):
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _by_table(image, mean + np.float32(factor) * (LEVELS - mean).astype(np.float32))


def brightness(image, factor, **_):
    return _by_table(image, np.float32(factor) * LEVELS.astype(np.float32))


TRUNCATE = -0.499  # turns OpenCV's rounding into Pillow's truncation


def color(image, factor, **_):
    gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, gray, 1 - factor, TRUNCATE)


def sharpness(image, factor, **_):
    kernel = np.full((3, 3), (1 - factor) / 13)  # Pillow's SMOOTH, 5 / 13 in the middle
    kernel[1, 1] = 5 * (1 - factor) / 13 + factor
    out = cv2.filter2D(image, -1, kernel, delta=TRUNCATE)
    for border in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):  # which Pillow does not smooth
        out[border] = image[border]
    return out


def _shift_rows(image: np.ndarray, shifts: np.ndarray, fillcolor: tuple[int, ...], resample) -> np.ndarray:
    """Row y of the result at x is row y of the image at x + shifts[y], interpolated as Pillow does it.

    OpenCV's warpAffine takes four times as long, and its cubic has another shape (-0.75 for Pillow's -1).
    """
    resample = random.choice(resample) if isinstance(resample, (list, tuple)) else resample
    height, width, channels = image.shape
    whole = np.clip(np.floor(shifts), -width - 4, width + 4).astype(int)
    t = (shifts - np.floor(shifts)).astype(np.float32)
    if resample == Image.Resampling.BICUBIC:
        first, weights = -1, (-t ** 3 + 2 * t ** 2 - t, t ** 3 - 2 * t ** 2 + 1, -t ** 3 + t ** 2 + t, t ** 3 - t ** 2)
    elif resample == Image.Resampling.BILINEAR:
        first, weights = 0, (1 - t, t)
    else:
        raise ValueError(f'no fast form of {resample}')
    reach = len(weights) // 2
    margin = int(np.abs(whole).max()) + 1
    padded = cv2.copyMakeBorder(image, 0, 0, reach, reach, cv2.BORDER_REPLICATE)
    padded = cv2.copyMakeBorder(padded, 0, 0, margin, margin, cv2.BORDER_CONSTANT, value=fillcolor).reshape(height, -1)
    starts = (margin + reach + whole + first) * channels
    span = (width + len(weights) - 1) * channels
    if (shifts == shifts[0]).all():  # a filter like any other, and OpenCV's are fast
        row = np.array([[weight[0] for weight in weights]])
        out = cv2.filter2D(padded[:, starts[0]:starts[0] + span].reshape(height, -1, channels), -1, row,
                           anchor=(0, 0), delta=TRUNCATE)[:, :width]
    else:
        rows = np.lib.stride_tricks.sliding_window_view(padded, span, axis=1)[np.arange(height), starts]
        rows, weights = torch.from_numpy(rows).float(), torch.from_numpy(np.stack(weights))[:, :, None]
        out = torch.full((height, width * channels), 1e-3)  # weights whose sum is 1 - 1e-7 must not cost a grey level
        for i, weight in enumerate(weights):
            out.addcmul_(rows[:, i * channels:(width + i) * channels], weight)
        out = out.clamp_(0, 255).to(torch.uint8).numpy().reshape(height, width, channels)
    # columns whose source is just outside of the image are a mixture so far
    mixed = np.arange(2 * reach + 1)
    left, right = np.ceil(-0.5 - shifts).astype(int), np.ceil(width - 0.5 - shifts).astype(int)
    columns = np.concatenate([left[:, None] - 1 - mixed, right[:, None] + mixed], axis=1)
    y, i = np.nonzero((columns >= 0) & (columns < width))
    out[y, columns[y, i]] = fillcolor
    return out


def _shift_columns(image, shifts, fillcolor, resample):
    return cv2.transpose(_shift_rows(cv2.transpose(image), shifts, fillcolor, resample))


def shear_x(image, factor, fillcolor, resample):
    return _shift_rows(image, factor * (np.arange(image.shape[0]) + 0.5), fillcolor, resample)


def shear_y(image, factor, fillcolor, resample):
    return _shift_columns(image, factor * (np.arange(image.shape[1]) + 0.5), fillcolor, resample)


def translate_x_abs(image, pixels, fillcolor, resample):
    return _shift_rows(image, np.full(image.shape[0], float(pixels)), fillcolor, resample)


def translate_y_abs(image, pixels, fillcolor, resample):
    return _shift_columns(image, np.full(image.shape[1], float(pixels)), fillcolor, resample)


def translate_x_rel(image, pct, **kwargs):
    return translate_x_abs(image, pct * image.shape[1], **kwargs)


def translate_y_rel(image, pct, **kwargs):
    return translate_y_abs(image, pct * image.shape[0], **kwargs)


def rotate(image, degrees, fillcolor, resample):
    """By OpenCV, whose cubic is a little sharper than Pillow's."""
    resample = random.choice(resample) if isinstance(resample, (list, tuple)) else resample
    height, width = image.shape[:2]
    flags = cv2.INTER_CUBIC if resample == Image.Resampling.BICUBIC else cv2.INTER_LINEAR
    # pixel centres are whole numbers in OpenCV
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.)
    return cv2.warpAffine(image, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_CONSTANT,
                          borderValue=fillcolor)


FAST_OPS = {function.__name__: function for function in (
    auto_contrast, equalize, invert, solarize, solarize_add, posterize, contrast, brightness, color, sharpness,
    shear_x, shear_y, translate_x_abs, translate_y_abs, translate_x_rel, translate_y_rel, rotate)}
