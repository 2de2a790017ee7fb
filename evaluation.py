"""Evaluate a model on a data set or on single images: match classes, compute scores, write reports, draw Grad-CAM."""
import argparse
import contextlib
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import ImageNetInfo, RealLabelsImagenet, resolve_model_data_config
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import normalize, to_pil_image

import processes
import reports
from engine import Preprocessor, evaluate
from errors import TrainingFault, UsageError, first_line, one_line, printable
from samplers import eval_indices
from sources import EXTENSIONS, HEIF, IGNORED, is_image, log_left_out, open_image, walk
from system import write_file
from transforms import build_transform
from utils import Progress
from weights import build_model, read_weights

logger = logging.getLogger(__name__)

IMAGENET = ImageNetInfo('imagenet-1k').label_names()  # WordNet ids, in the order of a model's outputs
MAX_MISTAKES = 24  # images on the sheet of mistakes


# Classes

def order_classes(dataset: Dataset, num_classes: int) -> str:
    """Map a data set's classes to the outputs of a model without class names; return a log line about the mapping."""
    names = dataset.classes
    by_index = {int(name): name for name in names} if all(map(str.isdecimal, names)) else {}
    if by_index and len(by_index) == len(names) and max(by_index) < num_classes:
        order, line = [by_index.get(i, str(i)) for i in range(num_classes)], 'using the folder names as indices'
    elif num_classes == 1000 and set(names) <= set(IMAGENET):
        order, line = IMAGENET, 'using the order of ImageNet-1k'
    elif len(names) == num_classes:
        order, line = names, 'using the order of the data, which is alphabetical for folders'
    else:
        raise UsageError(f'the weights have {num_classes} unnamed classes, but the data has {len(names)} '
                         f'({", ".join(names[:3])}, ...): list all {num_classes} in order in --class-map')
    lookup = np.array([order.index(name) for name in names])
    dataset.samples.targets, dataset.classes = lookup[dataset.samples.targets], list(order)
    return f'the weights have no class names: {line}; set another order with --class-map'


def valid_classes(dataset: Dataset, labels: str | None) -> list[int]:
    """Return the indices of the classes among which images are scored, as selected by --valid-labels."""
    count, used = len(dataset.classes), set(np.asarray(getattr(dataset, 'targets', ())).tolist())
    if labels is None and list(dataset.classes) == IMAGENET:
        return sorted(used)
    if labels in (None, 'all'):
        return list(range(count))
    try:
        indices = set(map(int, Path(labels).read_text('utf-8').split()))
    except ValueError:
        indices = set()
    if not indices or not indices <= set(range(count)):
        raise UsageError(f'--valid-labels {labels} must list class indices from 0 to {count - 1}')
    if not used <= indices:
        raise UsageError(f'--valid-labels {labels} lacks {len(used - indices)} classes of the data')
    return sorted(indices)


def real_labels(dataset: Dataset, indices: Iterable[int], file: str) -> RealLabelsImagenet:
    """Build timm's ReaL evaluation (arXiv 2006.07159) for the images at `indices`; file '' means timm's copy."""
    try:
        real = RealLabelsImagenet(range(50_000), file or None)  # timm checks that there are 50,000.
    except (ValueError, AssertionError, TypeError):
        raise UsageError(f'--real-labels {file} is not a real.json with labels of 50,000 images') from None
    real.filenames = [Path(dataset.samples[i][0]).name for i in indices] if hasattr(dataset, 'samples') else ['']
    if not real.real_labels.keys() >= set(real.filenames) or list(dataset.classes) != IMAGENET:
        raise UsageError('--real-labels needs the images ILSVRC2012_val_*.JPEG in folders of WordNet ids')
    return real


def class_words(names: list[str]) -> list[str]:
    """Return readable class names: words for WordNet ids, other names unchanged."""
    words = ImageNetInfo('imagenet-22k-ms').label_descriptions(as_dict=True)
    return [words.get(name, name) for name in names]


# Single images

def list_images(folder: str) -> list[str]:
    """List the images in a folder at any depth, and log what is left out; raise UsageError if there are none."""
    files = [Path(where, name) for where, names in walk(folder, set()) for name in names if not IGNORED.search(name)]
    images = sorted(str(file) for file in files if is_image(file.name))
    log_left_out((file.name for file in files if not is_image(file.name)), folder)
    if not images:
        raise UsageError(f'no images in {folder}')
    return images


def read_names(file: str) -> list[str]:
    """Read class names in index order, one per line."""
    try:
        return [line.strip() for line in Path(file).read_text('utf-8-sig').splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f'--class-names {file}: {error}') from None


