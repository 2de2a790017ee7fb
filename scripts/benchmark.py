"""python scripts/benchmark.py --models cmt_s --modes infer train --forms reference eager fused compiled --batches 8

Measure images per second, latency, memory and share of the machine's peak of CMT in several forms, and of other models.

Forms: `reference` is the authors' arithmetic operation by operation (tokens between blocks, BatchNorm apart, explicit
attention matrix, K and V apart, default memory format). `eager` is the model of cmt.py, `fused` its inference form
CMT.fuse(). `compiled` is torch.compile, of the fused form for inference and of the model for training. The cases take
turns, round by round, so that a machine that slows down slows all of them. Figures are medians.
"""
import argparse
import copy
import datetime
import functools
import itertools
import json
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch._inductor.config
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import _path
import cmt
import utils
from options import Parser, amount, output_file, positive

assert _path.ROOT  # importing _path puts the repository on sys.path

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
FORMS = ('reference', 'eager', 'fused', 'compiled')
# ImageNet-1k top-1 (%) of each model's paper, at 224 px or the model's default size
TOP1 = {
    **{name: variant.paper_top1 for name, variant in cmt.MODELS.items()}, 'convnext_tiny': 82.1,
    'swin_tiny_patch4_window7_224': 81.3, 'pvt_v2_b2': 82.0, 'coatnet_0_rw_224': 81.6, 'caformer_s18': 83.6,
    'efficientnet_b4': 82.9,
}


# ---------------------------------------------------------------------------------------------------------------------
# the reference form, with the layers of a CMT

def reference_attention(layer: cmt.LMHSA, x, height: int, width: int, bias):
    B, N, C = x.shape
    source = x
    if not isinstance(layer.sr, nn.Identity):
        source = layer.sr(x.transpose(1, 2).reshape(B, C, height, width)).flatten(2).transpose(1, 2)
    kv = (F.linear(source, *half) for half in zip(layer.kv.weight.chunk(2), layer.kv.bias.chunk(2)))
    q, k, v = (tokens.reshape(B, -1, layer.num_heads, layer.head_dim).permute(0, 2, 1, 3)
               for tokens in (layer.q(x), *kv))
    scores = (q @ k.transpose(-2, -1)) * layer.scale + bias
    return layer.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C))


def reference_block(block: cmt.CMTBlock, x, height: int, width: int, bias):
    B, N, C = x.shape
    x = x + block.lpu.dw(x.transpose(1, 2).reshape(B, C, height, width)).flatten(2).transpose(1, 2)
    x = x + reference_attention(block.lmhsa, nn.LayerNorm.forward(block.norm1, x), height, width, bias)
    layer = block.irffn
    maps = nn.LayerNorm.forward(block.norm2, x).transpose(1, 2).reshape(B, C, height, width)
    maps = layer.norm1(F.gelu(layer.expand(maps)))
    maps = layer.norm2(F.gelu(layer.dw(maps) + maps))
    return x + layer.norm3(layer.project(maps)).flatten(2).transpose(1, 2)


class Reference(nn.Module):
    """Repeat the authors' arithmetic with the layers of a CMT."""

    def __init__(self, model: cmt.CMT):
        super().__init__()
        self.model = model

    def forward(self, x):
        stem, head_proj = self.model.stem, self.model.head_proj
        for i in (1, 2, 3):
            x = getattr(stem, f'norm{i}')(F.gelu(getattr(stem, f'conv{i}')(x)))
        for stage in self.model.stages:
            # the blocks return channels-last memory; the authors' code restores the default format between stages
            x = stage.aggregation.proj(x.contiguous())
            height, width = x.shape[2:]
            x = nn.LayerNorm.forward(stage.aggregation.norm, x.flatten(2).transpose(1, 2))
            bias = stage.position_bias.flatten(3).flatten(1, 2)
            for block in stage.blocks:
                x = reference_block(block, x, height, width, bias)
            x = x.transpose(1, 2).reshape(len(x), -1, height, width)
        x = F.silu(head_proj.norm(head_proj.proj(x)))
        return self.model.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


# ---------------------------------------------------------------------------------------------------------------------

def is_own(name: str) -> bool:
    return timm.models.is_model_in_modules(name, ['cmt'])


