"""python scripts/benchmark_data.py --data-path imagenet --loaders reference fast timm torchvision --sizes 224 160

Measure the images per second of the training loaders under the published augmentation: in all, per core and by stage,
up to the normalised float batch on the device. Other libraries' loaders follow the recipe as far as they can.

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
from timm.data import create_loader
from timm.data.random_erasing import RandomErasing
from timm.utils import random_seed
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

import _path
import utils
from datasets import build_dataset
from engine import Preprocessor
from errors import UnreadableImage, one_line
from fast_transforms import FastTransform
from loader import build_loader, collate
from options import Parser, count, in_range, output_file, path, positive, rate
from samplers import TrainSampler
from sources import EncodedImages, ImageFolder, has_split, open_image
from transforms import build_transform
from weights import create_cmt

assert _path.ROOT  # importing _path puts the repository on sys.path

LEAVES_OUT = {  # of the recipe
    'reference': '', 'fast': '', 'timm': '',
    'torchvision': "RandAugment with torchvision's operations, of one strength (no mstd0.5, inc1), bilinear",
    'dali': "RandAugment with DALI's operations, of one strength (no mstd0.5, inc1)",
}
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


def torchvision_transform(size: int) -> v2.Compose:
    """Return torchvision's transforms v2 on uint8 tensors.

    Pillow takes_bytes, as in torchvision's reference scripts: torchvision's own decoders are deprecated since 0.29.
    """
    return v2.Compose([
        v2.PILToTensor(),
        v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        v2.RandAugment(2, 9, interpolation=v2.InterpolationMode.BILINEAR),
    ])


class DaliBatches:
    """Decode and augment by DALI's CPU pipeline: uint8 images (B, 3, H, W), in the data set's order.

    Nothing is loaded ahead of time, so that processor time belongs to the batch that is measured.
    """

    def __init__(self, dataset: EncodedImages, size: int, batch_size: int, threads: int):
        try:
            from nvidia.dali import fn, pipeline_def, types
            from nvidia.dali.auto_aug import rand_augment
        except ImportError:
            raise ValueError('--loaders dali needs DALI: pip install nvidia-dali-cuda120') from None

        @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None, enable_conditionals=True, seed=0,
                      exec_pipelined=False, exec_async=False, prefetch_queue_depth=1)
        def pipeline():
            encoded = fn.external_source(batch=False, source=lambda sample: np.frombuffer(
                dataset.read(sample.idx_in_epoch % len(dataset)), np.uint8))
            images = fn.decoders.image_random_crop(
                encoded, output_type=types.RGB, random_area=[0.08, 1], random_aspect_ratio=[3 / 4, 4 / 3])
            images = fn.resize(images, size=[size, size], interp_type=types.INTERP_CUBIC, antialias=True)
            images = fn.flip(images, horizontal=fn.random.coin_flip())
            return rand_augment.rand_augment(images, n=2, m=9, shape=[size, size])

        self.pipeline = pipeline()
        self.pipeline.build()
        self.batch_size, self.batches = batch_size, len(dataset) // batch_size

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(self.batches):
            images = torch.from_numpy(np.array(self.pipeline.run()[0].as_tensor())).permute(0, 3, 1, 2)
            yield images, torch.zeros(self.batch_size, dtype=torch.long)


def open_images(path: str, loader: str, size: int) -> EncodedImages:
    """Open the part train/ or val/ at `path`, or `path` itself as a folder of classes."""
    transform = torchvision_transform(size) if loader == 'torchvision' else build_transform(True, size)
    if loader == 'fast':
        transform = FastTransform(transform)
    for part in 'train', 'val':
        if has_split(path, part):
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
    """Measure one loader on one form of the data, at one input size, with a number of workers."""

    def __init__(
            self, args: argparse.Namespace, data: str, loader: str, size: int, workers: int, device: torch.device):
        self.data, self.loader, self.size, self.workers, self.device = data, loader, size, workers, device
        self.batch_size = args.batch_size
        self.dataset = open_images(args.data_path if data == 'original' else args.prepared, loader, size)
        self.sampler = TrainSampler(
            len(self.dataset), args.batch_size, repeats=3 if args.repeated_aug else 1, even=True)
        if loader == 'timm':
            self.batches = create_loader(
                self.dataset, size, args.batch_size, is_training=True, re_prob=0.25, re_mode='pixel', re_count=1,
                auto_augment='rand-m9-mstd0.5-inc1', interpolation='bicubic', num_workers=workers, device=device,
                num_aug_repeats=0, persistent_workers=workers > 0, pin_memory=device.type == 'cuda')
        elif loader == 'dali':
            self.batches = DaliBatches(self.dataset, size, args.batch_size, max(workers, 1))
        else:
            self.batches = build_loader(
                self.dataset, args.batch_size, sampler=self.sampler, num_workers=workers,
                pin_memory=device.type == 'cuda')
        self.prepare = Preprocessor(device, erasing=RandomErasing(0.25, mode='pixel', max_count=1, device=device))
        self.clear()

    def clear(self) -> None:
        """Drop the figures of earlier epochs."""
        self.per_s: list[float] = []
        self.per_s_per_core: list[float] = []
        self.stages: list[dict[str, float]] = []

    def prepare_batch(self, batch: tuple[torch.Tensor, torch.Tensor], seed: int) -> None:
        """Normalise and erase a batch on the device, which timm's loader has done, and wait for the device."""
        random_seed(seed)
        if self.loader != 'timm':
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
            'data': self.data, 'loader': self.loader, 'size': self.size, 'workers': self.workers,
            'device': self.device.type,
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
                if args.stages and not case.workers and case.loader in ('reference', 'fast'):
                    case.run_stages(epoch)
        if epoch == 0:
            for case in cases:
                case.clear()
    records = [case.record() for case in cases]
    for record, case in zip(records, cases):
        reference = next((other for other in cases if (other.data, other.loader) == ('original', 'reference') and
                          (other.size, other.workers) == (case.size, case.workers)), None)
        record['ratio'] = statistics.median(
            a / b for a, b in zip(case.per_s_per_core, reference.per_s_per_core)) if reference else None
    return records


