"""python scripts/profile_flops.py

Print the multiply-adds (counted by torchprofile) and parameters of the CMT models next to the paper's. Without flags,
every model is profiled at its default input size. For one model at another size, split into stages:

    python scripts/profile_flops.py --model cmt_s --input-size 256 --per-stage
"""
from typing import Any

import _path
from options import Parser, image_size


@_path.parse_first
def get_args_parser() -> Parser:
    parser = Parser(prog='profile_flops.py', description='Print multiply-adds and parameters of the CMT models.')
    parser.add_argument('--model', choices=[f'cmt_{size}' for size in (
        'ti', 'xs', 's', 'b', 'tiny', 'xsmall', 'small', 'base')], help='one model (default: all four)')
    parser.add_argument('--input-size', type=image_size, help="pixels, a multiple of 32 (default: each model's own)")
    parser.add_argument('--per-stage', action='store_true', help='count stem, stages and head separately')
    return parser


import timm
import torch
import torch.nn as nn
from torchprofile import profile_macs

import cmt

ROW = '{:<17}{:>7}{:>15}{:>13}{:>15}{:>14}'
STAGE_ROW = '{:<17}{:>15}{:>8}{:>13}{:>8}'


@torch.no_grad()
def profile(name: str, input_size: int | None = None) -> dict[str, Any]:
    """Count the multiply-adds of one image and the parameters of a CMT, in total and by stage.

    As in the paper, additions, norm statistics, activations and softmax are not counted.
    """
    model = timm.create_model(name, **({'img_size': input_size} if input_size else {})).eval()
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False  # Count attention as plain matrix products, whatever a fused kernel does.
    stages = {'stem': model.stem, **{f'stage {i}': stage for i, stage in enumerate(model.stages, 1)}}
    stages['head'] = nn.Sequential(model.head_proj, model.global_pool, model.head)

    rows = []
    x = torch.zeros(1, model.in_chans, *model.img_size)
    for stage, module in stages.items():
        params = sum(p.numel() for p in module.parameters())
        rows.append({'name': stage, 'macs': profile_macs(module, x), 'params': params})
        x = module(x)
    return {'model': name, 'input_size': model.img_size[0], 'macs': sum(row['macs'] for row in rows),
            'params': sum(row['params'] for row in rows), 'stages': rows}


def main() -> None:
    args = get_args_parser().parse_args()
    names = [cmt.ALIASES.get(args.model, args.model)] if args.model else cmt.MODELS
    results = [profile(name, args.input_size) for name in names]
    print(ROW.format('model', 'input', 'multiply-adds', 'parameters', 'paper: FLOPs', 'paper: top-1'))
    for r in results:
        variant = cmt.MODELS[r['model']]
        paper = (f'{variant.paper_gmacs} G', f'{variant.paper_top1} %')
        print(ROW.format(r['model'], r['input_size'], f"{r['macs'] / 1e9:.3f} G", f"{r['params']:,}",
                         *paper if r['input_size'] == variant.img_size else '--'))
    for r in results if args.per_stage else []:
        title = f"{r['model']} at {r['input_size']}"
        print('\n' + STAGE_ROW.format(title, 'multiply-adds', 'share', 'parameters', 'share'))
        for stage in r['stages']:
            print(STAGE_ROW.format(
                stage['name'], f"{stage['macs'] / 1e9:.3f} G", f"{stage['macs'] / r['macs']:.1%}",
                f"{stage['params']:,}", f"{stage['params'] / r['params']:.1%}"))


if __name__ == '__main__':
    main()