class Case:
    """Time steps of one model in one form.

    Args:
        name: of any timm model.
        mode: 'infer' or 'train'.
        form: one of FORMS.
        dtype: key of DTYPES. Inference converts the weights; the reference form and training use autocast.
        batch: images in a step.
        size: pixels; None for the model's default.
    """

    def __init__(self, name: str, mode: str, form: str, device: torch.device, dtype: str, batch: int, size: int | None):
        self.name, self.mode, self.form, self.device, self.dtype, self.batch = name, mode, form, device, dtype, batch
        torch.manual_seed(0)
        model = timm.create_model(name, **(dict(img_size=size) if is_own(name) and size else {}))
        self.size = size or model.pretrained_cfg['input_size'][-1]
        kind = DTYPES[dtype]
        casts = mode == 'train' or form == 'reference'  # autocast, as the engine trains
        stored = torch.float32 if casts else kind
        self.autocast = functools.partial(torch.autocast, device.type, kind, enabled=kind != stored)
        self.model = self.convert(model).to(stored)
        self.images = torch.randn(batch, 3, self.size, self.size, device=device, dtype=stored)
        self.targets = torch.randint(model.num_classes, (batch,), device=device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-6, fused=form != 'reference') if mode == 'train' else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=kind == torch.float16)
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.flops = self.count_flops()
        self.compile_seconds = None
        if form == 'compiled':
            self.compile()

    def convert(self, model: nn.Module) -> nn.Module:
        """Return `model` in the form of the case, before compilation, on the device."""
        if self.form == 'reference':
            model = Reference(model)
        model = model.to(self.device).train(self.mode == 'train')
        if not is_own(self.name):
            return model.to(memory_format=torch.channels_last)  # faster convolutions
        return model.fuse() if self.mode == 'infer' and self.form in ('fused', 'compiled') else model

    def count_flops(self) -> int:
        """Return the floating-point operations of a step, by torch's counter on one image."""
        model = copy.deepcopy(self.model).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), self.autocast():
            model(self.images[:1])
        return counter.get_total_flops() * self.batch * (3 if self.mode == 'train' else 1)

    def compile(self) -> None:
        mode = 'reduce-overhead' if self.device.type == 'cuda' and self.mode == 'infer' and self.batch <= 8 else None
        self.model = torch.compile(self.model, fullgraph=True, mode=mode)
        began = time.perf_counter()
        # Freezing packs weights for the CPU's matrix products. As an option of torch.compile it would come too late:
        # the weights would be inputs of the graph.
        with torch._inductor.config.patch(freezing=self.mode == 'infer' and self.device.type == 'cpu'):
            self.step()
        self.wait()
        self.compile_seconds = time.perf_counter() - began

    def step(self) -> None:
        if self.mode == 'infer':
            with torch.inference_mode(self.form != 'compiled'), torch.no_grad(), self.autocast():
                self.model(self.images)
            return
        with self.autocast():
            loss = F.cross_entropy(self.model(self.images), self.targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def wait(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def time(self, least_seconds: float) -> None:
        """Measure one more figure, over steps of at least `least_seconds` in total."""
        steps, began, cpu_began = 0, time.perf_counter(), time.process_time()
        while steps == 0 or time.perf_counter() - began < least_seconds:
            self.step()
            self.wait()
            steps += 1
        self.seconds.append((time.perf_counter() - began) / steps)
        self.cpu_seconds.append((time.process_time() - cpu_began) / steps)

    def peak_memory(self) -> int | None:
        """Return the peak bytes allocated on the device in a step; None on a CPU."""
        if self.device.type != 'cuda':
            return None
        torch.cuda.reset_peak_memory_stats()
        self.step()
        self.wait()
        return torch.cuda.max_memory_allocated()

    def record(self, peak: float) -> dict:
        median = statistics.median(self.seconds)
        return {
            'model': self.name, 'mode': self.mode, 'form': self.form, 'device': self.device.type, 'dtype': self.dtype,
            'batch': self.batch, 'size': self.size, 'images_per_s': self.batch / median, 'latency_ms': 1000 * median,
            'images_per_s_min': self.batch / max(self.seconds), 'images_per_s_max': self.batch / min(self.seconds),
            'repeats': len(self.seconds), 'peak_memory_bytes': self.peak_memory(), 'flops': self.flops,
            'cpu_ms': 1000 * statistics.median(self.cpu_seconds), 'share_of_peak': self.flops / median / peak,
            'compile_s': self.compile_seconds, 'seconds': self.seconds, 'cpu_seconds': self.cpu_seconds,
        }


def peak_flops(device: torch.device, dtype: str) -> float:
    """Return the operations per second of a large matrix product."""
    n = 8192 if device.type == 'cuda' else 1536
    a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
    timer = Timer('a @ b', globals={'a': a, 'b': b}, num_threads=torch.get_num_threads())
    return 2 * n ** 3 / min(timer.blocked_autorange(min_run_time=1).times)


def add_ratios(records: list[dict]) -> None:
    """Add the speed relative to the reference form of the same model: the median of the rounds' ratios.

    The reference has the same precision, or float16 if bfloat16 is compared with the authors' mixed precision.
    """
    for record in records:
        same = [r for r in records if r['form'] == 'reference' and all(
            r[key] == record[key] for key in ('model', 'mode', 'device', 'batch', 'size'))]
        same.sort(key=lambda r: r['dtype'] not in ('float16', record['dtype']))
        # processor time of all threads: other jobs on the machine disturb it less
        for ratio, key in (('ratio', 'seconds'), ('cpu_ratio', 'cpu_seconds')):
            is_known = same and (ratio == 'ratio' or record['device'] == 'cpu')
            record[ratio] = statistics.median(a / b for a, b in zip(same[0][key], record[key])) if is_known else None


def markdown(records: list[dict]) -> str:
    lines = ['| model | mode | device | precision | batch | size | form | images/s (smallest to largest) | ms a step '
             '| x reference (by processor time) | of peak | memory |', '|---' * 12 + '|']
    for r in records:
        ratio = f"{r['ratio']:.2f}" if r['ratio'] else ''
        ratio += f" ({r['cpu_ratio']:.2f})" if r['cpu_ratio'] else ''
        memory = f"{r['peak_memory_bytes'] / 2 ** 30:.2f} GiB" if r['peak_memory_bytes'] else ''
        lines.append(
            f"| {r['model']} | {r['mode']} | {r['device']} | {r['dtype']} | {r['batch']} | {r['size']} | {r['form']} "
            f"| {r['images_per_s']:.1f} ({r['images_per_s_min']:.1f} to {r['images_per_s_max']:.1f}) "
            f"| {r['latency_ms']:.1f} | {ratio} | {100 * r['share_of_peak']:.0f} % | {memory} |")
    return '\n'.join(lines)


def is_plotted(name: str, mode: str, form: str) -> bool:
    return mode == 'infer' and name in TOP1 and form != 'reference'


def plot(records: list[dict], path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    drawn = [r for r in records if is_plotted(r['model'], r['mode'], r['form'])]
    fastest = {r['model']: r for r in sorted(drawn, key=lambda r: r['images_per_s'])}
    for name, r in fastest.items():
        point = (r['images_per_s'], TOP1[name])
        axes.scatter(*point, color='tab:red' if name.startswith('cmt') else 'tab:gray')
        axes.annotate(f'{name} ({r["form"]})', point, xytext=(5, 4), textcoords='offset points')
    axes.set(xscale='log', xlabel='images/s, inference', ylabel='ImageNet top-1 as published (%)')
    axes.margins(0.2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def check_plot(path: Path, cases: list[tuple[str, str, str]]) -> list[str]:
    """Return the models that the picture leaves out.

    Raises:
        ValueError: a picture of unknown type, or nothing to draw.
    """
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f'--plot {path}: the name must end in one of .{", .".join(sorted(known))}')
    drawn = {name for name, mode, form in cases if is_plotted(name, mode, form)}
    if not drawn:
        raise ValueError(f'--plot {path}: nothing to draw. It shows inference, except in the form reference, by models '
                         f'whose published top-1 is known: {", ".join(TOP1)}')
    return list(dict.fromkeys(name for name, mode, _ in cases if name not in drawn))


class Group(NamedTuple):
    """Cases that take turns."""
    mode: str
    batch: int
    size: int | None  # pixels; None for each model's default
    models: list[str]
    forms: list[str]

    def cases(self) -> list[tuple[str, str, str]]:
        """Return (model, mode, form) of each case that exists."""
        own = FORMS if self.mode == 'infer' else ('reference', 'eager', 'compiled')
        return [(name, self.mode, form) for name in self.models for form in self.forms
                if form in (own if is_own(name) else ('eager', 'compiled'))]


def case_group(text: str) -> Group:
    """Parse an argument of --cases."""
    try:
        name, mode, size, batch, forms = text.split(':')
        if mode not in ('infer', 'train') or int(batch) < 1 or not set(forms.split(',')) <= set(FORMS):
            raise ValueError
        return Group(mode, int(batch), int(size), [name], forms.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not MODEL:MODE:SIZE:BATCH:FORM,FORM, as in cmt_s:infer:224:8:eager,fused") from None


def check_groups(groups: list[Group]) -> None:
    """Raise ValueError for unknown models, wrong sizes, or no case to measure."""
    for group in groups:
        for name in group.models:
            if not timm.is_model(name):
                raise ValueError(f'unknown model {name}')
        if group.size is not None and (group.size < 32 or group.size % 32):
            raise ValueError(f'size {group.size}: sizes are multiples of 32')
    if not any(group.cases() for group in groups):
        raise ValueError('nothing to measure: CMT does not train in the form fused, other models have eager and '
                         'compiled')


def try_models(groups: list[Group]) -> None:
    """Raise ValueError if a model fails in a step of at most two images on the CPU.

    That takes seconds. A model that fails later would cost the figures of all models before it.
    """
    for name, mode, size, batch in dict.fromkeys(
            (name, group.mode, group.size, min(group.batch, 2)) for group in groups for name, _, _ in group.cases()):
        try:
            Case(name, mode, 'eager', torch.device('cpu'), 'float32', batch, size).step()
        except Exception as error:  # models of timm raise anything
            reason = ' '.join(str(error).split()) or type(error).__name__
            size_text = f'{size} px' if size else 'its own size'
            raise ValueError(f'{name} cannot {mode} at {size_text}, batch {batch}: {reason}') from None


def measure(group: Group, device: torch.device, dtype: str, repeats: int, seconds: float) -> list[dict]:
    """Time the cases of a group in turns, `repeats` figures each."""
    cases = []
    for name, mode, form in group.cases():
        print(f'{name} {mode} {form} {dtype} batch {group.batch} on {device}', file=sys.stderr, flush=True)
        cases.append(Case(name, mode, form, device, dtype, group.batch, group.size))
    peak = peak_flops(device, dtype)
    for case in cases:
        case.step()
    for _ in range(repeats):
        for case in cases:
            case.time(seconds)
    return [case.record(peak) for case in cases]


def print_records(records: list[dict]) -> None:
    for r in records:
        ratio = f"  {r['ratio']:.2f} x reference" if r['ratio'] else ''
        ratio += f" ({r['cpu_ratio']:.2f} by processor time)" if r['cpu_ratio'] else ''
        compiled = f"  compiled in {r['compile_s']:.0f} s" if r['compile_s'] else ''
        print(f"{r['model']:<14} {r['mode']:<6}{r['form']:<10} {r['dtype']:<9} batch {r['batch']:<4} {r['size']} px  "
              f"{r['images_per_s']:9.1f} images/s ({r['images_per_s_min']:.1f} to {r['images_per_s_max']:.1f})"
              f"  {100 * r['share_of_peak']:3.0f} % of peak{ratio}{compiled}")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(prog='benchmark.py', description=__doc__.split('\n\n')[1])
    parser.add_argument('--models', nargs='+', default=['cmt_s'], help='CMT models and others of timm')
    parser.add_argument('--modes', '--mode', nargs='+', default=['infer'], choices=('infer', 'train'))
    parser.add_argument('--forms', nargs='+', default=['reference', 'eager', 'fused'], choices=FORMS)
    parser.add_argument('--devices', nargs='+', choices=('cpu', 'cuda'),
                        default=['cuda' if torch.cuda.is_available() else 'cpu'])
    parser.add_argument('--dtypes', nargs='+', default=['float32'], choices=DTYPES)
    parser.add_argument('--batches', nargs='+', type=positive, default=[8])
    parser.add_argument('--sizes', nargs='+', type=int, help="pixels (default: each model's own)")
    parser.add_argument('--cases', nargs='+', type=case_group, metavar='MODEL:MODE:SIZE:BATCH:FORM,FORM',
                        help='measure these cases instead of all combinations of the flags above')
    parser.add_argument('--repeats', type=positive, default=7, help='figures of each case (default: %(default)s)')
    parser.add_argument('--seconds', type=amount, default=1.0, help='least time of a figure (default: %(default)s)')
    parser.add_argument('--json', type=output_file, metavar='FILE', help='write all figures to FILE')
    parser.add_argument('--markdown', action='store_true', help='print a Markdown table')
    parser.add_argument('--plot', type=output_file, metavar='PNG', help='draw top-1 over images per second')
    return parser


def main() -> None:
    parser = get_args_parser()
    args = parser.parse_args()
    groups = args.cases or [
        Group(mode, batch, size, args.models, args.forms)
        for mode, batch, size in itertools.product(args.modes, args.batches, args.sizes or [None])]
    try:
        check_groups(groups)
        if 'cuda' in args.devices and not torch.cuda.is_available():
            raise ValueError('--devices cuda: no CUDA device here')
        left_out = check_plot(args.plot, [case for group in groups for case in group.cases()]) if args.plot else []
        try_models(groups)
    except ValueError as error:
        parser.error(str(error))
    if left_out:
        print(f'--plot leaves out {", ".join(left_out)}: no published top-1 is known, or no form of it is drawn',
              file=sys.stderr)

    records = []
    for device, dtype, group in itertools.product(args.devices, args.dtypes, groups):
        records += measure(group, torch.device(device), dtype, args.repeats, args.seconds)
    add_ratios(records)

    if args.json:
        args.json.write_text(json.dumps({
            'command': 'python scripts/benchmark.py ' + shlex.join(sys.argv[1:]),
            'date': datetime.date.today().isoformat(), 'processor': utils.processor(),
            'threads': torch.get_num_threads(),
            'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__},
            'records': records,
        }, indent=1) + '\n')
    if args.plot:
        plot(records, args.plot)
    if args.markdown:
        print(markdown(records))
    else:
        print_records(records)


if __name__ == '__main__':
    main()