def load_classifier(args: argparse.Namespace) -> tuple[nn.Module, list[str], dict[str, int]]:
    """Load the model that the flags of options.add_classifier_flags describe; raise UsageError if that fails.

    Return the model in eval mode on its device, readable class names, and a map from folder names to class indices.
    """
    weights = read_weights(args.model, use_ema=args.model_ema)
    model = build_model(weights, **({'img_size': args.input_size} if args.input_size else {}))
    if weights.is_ema:
        logger.warning('; '.join(["using the EMA (use --no-model-ema for the model's own weights)", *weights.notes]))
    if args.crop_pct:
        model.pretrained_cfg['crop_pct'] = args.crop_pct
    if model.img_size[0] != model.img_size[1] or not model.num_classes:
        raise UsageError(f'{args.model} has no classifier or a non-square input {model.img_size}: set --input-size')
    saved, indices = weights.class_names(model), [str(i) for i in range(model.num_classes)]
    folders = saved or (IMAGENET if model.num_classes == 1000 else [f'class {i}' for i in indices])
    names = read_names(args.class_names) if args.class_names else class_words(folders)
    if len(names) != model.num_classes:
        raise UsageError(f'{args.class_names} has {len(names)} names, but the model has {model.num_classes} classes')
    try:
        model.to(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f'--device {args.device}: {first_line(error)}') from None
    return model, names, {name: i for n in (names, folders, () if saved else indices) for i, name in enumerate(n)}


def read_images(
        images: list[tuple[str, str | bytes, int]], model: nn.Module, report: Callable[[str], Any]
) -> tuple[list, torch.Tensor, torch.Tensor]:
    """Read (name, path or encoded image, label) entries for `model`; call `report` with a line for unreadable ones.

    Returns:
        The entries of `images` that were read, their uint8 pixels (B, 3, size, size), and the normalized pixels.
    """
    config, read, pixels = resolve_model_data_config(model), [], [torch.empty(0, 3, *model.img_size, dtype=torch.uint8)]
    transform = build_transform(False, model.img_size[0], crop_pct=config['crop_pct'])
    for name, content, label in images:
        try:
            image = open_image(content if isinstance(content, bytes) else Path(content).read_bytes())
            if max(image.size) > 200 * min(image.size):  # Resizing the short side would take gigabytes.
                raise ValueError('one side is more than 200 times the other')
        except Exception as error:  # Pillow can raise exceptions of any type on damaged files.
            reason = getattr(error, 'strerror', None) or one_line(error)
            if name.lower().endswith(HEIF) and not name.lower().endswith(EXTENSIONS):
                reason += '; pip install pillow-heif to read HEIC files'
            report(f'cannot read {printable(name)} ({reason})')
        else:
            read.append((name, content, label))
            pixels.append(transform(image)[None])
    pixels = torch.cat(pixels)
    inputs = pixels.to(next(model.parameters()).device).float().div_(255)
    return read, pixels, normalize(inputs, config['mean'], config['std'])


# Scores

def score(
        model: nn.Module, loader: DataLoader, device: torch.device, autocast: Callable,
        is_stopped: Callable[[], Any] = lambda: False) -> tuple[dict[str, float], list[np.ndarray]]:
    """Evaluate `model` on all ranks, each with its share of the data, with a progress bar on rank 0.

    Returns:
        The scores of engine.evaluate, and the targets, classes and probabilities of all images for reports.Predictions,
        or [] if `is_stopped` became true on a rank before its last batch.
    """
    batches: list[tuple] = []
    shown = itertools.takewhile(lambda batch: not is_stopped(), loader)
    with contextlib.closing(Progress('test', len(loader), enabled=processes.get_rank() == 0)) as progress:
        scores = evaluate(model, shown, Preprocessor(device), autocast, progress, batches)
    shares = processes.gather_from_ranks([torch.cat(column).tolist() for column in zip(*batches)])
    indices = [eval_indices(len(loader.dataset), loader.batch_size, rank, len(shares)) for rank in range(len(shares))]
    order = np.argsort(np.concatenate(indices))
    if sum(len(share[0]) for share in shares if share) < len(order):
        return scores, []
    return scores, [np.concatenate(column)[order] for column in zip(*filter(None, shares))]  # Ranks may have no images.


def score_checkpoint(
        args: argparse.Namespace, model: nn.Module, loader: DataLoader, device: torch.device, autocast: Callable
) -> None:
    """Evaluate a model for --eval, with --valid-labels, --real-labels and --report."""
    data, real = loader.dataset.dataset, None
    with processes.usage_errors():
        valid = valid_classes(data, 'all' if args.real_labels is not None else args.valid_labels)
        if args.real_labels is not None:
            real = real_labels(data, loader.sampler, args.real_labels)
        if args.report and processes.get_rank() == 0:
            Path(args.report).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.report).close()  # Fail before the evaluation, not after it.
    if len(valid) < model.num_classes:
        logger.info('scoring among %d of %d classes%s', len(valid), model.num_classes,
                    '' if args.valid_labels else '; use --valid-labels all to score among all')
        others = torch.ones(model.num_classes, dtype=torch.bool, device=device)
        others[valid] = False
        model.register_forward_hook(lambda module, images, logits: logits.masked_fill(others, -torch.inf))
    if real is not None:
        model.register_forward_hook(lambda module, images, logits: real.add_result(logits))
    scores, columns = score(model, loader, device, autocast)
    # Log these two lines in DeiT's format, so that scripts that parse its logs keep working.
    logger.info('* Acc@1 %.3f Acc@5 %.3f loss %.3f', scores['acc1'], scores['acc5'], scores['loss'])
    logger.info('Accuracy of the network on the %d test images: %.3f%%', scores['count'], scores['acc1'])
    rotated = sum(processes.gather_from_ranks(sum(getattr(data, 'reading', {}).get('rotated', ()))))
    if rotated:
        logger.info('applied the EXIF orientation of %d images; use --ignore-exif to match published ImageNet scores',
                    rotated)
    if real is not None:
        hits = [sum(processes.gather_from_ranks(real.is_correct[k]), []) for k in (1, 5)]
        logger.info('* ReaL Acc@1 %.3f Acc@5 %.3f on the %d images with labels',
                    *(100 * sum(hit) / max(len(hit), 1) for hit in hits), len(hits[0]))
    with processes.usage_errors(TrainingFault):  # such as a full disk
        if args.report and processes.get_rank() == 0:
            write_report(Path(args.report), data, columns, valid, model, device)


