"""python scripts/predict.py output/digits/checkpoint_best.pth photos/ --picture answers.png

Print the most probable classes of images, as a table, JSON or CSV. IMAGE is a file, a folder (searched at any depth) or
-, standard input: an image, or paths one a line:

    find photos -newer last | python scripts/predict.py cmt_s - --csv
    curl -s https://example.org/cat.jpg | python scripts/predict.py cmt_s -

--picture draws a sheet: each image after resizing and cropping, the Grad-CAM of the first answer, and the answers.
An image that cannot be read is reported and left out (exit status 1).
"""
import argparse
import csv
import functools
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from timm.data import ImageNetInfo
from torchvision.transforms.functional import to_pil_image

import _path
import cmt
from checkpoints import atomic_write
from errors import one_line, printable
from options import Parser, output_file, path, positive
from sources import is_image, open_image
from transforms import build_transform
from weights import build_model, create_cmt, read_weights

assert _path.ROOT  # importing _path puts the repository on sys.path

SHEET = 120  # images on a sheet at most
INK, GREY = '#202124', '#70757a'
PAD, LINE = 14, 27  # of a card: margin and height of an answer (pixels)


def find_images(sources: list[str]) -> list[tuple[str, Any]]:
    """Return (name, path or file of bytes) of each image that `sources` name.

    Raises:
        ValueError: a folder without images, or standard input without an image or a path.
    """
    found = []
    for source in sources:
        if source == '-':
            content = sys.stdin.buffer.read()
            try:
                Image.open(io.BytesIO(content))
                found.append(('-', io.BytesIO(content)))
            except OSError:  # no image: paths
                lines = content.decode(errors='surrogateescape').splitlines()
                if not any(map(str.strip, lines)) or b'\0' in content:
                    raise ValueError('-: standard input contains neither an image nor paths of images') from None
                found += find_images([line for line in lines if line.strip() and line != '-'])
        elif os.path.isdir(source):
            inside = sorted(str(path) for path in Path(source).rglob('*') if is_image(str(path.relative_to(source))))
            if not inside:
                raise ValueError(f'no images in {source}')
            found += [(path, path) for path in inside]
        else:
            found.append((source, source))
    return found


def class_names(path: str | None, known: list[str] | None, num_classes: int) -> list[str]:
    """Return the names of the classes in the order of their index.

    Args:
        path: file of names, one a line or JSON.
        known: the checkpoint's names, used without `path`.
        num_classes: without names, 1000 classes get ImageNet's names and other counts get numbers.

    Raises:
        ValueError: no such file, or another number of names than of classes.
    """
    if path is not None:
        try:
            text = Path(path).read_text('utf-8-sig')
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f'--class-names {path}: {error}') from None
        try:
            names = json.loads(text)
        except json.JSONDecodeError:
            names = [line.strip() for line in text.splitlines() if line.strip()]
        if isinstance(names, dict):  # {index: name}, or torchvision's {name: index}
            names = names if all(str(key).isdigit() for key in names) else {i: name for name, i in names.items()}
            names = [names[key] for key in sorted(names, key=int)]
        if not isinstance(names, list) or len(names) != num_classes:
            count = len(names) if isinstance(names, list) else 'no'
            raise ValueError(f'{path} contains {count} names, the model has {num_classes} classes')
        return [str(name) for name in names]
    imagenet = ImageNetInfo()
    if known:
        synsets = all(re.fullmatch(r'n\d{8}', name) for name in known)
        return [imagenet.label_name_to_description(name) or name if synsets else name for name in known]
    if num_classes == 1000:
        return [imagenet.index_to_description(i) for i in range(num_classes)]
    return [f'class {i}' for i in range(num_classes)]


def answers(logits: torch.Tensor, names: list[str], k: int) -> list[list[dict[str, Any]]]:
    """Return the `k` most probable classes of each image."""
    probabilities, indices = logits.double().softmax(dim=-1).topk(min(k, len(names)))
    return [[{'index': index, 'class': names[index], 'probability': p} for p, index in zip(*row)]
            for row in zip(probabilities.tolist(), indices.tolist())]


