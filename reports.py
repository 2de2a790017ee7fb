"""Draw training curves, sheets of images and confusion matrices, and make tables of predictions.

Nothing here imports torch, and no display is needed.
"""
import bisect
import csv
import io
import itertools
import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator
from PIL import Image

from errors import UsageError, printable
from system import write_file

# Class and file names may have characters that the font lacks. The figure shows boxes instead, so omit the warning.
warnings.filterwarnings('ignore', 'Glyph .* missing')

# title, [(key in log.txt, label, line style)]
PANELS = [
    ('Loss', [('train_loss', 'train', ':'), ('test_loss', 'test', '-'), ('ema_test_loss', 'test, EMA', '--')]),
    ('Top-1 accuracy (%)', [('test_acc1', 'test', '-'), ('ema_test_acc1', 'test, EMA', '--')]),
    ('Learning rate', [('train_lr', 'learning rate', '-')]),
    ('Training images per second', [('train_images_per_s', 'images per second', '-')]),
]
DETECTION = ('Average precision (%)', [  # replaces accuracy for logs of detection.py
    ('box_ap', 'box', '-'), ('box_ap50', 'box, IoU 0.5', '--'), ('mask_ap', 'mask', '-.'),
    ('mask_ap50', 'mask, IoU 0.5', ':')])
BEST = [('test_acc1', 'best'), ('ema_test_acc1', 'EMA'), ('box_ap', 'box AP'), ('mask_ap', 'mask AP')]
MAX_MARKERS = 40  # More markers would hide the line.
MAX_MATRIX = 50  # classes; a larger confusion matrix is unreadable

SIDE = 224  # an image on a sheet; all sizes here are in pixels
PAD, GAP = 14, 20  # inside and between cards
HEADER, ROW = 58, 27  # heights: title and legend, one prediction
INK, GREY, GREEN, RED = '#202124', '#70757a', '#188038', '#c5221f'


# Files

