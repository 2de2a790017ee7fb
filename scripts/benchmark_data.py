"""python scripts/benchmark_data.py --data-path /path/to/imagenet --loaders reference fast --sizes 224 160 --workers 0

Images per second of the training loader under the published augmentation, in all, a core and stage by stage, up to the
normalised float batch on the device.

Both loaders take turns, batch by batch, so that a machine that slows down slows both; figures are medians of epochs. A
core's figure is images per second of processor time, which other jobs of the machine do not count in.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import transforms  # noqa: E402
import utils  # noqa: E402
from checkpoints import create_cmt  # noqa: E402
from datasets import UnreadableImage, build_dataset, build_loader, build_transform, collate, one_line  # noqa: E402
from options import Parser, count, output_file, positive, rate  # noqa: E402
from samplers import TrainSampler  # noqa: E402
from sources import EncodedImages, ImageFolder, has_part  # noqa: E402

STAGES = ('read', 'decode', 'crop and resize', 'augment', 'collate', 'to device')


def make_images(folder: Path, count: int) -> Path:
    """`count` JPEGs of ImageNet's mean size, 500 x 375 pixels and about 105 KB, for want of real ones."""
    rng = np.random.default_rng(0)
    (folder / 'train' / 'made').mkdir(parents=True)
    for i in range(count):
        pixels = sum(
            np.asarray(Image.fromarray(rng.integers(0, 256, (375 // cell, 500 // cell, 3), dtype=np.uint8)).resize(
                (500, 375), Image.Resampling.BICUBIC), np.float32) * share
            for cell, share in ((75, 0.5), (25, 0.18), (5, 0.12), (1, 0.2)))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / 'train' / 'made' / f'{i:03d}.jpg', quality=92)
    return folder


def open_images(path: str, loader: str, size: int, copies: bool) -> EncodedImages:
    transform = build_transform(True, size, fast=loader == 'fast', keep_decoded=copies)
    part = next((part for part in ('train', 'val') if has_part(path, part)), None)
    if part is None:  # a folder of classes
        return ImageFolder(path, transform)
    return build_dataset('IMNET', part == 'train', path, size, transform)


class Case:
    """One loader at one size with so many workers."""

    def __init__(self, args: argparse.Namespace, loader: str, size: int, workers: int, device: torch.device):
        self.loader, self.size, self.workers, self.device = loader, size, workers, device
        self.dataset = open_images(args.data_path, loader, size, args.repeated_aug)
        self.sampler = TrainSampler(
            len(self.dataset), args.batch_size, repeats=3 if args.repeated_aug else 1, even=True)
        self.batches = build_loader(
            self.dataset, args.batch_size, sampler=self.sampler, num_workers=workers, pin_memory=device.type == 'cuda')
        self.prepare = transforms.Prepare(device, erasing=RandomErasing(0.25, mode='pixel', max_count=1, device=device))
        self.batch_size = args.batch_size
        self.forget()

    def forget(self) -> None:
        self.per_s: list[float] = []
        self.per_s_per_core: list[float] = []
        self.stages: list[dict[str, float]] = []

    def wait(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def run(self, epoch: int) -> Iterator[None]:
        """One more figure: an epoch, yielding at each batch."""
        self.sampler.set_position(epoch)
        images, seconds, busy, batches = 0, 0., 0., iter(self.batches)
        for step in range(len(self.batches)):
            began, used = time.perf_counter(), time.process_time()
            batch = next(batches)
            random_seed(step)
            self.prepare(*batch)
            self.wait()
            seconds += time.perf_counter() - began
            busy += time.process_time() - used
            images += len(batch[1])
            yield
        self.per_s.append(images / seconds)
        cores = min(self.workers, utils.cores())
        self.per_s_per_core.append(images / seconds / cores if cores else images / busy)

    def run_stages(self, epoch: int) -> None:
        """Milliseconds of processor time an image of each stage, over one epoch in this process."""
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
                    image = transforms.open_image(data)
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
            random_seed(at)
            clock.start()
            self.prepare(*batch)
            self.wait()
            clock.lap('to device')
        self.stages.append({stage: 1000 * clock.spent[stage] / len(pairs) for stage in STAGES})

    def record(self) -> dict:
        return {
            'loader': self.loader, 'size': self.size, 'workers': self.workers, 'device': self.device.type,
            'batch': self.batch_size, 'images_per_s': statistics.median(self.per_s),
            'images_per_s_min': min(self.per_s), 'images_per_s_max': max(self.per_s),
            'images_per_s_per_core': statistics.median(self.per_s_per_core),
            'images_per_s_per_core_min': min(self.per_s_per_core),
            'images_per_s_per_core_max': max(self.per_s_per_core), 'repeats': len(self.per_s),
            'stages_ms': {stage: statistics.median(s[stage] for s in self.stages) for stage in STAGES}
            if self.stages else None,
        }


class Clock:
    """Processor time by stage."""

    def __init__(self):
        self.spent = dict.fromkeys(STAGES, 0.)

    def start(self) -> None:
        self.began = time.process_time()

    def lap(self, stage: str) -> None:
        now = time.process_time()
        self.spent[stage] += now - self.began
        self.began = now


def turns(cases: list[Case]) -> list[list[Case]]:
    """Cases that take turns batch by batch: those without workers, which would go on while it is another's turn."""
    groups = [[case for case in cases if not case.workers], *([case] for case in cases if case.workers)]
    return [group for group in groups if group]


def add_ratios(records: list[dict], cases: list[Case]) -> None:
    """Against the reference loader with the same size and workers: the median of the rounds' ratios."""
    for record, case in zip(records, cases):
        of = next((c for c in cases if c.loader == 'reference' and (c.size, c.workers) == (case.size, case.workers)),
                  None)
        record['ratio'] = statistics.median(
            a / b for a, b in zip(case.per_s_per_core, of.per_s_per_core)) if of else None


def table(records: list[dict]) -> str:
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


def training_rate(model_name: str, size: int, batch: int, device: torch.device, seconds: float = 20.) -> float:
    """Images per second that training takes: forward, backward and update in the precision that train.py chooses."""
    model = create_cmt(model_name, img_size=size).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    images = torch.randn(batch, 3, size, size, device=device)
    targets = torch.zeros(batch, dtype=torch.long, device=device)
    rates, began = [], time.perf_counter()
    while len(rates) < 4 or time.perf_counter() - began < seconds:
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


def compare(args: argparse.Namespace, path: Path, columns: int = 8) -> None:
    """A picture of what both loaders make of the same draws, and of eight times their difference."""
    size = args.sizes[0]
    made = {loader: open_images(args.data_path, loader, size, False) for loader in ('reference', 'fast')}
    picked = np.linspace(0, len(made['fast']) - 1, columns).astype(int)
    rows, difference = [], []
    for dataset in made.values():
        images = []
        for i in picked.tolist():
            random_seed(i)
            images.append(dataset[i][0].permute(1, 2, 0).numpy())
        rows.append(images)
    for a, b in zip(*rows):
        difference.append(np.abs(a.astype(int) - b))
    print(f'mean absolute difference {np.mean(difference):.2f} of 255')
    rows.append([np.clip(8 * d, 0, 255).astype(np.uint8) for d in difference])
    grid = Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows]))
    draw, font_size = ImageDraw.Draw(grid), max(size // 12, 1)
    for y, text in enumerate(('reference', 'fast', '8 x difference')):
        draw.text((4, y * size + 2), text, fill='white', stroke_width=2, stroke_fill='black', font_size=font_size)
    grid.save(path)


def measure(args: argparse.Namespace, cases: list[Case]) -> None:
    for round_ in range(-1, args.repeats):
        for group in turns(cases):
            running = [case.run(round_ + 1) for case in group]
            while running:  # a batch each
                running = [run for run in running if next(run, run) is None]
            for case in group:
                if args.stages and not case.workers:
                    case.run_stages(round_ + 1)
        if round_ < 0:  # caches fill, workers start
            for case in cases:
                case.forget()


def main() -> None:
    parser = Parser(prog='benchmark_data.py', description=__doc__.split('\n\n')[1])
    parser.add_argument('--data-path', help='folder of classes, one with train/, or a tar; JPEGs made here without it')
    parser.add_argument('--images', type=positive, default=250, help='JPEGs to make')
    parser.add_argument('--loaders', nargs='+', default=['reference', 'fast'], choices=('reference', 'fast'))
    parser.add_argument('--sizes', nargs='+', type=positive, default=[224], help='input sizes (pixels)')
    parser.add_argument('--workers', nargs='+', type=count, default=[0], help='loader processes; 0: in this process')
    parser.add_argument('--batch-size', type=positive, default=50)
    parser.add_argument('--repeated-aug', action='store_true', help='three copies of each image in a row')
    parser.add_argument('--repeats', type=positive, default=5, help='rounds, an epoch each')
    parser.add_argument('--stages', action='store_true', help='also time each stage')
    parser.add_argument('--model', help='also measure how fast this CMT trains here, and the cores that it needs')
    parser.add_argument('--rates', nargs='+', type=rate, default=[], help='images/s to feed: the cores that they need')
    parser.add_argument('--compare', type=output_file, metavar='PNG',
                        help="draw both loaders' images of the same draws, and stop")
    parser.add_argument('--json', type=output_file, metavar='FILE', help='all figures, with versions and hardware')
    args = parser.parse_args()
    if args.compare and args.compare.suffix.lower() != '.png':
        parser.error(f'--compare {args.compare}: give the name of a .png file')
    torch.set_num_threads(1)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    rates = {f'{needed:g} images/s': (needed, None) for needed in args.rates}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for size in args.sizes if args.model else []:
                create_cmt(args.model, img_size=size, device='meta')
        except (RuntimeError, ValueError) as error:
            parser.error(f'--model {args.model} at {size} px: {one_line(error)}')
        try:
            args.data_path = args.data_path or str(make_images(Path(folder), args.images))
            if args.compare:
                compare(args, args.compare)
                return
            cases = [Case(args, loader, size, workers, device)
                     for size in args.sizes for workers in args.workers for loader in args.loaders]
        except (OSError, ValueError) as error:
            parser.error(one_line(error))
        try:  # before the loaders, whose figures it would lose
            for size in args.sizes if args.model else []:
                needed = training_rate(args.model, size, args.batch_size, device)
                rates[f'{args.model} at {size} px, which trains at {needed:.0f} images/s here'] = (needed, size)
        except (RuntimeError, ValueError) as error:
            parser.error(f'--model {args.model} at {size} px, --batch-size {args.batch_size}: {one_line(error)}')
        try:
            measure(args, cases)
        except (OSError, UnreadableImage) as error:
            reason = error.line if isinstance(error, UnreadableImage) else one_line(error)
            parser.error(f'--data-path {args.data_path}: {reason}')
        records = [case.record() for case in cases]
        add_ratios(records, cases)
    print(table(records))
    for name, (needed, size) in rates.items():
        for r in records:
            if r['workers'] == args.workers[0] and size in (None, r['size']):
                cores = math.ceil(needed / r['images_per_s_per_core'])
                print(f"{name}: {cores} cores with the {r['loader']} loader at {r['size']} px")
    if args.json:
        installed = {package.name.lower(): package.version for package in distributions()}
        report = {
            'command': f'python {shlex.join(sys.argv)}', 'processor': utils.processor(),
            'cores': utils.cores(), 'device': torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu',
            'load': os.getloadavg(),
            'versions': {name: installed[name.lower()] for name in (
                'torch', 'torchvision', 'timm', 'Pillow', 'simplejpeg', 'opencv-python', 'opencv-python-headless')
                if name.lower() in installed},
            'records': records,
        }
        args.json.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()
