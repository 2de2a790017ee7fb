"""python scripts/plot_log.py output/digits -o curves.png

Draw the loss, accuracy, learning rate and images per second of one or several runs into one figure. Give a run by its
folder or its log.txt; --watch redraws the figure when a log changes. No display is needed. Runs of detection.py have
average precision in place of accuracy.
"""
import argparse
import time
from pathlib import Path

import _path
from errors import UsageError
from options import Parser, in_range, output_file
from reports import check_extension, draw_curves, read_log, save

assert _path.ROOT  # importing _path puts the repository on sys.path


def get_args_parser() -> Parser:
    """Build the parser."""
    parser = Parser(prog='plot_log.py', description=__doc__.split('\n', 2)[2],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='folder of a run, or its log.txt')
    parser.add_argument('-o', '--output', type=output_file, metavar='FILE',
                        help='the figure (default: curves.png in the folder of the run, or for several runs in the '
                        'current folder)')
    parser.add_argument('--watch', nargs='?', type=in_range(float, 0, 86400, above=True), const=10, metavar='SECONDS',
                        help='look for changes every SECONDS (default: 10), and redraw; Ctrl-C ends it')
    return parser


def plot(logs: list[Path], output: Path, may_be_empty: bool) -> None:
    """Draw the logs into `output`, once one of them has a record."""
    records = [read_log(log) if log.is_file() else [] for log in logs]
    for log in (log for log, lines in zip(logs, records) if not lines):
        if not may_be_empty:
            raise UsageError(f'{log} is empty: wait for the first epoch to end')
        print(f'waiting for the first epoch in {log}', flush=True)
    if any(records):
        names = [log.resolve().parent.name for log in logs]
        if len(set(names)) < len(names):
            names = map(str, logs)
        save(draw_curves(dict(zip(names, records))), output)
        print(f'{output}: {", ".join(f"{len(lines)} epochs" for lines in records)}', flush=True)


def main(argv: list[str] | None = None) -> None:
    """Plot once, or with --watch whenever a log has changed."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    logs = [path / 'log.txt' if path.is_dir() else path for path in args.runs]
    output = args.output or (logs[0].parent if len(logs) == 1 else Path()) / 'curves.png'
    with parser.usage_errors():
        check_extension(output)
        for log in logs:  # with --watch, the first epoch may still be running
            if not log.is_file() and not (args.watch and log.name == 'log.txt' and log.parent.is_dir()):
                raise UsageError(f'there is no {log}: give the folder of a run (its --output-dir) or its log.txt')
        drawn = None
        while True:
            stats = [log.stat() if log.is_file() else None for log in logs]
            state = [stat and (stat.st_mtime_ns, stat.st_size) for stat in stats]
            if state != drawn:
                plot(logs, output, may_be_empty=args.watch is not None)
                drawn = state
            if not args.watch:
                return
            time.sleep(args.watch)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:  # ends --watch
        pass
