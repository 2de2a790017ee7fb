"""python scripts/benchmark_checkpoint.py --model cmt_s

How long a checkpoint holds up training (the copy to host memory), and after how long it is on disk (in the background).
"""
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cmt  # noqa: E402, F401
from checkpoints import LAST, RunWriter  # noqa: E402
from options import Parser, positive  # noqa: E402


def main() -> None:
    parser = Parser(prog='benchmark_checkpoint.py', description=__doc__.split('\n\n')[1])
    parser.add_argument('--model', default='cmt_s')
    parser.add_argument('--folder', help='where to write (default: the system\'s temporary folder)')
    parser.add_argument('--runs', type=positive, default=7)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    if not timm.is_model(args.model):
        parser.error(f'unknown --model {args.model}')
    try:
        torch.zeros(1, device=args.device).cpu()
    except (AssertionError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        parser.error(f'--device {args.device} cannot be used here, give cpu or another: {reason}')
    try:
        temporary = tempfile.TemporaryDirectory(dir=args.folder)
    except OSError as error:
        parser.error(f'--folder {args.folder}: {error.strerror}: give a folder that is there and can be written to')

    copying, writing = [], []
    with temporary as folder:
        try:
            model = timm.create_model(args.model).to(args.device)
        except RuntimeError as error:
            parser.error(f'--model {args.model}: {" ".join(str(error).split())}')
        # what a run saves: weights, their average and two moments
        state = {name: {k: v.clone() for k, v in model.state_dict().items()}
                 for name in ('model', 'model_ema', 'exp_avg', 'exp_avg_sq')}
        writer = RunWriter(folder)
        for _ in range(args.runs + 1):
            began = time.perf_counter()
            writer.save(state)
            copying.append(time.perf_counter() - began)
            writer.wait()
            writing.append(time.perf_counter() - began)
            if writer.error:
                parser.exit(1, f'error: {writer.error}\n')
        megabytes = (Path(folder) / LAST).stat().st_size / 1e6
    copying, writing = copying[1:], writing[1:]  # the first one finds cold caches

    if args.json:
        print(json.dumps({
            'model': args.model, 'device': args.device, 'megabytes': megabytes,
            'held_up_s': copying, 'on_disk_s': writing,
            'torch': torch.__version__, 'processor': platform.processor() or platform.machine(),
        }))
        return
    print(f'{args.model} on {args.device}, torch {torch.__version__}: {megabytes:.0f} MB, median of {args.runs} '
          '(smallest to largest)')
    for name, seconds in (('training held up', copying), ('on disk after', writing)):
        print(f'{name:<17} {statistics.median(seconds):7.3f} s  ({min(seconds):.3f} to {max(seconds):.3f})')


if __name__ == '__main__':
    main()
