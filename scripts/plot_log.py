"""python scripts/plot_log.py output/digits -o curves.png

Draw the loss, accuracy, learning rate and images per second of one or several runs into one picture. A run is given
by its folder or its log.txt; --watch redraws the picture when a log has changed. No display is needed. Runs of
detection.py have average precision in place of accuracy.
"""
import argparse
import json
import math
import os
import textwrap
import time
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

import _path
from options import Parser, in_range, output_file

assert _path.ROOT  # importing _path puts the repository on sys.path

# title, [(key in log.txt, label, line style)]
PANELS = [
    ('Loss', [('train_loss', 'train', ':'), ('test_loss', 'test', '-'), ('ema_test_loss', 'test, EMA', '--')]),
    ('Top-1 accuracy (%)', [('test_acc1', 'test', '-'), ('ema_test_acc1', 'test, EMA', '--')]),
    ('Learning rate', [('train_lr', 'learning rate', '-')]),
    ('Training images per second', [('train_images_per_s', 'images per second', '-')]),
]
DETECTION = ('Average precision (%)', [  # in place of accuracy, for logs of detection.py
    ('box_ap', 'box', '-'), ('box_ap50', 'box, IoU 0.5', '--'), ('mask_ap', 'mask', '-.'),
    ('mask_ap50', 'mask, IoU 0.5', ':')])
MARKED = 40  # more markers than this hide the line


def read_log(path: Path) -> list[dict]:
    """Read the records of a log.txt in order of epoch.

    Of an epoch with two records (a resumed run) the later one is kept. A last line that is still being written is left
    out.

    Raises:
        ValueError: another line is no record.
    """
    text = path.read_text(encoding='utf-8', errors='replace')
    records = {}
    for n, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if line.startswith('{') and not line.endswith('\n'):  # only the last line can lack its end
                break
            raise ValueError(f'{path}, line {n} is no JSON: {error}') from None
        if not isinstance(record, dict) or not isinstance(record.get('epoch'), int):
            raise ValueError(f'{path}, line {n} is no record of an epoch (a JSON object with the key "epoch")')
        records[record['epoch']] = record
    return [records[epoch] for epoch in sorted(records)]


