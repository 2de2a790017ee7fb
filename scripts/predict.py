"""python scripts/predict.py output/digits/checkpoint_best.pth photos/ --picture sheet.png

Print the most probable classes of images, as a table, JSON or CSV. IMAGE is a file, a folder (searched at any depth) or
-, an image on standard input:

    find photos -newer last -type f -print0 | xargs -0 python scripts/predict.py cmt_s --csv
    curl -s https://example.org/cat.jpg | python scripts/predict.py cmt_s -

--picture draws a sheet: each image as the model sees it, the Grad-CAM of its top prediction, and the predictions. For a
folder of class folders, the number of correct predictions is printed, and the sheet begins with the mistakes. An image
that cannot be read is reported and left out (exit status 1).
"""
import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import _path
from errors import printable
from options import Parser, add_classifier_flags, output_file, positive

MAX_ON_SHEET = 120  # images


@_path.parse_first
def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split('\n', 2)[2], formatter_class=argparse.RawDescriptionHelpFormatter)
    add_classifier_flags(parser)
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='file, folder or -')
    parser.add_argument('--top', type=positive, default=5, metavar='K',
                        help='predictions for each image (default: %(default)s)')
    output = parser.add_mutually_exclusive_group()
    output.add_argument('--json', action='store_true', help='print JSON')
    output.add_argument('--csv', action='store_true', help='print CSV')
    parser.add_argument('--picture', type=output_file, metavar='OUT.png',
                        help=f'draw a sheet of the first {MAX_ON_SHEET} images')
    parser.add_argument('--features', type=output_file, metavar='OUT.npz',
                        help="write the images' names, labels (-1 if unknown) and features before the classifier")
    parser.add_argument('--batch-size', type=positive, default=32, metavar='N', help='default: %(default)s')
    return parser


import numpy as np
import torch
import torch.nn as nn
from torchvision.transforms.functional import to_pil_image

from evaluation import grad_cam, list_images, load_classifier, read_images
from reports import check_extension, draw_sheet, save, to_csv
from system import atomic_write


def find_images(arguments: list[str]) -> list[tuple[str, str | bytes, tuple[str, ...]]]:
    """Find the images that `arguments` name: (name, path or encoded image, folders below the argument)."""
    images = []
    for argument in arguments:
        if argument == '-':
            images.append(('-', sys.stdin.buffer.read(), ()))
        elif os.path.isdir(argument):
            images += [(path, path, Path(path).relative_to(argument).parts[:-1]) for path in list_images(argument)]
        else:
            images.append((argument, argument, ()))
    return images


def predict(
        model: nn.Module, names: list[str], images: list[tuple[str, str | bytes, int]], k: int, batch_size: int
) -> tuple[list[dict[str, Any]], list[tuple[str, str | bytes, int]], np.ndarray]:
    """Return the top k predictions for the readable images, their entries of `images`, and features (N, channels)."""
    results, read, features = [], [], []
    handle = model.head.register_forward_pre_hook(lambda head, inputs: features.append(inputs[0].float().cpu().numpy()))
    for i in range(0, len(images), batch_size):
        batch, _, inputs = read_images(images[i:i + batch_size], model, print_error)
        if not batch:
            continue
        with torch.no_grad():
            top = model(inputs).cpu().double().softmax(dim=-1).topk(min(k, len(names)))
        read += batch
        for (name, _, label), *row in zip(batch, top.values.tolist(), top.indices.tolist()):
            predictions = [{'index': index, 'class': names[index], 'probability': p} for p, index in zip(*row)]
            truth = {'label': {'index': label, 'class': names[label]}} if label >= 0 else {}
            results.append({'image': name, **truth, 'predictions': predictions})
    handle.remove()
    return results, read, np.concatenate(features) if features else np.zeros((0, model.num_features))


def print_error(line: str) -> None:
    print(line, file=sys.stderr)


def is_correct(result: dict[str, Any]) -> bool:
    return result['label']['index'] == result['predictions'][0]['index']


def write_sheet(
        path: Path, model: nn.Module, title: str, results: list[dict[str, Any]], images: list, batch_size: int) -> None:
    """Write a sheet of the first images. Mistakes come first, the most confident ones at the top."""
    def rank(i: int) -> float:
        is_mistake = 'label' in results[i] and not is_correct(results[i])
        return -results[i]['predictions'][0]['probability'] if is_mistake else 0

    order = sorted(range(len(images)), key=rank)[:MAX_ON_SHEET]
    entries = []
    for i in range(0, len(order), batch_size):
        _, pixels, inputs = read_images([images[j] for j in order[i:i + batch_size]], model, print_error)
        cams = grad_cam(model, inputs)
        entries += [{**results[j], 'name': results[j]['image'], 'truth': results[j].get('label'),
                     'image': to_pil_image(image), 'cam': cam.cpu().numpy()}
                    for j, image, cam in zip(order[i:i + batch_size], pixels, cams)]
    save(draw_sheet(entries, title + f', the first {len(order)}' * (len(order) < len(images))), path)


def print_table(rows: list[tuple[str, int, int, str, float]]) -> None:  # image, rank, index, class, probability
    lines = [('image', 'class', 'probability')]
    for image, rank, _, name, probability in rows:
        lines.append((printable(image) if rank == 1 else '', printable(name), f'{probability:.2%}'))
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, tuple('-' * width for width in widths))
    for image, name, probability in lines:
        print(f'{image:{widths[0]}}  {name:{widths[1]}}  {probability:>{widths[2]}}')


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    # Write JSON and CSV as UTF-8, even to a pipe. File names may contain invalid UTF-8.
    sys.stdout.reconfigure(encoding='utf-8' if args.json or args.csv else None, errors='backslashreplace')
    logging.basicConfig(format='%(message)s')  # Print warnings to stderr.
    logging.getLogger('sources').setLevel(logging.INFO)  # Log which files are left out.
    with parser.usage_errors():
        if args.picture:
            check_extension(args.picture)
        images = find_images(args.images)
        model, names, index = load_classifier(args)

    images = [(name, content, next((index[folder] for folder in folders if folder in index), -1))
              for name, content, folders in images]
    results, read, features = predict(model, names, images, args.top, args.batch_size)
    labeled, title = [result for result in results if 'label' in result], f'{args.model}: {len(results)} images'
    if labeled:
        correct = sum(map(is_correct, labeled))
        print(f'{correct} of {len(labeled)} images in class folders are correct ({correct / len(labeled):.1%})',
              file=sys.stderr)
        title += f', {correct} of {len(labeled)} correct, mistakes first'
    rows = [(result['image'], rank, *prediction.values())
            for result in results for rank, prediction in enumerate(result['predictions'], 1)]
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    elif args.csv and rows:
        print(to_csv([dict(zip(('image', 'rank', 'index', 'class', 'probability'), (*row, f'{probability:.6g}')))
                      for *row, probability in rows]), end='')
    elif results:
        print_table(rows)
    try:
        if args.features:
            with atomic_write(args.features) as file:
                np.savez(file, names=[name for name, *_ in read], features=features,
                         labels=[label for *_, label in read])
        if args.picture and results:
            write_sheet(args.picture, model, title, results, read, args.batch_size)
    except OSError as error:  # The disk may be full.
        sys.exit(f'predict.py: error: {error}')
    if len(results) < len(images):
        sys.exit(1)


if __name__ == '__main__':
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # The reader, such as `| head`, has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
