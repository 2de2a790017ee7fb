"""python scripts/predict.py output/digits/checkpoint_best.pth photos/ --picture sheet.png

Print the most probable classes of images, as a table, JSON or CSV. IMAGE is a file, a folder (searched at any depth) or
-, standard input: an image, or paths one a line:

    find photos -newer last | python scripts/predict.py cmt_s - --csv
    curl -s https://example.org/cat.jpg | python scripts/predict.py cmt_s -

--picture draws a sheet: each image as the model sees it, the Grad-CAM of its top prediction, and the predictions. An
image that cannot be read is reported and left out (exit status 1).
"""
import argparse
import csv
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from torchvision.transforms.functional import normalize, to_pil_image

import _path
from errors import UsageError, first_line, one_line, printable
from options import Parser, add_weights_flag, image_size, in_range, output_file, path, positive
from reports import check_extension, draw_sheet, save
from sources import EXTENSIONS, HEIF, IGNORED, is_image, log_left_out, open_image
from transforms import build_transform
from weights import build_model, read_weights

assert _path.ROOT  # importing _path puts the repository on sys.path

MAX_ON_SHEET = 120  # images


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split('\n', 2)[2], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', metavar='CKPT|MODEL',
                        help='a checkpoint, a converted folder, or a name with published weights')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='file, folder or -')
    parser.add_argument('--top', type=positive, default=5, metavar='K',
                        help='predictions for each image (default: %(default)s)')
    output = parser.add_mutually_exclusive_group()
    output.add_argument('--json', action='store_true', help='print JSON')
    output.add_argument('--csv', action='store_true', help='print CSV')
    parser.add_argument('--class-names', type=path, metavar='FILE', help='names of the classes, one a line or JSON')
    parser.add_argument('--picture', type=output_file, metavar='OUT.png',
                        help=f'draw a sheet of the first {MAX_ON_SHEET} images')
    parser.add_argument('--input-size', type=image_size, metavar='N', help="pixels (default: the checkpoint's)")
    parser.add_argument('--crop-pct', type=in_range(float, 0, 1, above=True), metavar='SHARE',
                        help="share of an image's short side that is kept (default: the checkpoint's)")
    add_weights_flag(parser)
    parser.add_argument('--batch-size', type=positive, default=32, metavar='N', help='default: %(default)s')
    parser.add_argument('--device', help='default: cuda if available')
    return parser


def find_images(arguments: list[str]) -> list[tuple[str, str | bytes]]:
    """Return (name, path or encoded image) of each image that `arguments` name.

    Raises:
        UsageError: a folder without images, or standard input without an image or a path.
    """
    images = []
    for argument in arguments:
        if argument == '-':
            content = sys.stdin.buffer.read()
            try:
                Image.open(io.BytesIO(content))
                images.append(('-', content))
            except OSError:  # not an image: paths
                paths = [line for line in os.fsdecode(content).splitlines() if line.strip()]
                if not paths or b'\0' in content:
                    raise UsageError('-: standard input contains neither an image nor paths of images') from None
                images += find_images(paths)
        elif os.path.isdir(argument):
            files = [path for path in Path(argument).rglob('*') if not IGNORED.search(str(path.relative_to(argument)))]
            paths = sorted(str(path) for path in files if is_image(path.name))
            log_left_out((path.name for path in files if not is_image(path.name) and path.is_file()), argument)
            if not paths:
                raise UsageError(f'no images in {argument}')
            images += zip(paths, paths)
        else:
            images.append((argument, argument))
    return images


def read_images(
        images: list[tuple[str, str | bytes]], size: int, crop_pct: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and pixels (3, size, size), uint8, of each readable image, and report the others."""
    transform = build_transform(False, size, crop_pct=crop_pct)
    for name, content in images:
        try:
            image = open_image(content if isinstance(content, bytes) else Path(content).read_bytes())
        except Exception as error:  # Pillow's plugins raise anything on damaged files
            reason = getattr(error, 'strerror', None) or one_line(error)
            if name.lower().endswith(HEIF) and not name.lower().endswith(EXTENSIONS):
                reason += ': pip install pillow-heif'
            print(f'cannot read {printable(name)} ({reason})', file=sys.stderr)
        else:
            yield name, transform(image)


def read_names(file: str) -> list[str]:
    """Read class names, one a line, or JSON: a list, {index: name}, or {name: index} as torchvision's class_to_idx."""
    try:
        text = Path(file).read_text('utf-8-sig')
        is_json = text.lstrip().startswith(('[', '{'))
        names = json.loads(text) if is_json else [line.strip() for line in text.splitlines() if line.strip()]
        if isinstance(names, dict):
            by_index = names if all(map(str.isdigit, names)) else {index: name for name, index in names.items()}
            names = [by_index[index] for index in sorted(by_index, key=int)]
        return list(map(str, names))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f'--class-names {file}: {error}') from None


def describe(names: list[str] | None, model: nn.Module) -> list[str]:
    """Replace WordNet ids by their words. Without names, 1000 classes are ImageNet's, and others get numbers."""
    if names:
        words = ImageNetInfo('imagenet-22k-ms').label_descriptions(as_dict=True)
        return [words.get(name, name) for name in names]
    subset = infer_imagenet_subset(model)
    return ImageNetInfo(subset).label_descriptions() if subset else [f'class {i}' for i in range(model.num_classes)]


