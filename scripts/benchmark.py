"""python scripts/benchmark.py --models cmt_s --modes infer train --forms reference eager fused compiled --batches 8

Images per second, latency, memory and share of the machine's peak of CMT in several forms, beside other models of timm.

Forms: `reference` is the authors' arithmetic operation by operation (NCHW convolutions for every 1x1, BatchNorm apart,
explicit attention matrix, K and V apart, default memory format); `eager` is the model as it stands; `fused` its
inference form, CMT.fuse(); `compiled` is torch.compile of the fused form for inference and of the model for training;
`kernels` is the same on the Triton kernels of kernels.py, on CUDA only.
All cases take turns, round by round, so that a machine that slows down slows all of them; figures are medians.
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

import timm
import torch
import torch._inductor.config
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cmt  # noqa: E402
import utils  # noqa: E402
from options import Parser, amount, output_file, positive  # noqa: E402

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
FORMS = ('reference', 'eager', 'fused', 'compiled', 'kernels')
COMPILED = ('compiled', 'kernels')
# ImageNet-1k top-1 (%) at 224 px, or the size named, as published in each model's paper
TOP1 = {
    'cmt_ti': 79.2, 'cmt_xs': 81.8, 'cmt_s': 83.5, 'cmt_b': 84.5, 'convnext_tiny': 82.1,
    'swin_tiny_patch4_window7_224': 81.3, 'pvt_v2_b2': 82.0, 'coatnet_0_rw_224': 81.6, 'caformer_s18': 83.6,
    'efficientnet_b4': 82.9,
}


# ---------------------------------------------------------------------------------------------------------------------
# the reference form, under the released names

class ReferenceAttention(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: int):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.sr = nn.Sequential(
            nn.Conv2d(dim, dim, ratio, ratio, groups=dim), nn.BatchNorm2d(dim)) if ratio > 1 else None

    def forward(self, x, height: int, width: int, bias):
        B, N, C = x.shape
        source = x
        if self.sr is not None:
            source = self.sr(x.transpose(1, 2).reshape(B, C, height, width)).reshape(B, C, -1).transpose(1, 2)
        q, k, v = (
            layer(tokens).reshape(B, -1, self.heads, C // self.heads).permute(0, 2, 1, 3)
            for layer, tokens in ((self.q, x), (self.k, source), (self.v, source)))
        scores = (q @ k.transpose(-2, -1)) * self.scale + bias
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C))


class ReferenceIRFFN(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.BatchNorm2d(hidden))
        self.proj = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.proj_act, self.proj_bn = nn.GELU(), nn.BatchNorm2d(hidden)
        self.conv2 = nn.Sequential(nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim))

    def forward(self, x, height: int, width: int):
        B, N, C = x.shape
        x = self.conv1(x.transpose(1, 2).reshape(B, C, height, width))
        x = self.conv2(self.proj_bn(self.proj_act(self.proj(x) + x)))
        return x.flatten(2).transpose(1, 2)


class ReferenceBlock(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: int, hidden: int):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = ReferenceAttention(dim, heads, ratio), ReferenceIRFFN(dim, hidden)

    def forward(self, x, height: int, width: int, bias):
        B, N, C = x.shape
        local = self.proj(x.transpose(1, 2).reshape(B, C, height, width))
        x = x + local.flatten(2).transpose(1, 2)
        x = x + self.attn(self.norm1(x), height, width, bias)
        return x + self.mlp(self.norm2(x), height, width)


class ReferencePatch(nn.Module):
    def __init__(self, in_chs: int, dim: int):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(in_chs, dim, 2, 2), nn.LayerNorm(dim)

    def forward(self, x):
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), x.shape[2], x.shape[3]


class Reference(nn.Module):
    """The authors' arithmetic, built after a CMT and holding its weights."""

    def __init__(self, model: cmt.CMT):
        super().__init__()
        channels = model.stem.conv1.out_channels
        for i in (1, 2, 3):
            source = getattr(model.stem, f'conv{i}')
            setattr(self, f'stem_conv{i}', nn.Conv2d(source.in_channels, channels, 3, source.stride, 1))
            setattr(self, f'stem_norm{i}', nn.BatchNorm2d(channels))
        for name, stage in zip('abcd', model.stages):
            dim, ratio = stage.aggregation.proj.out_channels, stage.sr_ratio
            heads, hidden = stage.blocks[0].lmhsa.num_heads, stage.blocks[0].irffn.expand.out_features
            setattr(self, f'patch_embed_{name}', ReferencePatch(channels, dim))
            shape = stage.position_bias.flatten(3).flatten(1, 2).shape
            setattr(self, f'relative_pos_{name}', nn.Parameter(torch.empty(shape)))
            setattr(self, f'blocks_{name}', nn.ModuleList(
                ReferenceBlock(dim, heads, ratio, hidden) for _ in stage.blocks))
            channels = dim
        self._fc, self._bn, self._swish = nn.Conv2d(channels, 1280, 1), nn.BatchNorm2d(1280), nn.SiLU()
        self.head = nn.Linear(1280, model.num_classes)
        self.load_state_dict(cmt.to_released(model.state_dict()))

    def forward(self, x):
        for i in (1, 2, 3):
            x = getattr(self, f'stem_norm{i}')(F.gelu(getattr(self, f'stem_conv{i}')(x)))
        for name in 'abcd':
            x, height, width = getattr(self, f'patch_embed_{name}')(x)
            for block in getattr(self, f'blocks_{name}'):
                x = block(x, height, width, getattr(self, f'relative_pos_{name}'))
            x = x.transpose(1, 2).reshape(len(x), -1, height, width)  # channels-last memory, as all in the blocks
            if name != 'd':  # the authors go back to the default format between stages
                x = x.contiguous()
        x = self._swish(self._bn(self._fc(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


# ---------------------------------------------------------------------------------------------------------------------

def is_own(name: str) -> bool:
    return timm.models.is_model_in_modules(name, ['cmt'])


def possible(name: str, mode: str, forms: list[str]) -> list[str]:
    """Those of `forms` that a model has."""
    if is_own(name):
        return [form for form in forms if (mode, form) != ('train', 'fused')]
    return [form for form in forms if form in ('eager', 'compiled')]


class Case:
    """One model in one form, ready to be timed."""

    def __init__(self, name: str, mode: str, form: str, device: torch.device, dtype: str, batch: int, size: int | None):
        own = is_own(name)
        self.name, self.mode, self.form, self.device, self.dtype, self.batch = name, mode, form, device, dtype, batch
        torch.manual_seed(0)
        options = dict(img_size=size) if own and size else {}
        model = timm.create_model(name, **options)
        self.size = size or model.pretrained_cfg['input_size'][-1]
        if form == 'reference':
            model = Reference(model)
        model = model.to(device).train(mode == 'train')
        if mode == 'infer' and own and form in ('fused', *COMPILED):
            model = model.fuse()
        if not own:  # peers in the memory format that suits convolutions
            model = model.to(memory_format=torch.channels_last)
        kind = DTYPES[dtype]
        # inference holds its weights in the low precision; training casts under autocast, as the engine does
        casts = kind != torch.float32 and (mode == 'train' or form == 'reference')
        self.autocast = functools.partial(torch.autocast, device.type, kind, enabled=casts)
        low = mode == 'infer' and form != 'reference'
        if low:
            model = model.to(kind)
        self.images = torch.randn(batch, 3, self.size, self.size, device=device, dtype=kind if low else torch.float32)
        self.targets = torch.randint(model.head.out_features if own or form == 'reference' else model.num_classes,
                                     (batch,), device=device)
        self.model = model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-6, fused=form != 'reference') if mode == 'train' else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=kind == torch.float16)
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.flops = self.count_flops()
        self.compile_seconds = None
        if form in COMPILED:
            self.compile()

    def count_flops(self) -> int:
        """Floating-point operations of a step, by torch's counter on one image; it does not look into kernels."""
        cmt.use_kernels(False)
        model = copy.deepcopy(self.model).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), self.autocast():
            model(self.images[:1])
        return counter.get_total_flops() * self.batch * (3 if self.mode == 'train' else 1)

    def compile(self) -> None:
        mode = 'reduce-overhead' if self.device.type == 'cuda' and self.mode == 'infer' and self.batch <= 8 else None
        self.model = torch.compile(self.model, fullgraph=True, mode=mode)
        began = time.perf_counter()
        # packs weights for the CPU's matrix products; as an option of torch.compile it would come too late, after the
        # weights have become inputs of the graph
        with torch._inductor.config.patch(freezing=self.mode == 'infer' and self.device.type == 'cpu'):
            self.step()
        self.wait()
        self.compile_seconds = time.perf_counter() - began

    def step(self) -> None:
        if is_own(self.name):
            cmt.use_kernels(self.form == 'kernels')
        if self.mode == 'infer':
            with torch.inference_mode(self.form not in COMPILED), torch.no_grad(), self.autocast():
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
        """One more figure: steps for at least so long."""
        steps, began, cpu_began = 0, time.perf_counter(), time.process_time()
        while steps == 0 or time.perf_counter() - began < least_seconds:
            self.step()
            self.wait()
            steps += 1
        self.seconds.append((time.perf_counter() - began) / steps)
        self.cpu_seconds.append((time.process_time() - cpu_began) / steps)

    def peak_memory(self) -> int | None:
        """Bytes allocated on the device at the most during a step; not known of a CPU."""
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
    """What a large matrix product reaches here, in operations a second."""
    n = 8192 if device.type == 'cuda' else 1536
    a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
    seconds = []
    for _ in range(7):
        began = time.perf_counter()
        a @ b
        if device.type == 'cuda':
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds)


