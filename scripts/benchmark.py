"""python scripts/benchmark.py --models cmt_s --modes infer train --forms reference eager fused compiled --batches 8

Measure images per second, latency and memory of CMT in several forms, and of any other timm model.

`reference` is the authors' arithmetic, operation by operation: tokens between blocks, an explicit attention matrix,
separate BatchNorm, K and V, default memory format. `eager` is the model as built. `fused` is CMT.fuse(), for inference.
`compiled` is torch.compile of the fused model, or for training of the eager one. Cases take turns; results are medians.
"""
import argparse
import datetime
import functools
import itertools
import json
import shlex
import statistics
import sys
import time
from typing import NamedTuple

import _path
from options import Parser, non_negative, output_file, positive

DTYPES = ('float32', 'bfloat16', 'float16')
MODES = ('infer', 'train')
FORMS = ('reference', 'eager', 'fused', 'compiled')


class Setup(NamedTuple):
    """Describe a benchmark case. `size` is in pixels, or None for the model's default."""
    model: str
    mode: str
    size: int | None
    batch: int
    form: str

    def exists(self) -> bool:
        """Return whether the model has this form: `fused` needs CMT in inference, `reference` needs CMT."""
        is_cmt = self.model.startswith('cmt')
        return self.form in ('eager', 'compiled') or is_cmt and (self.form, self.mode) != ('fused', 'train')

    def build(self) -> 'tuple[nn.Module, int]':
        """Build the model with random weights, not compiled; return it with its input size."""
        torch.manual_seed(0)
        settings = {'img_size': self.size} if self.size and self.model.startswith('cmt') else {}
        model = timm.create_model(self.model, **settings)
        size = self.size or model.pretrained_cfg['input_size'][-1]
        if self.form == 'reference':
            model.forward = functools.partial(reference, model)
        elif not self.model.startswith('cmt'):
            model = model.to(memory_format=torch.channels_last)  # Convolutions are faster in this format.
        elif self.form == 'fused' or self.form == 'compiled' and self.mode == 'infer':
            model = model.fuse()
        return model.train(self.mode == 'train'), size


def case_group(text: str) -> list[Setup]:
    """Parse an argument of --cases."""
    try:
        name, mode, size, batch, forms = text.split(':')
        group = [Setup(name, mode, positive(size), positive(batch), form) for form in forms.split(',')]
    except ValueError:
        group = []
    if not group or group[0].mode not in MODES or not {setup.form for setup in group} <= set(FORMS):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not MODEL:MODE:SIZE:BATCH:FORM,FORM, as in cmt_s:infer:224:8:eager,fused")
    return group


@_path.parse_first
def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(prog='benchmark.py', description=__doc__.split('\n\n')[1])
    parser.add_argument('--models', nargs='+', default=['cmt_s'], help='names of timm models')
    parser.add_argument('--modes', nargs='+', default=['infer'], choices=MODES)
    parser.add_argument('--forms', nargs='+', default=['reference', 'eager', 'fused'], choices=FORMS)
    parser.add_argument('--devices', nargs='+', choices=('cpu', 'cuda'), help='default: cuda if available')
    parser.add_argument('--dtypes', nargs='+', default=['float32'], choices=DTYPES)
    parser.add_argument('--batches', nargs='+', type=positive, default=[8])
    parser.add_argument('--sizes', nargs='+', type=positive, default=[None], help="pixels (default: each model's own)")
    parser.add_argument('--cases', nargs='+', type=case_group, metavar='MODEL:MODE:SIZE:BATCH:FORM,FORM',
                        help='measure these cases instead of all combinations of the flags above')
    parser.add_argument('--repeats', type=positive, default=7, help='measurements per case (default: %(default)s)')
    parser.add_argument('--seconds', type=non_negative, default=1.0, help='minimum per case and round (default: 1)')
    parser.add_argument('--json', type=output_file, metavar='FILE', help='write all measurements to FILE')
    return parser


import timm
import torch
import torch._inductor.config
import torch.nn as nn
import torch.nn.functional as F

import cmt
import utils