def grad_cam(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and the Grad-CAM of each image's first answer (Selvaraju et al., arXiv 1610.02391).

    Args:
        model: a CMT in eval mode.
        images: (B, 3, H, W), normalised.

    Returns:
        Logits (B, classes), and maps (B, H, W) in [0, 1]: the positive part of a stage's channels, each weighted by
        the mean gradient of the largest logit. The stage is the last that has 4 x 4 positions or more: the fourth from
        128 px on, the second at 32 px, where the fourth has one position.
    """
    depth = max(n for n in (2, 3, 4) if min(images.shape[2:]) >= 4 * 2 ** (n + 1))
    with torch.enable_grad():
        maps = model.stages[:depth](model.stem(images))  # (B, C, H / 2^(depth + 1), W / 2^(depth + 1))
        maps = maps.detach().requires_grad_()
        logits = model.forward_head(model.head_proj(model.stages[depth:](maps)))
        gradient, = torch.autograd.grad(logits.amax(dim=-1).sum(), maps)
    cam = (gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True).relu()
    cam = F.interpolate(cam.detach(), size=images.shape[2:], mode='bilinear', align_corners=False)[:, 0]
    return logits.detach(), cam / cam.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def overlay(image: Image.Image, cam: np.ndarray) -> Image.Image:
    """Blend the heat map over the image in grey.

    The ends of matplotlib's turbo are left out: they are too dark to see the image through.
    """
    heat = Image.fromarray(matplotlib.colormaps['turbo'](0.06 + 0.82 * cam, bytes=True)[..., :3])
    strength = Image.fromarray((64 + 64 * cam).astype(np.uint8))
    return Image.composite(heat, image.convert('L').convert('RGB'), strength)


@functools.cache
def find_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / f'{name}.ttf'), size)


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float, keep_end: bool = False) -> str:
    """Shorten `text` to `width` pixels, with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + '…') > width:
        text = text[1:] if keep_end else text[:-1]
    return '…' + text if keep_end else text.rstrip(' ,') + '…'


