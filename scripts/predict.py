"""python scripts/predict.py output/digits/checkpoint_best.pth photos/ --picture answers.png

Says what is in images: the most probable classes of each, as a table, JSON or CSV. Images are files, folders (searched
for images at any depth) or -, standard input: an image, or paths one a line:

    find photos -newer last | python scripts/predict.py cmt_s - --csv
    curl -s https://example.org/cat.jpg | python scripts/predict.py cmt_s -

--picture draws a sheet of the images with their answers, as the model sees them, and beside each where it looked: the
Grad-CAM of its last stage for the first answer. An image that can't be read is named and left out (status 1).
"""
import argparse
import csv
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from timm.data import ImageNetInfo
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cmt  # noqa: E402, F401
from checkpoints import build_model, create_cmt, replacing  # noqa: E402
from datasets import build_transform, one_line  # noqa: E402
from options import Parser  # noqa: E402

SHEET = 120  # images on a sheet at most


def find_images(sources: list[str]) -> list[tuple[str, Any]]:
    """(name, what default_loader opens) of all images that the command line names.

    Raises:
        ValueError: a folder without images, nothing on standard input.
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
                    raise ValueError('-: standard input holds neither an image nor paths of images') from None
                found += find_images([line for line in lines if line.strip() and line != '-'])
        elif os.path.isdir(source):
            inside = sorted(str(path) for path in Path(source).rglob('*') if path.suffix.lower() in IMG_EXTENSIONS)
            if not inside:
                raise ValueError(f'no images in {source}')
            found += [(path, path) for path in inside]
        else:
            found.append((source, source))
    return found


def class_names(path: Path | None, known: list[str] | None, num_classes: int) -> list[str]:
    """Names in the order of their index: of a file, of the checkpoint, ImageNet's for 1000 classes, or numbers.

    Raises:
        ValueError: another number of names than of classes.
    """
    if path is not None:
        try:
            text = path.read_text(encoding='utf-8')
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
            raise ValueError(f'{path} holds {count} names, the model has {num_classes} classes')
        return [str(name) for name in names]
    imagenet = ImageNetInfo()
    if known:
        synsets = all(re.fullmatch(r'n\d{8}', name) for name in known)
        return [imagenet.label_name_to_description(name) or name if synsets else name for name in known]
    if num_classes == 1000:
        return [imagenet.index_to_description(i) for i in range(num_classes)]
    return [f'class {i}' for i in range(num_classes)]


def answers(logits: torch.Tensor, names: list[str], k: int) -> list[list[dict[str, Any]]]:
    """The k most probable classes of each image."""
    probabilities, indices = logits.double().softmax(dim=-1).topk(min(k, len(names)))
    return [[{'index': index, 'class': names[index], 'probability': p} for p, index in zip(*row)]
            for row in zip(probabilities.tolist(), indices.tolist())]


def grad_cam(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and where the first answer of each image comes from (Selvaraju et al., arXiv 1610.02391).

    Args:
        model: a CMT in eval mode.
        images: (B, 3, H, W), normalised.

    Returns:
        Logits (B, classes), and maps (B, H, W) in [0, 1]: the last stage's channels, weighted by the mean gradient of
        the largest logit, positive part.
    """
    with torch.enable_grad():
        maps = model.stages(model.stem(images))  # (B, C, H / 32, W / 32)
        maps = maps.detach().requires_grad_()
        logits = model.forward_head(model.head_proj(maps))
        gradient, = torch.autograd.grad(logits.amax(dim=-1).sum(), maps)
    cam = (gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True).relu()
    cam = F.interpolate(cam.detach(), size=images.shape[2:], mode='bilinear', align_corners=False)[:, 0]
    return logits.detach(), cam / cam.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def overlay(image: Image.Image, cam: np.ndarray) -> Image.Image:
    """Heat over the image in grey, so that all colour is heat; turbo's ends, too dark to see through, are left out."""
    heat = matplotlib.colormaps['turbo'](0.06 + 0.82 * cam)[..., :3] * 255
    grey = np.asarray(image.convert('L'), dtype=np.float64)[..., None]
    strength = 0.25 + 0.25 * cam[..., None]
    return Image.fromarray((grey * (1 - strength) + heat * strength).round().astype(np.uint8))


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float, keep_end: bool = False) -> str:
    """`text`, with an ellipsis where it is wider than `width`."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + '…') > width:
        text = text[1:] if keep_end else text[:-1]
    return '…' + text if keep_end else text.rstrip(' ,') + '…'


def draw_sheet(entries: list[dict[str, Any]], title: str, side: int = 224) -> Image.Image:
    """A card an image: what the model sees, the heat map beside it, file name and answers below.

    Args:
        entries: name, image (PIL), cam (H, W), predictions.
        title: above all.
        side: of an image on the sheet (pixels).
    """
    fonts = Path(matplotlib.get_data_path()) / 'fonts' / 'ttf'
    small, plain = (ImageFont.truetype(str(fonts / 'DejaVuSans.ttf'), size) for size in (13, 16))
    bold, large = (ImageFont.truetype(str(fonts / 'DejaVuSans-Bold.ttf'), size) for size in (16, 22))
    ink, grey, bar, first_bar = '#202124', '#70757a', '#c9d3e0', '#3b6fb6'
    gap, pad, line = 20, 14, 27
    rows_of_text = max(len(entry['predictions']) for entry in entries)
    card_w = 2 * side + 3 * pad
    card_h = pad + side + 34 + line * rows_of_text + pad
    # as many columns as make the sheet about 3:2
    columns = min(len(entries), max(1, round(math.sqrt(1.5 * len(entries) * (card_h + gap) / (card_w + gap)))))
    rows = math.ceil(len(entries) / columns)
    header = 58
    width, height = gap + columns * (card_w + gap), header + rows * (card_h + gap)
    sheet = Image.new('RGB', (width, height), '#f1f3f4')
    draw = ImageDraw.Draw(sheet)
    legend = 'right: where the first answer comes from (Grad-CAM, blue to red)'
    room = width - 2 * gap - small.getlength(legend) - 40
    draw.text((gap, header / 2), shorten(title, large, max(room, card_w)), ink, large, anchor='lm')
    if room >= min(card_w, large.getlength(title)):
        draw.text((width - gap, header / 2), legend, grey, small, anchor='rm')
    for i, entry in enumerate(entries):
        x = gap + (i % columns) * (card_w + gap)
        y = header + (i // columns) * (card_h + gap)
        draw.rounded_rectangle((x, y, x + card_w, y + card_h), 10, 'white', '#dadce0')
        image = entry['image'].resize((side, side), Image.Resampling.BICUBIC)
        cam = Image.fromarray(entry['cam'].astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
        sheet.paste(image, (x + pad, y + pad))
        sheet.paste(overlay(image, np.asarray(cam).clip(0, 1)), (x + 2 * pad + side, y + pad))
        x, y, inner = x + pad, y + pad + side, card_w - 2 * pad
        draw.text((x, y + 18), shorten(entry['name'], small, inner, keep_end=True), grey, small, anchor='lm')
        y += 34
        for rank, answer in enumerate(entry['predictions']):
            font, middle, name_w = bold if rank == 0 else plain, y + line / 2, inner - 170
            draw.text((x, middle), shorten(answer['class'], font, name_w), ink, font, anchor='lm')
            bar_x, bar_w = x + inner - 158, 90
            draw.rounded_rectangle((bar_x, middle - 5, bar_x + bar_w, middle + 5), 5, '#eceff1')
            filled = bar_w * answer['probability']
            if filled >= 1:
                draw.rounded_rectangle((bar_x, middle - 5, bar_x + filled, middle + 5), min(5, filled / 2),
                                       first_bar if rank == 0 else bar)
            draw.text((x + inner, middle), f"{answer['probability']:.1%}", ink, font, anchor='rm')
            y += line
    return sheet


def print_table(results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        for rank, answer in enumerate(result['predictions']):
            rows.append(['' if rank else result['image'], answer['class'], f"{answer['probability']:.2%}"])
    table = [['image', 'class', 'probability'], *rows]
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    table.insert(1, ['-' * width for width in widths])
    for row in table:
        print(f'{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>{widths[2]}}')


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
    parser.add_argument('--top', type=int, default=5, metavar='K', help='answers for each image (default: %(default)s)')
    form = parser.add_mutually_exclusive_group()
    form.add_argument('--json', action='store_true')
    form.add_argument('--csv', action='store_true')
    parser.add_argument('--class-names', type=Path, metavar='FILE', help='a name a line, or JSON')
    parser.add_argument('--picture', type=Path, metavar='OUT.png', help=f'draw a sheet of the first {SHEET} images')
    parser.add_argument('--input-size', type=int, metavar='N', help="a multiple of 32 (default: the checkpoint's)")
    parser.add_argument('--model-weights', action='store_true', help='the weights themselves, not their average')
    parser.add_argument('--random-weights', action='store_true', help='of a MODEL, to see what an untrained one says')
    parser.add_argument('--batch-size', type=int, default=32, metavar='N')
    parser.add_argument('--device', help='default: cuda where there is one')
    return parser


def load(args: argparse.Namespace) -> tuple[nn.Module, list[str]]:
    """The model on its device, and names of its classes."""
    size = {'img_size': args.input_size} if args.input_size else {}
    if args.random_weights:
        torch.manual_seed(0)
        model, known = create_cmt(args.model, **size).eval(), None
    else:
        model, info = build_model(None, args.model, use_ema=not args.model_weights, **size)
        known = info['classes']
        if info['kind'] == 'model_ema':
            print('the average of the weights answers; --model-weights: the weights themselves', file=sys.stderr)
    if model.img_size[0] != model.img_size[1]:
        raise ValueError(f'{args.model} is for {model.img_size[0]}x{model.img_size[1]} images; evaluation crops '
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
    """Answers for all images that can be read, and what a sheet shows of the first `pictures`."""
    device, size = next(model.parameters()).device, model.img_size[0]
    cfg = getattr(model, 'pretrained_cfg', None) or cmt.default_cfgs['cmt_s'].default.to_dict()
    mean, std = (torch.tensor(cfg[key], device=device).view(1, -1, 1, 1) * 255 for key in ('mean', 'std'))
    transform = build_transform(False, size)
    results, entries, read = [], [], []

    def flush() -> None:
        pixels = torch.stack([torch.as_tensor(image) for _, image in read])  # (B, 3, H, W), uint8
        images = pixels.to(device, torch.float32).sub_(mean).div_(std)
        if len(entries) < pictures:
            logits, cams = grad_cam(model, images)
        else:
            with torch.no_grad():
                logits, cams = model(images), images[:0]
        for i, predictions in enumerate(answers(logits.float().cpu(), names, k)):
            results.append({'image': read[i][0], 'predictions': predictions})
            if len(entries) < pictures:
                image = Image.fromarray(pixels[i].permute(1, 2, 0).numpy())
                entries.append({'name': read[i][0], 'image': image, 'cam': cams[i].cpu().numpy(),
                                'predictions': predictions})
        read.clear()

    for name, source in found:
        try:
            image = default_loader(source) if name != '-' else Image.open(source).convert('RGB')
            read.append((name, transform(image)))
        except Exception as error:  # Pillow's plugins raise whatever comes on damaged files
            reason = getattr(error, 'strerror', None) or one_line(error)
            print(f'cannot read {name} ({reason})', file=sys.stderr)
        if len(read) == batch_size:
            flush()
    if read:
        flush()
    return results, entries


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    try:
        if args.top < 1 or args.batch_size < 1:
            raise ValueError('--top and --batch-size: give at least 1')
        if args.picture and args.picture.suffix.lower() not in ('.png', '.jpg', '.jpeg', '.webp'):
            raise ValueError(f'--picture {args.picture}: the name must end in .png, .jpg or .webp')
        if args.picture and not args.picture.absolute().parent.is_dir():
            raise ValueError(f'--picture {args.picture}: there is no folder {args.picture.parent}')
        found = find_images(args.images)
        model, names = load(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    results, entries = predict(model, names, found, args.top, args.batch_size, SHEET if args.picture else 0)
    if entries:
        title = f'{args.model}: {len(results)} image{"s"[:len(results) > 1]}'
        if len(entries) < len(results):
            title += f', the first {len(entries)}'
        folder = os.path.commonpath([os.path.dirname(entry['name']) or '.' for entry in entries])
        for entry in entries:
            entry['name'] = os.path.relpath(entry['name'], folder) if folder else entry['name']
            entry['predictions'] = entry['predictions'][:5]
        picture = draw_sheet(entries, title)
        with replacing(args.picture) as file:
            picture.save(file, Image.registered_extensions()[args.picture.suffix.lower()])
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
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
