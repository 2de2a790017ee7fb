"""python scripts/plot_log.py output/digits -o curves.png

Draws the loss, accuracy, learning rate and images per second of one or several runs into one picture. A run is its
folder or its log.txt; --watch redraws whenever a log grows. Works without a display.
"""
import argparse
import json
import math
import os
import textwrap
import time
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# title, [(key in log.txt, label, line style)]
PANELS = [
    ('Loss', [('train_loss', 'train', ':'), ('test_loss', 'test', '-'), ('ema_test_loss', 'test, EMA', '--')]),
    ('Top-1 accuracy (%)', [('test_acc1', 'test', '-'), ('ema_test_acc1', 'test, EMA', '--')]),
    ('Learning rate', [('train_lr', 'learning rate', '-')]),
    ('Training images per second', [('train_images_per_s', 'images per second', '-')]),
]
MARKED = 40  # epochs at most whose points are marked one by one; more would hide the line


class Parser(argparse.ArgumentParser):
    """One line an error. options.Parser does the same, but brings torch along: seconds to a plot."""

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message}\n')


def read_log(path):
    """The records of a log.txt in order of epoch; of an epoch that is there twice (a resumed run), the later.

    A last line that is still being written is left out. ValueError names any other line that is no record.
    """
    text = path.read_text(encoding='utf-8', errors='replace')
    records = {}
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if line.startswith('{') and not line.endswith('\n'):  # only a last line lacks its end
                break
            raise ValueError(f'{path}, line {number} is no JSON: {error}') from None
        if not isinstance(record, dict) or not isinstance(record.get('epoch'), int):
            raise ValueError(f'{path}, line {number} is no record of an epoch (a JSON object with the key "epoch")')
        records[record['epoch']] = record
    return [records[epoch] for epoch in sorted(records)]


def points(records, key):
    """Epochs and values of a key, without the epochs that lack it: those without validation, or a NaN loss."""
    found = [(record['epoch'], record[key]) for record in records if isinstance(record.get(key), (int, float))]
    found = [(epoch, value) for epoch, value in found if math.isfinite(value)]
    return [epoch for epoch, _ in found], [value for _, value in found]


def run_names(paths):
    """What tells the runs apart: the folder's name, or as much of the path as is needed."""
    folders = [(path if path.is_dir() else path.parent).resolve() for path in paths]
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def draw(runs):
    """The figure of {name: records}: a colour a run, a line style a quantity."""
    labels = [textwrap.fill(f'{name}{best(records)}', 90) for name, records in runs.items()]
    columns = max(1, min(len(runs), 3, 120 // (max(map(len, labels)) + 7)))  # what 11 inches hold
    lines = sum(label.count('\n') for label in labels) + math.ceil(len(labels) / columns)
    figure = Figure(figsize=(11, 7.3 + 0.2 * lines), dpi=120, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    FigureCanvasAgg(figure)
    colors = [f'C{i}' for i in range(len(runs))]
    few = max(len(records) for records in runs.values()) <= MARKED
    for axes, (title, series) in zip(figure.subplots(2, 2).flat, PANELS):
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
        elif 'acc1' not in series[0][0] and axes.dataLim.ymax > 0:
            axes.set_ylim(0, 1.05 * axes.dataLim.ymax)  # a speed that varies by 2 % should look like it
        if len(drawn) > 1:
            axes.legend([Line2D([], [], color='black', linestyle=style) for style in drawn.values()], list(drawn))
    figure.legend([Line2D([], [], color=color, linewidth=3) for color in colors], labels,
                  loc='outside upper center', ncols=columns, frameon=False)
    return figure


def best(records):
    found = [(label, points(records, key)[1]) for key, label in (('test_acc1', 'best'), ('ema_test_acc1', 'EMA'))]
    return ''.join(f', {label} {max(values):.2f} %' for label, values in found if values)


def save(figure, path):
    # renamed into place: a viewer that follows the picture never opens half of it
    temporary = path.with_name(f'.{path.name}.tmp')
    figure.savefig(temporary, format=path.suffix[1:].lower())
    os.replace(temporary, path)


def get_args_parser():
    parser = Parser(prog='plot_log.py', description=__doc__.split('\n', 2)[2],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='a run\'s folder, or its log.txt')
    parser.add_argument('-o', '--output', type=Path, metavar='FILE',
                        help='the picture (default: curves.png beside the log; for several runs, in this folder)')
    parser.add_argument('--watch', nargs='?', type=float, const=10, metavar='SECONDS',
                        help='redraw when a log has changed, looking every so often (default 10); Ctrl-C ends it')
    return parser


def main(argv=None):
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.watch is not None and not 0 < args.watch <= 86400:
        parser.error(f'--watch {args.watch:g}: give a number of seconds above 0 and at most 86400, a day')
    logs = [path / 'log.txt' if path.is_dir() else path for path in args.runs]
    output = args.output or (logs[0].parent if len(logs) == 1 else Path()) / 'curves.png'
    known = FigureCanvasAgg.get_supported_filetypes()
    if output.suffix[1:].lower() not in known:
        parser.error(f'--output {output}: the name must end in one of .{", .".join(sorted(known))}')
    if not output.parent.is_dir():
        parser.error(f'--output {output}: there is no folder {output.parent}')
    if output.is_dir():
        parser.error(f'--output {output} is a folder: give a file in it')

    # a run that is watched may not have ended its first epoch
    for log in logs:
        if not log.is_file() and not (args.watch and log.name == 'log.txt' and log.parent.is_dir()):
            parser.error(f'there is no {log}: give the folder of a run (its --output_dir) or its log.txt')

    seen = None
    while True:
        now = [log.stat() if log.is_file() else None for log in logs]
        now = [stat and (stat.st_mtime_ns, stat.st_size) for stat in now]
        if now != seen:
            try:
                records = [read_log(log) if stat else [] for log, stat in zip(logs, now)]
            except (OSError, ValueError) as error:
                parser.error(str(error))
            empty = [log for log, lines in zip(logs, records) if not lines]
            if empty and not args.watch:
                parser.error(f'{empty[0]} is empty: wait for the first epoch to end')
            for log in empty:
                print(f'waiting for the first epoch in {log}', flush=True)
            if len(empty) < len(logs):
                try:
                    save(draw(dict(zip(run_names(args.runs), records))), output)
                except OSError as error:
                    parser.error(f'--output {output}: {error.strerror or error}')
                print(f'{output}: {", ".join(f"{len(lines)} epochs" for lines in records)}', flush=True)
            seen = now
        if not args.watch:
            return
        time.sleep(args.watch)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:  # the way to end --watch
        pass