def reference_attention(layer: cmt.LMHSA, x, size: tuple[int, int], bias):
    reduced = layer.sr(x.mT.unflatten(2, size)).flatten(2).mT  # (B, N_kv, C)
    k, v = (F.linear(reduced, *half) for half in zip(layer.kv.weight.chunk(2), layer.kv.bias.chunk(2)))
    q, k, v = (tokens.unflatten(2, (layer.num_heads, layer.head_dim)).transpose(1, 2)
               for tokens in (layer.q(x), k, v))  # (B, heads, N or N_kv, head_dim)
    scores = (q @ k.mT) * layer.scale + bias  # (B, heads, N, N_kv)
    return layer.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


def reference_block(block: cmt.CMTBlock, x, size: tuple[int, int], bias):
    x = x + block.lpu.dw(x.mT.unflatten(2, size)).flatten(2).mT
    x = x + reference_attention(block.lmhsa, nn.LayerNorm.forward(block.norm1, x), size, bias)
    maps = nn.LayerNorm.forward(block.norm2, x).mT.unflatten(2, size)  # (B, C, H, W)
    maps = block.irffn.norm1(F.gelu(block.irffn.expand(maps)))
    maps = block.irffn.norm2(F.gelu(block.irffn.dw(maps) + maps))
    return x + block.irffn.norm3(block.irffn.project(maps)).flatten(2).mT  # (B, N, C)


def reference(model: cmt.CMT, x):
    """Repeat the authors' arithmetic with the layers of a CMT: images (B, 3, H, W) to logits (B, classes)."""
    for i in (1, 2, 3):
        x = getattr(model.stem, f'norm{i}')(F.gelu(getattr(model.stem, f'conv{i}')(x)))
    for stage in model.stages:
        # The blocks return channels-last memory. The authors' code restores the default format between stages.
        x = stage.aggregation.proj(x.contiguous())
        size = x.shape[2:]
        x = nn.LayerNorm.forward(stage.aggregation.norm, x.flatten(2).mT)  # (B, N, C)
        bias = stage.position_bias.flatten(3).flatten(1, 2)  # (heads, N, N_kv)
        for block in stage.blocks:
            x = reference_block(block, x, size, bias)
        x = x.mT.unflatten(2, size)
    x = F.silu(model.head_proj.norm(model.head_proj.proj(x)))
    return model.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Case:
    """Time the steps of a setup. Inference converts the weights to `dtype`; training and the reference use autocast."""

    def __init__(self, setup: Setup, device: torch.device, dtype: str):
        print(*setup, dtype, device, file=sys.stderr, flush=True)
        model, size = setup.build()
        self.labels = {**setup._asdict(), 'size': size, 'device': device.type, 'dtype': dtype}
        self.batch, self.form, self.trains, self.device = setup.batch, setup.form, setup.mode == 'train', device
        weight_dtype = torch.float32 if self.trains or self.form == 'reference' else getattr(torch, dtype)
        self.autocast = functools.partial(
            torch.autocast, device.type, getattr(torch, dtype), enabled=getattr(torch, dtype) != weight_dtype)
        self.model = model.to(device, weight_dtype)
        self.images = torch.randn(self.batch, 3, size, size, device=device, dtype=weight_dtype)
        self.targets = torch.zeros(self.batch, dtype=torch.long, device=device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-6, fused=self.form != 'reference') if self.trains else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')
        self.seconds, self.cpu_seconds = [], []  # per step; one entry per measurement
        self.compile_seconds = self.compile() if self.form == 'compiled' else None
        self.step()  # warm up

    def compile(self) -> float:
        """Compile the model; return how many seconds it took."""
        mode = 'reduce-overhead' if self.device.type == 'cuda' and not self.trains and self.batch <= 8 else None
        self.model = torch.compile(self.model, fullgraph=True, mode=mode)
        began = time.perf_counter()
        # Freezing packs weights for the CPU. As an option of torch.compile, freezing would come too late,
        # because the weights would already be graph inputs.
        with torch._inductor.config.patch(freezing=not self.trains and self.device.type == 'cpu'):
            self.step()
        return time.perf_counter() - began

    def step(self) -> None:
        """Run one step and wait for the device."""
        if self.trains:
            with self.autocast():
                loss = F.cross_entropy(self.model(self.images), self.targets)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            with torch.inference_mode(self.form != 'compiled'), torch.no_grad(), self.autocast():
                self.model(self.images)
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def time(self, min_seconds: float) -> None:
        """Add one measurement: the mean of steps that take at least `min_seconds` in total."""
        steps, began, cpu_began = 0, time.perf_counter(), time.process_time()
        while steps == 0 or time.perf_counter() - began < min_seconds:
            self.step()
            steps += 1
        self.seconds.append((time.perf_counter() - began) / steps)
        self.cpu_seconds.append((time.process_time() - cpu_began) / steps)

    def record(self) -> dict:
        """Return the results. The peak memory includes the weights of the group's other cases."""
        median, peak_memory = statistics.median(self.seconds), None
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            self.step()
            peak_memory = torch.cuda.max_memory_allocated()
        return {
            **self.labels, 'images_per_s': self.batch / median, 'latency_ms': 1000 * median,
            'images_per_s_min': self.batch / max(self.seconds), 'images_per_s_max': self.batch / min(self.seconds),
            'repeats': len(self.seconds), 'peak_memory_bytes': peak_memory, 'compile_s': self.compile_seconds,
            'seconds': self.seconds, 'cpu_seconds': self.cpu_seconds,
        }