def load(args: argparse.Namespace) -> tuple[nn.Module, list[str]]:
    """Return the model on its device, and the names of its classes."""
    weights = read_weights(args.model, use_ema=args.model_ema)
    model = build_model(weights, **({'img_size': args.input_size} if args.input_size else {}))
    if weights.is_ema:
        print('; '.join(["using the EMA (--no-model-ema uses the model's own weights)", *weights.notes]),
              file=sys.stderr)
    if args.crop_pct:
        model.pretrained_cfg['crop_pct'] = args.crop_pct
    if model.img_size[0] != model.img_size[1]:
        raise UsageError(f'{args.model} takes {model.img_size}, evaluation crops squares: give an --input-size')
    if model.num_classes == 0:
        raise UsageError(f'{args.model} has no classifier')
    names = read_names(args.class_names) if args.class_names else describe(weights.class_names(model), model)
    if len(names) != model.num_classes:
        raise UsageError(f'{args.class_names} contains {len(names)} names, the model has {model.num_classes} classes')
    try:
        return model.to(args.device or ('cuda' if torch.cuda.is_available() else 'cpu')), names
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f'--device {args.device}: {first_line(error)}') from None


def grad_cam(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and the Grad-CAM of each image's top prediction (Selvaraju et al., arXiv 1610.02391).

    Args:
        model: a CMT in eval mode.
        images: (B, 3, H, W), normalized.

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


def predict(
        model: nn.Module, names: list[str], images: list[tuple[str, str | bytes]], k: int, batch_size: int,
        on_sheet: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the predictions of all readable images, and the first `on_sheet` entries for reports.draw_sheet."""
    config, device = resolve_model_data_config(model), next(model.parameters()).device
    results, entries = [], []
    for i in range(0, len(images), batch_size):
        batch = list(read_images(images[i:i + batch_size], model.img_size[0], config['crop_pct']))
        if not batch:
            continue
        inputs = torch.stack([pixels for _, pixels in batch]).to(device).float().div_(255)
        inputs = normalize(inputs, config['mean'], config['std'])
        if len(entries) < on_sheet:
            logits, cams = grad_cam(model, inputs)
        else:
            with torch.no_grad():
                logits, cams = model(inputs), []
        top = logits.double().softmax(dim=-1).topk(min(k, len(names)))
        predictions = [[{'index': index, 'class': names[index], 'probability': p} for p, index in zip(*row)]
                       for row in zip(top.values.tolist(), top.indices.tolist())]
        results += [{'image': name, 'predictions': ranked} for (name, _), ranked in zip(batch, predictions)]
        entries += [{'name': name, 'image': to_pil_image(pixels), 'cam': cam.cpu().numpy(), 'predictions': ranked}
                    for (name, pixels), cam, ranked in zip(batch, cams, predictions)]
    return results, entries[:on_sheet]


def write_sheet(path: Path, entries: list[dict[str, Any]], model: str, count: int) -> None:
    """Write the sheet of `entries`, the first of `count` images, with the file names' common folder left out."""
    title = f'{model}: {count} image{"s"[:count > 1]}' + (f', the first {len(entries)}' if len(entries) < count else '')
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(entry['name'])) for entry in entries])
    for entry in entries:
        entry['name'] = printable(os.path.relpath(entry['name'], folder))
        entry['predictions'] = [{**top, 'class': printable(top['class'])} for top in entry['predictions'][:5]]
    save(draw_sheet(entries, title), path)


def print_table(rows: list[tuple[str, int, int, str, float]]) -> None:  # image, rank, index, class, probability
    lines = [('image', 'class', 'probability')]
    for image, rank, _, name, probability in rows:
        lines.append((printable(image) if rank == 1 else '', printable(name), f'{probability:.2%}'))
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, tuple('-' * width for width in widths))
    for image, name, probability in lines:
        print(f'{image:{widths[0]}}  {name:{widths[1]}}  {probability:>{widths[2]}}')


def print_csv(rows: list[tuple[str, int, int, str, float]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator='\n')
    writer.writerow(['image', 'rank', 'index', 'class', 'probability'])
    writer.writerows((*row, f'{probability:.6g}') for *row, probability in rows)


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors='backslashreplace')  # no encoding has every file name
    logging.basicConfig(format='%(message)s')  # warnings, to standard error
    logging.getLogger('sources').setLevel(logging.INFO)  # which files of a folder are left out
    with parser.usage_errors():
        if args.picture:
            check_extension(args.picture)
        images = find_images(args.images)
        model, names = load(args)

    results, entries = predict(model, names, images, args.top, args.batch_size, MAX_ON_SHEET if args.picture else 0)
    if entries:
        write_sheet(args.picture, entries, args.model, len(results))
    rows = [(result['image'], rank, *prediction.values())
            for result in results for rank, prediction in enumerate(result['predictions'], 1)]
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    elif args.csv:
        print_csv(rows)
    elif results:
        print_table(rows)
    if len(results) < len(images):
        sys.exit(1)


if __name__ == '__main__':
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