def add_ratios(records: list[dict]) -> None:
    """Against the reference form of the same model: in float32, and in float16 where CUDA trains in bfloat16.

    Medians of the rounds' ratios: what slows a round down slows both.
    """
    for record in records:
        same = [r for r in records if r['form'] == 'reference' and all(
            r[key] == record[key] for key in ('model', 'mode', 'device', 'batch', 'size'))]
        same.sort(key=lambda r: r['dtype'] not in ('float16', record['dtype']))

        def ratio(key, record=record, same=same):
            return statistics.median(a / b for a, b in zip(same[0][key], record[key])) if same else None
        record['ratio'] = ratio('seconds')
        # processor time, all threads: what other jobs on the machine disturb less
        record['cpu_ratio'] = ratio('cpu_seconds') if record['device'] == 'cpu' else None


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
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 5), layout='constrained')
    best = {}
    for r in records:
        if is_plotted(r['model'], r['mode'], r['form']):
            if r['images_per_s'] > best.get(r['model'], {'images_per_s': 0})['images_per_s']:
                best[r['model']] = r
    for name, r in best.items():
        color = 'tab:red' if name.startswith('cmt') else 'tab:gray'
        axes.scatter(r['images_per_s'], TOP1[name], color=color)
        point = (r['images_per_s'], TOP1[name])
        axes.annotate(f'{name} ({r["form"]})', point, xytext=(5, 4), textcoords='offset points')
    axes.set(xscale='log', xlabel='images/s, inference', ylabel='ImageNet top-1 as published (%)')
    axes.margins(0.2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def check_plot(parser: argparse.ArgumentParser, path: Path, cases: list[tuple[str, str, str]]) -> list[str]:
    """The models that the picture leaves out; what cannot be drawn is refused."""
    from matplotlib.backend_bases import FigureCanvasBase
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        parser.error(f'--plot {path}: the name must end in one of .{", .".join(sorted(known))}')
    drawn = {name for name, mode, form in cases if is_plotted(name, mode, form)}
    if not drawn:
        parser.error(f'--plot {path}: nothing to draw, it is of inference in forms but the reference, by models whose '
                     f'published top-1 is known: {", ".join(TOP1)}')
    return list(dict.fromkeys(name for name, mode, _ in cases if name not in drawn))


def case_group(text: str) -> tuple[str, str, int, int, list[str]]:
    """A type for argparse."""
    try:
        name, mode, size, batch, forms = text.split(':')
        if mode not in ('infer', 'train') or int(batch) < 1 or not set(forms.split(',')) <= set(FORMS):
            raise ValueError
        return name, mode, int(size), int(batch), forms.split(',')
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not MODEL:MODE:SIZE:BATCH:FORM,FORM, as in cmt_s:infer:224:8:eager,fused") from None


def main() -> None:
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
                        help='these in the place of all combinations of the above, for lines that differ in more')
    parser.add_argument('--repeats', type=positive, default=7)
    parser.add_argument('--seconds', type=amount, default=1.0, help='at least, of each of the repeats')
    parser.add_argument('--json', type=output_file, metavar='FILE')
    parser.add_argument('--markdown', action='store_true')
    parser.add_argument('--plot', type=output_file, metavar='PNG')
    args = parser.parse_args()
    groups = [(mode, batch, size, [name], forms) for name, mode, size, batch, forms in args.cases or []] or [
        (mode, batch, size, args.models, args.forms)
        for mode, batch, size in itertools.product(args.modes, args.batches, args.sizes or [None])]
    unknown = [name for group in groups for name in group[3] if not timm.is_model(name)]
    if unknown:
        parser.error(f'unknown model {unknown[0]}')
    wrong = [size for _, _, size, _, _ in groups if size is not None and (size < 32 or size % 32)]
    if wrong:
        parser.error(f'size {wrong[0]}: sizes are multiples of 32')
    if 'cpu' in args.devices and any('kernels' in group[4] for group in groups):
        parser.error('the form kernels is for --devices cuda')
    if 'cuda' in args.devices and not torch.cuda.is_available():
        parser.error('--devices cuda: no CUDA device here')
    found = [(name, mode, form) for mode, _, _, models, forms in groups for name in models
             for form in possible(name, mode, forms)]
    if not found:
        parser.error('nothing to measure: CMT does not train in the form fused, other models have eager and compiled')
    left_out = check_plot(parser, args.plot, found) if args.plot else []
    # two images on the CPU take seconds; a model that fails later takes the figures of those before it along
    for name, mode, size, batch in dict.fromkeys(
            (name, mode, size, min(batch, 2)) for mode, batch, size, models, forms in groups for name in models
            if possible(name, mode, forms)):
        try:
            Case(name, mode, 'eager', torch.device('cpu'), 'float32', batch, size).step()
        except Exception as error:  # whatever timm's models raise
            reason = ' '.join(str(error).split()) or type(error).__name__
            parser.error(f'{name} cannot {mode} at {f"{size} px" if size else "its own size"}, batch {batch}: {reason}')
    if left_out:
        print(f'--plot leaves out {", ".join(left_out)}: no published top-1 is known here, or nothing of it to draw',
              file=sys.stderr)

    records = []
    for device, dtype, (mode, batch, size, models, forms) in itertools.product(args.devices, args.dtypes, groups):
        device = torch.device(device)
        cases = []
        for name in models:
            for form in possible(name, mode, forms):
                print(f'{name} {mode} {form} {dtype} batch {batch} on {device}', file=sys.stderr, flush=True)
                cases.append(Case(name, mode, form, device, dtype, batch, size))
        peak = peak_flops(device, dtype)
        for case in cases:
            case.step()
        for _ in range(args.repeats):
            for case in cases:
                case.time(args.seconds)
        records += [case.record(peak) for case in cases]
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
        return
    for r in records:
        ratio = f"  {r['ratio']:.2f} x reference" if r['ratio'] else ''
        ratio += f" ({r['cpu_ratio']:.2f} by processor time)" if r['cpu_ratio'] else ''
        compiled = f"  compiled in {r['compile_s']:.0f} s" if r['compile_s'] else ''
        print(f"{r['model']:<14} {r['mode']:<6}{r['form']:<10} {r['dtype']:<9} batch {r['batch']:<4} {r['size']} px  "
              f"{r['images_per_s']:9.1f} images/s ({r['images_per_s_min']:.1f} to {r['images_per_s_max']:.1f})"
              f"  {100 * r['share_of_peak']:3.0f} % of peak{ratio}{compiled}")


if __name__ == '__main__':
    main()
