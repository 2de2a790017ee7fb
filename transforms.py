"""Build the reference transforms, which use Pillow. fast_transforms.py makes the same random draws."""
from collections.abc import Callable

import timm.data.auto_augment as augment
from PIL import Image
from timm.data import create_transform
from torchvision import transforms as tv_transforms

from errors import UsageError, first_line

SMALL = 32  # pixels; up to this input size, training pads and crops, and evaluation keeps the short side, as for CIFAR


def _posterize(img: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    # rand-m9-mstd0.5-inc1 sometimes draws 0 bits, which Pillow 13 refuses. Return black, as earlier releases did.
    if bits_to_keep <= 0:
        return Image.new(img.mode, img.size)
    return augment.posterize(img, bits_to_keep)


def build_transform(
        is_train: bool, input_size: int, *, crop_pct: float | None = None,
        auto_augment: str | None = 'rand-m9-mstd0.5-inc1', color_jitter: float | None = 0.4,
        interpolation: str = 'bicubic', hflip: float = 0.5,
        scale: tuple[float, float] | None = None, ratio: tuple[float, float] | None = None) -> Callable:
    """Return the transform from a PIL image to a uint8 tensor (3, input_size, input_size).

    Evaluation resizes the short side to int(input_size / crop_pct), bicubic, and crops the center. For inputs up to
    32 px, as for CIFAR, training crops the image at random with a padding of 4.

    Args:
        is_train: True for random augmentation, False for evaluation, which ignores the arguments after `crop_pct`.
        input_size: height and width of the result (pixels).
        crop_pct: fraction of the short side that evaluation keeps; None for 0.875, or 1 up to 32 px, as for CIFAR.
        auto_augment: timm's policy, such as rand-m9-mstd0.5-inc1; None for no policy. Unknown ones raise UsageError.
        color_jitter: strength of timm's color jitter, which applies without a policy.
        interpolation: bicubic, bilinear, or random to draw one of the two for each image.
        hflip: probability of a horizontal flip.
        scale, ratio: ranges of the crop's area, as a fraction of the image's, and of its aspect ratio (width / height);
            None for timm's.
    """
    if not is_train:
        crop_pct = crop_pct or (1. if input_size <= SMALL else 0.875)
        return create_transform(input_size, interpolation='bicubic', crop_pct=crop_pct, normalize=False)
    for name in ('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'):
        augment.NAME_TO_OP[name] = _posterize
    try:
        transform = create_transform(
            input_size, is_training=True, color_jitter=color_jitter, auto_augment=auto_augment,
            interpolation=interpolation, hflip=hflip, scale=scale, ratio=ratio, normalize=False)
    except (AssertionError, ValueError) as error:
        raise UsageError(f'--aa {auto_augment}: {first_line(error)}; use a policy such as rand-m9-mstd0.5-inc1, '
                         "or 'none' to turn it off") from None
    if input_size <= SMALL:
        transform.transforms[0] = tv_transforms.Compose([  # Images that already have this size are only cropped.
            tv_transforms.Resize(input_size, tv_transforms.InterpolationMode.BICUBIC),
            tv_transforms.CenterCrop(input_size), tv_transforms.RandomCrop(input_size, padding=4)])
    return transform
