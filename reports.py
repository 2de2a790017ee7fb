"""Draw what a person looks at: the curves of runs, and sheets of images with their predictions.

Nothing here imports torch, and no display is needed.
"""
import bisect
import json
import math
import os
import secrets
import warnings
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

from errors import UsageError

# Class names and file names may have characters that the font lacks; the figure shows boxes for them.
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
MAX_MARKERS = 40  # more markers hide the line

SIDE = 224  # an image on a sheet; this and all below in pixels
PAD, GAP = 14, 20  # inside and between cards
HEADER, ROW = 58, 27  # heights: title and legend, one prediction
INK, GREY = '#202124', '#70757a'


# Files

def check_extension(path: Path) -> None:
    """Raise UsageError if a figure cannot be saved in the format of the path's extension."""
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise UsageError(f'{path}: the name must end in one of .{", .".join(sorted(known))}')


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of its extension. A viewer of an earlier file never opens half of the new one."""
    temporary, extension = path.with_name(f'.cmt-{secrets.token_hex(8)}.tmp'), path.suffix[1:].lower()
    # Level 4 takes half the time of the default, 6, for files 2 % larger.
    options = {'pil_kwargs': {'compress_level': 4}} if extension == 'png' else {}
    try:
        with open(temporary, 'xb') as file:  # 'x' does not follow links.
            figure.savefig(file, format=extension, dpi='figure', **options)
        os.replace(temporary, path)
    except OSError as error:  # matplotlib names no file on a full disk.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the records of a log.txt in order of epoch.

    A resumed run may have logged an epoch twice: the later record counts. A last line that is still being written is
    left out.

    Raises:
        UsageError: another line is not a record.
    """
    records = {}
    for n, line in enumerate(path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if line.startswith('{') and not line.endswith('\n'):  # only the last line can lack its newline
                break
            raise UsageError(f'{path}, line {n} is not JSON: {error}') from None
        if not isinstance(record, dict) or not isinstance(record.get('epoch'), int):
            raise UsageError(f'{path}, line {n} is not the record of an epoch (a JSON object with the key "epoch")')
        records[record['epoch']] = record
    return [records[epoch] for epoch in sorted(records)]


# Curves

def draw_curves(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw loss, accuracy (or average precision), learning rate and images per second by epoch.

    `runs` maps names to records of read_log. Colors stand for runs, line styles for quantities.
    """
    labels = [name + _best(records) for name, records in runs.items()]
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
        entries: dicts of name, image (PIL), cam (H, W) in [0, 1] and predictions, dicts of class and probability.
        title: of the sheet.
    """
    rows_of_text = max(len(entry['predictions']) for entry in entries)
    card_w, card_h = 2 * SIDE + 3 * PAD, PAD + SIDE + 34 + ROW * rows_of_text + PAD
    # This number of columns makes the sheet about 3:2.
    columns = min(len(entries), max(1, round(math.sqrt(1.5 * len(entries) * (card_h + GAP) / (card_w + GAP)))))
    width, height = GAP + columns * (card_w + GAP), HEADER + math.ceil(len(entries) / columns) * (card_h + GAP)

    figure = Figure((width / 72, height / 72), dpi=72, facecolor='#f1f3f4')  # a point is a pixel
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    room = width - 2 * GAP
    size = max(13, min(22, 22 * room / _text_width(title, size=22, weight='bold')))
    _write(axes, GAP, 20, title, room, keep_end=True, size=size, weight='bold')
    _write(axes, GAP, 43, 'right: what the top prediction rests on (Grad-CAM, blue to red)', room, size=13, color=GREY)
    boxes = []
    for i, entry in enumerate(entries):
        x, y = GAP + i % columns * (card_w + GAP), HEADER + i // columns * (card_h + GAP)
        boxes.append(_box(x + 0.5, y + 0.5, card_w, card_h, 10, 'white', '#dadce0'))
        image = entry['image'].resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        cam = Image.fromarray(entry['cam'].astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        bottom = height - (y + PAD + SIDE)  # figimage measures from the bottom
        figure.figimage(np.asarray(image), x + PAD, bottom, zorder=2)
        figure.figimage(overlay(image, np.asarray(cam).clip(0, 1)), x + 2 * PAD + SIDE, bottom, zorder=2)
        boxes += _draw_predictions(axes, entry, x + PAD, y + PAD + SIDE, card_w - 2 * PAD)
    axes.add_collection(PatchCollection(boxes, match_original=True))
    return figure


def overlay(image: Image.Image, cam: np.ndarray) -> np.ndarray:
    """Blend the heat map (H, W) over the image in gray; return uint8 (H, W, 3).

    The ends of matplotlib's turbo are left out: they are too dark to see the image through.
    """
    heat = matplotlib.colormaps['turbo'](0.06 + 0.82 * cam)[..., :3]  # (H, W, 3) in [0, 1]
    strength = 0.25 + 0.25 * cam[..., None]
    gray = np.asarray(image.convert('L'))[..., None]
    return (strength * 255 * heat + (1 - strength) * gray).astype(np.uint8)


def _draw_predictions(axes, entry: dict[str, Any], x: int, y: int, width: int) -> list[FancyBboxPatch]:
    """Write file name and predictions at (x, y); return the bars of the probabilities."""
    _write(axes, x, y + 18, entry['name'], width, keep_end=True, size=13, color=GREY)
    bars = []
    for rank, prediction in enumerate(entry['predictions']):
        middle = y + 34 + ROW * (rank + 0.5)
        weight = 'normal' if rank else 'bold'
        _write(axes, x, middle, prediction['class'], width - 178, size=16, weight=weight)
        _write(axes, x + width, middle, f"{prediction['probability']:.1%}", 70, size=16, weight=weight, ha='right')
        left, filled = x + width - 166, 90 * prediction['probability']
        bars.append(_box(left, middle - 5, 90, 10, 5, '#eceff1'))
        bars.append(_box(left, middle - 5, filled, 10, min(5, filled / 2), '#c9d3e0' if rank else '#3b6fb6'))
    return bars


def _box(x: float, y: float, width: float, height: float, radius: float, face: str, edge: str = 'none'):
    return FancyBboxPatch((x, y), width, height, f'round,pad=0,rounding_size={radius}', facecolor=face, edgecolor=edge)


def _write(axes, x: float, y: float, text: str, room: float, keep_end: bool = False, color: str = INK,
           ha: str = 'left', **font) -> None:
    """Write a line of text with its middle at y, shortened to `room` pixels with an ellipsis."""
    def shortened(n: int) -> str:
        return '…' + text[len(text) - n:] if keep_end else text[:n].rstrip(' ,') + '…'

    if _text_width(text, **font) > room:
        n = bisect.bisect(range(len(text)), room, key=lambda n: _text_width(shortened(n), **font))
        text = shortened(max(n - 1, 0))
    axes.text(x, y + 1, text, color=color, ha=ha, va='center', parse_math=False, **font)


def _text_width(text: str, **font) -> float:
    return text_to_path.get_text_width_height_descent(text, FontProperties(**font), False)[0]