def check_extension(path: Path) -> None:
    """Raise UsageError if a figure cannot be saved in the format of the path's extension."""
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise UsageError(f'{path}: the name must end in one of .{", .".join(sorted(known))}')


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of its extension. A viewer never sees a half-written file."""
    extension = path.suffix[1:].lower()
    # Level 4 takes half the time of the default, 6, for files 2 % larger.
    options = {'pil_kwargs': {'compress_level': 4}} if extension == 'png' else {}
    figure.savefig(content := io.BytesIO(), format=extension, dpi='figure', **options)
    write_file(path, content.getvalue())  # If Pillow wrote a JPEG itself, it would ignore a full disk.


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the records of a log.txt in order of epoch.

    A resumed run may have logged an epoch twice; the later record counts. An incomplete last line, which a run may be
    writing, is ignored. Raise UsageError if any other line is not a record.
    """
    records = {}
    for n, line in enumerate(path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
            records[int(record['epoch'])] = record
        except (ValueError, TypeError, KeyError, RecursionError):
            if line.startswith('{') and not line.endswith('\n'):  # The last line was cut off while it was written.
                break
            raise UsageError(f'{path}, line {n} is not a JSON object with the key "epoch"') from None
    return [records[epoch] for epoch in sorted(records)]


# Curves

def draw_curves(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw loss, accuracy (or average precision), learning rate and images per second by epoch.

    `runs` maps names to records from read_log. Colors distinguish runs; line styles distinguish metrics.
    """
    labels = [printable(name) + _best(records) for name, records in runs.items()]
    columns = max(1, min(len(runs), 110 // max(map(len, labels))))  # about 120 characters fit across the figure
    figure = Figure(figsize=(11, 7.3 + 0.2 * math.ceil(len(runs) / columns)), dpi=120, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    detects = any('box_ap' in record for records in runs.values() for record in records)
    panels = [PANELS[0], DETECTION if detects else PANELS[1], *PANELS[2:]]
    for axes, (title, series) in zip(figure.subplots(2, 2).flat, panels):
        styles = {}
        for i, records in enumerate(runs.values()):
            for key, label, style in series:
                epochs, values = _points(records, key)
                if epochs:
                    axes.plot(epochs, values, style, color=f'C{i}', linewidth=1.6, markersize=4,
                              marker='o' if len(epochs) <= MAX_MARKERS else None)
                    styles[label] = style
        axes.set(title=title, xlabel='epoch')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis='y', scilimits=(-2, 5))
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
        if not styles:
            axes.text(0.5, 0.5, 'not in the log', transform=axes.transAxes, ha='center', color='gray')
        elif '%' not in title and axes.dataLim.ymax > 0:
            axes.set_ylim(0, 1.05 * axes.dataLim.ymax)  # from 0, so that a small variation looks small
        if len(styles) > 1:
            axes.legend([Line2D([], [], color='black', linestyle=style) for style in styles.values()], list(styles))
    figure.legend([Line2D([], [], color=f'C{i}', linewidth=3) for i in range(len(runs))], labels,
                  loc='outside upper center', ncols=columns, frameon=False)
    return figure


def _points(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return epochs and values of `key`, without epochs that lack a finite value."""
    points = {record['epoch']: record[key] for record in records
              if isinstance(record.get(key), (int, float)) and math.isfinite(record[key])}
    return list(points), list(points.values())


def _best(records: list[dict[str, Any]]) -> str:
    scores = [(label, _points(records, key)[1]) for key, label in BEST]
    return ''.join(f', {label} {max(values):.2f} %' for label, values in scores if values)


# Sheets

def draw_sheet(entries: list[dict[str, Any]], title: str) -> Figure:
    """Draw a card for each image: the model's input, its heat map, the file name and the predictions.

    Args:
        entries: dicts of name (path), image (PIL), cam (H, W) in [0, 1], predictions (dicts of index, class and
            probability, of which five are shown), and truth (such a dict, or None).
        title: title of the sheet.
    """
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(entry['name'])) for entry in entries])
    rows_of_text = min(5, max(len(entry['predictions']) for entry in entries)) + any(e['truth'] for e in entries)
    card_w, card_h = 2 * SIDE + 3 * PAD, PAD + SIDE + 34 + ROW * rows_of_text + PAD
    # This number of columns makes the sheet about 3:2.
    columns = min(len(entries), max(1, round(math.sqrt(1.5 * len(entries) * (card_h + GAP) / (card_w + GAP)))))
    width, height = GAP + columns * (card_w + GAP), HEADER + math.ceil(len(entries) / columns) * (card_h + GAP)

    figure = Figure((width / 72, height / 72), dpi=72, facecolor='#f1f3f4')  # At 72 dpi, a point is a pixel.
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    room = width - 2 * GAP
    _write(axes, GAP, 20, title, room, keep_end=True, size=18, weight='bold')
    _write(axes, GAP, 43, 'right: regions behind the top prediction (Grad-CAM, blue to red)', room, size=13, color=GREY)
    boxes = []
    for i, entry in enumerate(entries):
        x, y = GAP + i % columns * (card_w + GAP), HEADER + i // columns * (card_h + GAP)
        boxes.append(_box(x + 0.5, y + 0.5, card_w, card_h, 10, 'white', '#dadce0'))
        image = entry['image'].resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        cam = Image.fromarray(entry['cam'].astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        bottom = height - (y + PAD + SIDE)  # figimage measures from the bottom
        figure.figimage(np.asarray(image), x + PAD, bottom, zorder=2)
        figure.figimage(overlay(image, np.asarray(cam).clip(0, 1)), x + 2 * PAD + SIDE, bottom, zorder=2)
        boxes += _draw_predictions(axes, entry, folder, x + PAD, y + PAD + SIDE, card_w - 2 * PAD)
    axes.add_collection(PatchCollection(boxes, match_original=True))
    return figure


def overlay(image: Image.Image, cam: np.ndarray) -> np.ndarray:
    """Blend the heat map (H, W) over the image in gray; return uint8 (H, W, 3).

    Leave out the ends of matplotlib's turbo colormap, which are too dark to see the image through.
    """
    heat = matplotlib.colormaps['turbo'](0.06 + 0.82 * cam)[..., :3]  # (H, W, 3) in [0, 1]
    strength = 0.25 + 0.25 * cam[..., None]
    gray = np.asarray(image.convert('L'))[..., None]
    return (strength * 255 * heat + (1 - strength) * gray).astype(np.uint8)


def _draw_predictions(axes, entry: dict[str, Any], folder: str, x: int, y: int, width: int) -> list[FancyBboxPatch]:
    """Write file name, truth and predictions at (x, y); return bars that show the probabilities."""
    name = printable(os.path.relpath(entry['name'], folder))
    _write(axes, x, y + 18, name, width, keep_end=True, size=13, color=GREY)
    bars, truth = [], entry['truth']
    if truth:
        is_right = truth['index'] == entry['predictions'][0]['index']
        _write(axes, x, y + 34 + ROW / 2, f"truth: {printable(truth['class'])}", width,
               size=16, color=GREEN if is_right else RED)
    for rank, prediction in enumerate(entry['predictions'][:5]):
        middle = y + 34 + ROW * (rank + 0.5 + bool(truth))
        weight = 'normal' if rank else 'bold'
        _write(axes, x, middle, printable(prediction['class']), width - 178, size=16, weight=weight)
        _write(axes, x + width, middle, f"{prediction['probability']:.1%}", 70, size=16, weight=weight, ha='right')
        left, filled = x + width - 166, 90 * prediction['probability']
        bars.append(_box(left, middle - 5, 90, 10, 5, '#eceff1'))
        bars.append(_box(left, middle - 5, filled, 10, min(5, filled / 2), '#c9d3e0' if rank else '#3b6fb6'))
    return bars


def _box(x: float, y: float, width: float, height: float, radius: float, face: str, edge: str = 'none'):
    return FancyBboxPatch((x, y), width, height, f'round,pad=0,rounding_size={radius}', facecolor=face, edgecolor=edge)


def _write(axes, x: float, y: float, text: str, room: float, keep_end: bool = False, color: str = INK,
           ha: str = 'left', **font) -> None:
    """Write a line of text, vertically centered at y. Shorten it to `room` pixels with an ellipsis."""
    def shortened(n: int) -> str:
        return '…' + text[len(text) - n:] if keep_end else text[:n].rstrip(' ,') + '…'

    if _text_width(text, **font) > room:
        n = bisect.bisect(range(len(text)), room, key=lambda n: _text_width(shortened(n), **font))
        text = shortened(max(n - 1, 0))
    axes.text(x, y + 1, text, color=color, ha=ha, va='center', parse_math=False, **font)


def _text_width(text: str, **font) -> float:
    return text_to_path.get_text_width_height_descent(text, FontProperties(**font), False)[0]


# Predictions for a data set

@dataclass
class Predictions:
    """Hold the top predictions for all images of a data set, in its order."""
    paths: list[str]  # file of each image
    names: list[str]  # class names
    words: list[str]  # readable class names
    targets: np.ndarray  # class index of each image (N,)
    classes: np.ndarray  # indices of the k <= 5 most probable classes (N, k), the most probable first
    probabilities: np.ndarray  # probabilities of these classes (N, k)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of predictions.csv."""
        rows = []
        for path, target, classes, probabilities in zip(
                self.paths, self.targets.tolist(), self.classes.tolist(), self.probabilities.tolist()):
            row = {'path': path, 'label': self.names[target], 'prediction': self.names[classes[0]]}
            for rank, (index, probability) in enumerate(zip(classes, probabilities), 1):
                row |= {f'class_{rank}': self.names[index], f'probability_{rank}': f'{probability:.4f}'}
            rows.append(row)
        return rows

    def mistakes(self) -> np.ndarray:
        """Return the indices of the misclassified images, the most confident mistake first."""
        wrong = np.flatnonzero(self.classes[:, 0] != self.targets)
        return wrong[np.argsort(-self.probabilities[wrong, 0].round(4), kind='stable')]


def to_csv(rows: list[dict[str, Any]]) -> str:
    """Return rows with the same keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def per_class(predictions: Predictions, valid: list[int], matrix: np.ndarray) -> list[dict[str, Any]]:
    """Return the rows of per_class.csv, one for each class in `valid`; `matrix` is their confusion matrix.

    Precision, recall and F1 are scikit-learn's, 0 where they are not defined. The accuracy of a class is its recall.
    """
    from sklearn.metrics import precision_recall_fscore_support
    columns = precision_recall_fscore_support(
        predictions.targets, predictions.classes[:, 0], labels=valid, zero_division=0)
    wrong = matrix - np.diag(matrix.diagonal())
    rows = []
    for i, precision, recall, f1, images in zip(range(len(valid)), *columns):
        other = wrong[i].argmax()
        rows.append({
            'class': predictions.names[valid[i]], 'images': int(images), 'accuracy': f'{recall:.4f}',
            'precision': f'{precision:.4f}', 'recall': f'{recall:.4f}', 'f1': f'{f1:.4f}',
            'confused_with': predictions.names[valid[other]] if wrong[i, other] else '',
            'confusions': int(wrong[i, other])})
    return rows


def summarize(matrix: np.ndarray, words: list[str]) -> list[str]:
    """Return log lines: the mean per-class accuracy, the weakest classes and the most frequent confusion."""
    images, words = matrix.sum(axis=1), list(map(printable, words))
    present = np.flatnonzero(images)
    accuracy = matrix.diagonal()[present] / images[present]
    weakest = [f'{words[present[i]]} ({accuracy[i]:.1%} of {images[present[i]]})'
               for i in np.argsort(accuracy, kind='stable')[:5] if accuracy[i] < 1]
    lines = [f'mean per-class accuracy {accuracy.mean():.3%}' + f'; weakest: {", ".join(weakest)}' * bool(weakest)]
    for true, predicted, count in _confusions(matrix)[:1]:
        lines.append(f'most frequent confusion: {words[true]} predicted as {words[predicted]}, '
                     f'{count} of {images[true]} images')
    return lines


def _confusions(matrix: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (class, predicted class, images) of all confusions, the most frequent first."""
    true, predicted = np.nonzero(matrix - np.diag(matrix.diagonal()))
    counts = matrix[true, predicted]
    order = np.argsort(-counts, kind='stable')
    return list(zip(true[order].tolist(), predicted[order].tolist(), counts[order].tolist()))


def draw_confusion(matrix: np.ndarray, words: list[str]) -> Figure:
    """Draw a confusion matrix (rows: true classes); above 50 classes a table of the 30 most frequent confusions."""
    words = [_short(printable(word)) for word in words]
    if len(words) > MAX_MATRIX:
        images = matrix.sum(axis=1)
        lines = [f'{words[true]:32}  {words[predicted]:32}  {count:6}  {count / images[true]:12.1%}'
                 for true, predicted, count in _confusions(matrix)[:30]]
        head = f'{"class":32}  {"predicted as":32}  {"images":>6}  {"of the class":>12}'
        figure = Figure((8.2, 0.6 + 0.18 * len(lines)), dpi=120)
        figure.text(0.03, 0.97, '\n'.join([head, '-' * len(head), *lines]), va='top', family='monospace',
                    parse_math=False, size=10)
        return figure
    from sklearn.metrics import ConfusionMatrixDisplay
    side = 3 + 0.3 * len(words) + 0.08 * max(map(len, words))
    figure = Figure((side, side), dpi=120, layout='constrained')
    axes = figure.add_subplot()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    display = ConfusionMatrixDisplay(share).plot(ax=axes, cmap='Blues', colorbar=False, im_kw={'vmin': 0, 'vmax': 1})
    for text, count in zip(display.text_.flat, matrix.flat):
        text.set(text=str(count) if count else '', fontsize=8)
    figure.suptitle('Images (color: share of the true class)')
    axes.set(xlabel='prediction', ylabel='true class')
    axes.set_xticks(range(len(words)), words, rotation=90, parse_math=False)
    axes.set_yticks(range(len(words)), words, parse_math=False)
    return figure


def _short(text: str, length: int = 32) -> str:
    return text if len(text) <= length else text[:length - 1] + '…'


def draw_batch(images: np.ndarray, titles: list[str]) -> Figure:
    """Draw uint8 images (B, H, W, 3) in a grid, each below its title."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    figure = Figure((2.2 * columns, 2.4 * rows), dpi=100, layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, image, title in itertools.zip_longest(grid, images, titles):
        axes.set_axis_off()
        if image is not None:
            axes.imshow(image)
            axes.set_title(_short(printable(title)), fontsize=8, parse_math=False)
    return figure