def measure(group: list[Setup], device: torch.device, dtype: str, repeats: int, seconds: float) -> list[dict]:
    """Time the cases of a group in turn, with `repeats` measurements each.

    The ratios are speeds relative to the reference form of the same model: medians of the rounds' ratios.
    """
    cases = [Case(setup, device, dtype) for setup in group]
    for case in repeats * cases:
        case.time(seconds)
    records = [case.record() for case in cases]
    references = {record['model']: record for record in records if record['form'] == 'reference'}
    for record in records:
        same = references.get(record['model'])
        # Other jobs on the machine affect the CPU time of all threads less than the elapsed time.
        for ratio, key in (('ratio', 'seconds'), ('cpu_ratio', 'cpu_seconds')):
            record[ratio] = statistics.median(a / b for a, b in zip(same[key], record[key])) if same else None
    return records


def table(records: list[dict]) -> str:
    """Return the records as a Markdown table, without columns that are empty in all rows."""
    rows = [{
        **{name: str(r[name]) for name in (*Setup._fields, 'device', 'dtype')},
        'images/s (smallest to largest)':
            f"{r['images_per_s']:.1f} ({r['images_per_s_min']:.1f} to {r['images_per_s_max']:.1f})",
        'ms a step': f"{r['latency_ms']:.1f}",
        'x reference (by processor time)': f"{r['ratio']:.2f} ({r['cpu_ratio']:.2f})" if r['ratio'] else '',
        'memory': f"{r['peak_memory_bytes'] / 2 ** 30:.2f} GiB" if r['peak_memory_bytes'] else '',
        'compilation': f"{r['compile_s']:.0f} s" if r['compile_s'] else '',
    } for r in records]
    columns = [(name, *(row[name] for row in rows)) for name in rows[0] if any(row[name] for row in rows)]
    lines = zip(*((column[0], '---', *column[1:]) for column in columns))
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def main() -> None:
    parser = get_args_parser()
    args = parser.parse_args()
    args.devices = args.devices or ['cuda' if torch.cuda.is_available() else 'cpu']
    groups = args.cases or [
        [Setup(model, mode, size, batch, form) for model, form in itertools.product(args.models, args.forms)]
        for mode, batch, size in itertools.product(args.modes, args.batches, args.sizes)]
    groups = [[setup for setup in group if setup.exists()] for group in groups]
    if not any(groups):
        parser.error('nothing to measure: fused CMT cannot be trained, and other models have only eager and compiled')
    if 'cuda' in args.devices and not torch.cuda.is_available():
        parser.error('--devices cuda: no CUDA device found')
    for setup in itertools.chain(*groups):
        if not timm.is_model(setup.model) or setup.model.startswith('cmt') and (setup.size or 32) % 32:
            parser.error(f'{setup.model}: no such timm model, or --sizes is not a multiple of 32 (CMT)')
    records = []
    for device, dtype, group in itertools.product(args.devices, args.dtypes, groups):
        records += measure(group, torch.device(device), dtype, args.repeats, args.seconds)
    if args.json:
        args.json.write_text(encoding='utf-8', data=json.dumps({
            'command': f'python {shlex.join(sys.argv)}', 'date': datetime.date.today().isoformat(),
            'systems': [utils.describe_system(torch.device(device)) for device in args.devices], 'records': records,
        }, indent=1) + '\n')
    print(table(records))


if __name__ == '__main__':
    main()