def points(records: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Return epochs and values of `key`, without epochs that lack a finite value."""
    found = {record['epoch']: record[key] for record in records
             if isinstance(record.get(key), (int, float)) and math.isfinite(record[key])}
    return list(found), list(found.values())


def run_names(paths: list[Path]) -> list[str]:
    """Name each run by its folder, or by its whole path if folder names repeat."""
    folders = [(path if path.is_dir() else path.parent).resolve() for path in paths]
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def draw(runs: dict[str, list[dict]]) -> Figure:
    """Draw {name: records}, with a colour for each run and a line style for each quantity."""
    labels = [textwrap.fill(f'{name}{best(records)}', 90) for name, records in runs.items()]
    columns = max(1, min(len(runs), 3, 120 // (max(map(len, labels)) + 7)))  # that fit into 11 inches
    lines = sum(label.count('\n') for label in labels) + math.ceil(len(labels) / columns)
    figure = Figure(figsize=(11, 7.3 + 0.2 * lines), dpi=120, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    colors = [f'C{i}' for i in range(len(runs))]
    few = max(len(records) for records in runs.values()) <= MARKED
    detects = any('box_ap' in record for records in runs.values() for record in records)
    panels = [PANELS[0], DETECTION if detects else PANELS[1], *PANELS[2:]]
    for axes, (title, series) in zip(figure.subplots(2, 2).flat, panels):
        drawn = {}
        for records, color in zip(runs.values(), colors):
            for key, label, style in series:
                epochs, values = points(records, key)
                if epochs:
                    axes.plot(epochs, values, style, color=color, linewidth=1.6, markersize=4,
                              marker='o' if few or len(epochs) == 1 else None)
                    drawn[label] = style
        axes.set_title(title)
        axes.set_xlabel('epoch')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis='y', scilimits=(-2, 5))
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
        if not drawn:
            axes.text(0.5, 0.5, 'not in the log', transform=axes.transAxes, ha='center', color='gray')
        elif series[0][0] not in ('test_acc1', 'box_ap') and axes.dataLim.ymax > 0:
            axes.set_ylim(0, 1.05 * axes.dataLim.ymax)  # a speed that varies by 2 % should look like it
        if len(drawn) > 1:
            axes.legend([Line2D([], [], color='black', linestyle=style) for style in drawn.values()], list(drawn))
    figure.legend([Line2D([], [], color=color, linewidth=3) for color in colors], labels,
                  loc='outside upper center', ncols=columns, frameon=False)
    return figure


def best(records: list[dict]) -> str:
    """Format the best accuracies for the legend."""
    found = [(label, points(records, key)[1]) for key, label in (
        ('test_acc1', 'best'), ('ema_test_acc1', 'EMA'), ('box_ap', 'box AP'), ('mask_ap', 'mask AP'))]
    return ''.join(f', {label} {max(values):.2f} %' for label, values in found if values)


def get_args_parser() -> Parser:
    """Build the parser."""
    parser = Parser(prog='plot_log.py', description=__doc__.split('\n', 2)[2],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='folder of a run, or its log.txt')
    parser.add_argument('-o', '--output', type=output_file, metavar='FILE',
                        help='the picture (default: curves.png beside the log, or in this folder for several runs)')
    parser.add_argument('--watch', nargs='?', type=in_range(float, 0, 86400, above=True), const=10, metavar='SECONDS',
                        help='redraw when a log has changed, with a look every SECONDS (default: 10); Ctrl-C ends it')
    return parser


def check_args(args: argparse.Namespace, logs: list[Path], output: Path) -> None:
    """Raise ValueError for a mistake that shows before a log is read."""
    known = FigureCanvasBase.get_supported_filetypes()
    if output.suffix[1:].lower() not in known:
        raise ValueError(f'--output {output}: the name must end in one of .{", .".join(sorted(known))}')
    for log in logs:  # with --watch, a run may not have ended its first epoch
        if not log.is_file() and not (args.watch and log.name == 'log.txt' and log.parent.is_dir()):
            raise ValueError(f'there is no {log}: give the folder of a run (its --output-dir) or its log.txt')


def plot(args: argparse.Namespace, logs: list[Path], output: Path) -> None:
    """Draw all logs once."""
    records = [read_log(log) if log.is_file() else [] for log in logs]
    empty = [log for log, lines in zip(logs, records) if not lines]
    if empty and not args.watch:
        raise ValueError(f'{empty[0]} is empty: wait for the first epoch to end')
    for log in empty:
        print(f'waiting for the first epoch in {log}', flush=True)
    if len(empty) < len(logs):
        temporary = output.with_name(f'.{output.name}.tmp')
        draw(dict(zip(run_names(args.runs), records))).savefig(temporary, format=output.suffix[1:].lower())
        os.replace(temporary, output)  # a viewer never opens half a picture
        print(f'{output}: {", ".join(f"{len(lines)} epochs" for lines in records)}', flush=True)


def main(argv: list[str] | None = None) -> None:
    """Plot once, or with --watch whenever a log has changed."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    logs = [path / 'log.txt' if path.is_dir() else path for path in args.runs]
    output = args.output or (logs[0].parent if len(logs) == 1 else Path()) / 'curves.png'
    try:
        check_args(args, logs, output)
        seen = None
        while True:
            stats = [log.stat() if log.is_file() else None for log in logs]
            now = [stat and (stat.st_mtime_ns, stat.st_size) for stat in stats]
            if now != seen:
                plot(args, logs, output)
                seen = now
            if not args.watch:
                return
            time.sleep(args.watch)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:  # ends --watch
        pass