def draw_sheet(entries: list[dict[str, Any]], title: str, side: int = 224) -> Image.Image:
    """Draw a card for each image: the model's input, the heat map beside it, file name and answers below.

    Args:
        entries: dicts of name, image (PIL), cam (H, W) and predictions.
        title: of the sheet.
        side: of an image on the sheet (pixels).
    """
    gap, header = 20, 58
    rows_of_text = max(len(entry['predictions']) for entry in entries)
    card_w, card_h = 2 * side + 3 * PAD, PAD + side + 34 + LINE * rows_of_text + PAD
    # the number of columns that makes the sheet about 3:2
    columns = min(len(entries), max(1, round(math.sqrt(1.5 * len(entries) * (card_h + gap) / (card_w + gap)))))
    rows = math.ceil(len(entries) / columns)
    width, height = gap + columns * (card_w + gap), header + rows * (card_h + gap)
    sheet = Image.new('RGB', (width, height), '#f1f3f4')
    draw = ImageDraw.Draw(sheet)
    small = find_font('DejaVuSans', 13)
    large = next((font for font in (find_font('DejaVuSans-Bold', size) for size in (22, 18, 15))
                  if font.getlength(title) <= width - 2 * gap), small)
    legend = 'right: what the first answer rests on (Grad-CAM, blue to red)'
    draw.text((gap, 20), shorten(title, large, width - 2 * gap), INK, large, anchor='lm')
    draw.text((gap, 43), shorten(legend, small, width - 2 * gap), GREY, small, anchor='lm')
    for i, entry in enumerate(entries):
        x = gap + (i % columns) * (card_w + gap)
        y = header + (i // columns) * (card_h + gap)
        draw.rounded_rectangle((x, y, x + card_w, y + card_h), 10, 'white', '#dadce0')
        image = entry['image'].resize((side, side), Image.Resampling.BICUBIC)
        cam = Image.fromarray(entry['cam'].astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
        sheet.paste(image, (x + PAD, y + PAD))
        sheet.paste(overlay(image, np.asarray(cam).clip(0, 1)), (x + 2 * PAD + side, y + PAD))
        draw_answers(draw, entry, x + PAD, y + PAD + side, card_w - 2 * PAD)
    return sheet


def draw_answers(draw: ImageDraw.ImageDraw, entry: dict[str, Any], x: int, y: int, width: int) -> None:
    """Draw file name and answers of an entry of draw_sheet at (x, y), with a bar for each probability."""
    small = find_font('DejaVuSans', 13)
    draw.text((x, y + 18), shorten(entry['name'], small, width, keep_end=True), GREY, small, anchor='lm')
    for rank, answer in enumerate(entry['predictions']):
        middle = y + 34 + LINE * (rank + 0.5)
        font = find_font('DejaVuSans' if rank else 'DejaVuSans-Bold', 16)
        draw.text((x, middle), shorten(answer['class'], font, width - 178), INK, font, anchor='lm')
        bar_x, bar_w = x + width - 166, 90
        draw.rounded_rectangle((bar_x, middle - 5, bar_x + bar_w, middle + 5), 5, '#eceff1')
        filled = bar_w * answer['probability']
        if filled >= 1:
            draw.rounded_rectangle((bar_x, middle - 5, bar_x + filled, middle + 5), min(5, filled / 2),
                                   '#c9d3e0' if rank else '#3b6fb6')
        draw.text((x + width, middle), f"{answer['probability']:.1%}", INK, font, anchor='rm')


def print_table(results: list[dict[str, Any]]) -> None:
    rows = [('image', 'class', 'probability')]
    for result in results:
        for rank, answer in enumerate(result['predictions']):
            image = '' if rank else printable(result['image'])
            rows.append((image, printable(answer['class']), f"{answer['probability']:.2%}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ['-' * width for width in widths])
    for image, name, probability in rows:
        print(f'{image:{widths[0]}}  {name:{widths[1]}}  {probability:>{widths[2]}}')


def print_csv(results: list[dict[str, Any]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator='\n')
    writer.writerow(['image', 'rank', 'index', 'class', 'probability'])
    for result in results:
        for rank, answer in enumerate(result['predictions'], 1):
            writer.writerow([result['image'], rank, answer['index'], answer['class'], f"{answer['probability']:.6g}"])


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split('\n', 2)[2],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', metavar='CKPT|MODEL',
                        help='a checkpoint, a converted folder, or a name with published weights')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='file, folder or -')
    parser.add_argument('--top', type=positive, default=5, metavar='K',
                        help='answers for each image (default: %(default)s)')
    output = parser.add_mutually_exclusive_group()
    output.add_argument('--json', action='store_true', help='print JSON')
    output.add_argument('--csv', action='store_true', help='print CSV')
    parser.add_argument('--class-names', type=path, metavar='FILE', help='names of the classes, one a line or JSON')
    parser.add_argument('--picture', type=output_file, metavar='OUT.png',
                        help=f'draw a sheet of the first {SHEET} images')
    parser.add_argument('--input-size', type=int, metavar='N', help="a multiple of 32 (default: the checkpoint's)")
    parser.add_argument('--model-weights', action='store_true', help='use the weights, not their EMA')
    parser.add_argument('--random-weights', action='store_true', help='use MODEL untrained, to try the output')
    parser.add_argument('--batch-size', type=positive, default=32, metavar='N', help='default: %(default)s')
    parser.add_argument('--device', help='default: cuda if available')
    return parser


def load(args: argparse.Namespace) -> tuple[nn.Module, list[str]]:
    """Return the model on its device, and the names of its classes."""
    size = {'img_size': args.input_size} if args.input_size else {}
    if args.random_weights:
        torch.manual_seed(0)
        model, known = create_cmt(args.model, **size).eval(), None
    else:
        weights = read_weights(args.model, use_ema=not args.model_weights)
        model = build_model(weights, **size)
        known = weights.classes_for(model)
        if weights.kind == 'model_ema':
            print('; '.join(['using the EMA of the weights (--model-weights uses the weights)', *weights.notes]),
                  file=sys.stderr)
    if model.img_size[0] != model.img_size[1]:
        raise ValueError(f'{args.model} has an input of {model.img_size[0]}x{model.img_size[1]}, evaluation crops '
                         'squares: give an --input-size')
    if model.num_classes == 0:
        raise ValueError(f'{args.model} has no classifier')
    names = class_names(args.class_names, known, model.num_classes)
    try:
        return model.to(args.device or ('cuda' if torch.cuda.is_available() else 'cpu')), names
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'--device {args.device}: {str(error).splitlines()[0]}') from None


def predict(
        model: nn.Module, names: list[str], found: list[tuple[str, Any]], k: int, batch_size: int, pictures: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the answers for all readable images, and the first `pictures` entries for draw_sheet."""
    device, size = next(model.parameters()).device, model.img_size[0]
    cfg = getattr(model, 'pretrained_cfg', None) or cmt.default_cfgs['cmt_s'].default.to_dict()
    mean, std = (torch.tensor(cfg[key], device=device).view(1, -1, 1, 1) * 255 for key in ('mean', 'std'))
    results, entries = [], []
    for start in range(0, len(found), batch_size):
        read = list(read_images(found[start:start + batch_size], build_transform(False, size)))
        if not read:
            continue
        images = torch.stack([pixels for _, pixels in read]).to(device, torch.float32).sub_(mean).div_(std)
        cams = []
        if len(entries) < pictures:
            logits, cams = grad_cam(model, images)
        else:
            with torch.no_grad():
                logits = model(images)
        predictions = answers(logits.float().cpu(), names, k)
        results += [{'image': name, 'predictions': ranked} for (name, _), ranked in zip(read, predictions)]
        entries += [{'name': name, 'image': to_pil_image(pixels), 'cam': cam.cpu().numpy(), 'predictions': ranked}
                    for (name, pixels), cam, ranked in zip(read, cams, predictions)]
    return results, entries[:pictures]


def read_images(found: list[tuple[str, Any]], transform: Callable) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and pixels (3, H, W), uint8, of each readable image, and report the others."""
    for name, source in found:
        try:
            image = open_image(Path(source).read_bytes() if name != '-' else source.read())
            yield name, transform(image)
        except Exception as error:  # Pillow's plugins raise anything on damaged files
            reason = getattr(error, 'strerror', None) or one_line(error)
            print(f'cannot read {printable(name)} ({reason})', file=sys.stderr)


def write_picture(path: Path, entries: list[dict[str, Any]], model: str, count: int) -> None:
    """Write the sheet of `entries`, the first of `count` images, with the file names' common folder left out."""
    title = f'{model}: {count} image{"s"[:count > 1]}' + (f', the first {len(entries)}' if len(entries) < count else '')
    folder = os.path.commonpath([os.path.dirname(entry['name']) or '.' for entry in entries])
    for entry in entries:
        entry['name'] = printable(os.path.relpath(entry['name'], folder) if folder else entry['name'])
        entry['predictions'] = [{**answer, 'class': printable(answer['class'])} for answer in entry['predictions'][:5]]
    picture = draw_sheet(entries, title)
    with atomic_write(path) as file:
        picture.save(file, Image.registered_extensions()[path.suffix.lower()])


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')  # names of files may be in no encoding
    try:
        if args.picture and args.picture.suffix.lower() not in ('.png', '.jpg', '.jpeg', '.webp'):
            raise ValueError(f'--picture {args.picture}: the name must end in .png, .jpg or .webp')
        found = find_images(args.images)
        model, names = load(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    results, entries = predict(model, names, found, args.top, args.batch_size, SHEET if args.picture else 0)
    if entries:
        write_picture(args.picture, entries, args.model, len(results))
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    elif args.csv:
        print_csv(results)
    elif results:
        print_table(results)
    if len(results) < len(found):
        sys.exit(1)


if __name__ == '__main__':
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