def write_report(folder: Path, dataset: Dataset, columns: list[np.ndarray], valid: list[int], model: nn.Module,
                 device: torch.device) -> None:
    """Write predictions.csv, per_class.csv, confusion.png and mistakes.jpg into `folder`, and log a summary.

    `dataset` yields uint8 images (3, H, W). `columns` is what score() returned for `model` on `dataset`. `valid` lists
    the scored classes.
    """
    from sklearn.metrics import confusion_matrix  # Importing it at the top would delay every start by a second.
    samples, names = getattr(dataset, 'samples', None), list(map(str, dataset.classes))
    paths = [samples[i][0] if samples else f'image {i}' for i in range(len(dataset))]
    predictions = reports.Predictions(paths, names, class_words(names), *columns)
    matrix = confusion_matrix(predictions.targets, predictions.classes[:, 0], labels=valid)
    words = [predictions.words[i] for i in valid]
    for line in reports.summarize(matrix, words):
        logger.info(line)
    rows = reports.per_class(predictions, valid, matrix)
    for name, table in (('predictions.csv', predictions.rows()), ('per_class.csv', rows)):
        write_file(folder / name, reports.to_csv(table).encode('utf-8', 'surrogateescape'))
    reports.save(reports.draw_confusion(matrix, words), folder / 'confusion.png')
    mistakes = predictions.mistakes()
    (folder / 'mistakes.jpg').unlink(missing_ok=True)
    if len(mistakes):
        shown = mistakes[:MAX_MISTAKES]
        pixels = torch.stack([dataset[i][0] for i in shown.tolist()])
        top = torch.from_numpy(predictions.classes[shown, 0]).to(device)
        cams = grad_cam(model, Preprocessor(device).normalize(pixels.to(device)), top)
        entries = [{'name': predictions.paths[i], 'image': to_pil_image(image), 'cam': cam.cpu().numpy(),
                    'truth': {'index': predictions.targets[i], 'class': predictions.words[predictions.targets[i]]},
                    'predictions': [
                        {'index': index, 'class': predictions.words[index], 'probability': probability}
                        for index, probability in zip(predictions.classes[i], predictions.probabilities[i])]}
                   for i, image, cam in zip(shown, pixels, cams)]
        title = f'{len(mistakes)} of {len(dataset)} images misclassified: the {len(shown)} most confident'
        reports.save(reports.draw_sheet(entries, title), folder / 'mistakes.jpg')
    logger.info('report in %s: predictions.csv, per_class.csv, confusion.png%s', folder,
                ', mistakes.jpg' if len(mistakes) else '')


def grad_cam(model: nn.Module, images: torch.Tensor, classes: torch.Tensor | None = None) -> torch.Tensor:
    """Return the Grad-CAM of one class for each image (Selvaraju et al., arXiv 1610.02391).

    Args:
        model: a CMT in eval mode.
        images: (B, 3, H, W), normalized.
        classes: indices (B,); None for the top predictions.

    Returns:
        Maps (B, H, W) in [0, 1]: the ReLU of the sum of a stage's channels, each weighted by the mean gradient of the
        class's logit. The stage is the last one with at least 4 x 4 positions: the fourth from 128 px on, but the
        second at 32 px, where the fourth has one position.
    """
    depth = max(n for n in (2, 3, 4) if min(images.shape[2:]) >= 4 * 2 ** (n + 1))
    with torch.enable_grad():
        maps = model.stages[:depth](model.stem(images))  # (B, C, H / 2^(depth + 1), W / 2^(depth + 1))
        maps = maps.detach().requires_grad_()
        logits = model.forward_head(model.head_proj(model.stages[depth:](maps)))
        classes = logits.argmax(dim=-1) if classes is None else classes
        gradient, = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), maps)
    cam = (gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True).relu()
    cam = F.interpolate(cam.detach(), size=images.shape[2:], mode='bilinear', align_corners=False)[:, 0]
    return cam / cam.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
