"""python scripts/profile_flops.py

Multiply-adds (torchprofile) and parameters of the CMT models, beside the paper's. Every variant at its default input
size, or one at a size of your own, and where the cost goes:

    python scripts/profile_flops.py --model cmt_s --input-size 256 --per-stage
    python scripts/profile_flops.py --json
"""
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from torchprofile import profile_macs

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cmt  # noqa: E402
from options import Parser  # noqa: E402

# the paper's input size, FLOPs (which are multiply-adds, in G) and ImageNet top-1 (%)
PAPER = {'cmt_ti': (160, 0.6, 79.2), 'cmt_xs': (192, 1.5, 81.8), 'cmt_s': (224, 4.0, 83.5), 'cmt_b': (256, 9.3, 84.5)}
warnings.filterwarnings('ignore', 'No handlers found: "aten::unbind"')  # torchprofile: a view, which costs nothing


@torch.no_grad()
def profile(name: str, input_size: int = 0) -> dict[str, Any]:
    """Multiply-adds of one image and parameters of model `name`, whole and part by part; 0 is its default size.

    Additions, normalisation's statistics, activations and softmax are not counted, as torchprofile does and the paper.

    Raises:
        ValueError: a size that is not a multiple of 32.
    """
    # torchprofile counts products of matrices; only its newest release knows fused attention, so take the plain path
    with_fused = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        model = timm.create_model(name, **({'img_size': input_size} if input_size else {})).eval()
    finally:
        timm.layers.set_fused_attn(with_fused)
    parts = {'stem': model.stem, **{f'stage {i}': stage for i, stage in enumerate(model.stages, 1)}}
    parts['head'] = nn.Sequential(model.head_proj, model.global_pool, model.head)

    rows = []
    x = torch.zeros(1, model.in_chans, *model.img_size)
    for part, module in parts.items():
        params = sum(p.numel() for p in module.parameters())
        rows.append({'part': part, 'macs': profile_macs(module, x), 'params': params})
        x = module(x)
    return {
        'model': name, 'input_size': model.img_size[0], 'macs': sum(row['macs'] for row in rows),
        'params': sum(row['params'] for row in rows), 'parts': rows,
    }


def print_table(header: str, rows) -> None:
    """Columns as wide as their widest cell, the first one flush left."""
    table = [header.split('|'), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    table.insert(1, ['-' * width for width in widths])
    for row in table:
        print('  '.join([row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:])]))


def main() -> None:
    parser = Parser(prog='profile_flops.py', description='Multiply-adds and parameters of the CMT models.')
    parser.add_argument('--model', help='one model (default: all four)')
    parser.add_argument('--input-size', type=int, help="a multiple of 32 (default: each model's own)")
    parser.add_argument('--per-stage', action='store_true', help='where they go: stem, the four stages, head')
    parser.add_argument('--json', action='store_true', help='print JSON, multiply-adds and parameters unrounded')
    args = parser.parse_args()
    names = {**{name: name for name in PAPER}, **cmt.ALIASES}
    if args.model is not None and args.model not in names:
        parser.error(f"unknown model '{args.model}': choose from {', '.join(names)}")
    if args.input_size is not None and (args.input_size < 32 or args.input_size % 32):
        parser.error(f'--input-size {args.input_size}: must be a multiple of 32')

    try:
        results = [profile(name, args.input_size or 0) for name in ([names[args.model]] if args.model else PAPER)]
    except RuntimeError as error:  # more memory than there is
        parser.error(f'--input-size {args.input_size}: give a smaller one: {" ".join(str(error).split())}')
    if args.json:
        for result in results:
            if not args.per_stage:
                del result['parts']
        print(json.dumps(results, indent=2))
        return

    rows = []
    for r in results:
        size, flops, top1 = PAPER[r['model']]
        paper = (f'{flops} G', f'{top1} %') if r['input_size'] == size else ('-', '-')
        rows.append([r['model'], str(r['input_size']), f"{r['macs'] / 1e9:.3f} G", f"{r['params']:,}", *paper])
    print_table('model|input|multiply-adds|parameters|paper: FLOPs|paper: top-1', rows)
    for result in results if args.per_stage else []:
        print()
        print_table(f"{result['model']} at {result['input_size']}|multiply-adds|share|parameters|share", [[
            row['part'], f"{row['macs'] / 1e9:.3f} G", f"{row['macs'] / result['macs']:.1%}",
            f"{row['params']:,}", f"{row['params'] / result['params']:.1%}",
        ] for row in result['parts']])


if __name__ == '__main__':
    main()
