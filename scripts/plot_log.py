"""python scripts/plot_log.py output/digits -o curves.png

Draw the loss, accuracy, learning rate and images per second of one or more runs in one figure. Name a run by its folder
or its log.txt. No display is needed. Runs of detection.py show average precision instead of accuracy. To follow a run,
repeat the command:

    watch -n 60 python scripts/plot_log.py output/digits
"""
import argparse
from pathlib import Path

import _path
from options import Parser, output_file


@_path.parse_first
def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(prog='plot_log.py', description=__doc__.split('\n', 2)[2],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='folder of a run, or its log.txt')
    parser.add_argument('-o', '--output', type=output_file, metavar='FILE',
                        help='the figure (default: curves.png, in the folder of a single run, or in the current folder '
                        'for several runs)')
    return parser


from errors import UsageError
from reports import check_extension, draw_curves, read_log, save


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    logs = [path / 'log.txt' if path.is_dir() else path for path in args.runs]
    output = args.output or (logs[0].parent if len(logs) == 1 else Path()) / 'curves.png'
    with parser.usage_errors():
        check_extension(output)
        for log in logs:
            if not log.is_file():
                raise UsageError(f'{log} does not exist: use the folder of a run (its --output-dir) or its log.txt')
        records = [read_log(log) for log in logs]
        if [] in records:
            raise UsageError(f'{logs[records.index([])]} is empty: wait for the first epoch to end')
        names = [log.resolve().parent.name for log in logs]
        if len(set(names)) < len(names):
            names = map(str, logs)
        save(draw_curves(dict(zip(names, records))), output)
    print(f'{output}: {", ".join(f"{len(lines)} epochs" for lines in records)}')


if __name__ == '__main__':
    main()
