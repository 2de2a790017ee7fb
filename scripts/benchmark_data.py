"""python scripts/benchmark_data.py --data-path imagenet --sizes 224 160 --workers 0 8

Measure the images per second of the training loaders under the published augmentation: in all, per core and by stage,
up to the normalised float batch on the device.

Loaders without workers alternate batch by batch, so that a slower minute of the machine slows down both. Figures are
medians over epochs. A core's figure without workers is images per second of processor time: other jobs do not count.
"""
import argparse
import json
import math
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from timm.data.random_erasing import RandomErasing
from timm.utils import random_seed
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils  # noqa: E402
from datasets import UnreadableImage, build_dataset, build_loader, collate, one_line  # noqa: E402
from engine import Prepare  # noqa: E402
from fast_transforms import FastTransform  # noqa: E402
from options import Parser, count, number, output_file, path, positive, rate  # noqa: E402
from samplers import TrainSampler  # noqa: E402
from sources import EncodedImages, ImageFolder, has_part, open_image  # noqa: E402
from transforms import build_transform  # noqa: E402
from weights import create_cmt  # noqa: E402

STAGES = ('read', 'decode', 'crop and resize', 'augment', 'collate', 'to device')


def make_images(folder: Path, count: int) -> Path:
    """Write `count` JPEGs of ImageNet's mean size, 500 x 375 pixels and about 105 KB."""
    rng = np.random.default_rng(0)
    (folder / 'train' / 'made').mkdir(parents=True)
    for i in range(count):
        pixels = sum(
            np.asarray(Image.fromarray(rng.integers(0, 256, (375 // cell, 500 // cell, 3), dtype=np.uint8)).resize(
                (500, 375), Image.Resampling.BICUBIC), np.float32) * share
            for cell, share in ((75, 0.5), (25, 0.18), (5, 0.12), (1, 0.2)))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / 'train' / 'made' / f'{i:03d}.jpg', quality=92)
    return folder


def open_images(path: str, loader: str, size: int) -> EncodedImages:
    """Open the part train/ or val/ at `path`, or `path` itself as a folder of classes."""
    transform = build_transform(True, size)
    if loader == 'fast':
        transform = FastTransform(transform)
    for part in 'train', 'val':
        if has_part(path, part):
            return build_dataset('IMNET', part == 'train', path, size, transform)
    return ImageFolder(path, transform)


def measure_listing(folder: Path, count: int) -> str:
    """Return a line on the time and memory that a process needs to list `count` images in 1,000 class folders.

    The images are links to one file for each class, since listing does not read files.
    """
    for label in range(1000):
        first = folder / 'train' / f'n{label:08d}' / f'n{label:08d}_0.JPEG'
        first.parent.mkdir(parents=True)
        first.touch()
        for i in range(1, len(range(label, count, 1000))):
            os.link(first, first.with_name(f'n{label:08d}_{i}.JPEG'))
    before, began = utils.memory_mb(torch.device('cpu')), time.process_time()
    images = len(build_dataset('IMNET', True, str(folder), 224))
    seconds, after = time.process_time() - began, utils.memory_mb(torch.device('cpu'))
    return (f'{images} images in 1000 folders: {seconds:.2f} s of processor time, peak memory {after:.0f} MiB, '
            f'{before:.0f} MiB of it before the listing (imports of torch, torchvision and timm)')


class Case:
    """Measure one loader at one input size with a number of workers."""

    def __init__(self, args: argparse.Namespace, loader: str, size: int, workers: int, device: torch.device):
        self.loader, self.size, self.workers, self.device = loader, size, workers, device
        self.batch_size = args.batch_size
        self.dataset = open_images(args.data_path, loader, size)
        self.sampler = TrainSampler(
            len(self.dataset), args.batch_size, repeats=3 if args.repeated_aug else 1, even=True)
        self.batches = build_loader(
            self.dataset, args.batch_size, sampler=self.sampler, num_workers=workers, pin_memory=device.type == 'cuda')
        self.prepare = Prepare(device, erasing=RandomErasing(0.25, mode='pixel', max_count=1, device=device))
        self.clear()

    def clear(self) -> None:
        """Drop the figures of earlier epochs."""
        self.per_s: list[float] = []
        self.per_s_per_core: list[float] = []
        self.stages: list[dict[str, float]] = []

    def prepare_batch(self, batch: tuple[torch.Tensor, torch.Tensor], seed: int) -> None:
        """Normalise and erase a batch on the device, and wait for the device."""
        random_seed(seed)
        self.prepare(*batch)
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def run(self, epoch: int) -> Iterator[None]:
        """Measure one epoch, yielding after each batch."""
        self.sampler.set_position(epoch)
        images, seconds, busy, batches = 0, 0., 0., iter(self.batches)
        for step in range(len(self.batches)):
            began, used = time.perf_counter(), time.process_time()
            batch = next(batches)
            self.prepare_batch(batch, step)
            seconds += time.perf_counter() - began
            busy += time.process_time() - used
            images += len(batch[1])
            yield
        self.per_s.append(images / seconds)
        cores = min(self.workers, utils.cores())
        self.per_s_per_core.append(images / seconds / cores if cores else images / busy)

    def run_stages(self, epoch: int) -> None:
        """Measure the processor time of each stage (ms per image) over one epoch in this process."""
        clock, transform = Clock(), self.dataset.transform
        self.sampler.set_position(epoch)
        pairs = list(self.sampler)
        for at in range(0, len(pairs), self.batch_size):
            samples = []
            for index, seed in pairs[at:at + self.batch_size]:
                random_seed(seed)
                clock.start()
                data = self.dataset.read(index)
                clock.lap('read')
                if self.loader == 'fast':
                    plan = transform.plan(data)
                    pixels = transform.decode(plan)
                    clock.lap('decode')
                    pixels = transform.resize(pixels, plan)
                    clock.lap('crop and resize')
                    image = transform.augment(pixels)
                else:
                    image = open_image(data)
                    clock.lap('decode')
                    image = transform.transforms[0](image)
                    clock.lap('crop and resize')
                    for step in transform.transforms[1:]:
                        image = step(image)
                clock.lap('augment')
                samples.append((image, 0))
            clock.start()
            batch = collate(samples)
            clock.lap('collate')
            self.prepare_batch(batch, at)
            clock.lap('to device')
        self.stages.append({stage: 1000 * clock.spent[stage] / len(pairs) for stage in STAGES})

    def record(self) -> dict:
        """Return the medians and ranges of all epochs."""
        figures = {}
        for name, values in (('images_per_s', self.per_s), ('images_per_s_per_core', self.per_s_per_core)):
            figures |= {name: statistics.median(values), f'{name}_min': min(values), f'{name}_max': max(values)}
        return {
            'loader': self.loader, 'size': self.size, 'workers': self.workers, 'device': self.device.type,
            'batch': self.batch_size, **figures, 'repeats': len(self.per_s),
            'stages_ms': {stage: statistics.median(s[stage] for s in self.stages) for stage in STAGES}
            if self.stages else None,
        }


class Clock:
    """Sum the processor time of each stage (s)."""

    def __init__(self):
        self.spent = dict.fromkeys(STAGES, 0.)

    def start(self) -> None:
        self.began = time.process_time()

    def lap(self, stage: str) -> None:
        self.spent[stage] += time.process_time() - self.began
        self.start()


def measure(args: argparse.Namespace, cases: list[Case]) -> list[dict]:
    """Measure all cases `args.repeats` times.

    One more epoch comes first: caches fill and workers start. Cases with workers do not alternate with others: workers
    would go on loading while another case is measured.
    """
    alone = [case for case in cases if case.workers]
    alternating = [case for case in cases if not case.workers]
    for epoch in range(args.repeats + 1):
        for group in [alternating, *([case] for case in alone)]:
            running = [case.run(epoch) for case in group]
            while running:
                running = [run for run in running if next(run, run) is None]
            for case in group:
                if args.stages and not case.workers:
                    case.run_stages(epoch)
        if epoch == 0:
            for case in cases:
                case.clear()
    records = [case.record() for case in cases]
    for record, case in zip(records, cases):
        reference = next((other for other in cases if other.loader == 'reference' and
                          (other.size, other.workers) == (case.size, case.workers)), None)
        record['ratio'] = statistics.median(
            a / b for a, b in zip(case.per_s_per_core, reference.per_s_per_core)) if reference else None
    return records


def table(records: list[dict]) -> str:
    """Return the records as Markdown."""
    lines = ['| loader | pixels | workers | images/s (smallest to largest) | images/s a core (smallest to largest) '
             '| x reference |', '|---' * 6 + '|']
    for r in records:
        ratio = f"{r['ratio']:.2f}" if r['ratio'] else ''
        lines.append(
            f"| {r['loader']} | {r['size']} | {r['workers']} "
            f"| {r['images_per_s']:.0f} ({r['images_per_s_min']:.0f} to {r['images_per_s_max']:.0f}) "
            f"| {r['images_per_s_per_core']:.0f} "
            f"({r['images_per_s_per_core_min']:.0f} to {r['images_per_s_per_core_max']:.0f}) | {ratio} |")
    staged = [r for r in records if r['stages_ms']]
    if staged:
        lines += ['', f"| ms an image on one core | {' | '.join(STAGES)} |", '|---' * (len(STAGES) + 1) + '|']
        lines += [f"| {r['loader']}, {r['size']} px | " + ' | '.join(f"{r['stages_ms'][s]:.2f}" for s in STAGES) + ' |'
                  for r in staged]
    return '\n'.join(lines)


def training_rate(model_name: str, size: int, batch: int, device: torch.device) -> float:
    """Measure the images per second of forward, backward and update for 20 s.

    As in train.py, arithmetic is float32 on a CPU and bfloat16 autocast on CUDA.
    """
    model = create_cmt(model_name, img_size=size).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    images = torch.randn(batch, 3, size, size, device=device)
    targets = torch.zeros(batch, dtype=torch.long, device=device)
    rates, began = [], time.perf_counter()
    while len(rates) < 4 or time.perf_counter() - began < 20:
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        rates.append(batch / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def compare(args: argparse.Namespace, columns: int = 8) -> None:
    """Draw what both loaders return for the same draws, and eight times their difference."""
    size = args.sizes[0]
    rows = []
    for loader in 'reference', 'fast':
        dataset = open_images(args.data_path, loader, size)
        rows.append([])
        for i in np.linspace(0, len(dataset) - 1, columns).astype(int).tolist():
            random_seed(i)
            rows[-1].append(dataset[i][0])  # (3, size, size), uint8
    differences = [(a.short() - b).abs() for a, b in zip(*rows)]
    print(f'mean absolute difference {torch.stack(differences).float().mean():.2f} of 255')
    enlarged = [(8 * difference).clamp(max=255).byte() for difference in differences]
    grid = to_pil_image(make_grid([*rows[0], *rows[1], *enlarged], columns, padding=0))
    draw, font_size = ImageDraw.Draw(grid), max(size // 12, 1)
    for y, text in enumerate(('reference', 'fast', '8 x difference')):
        draw.text((4, y * size + 2), text, fill='white', stroke_width=2, stroke_fill='black', font_size=font_size)
    grid.save(args.compare)


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog='benchmark_data.py', description=__doc__.split('\n\n')[1])
    parser.add_argument('--data-path', type=path, help='folder with train/ or val/, folder of classes, or tar '
                                            '(default: JPEGs made for the benchmark)')
    parser.add_argument('--images', type=positive, default=250, help='number of JPEGs to make without --data-path')
    parser.add_argument('--loaders', nargs='+', default=['reference', 'fast'], choices=('reference', 'fast'))
    parser.add_argument('--sizes', nargs='+', type=positive, default=[224], help='input sizes (pixels)')
    parser.add_argument('--workers', nargs='+', type=count, default=[0],
                        help='numbers of loader processes; 0 loads in the main process')
    parser.add_argument('--batch-size', type=positive, default=50)
    parser.add_argument('--repeated-aug', action='store_true', help='load three copies of each image in a row')
    parser.add_argument('--repeats', type=positive, default=5, help='measured epochs')
    parser.add_argument('--stages', action='store_true', help='also measure each stage')
    parser.add_argument('--model', help='also measure the training speed of this CMT, and print the cores that feed it')
    parser.add_argument('--rates', nargs='+', type=rate, default=[],
                        help='print the cores that load these numbers of images per second')
    parser.add_argument('--compare', type=output_file, metavar='PNG',
                        help="draw both loaders' images of the same draws, and measure nothing")
    parser.add_argument('--listing', type=number(int, 1000), metavar='N',
                        help='measure what listing N images in 1,000 folders costs a process, and nothing else; '
                        'TMPDIR=/dev/shm keeps the disk out of it')
    parser.add_argument('--json', type=output_file, metavar='FILE',
                        help='write all figures with versions and hardware to this file')
    return parser


def check_model(args: argparse.Namespace) -> None:
    """Raise ValueError if --model cannot be built at one of --sizes."""
    for size in args.sizes if args.model else []:
        try:
            create_cmt(args.model, img_size=size, device='meta')
        except (RuntimeError, ValueError) as error:
            raise ValueError(f'--model {args.model} at {size} px: {one_line(error)}') from error


def rates_to_feed(args: argparse.Namespace, device: torch.device) -> list[tuple[str, float, int | None]]:
    """Return (name, images per second, input size or None for all) of --rates and --model."""
    rates = [(f'{needed:g} images/s', needed, None) for needed in args.rates]
    for size in args.sizes if args.model else []:
        try:
            needed = training_rate(args.model, size, args.batch_size, device)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f'--model {args.model} at {size} px, --batch-size {args.batch_size}: {one_line(error)}') from error
        rates.append((f'{args.model} at {size} px, which trains at {needed:.0f} images/s here', needed, size))
    return rates


def report(records: list[dict], device: torch.device) -> dict:
    """Return the records with the command, versions and hardware."""
    installed = {package.name.lower(): package.version for package in distributions()}
    names = ('torch', 'torchvision', 'timm', 'Pillow', 'simplejpeg', 'opencv-python', 'opencv-python-headless')
    return {
        'command': f'python {shlex.join(sys.argv)}', 'processor': utils.processor(), 'cores': utils.cores(),
        'device': torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu', 'load': os.getloadavg(),
        'versions': {name: installed[name.lower()] for name in names if name.lower() in installed},
        'records': records,
    }


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if args.compare and args.compare.suffix.lower() != '.png':
        parser.error(f'--compare {args.compare}: give the name of a .png file')
    torch.set_num_threads(1)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    with tempfile.TemporaryDirectory() as folder:
        try:
            if args.listing:
                print(measure_listing(Path(folder), args.listing))
                return
            check_model(args)
            args.data_path = args.data_path or str(make_images(Path(folder), args.images))
            if args.compare:
                compare(args)
                return
            cases = [Case(args, loader, size, workers, device)
                     for size in args.sizes for workers in args.workers for loader in args.loaders]
            rates = rates_to_feed(args, device)  # a mistake here must not cost the loaders' figures
            records = measure(args, cases)
        except (OSError, UnreadableImage) as error:
            reason = error.line if isinstance(error, UnreadableImage) else one_line(error)
            parser.error(f'--data-path {args.data_path}: {reason}')
        except ValueError as error:
            parser.error(one_line(error))
    print(table(records))
    for name, needed, size in rates:
        for r in records:
            if r['workers'] == args.workers[0] and size in (None, r['size']):
                cores = math.ceil(needed / r['images_per_s_per_core'])
                print(f"{name}: {cores} cores with the {r['loader']} loader at {r['size']} px")
    if args.json:
        args.json.write_text(json.dumps(report(records, device), indent=1) + '\n')


if __name__ == '__main__':
    main()
