"""python scripts/profile_flops.py

Print multiply-adds (torchprofile) and parameters of the CMT models, beside the paper's. Without flags every variant is
profiled at its default input size. One variant, another size and a split by stages:

    python scripts/profile_flops.py --model cmt_s --input-size 256 --per-stage
    python scripts/profile_flops.py --json
"""
import json
import warnings
from typing import Any

import timm
import torch
import torch.nn as nn
from torchprofile import profile_macs

import _path
import cmt
from options import Parser

assert _path.ROOT  # importing _path puts the repository on sys.path

ROW = '{:<17}{:>7}{:>15}{:>13}{:>15}{:>14}'
PART_ROW = '{:<17}{:>15}{:>8}{:>13}{:>8}'


@torch.no_grad()
def profile(name: str, input_size: int = 0) -> dict[str, Any]:
    """Count the multiply-adds of one image and the parameters of a model, whole and by parts.

    As in the paper, additions, statistics of norms, activations and softmax are not counted.

    Args:
        name: of a CMT.
        input_size: pixels; 0 for the model's default.

    Raises:
        ValueError: a size that is not a multiple of 32.
    """
    model = timm.create_model(name, **({'img_size': input_size} if input_size else {})).eval()
    for module in model.modules():  # only the newest release of torchprofile counts fused attention
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False
    parts = {'stem': model.stem, **{f'stage {i}': stage for i, stage in enumerate(model.stages, 1)}}
    parts['head'] = nn.Sequential(model.head_proj, model.global_pool, model.head)

    rows = []
    x = torch.zeros(1, model.in_chans, *model.img_size)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'No handlers found: "aten::unbind"')  # a view, which costs nothing
        for part, module in parts.items():
            params = sum(p.numel() for p in module.parameters())
            rows.append({'part': part, 'macs': profile_macs(module, x), 'params': params})
            x = module(x)
    return {
        'model': name, 'input_size': model.img_size[0], 'macs': sum(row['macs'] for row in rows),
        'params': sum(row['params'] for row in rows), 'parts': rows,
    }


def main() -> None:
    parser = Parser(prog='profile_flops.py', description='Print multiply-adds and parameters of the CMT models.')
    parser.add_argument('--model', choices=[*cmt.MODELS, *cmt.ALIASES], metavar='MODEL',
                        help='one model (default: all four)')
    parser.add_argument('--input-size', type=int, help="pixels, a multiple of 32 (default: each model's own)")
    parser.add_argument('--per-stage', action='store_true', help='split the counts: stem, the four stages, head')
    parser.add_argument('--json', action='store_true', help='print JSON, multiply-adds and parameters unrounded')
    args = parser.parse_args()
    names = [cmt.ALIASES.get(args.model, args.model)] if args.model else cmt.MODELS
    if args.input_size is not None and (args.input_size < 32 or args.input_size % 32):
        parser.error(f'--input-size {args.input_size}: must be a multiple of 32')

    try:
        results = [profile(name, args.input_size or 0) for name in names]
    except RuntimeError as error:  # out of memory
        parser.error(f'--input-size {args.input_size}: give a smaller one: {" ".join(str(error).split())}')
    if args.json:
        for result in results:
            if not args.per_stage:
                del result['parts']
        print(json.dumps(results, indent=2))
        return

    print(ROW.format('model', 'input', 'multiply-adds', 'parameters', 'paper: FLOPs', 'paper: top-1'))
    for r in results:
        variant = cmt.MODELS[r['model']]
        own_size = r['input_size'] == variant.img_size
        paper = (f'{variant.paper_gmacs} G', f'{variant.paper_top1} %') if own_size else ('-', '-')
        print(ROW.format(r['model'], r['input_size'], f"{r['macs'] / 1e9:.3f} G", f"{r['params']:,}", *paper))
    for r in results if args.per_stage else []:
        title = f"{r['model']} at {r['input_size']}"
        print('\n' + PART_ROW.format(title, 'multiply-adds', 'share', 'parameters', 'share'))
        for part in r['parts']:
            print(PART_ROW.format(
                part['part'], f"{part['macs'] / 1e9:.3f} G", f"{part['macs'] / r['macs']:.1%}",
                f"{part['params']:,}", f"{part['params'] / r['params']:.1%}"))


if __name__ == '__main__':
    main()