def table(records: list[dict]) -> str:
    """Return the records as Markdown."""
    lines = ['| data | loader | pixels | workers | images/s (smallest to largest) '
             '| images/s a core (smallest to largest) | x reference | differs from the recipe |', '|---' * 8 + '|']
    for r in records:
        ratio = f"{r['ratio']:.2f}" if r['ratio'] else ''
        lines.append(
            f"| {r['data']} | {r['loader']} | {r['size']} | {r['workers']} "
            f"| {r['images_per_s']:.0f} ({r['images_per_s_min']:.0f} to {r['images_per_s_max']:.0f}) "
            f"| {r['images_per_s_per_core']:.0f} "
            f"({r['images_per_s_per_core_min']:.0f} to {r['images_per_s_per_core_max']:.0f}) | {ratio} "
            f"| {LEAVES_OUT[r['loader']]} |")
    staged = [r for r in records if r['stages_ms']]
    if staged:
        lines += ['', f"| ms an image on one core | {' | '.join(STAGES)} |", '|---' * (len(STAGES) + 1) + '|']
        lines += [f"| {r['data']}, {r['loader']}, {r['size']} px | "
                  + ' | '.join(f"{r['stages_ms'][s]:.2f}" for s in STAGES) + ' |' for r in staged]
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
    """Draw what two loaders return for the same draws, and eight times their difference.

    The loaders are reference and fast, or with --prepared the fast one on both forms of the data. A crop there is the
    same part of the picture: drawn for the original, and scaled to the prepared image.
    """
    size, rows = args.sizes[0], ([], [])
    labels = ('original', 'prepared') if args.prepared else ('reference', 'fast')
    first, second = (open_images(args.data_path, loader, size) for loader in ('reference', 'fast'))
    prepared = open_images(args.prepared, 'fast', size) if args.prepared else None
    for i in np.linspace(0, len(second) - 1, columns).astype(int).tolist():
        for row, dataset in enumerate((second if prepared else first, prepared or second)):
            random_seed(i)
            rows[row].append(crop_of(second, prepared, i) if row and prepared else dataset[i][0])  # (3, size, size)
    differences = [(a.short() - b).abs() for a, b in zip(*rows)]
    print(f'mean absolute difference {torch.stack(differences).float().mean():.2f} of 255')
    enlarged = [(8 * difference).clamp(max=255).byte() for difference in differences]
    grid = to_pil_image(make_grid([*rows[0], *rows[1], *enlarged], columns, padding=0))
    draw, font_size = ImageDraw.Draw(grid), max(size // 12, 1)
    for y, text in enumerate((*labels, '8 x difference')):
        draw.text((4, y * size + 2), text, fill='white', stroke_width=2, stroke_fill='black', font_size=font_size)
    grid.save(args.compare, quality=90)


def crop_of(original: EncodedImages, prepared: EncodedImages, index: int) -> torch.Tensor:
    """Return the prepared image of a sample, cropped and augmented by the draws for the original."""
    transform = original.transform
    plan = transform.plan(original.read(index))
    if plan.box is None:  # small inputs are not cropped at random sizes
        return prepared[index][0]
    before, after = open_image(original.read(index)), open_image(prepared.read(index))
    scale = max(before.width / after.width, before.height / after.height)  # both, up to rounding
    return transform.augment(transform.resize(np.array(after), plan._replace(scale=scale)))


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog='benchmark_data.py', description=__doc__.split('\n\n')[1])
    parser.add_argument('--data-path', type=path, help='folder with train/ or val/, folder of classes, or tar '
                                            '(default: JPEGs made for the benchmark)')
    parser.add_argument('--images', type=positive, default=250, help='number of JPEGs to make without --data-path')
    parser.add_argument('--prepared', type=path, help='the same images, prepared by scripts/prepare_data.py: '
                        'each loader is measured on both')
    parser.add_argument('--loaders', nargs='+', default=['reference', 'fast'], choices=tuple(LEAVES_OUT),
                        help="this project's two loaders, and those of timm, torchvision (v2) and DALI (on the CPU; "
                        'pip install nvidia-dali-cuda120)')
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
    parser.add_argument('--compare', type=output_file, metavar='FILE',
                        help="draw both loaders' images of the same draws, or with --prepared the fast loader's from "
                        'both forms of the data, and measure nothing')
    parser.add_argument('--listing', type=in_range(int, 1000), metavar='N',
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
    names = ('torch', 'torchvision', 'timm', 'Pillow', 'simplejpeg', 'opencv-python', 'opencv-python-headless',
             'nvidia-dali-cuda120')
    return {
        'command': f'python {shlex.join(sys.argv)}', 'processor': utils.processor(), 'cores': utils.cores(),
        'device': torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu', 'load': os.getloadavg(),
        'versions': {name: installed[name.lower()] for name in names if name.lower() in installed},
        'records': records,
    }


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if args.compare and args.compare.suffix.lower() not in ('.png', '.jpg'):
        parser.error(f'--compare {args.compare}: give the name of a .png or .jpg file')
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
            forms = ['original', 'prepared'] if args.prepared else ['original']
            cases = [Case(args, data, loader, size, workers, device) for size in args.sizes for workers in args.workers
                     for data in forms for loader in args.loaders]
            if args.prepared and len({tuple(case.dataset.targets) for case in cases}) > 1:
                raise ValueError(f'--prepared {args.prepared} and --data-path {args.data_path} contain other images')
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
                print(f"{name}: {cores} cores with the {r['loader']} loader at {r['size']} px"
                      + (f" on {r['data']} images" if args.prepared else ''))
    if args.json:
        args.json.write_text(json.dumps(report(records, device), indent=1) + '\n')


if __name__ == '__main__':
    main()
