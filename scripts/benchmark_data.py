"""python scripts/benchmark_data.py --data-path imagenet --loaders reference fast timm torchvision --sizes 224 160

Measure the images per second of the training loaders, in total and per core, with the published augmentation. A
loader's result is the normalized float batch on the device. torchvision and DALI have their own RandAugment, with a
fixed strength (no mstd0.5, inc1); torchvision's is bilinear.

Loaders without workers alternate batch by batch, so that a slow minute of the machine affects all of them. Their images
per core are images per second of CPU time, which other jobs affect less. Results are medians over epochs.
"""
import argparse
import itertools
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.metadata import distributions

import _path
from errors import UsageError
from options import Parser, count, output_file, path, positive
from system import cores


@_path.parse_first
def build_parser() -> Parser:
    """Build the command-line parser."""
    parser = Parser(prog='benchmark_data.py', description=__doc__.split('\n\n')[1])
    parser.add_argument('--data-path', type=path, required=True,
                        help='folder with train/ or val/, folder of classes, or tar')
    parser.add_argument('--prepared', type=path, help='the same images, prepared by scripts/prepare_data.py: '
                        'each loader is measured on both')
    parser.add_argument('--loaders', nargs='+', default=['reference', 'fast'],
                        choices=('reference', 'fast', 'timm', 'torchvision', 'dali'),
                        help="this project's two loaders, and those of timm, torchvision (v2) and DALI, on the CPU; "
                        'install DALI with pip install nvidia-dali-cuda120')
    parser.add_argument('--sizes', nargs='+', type=positive, default=[224], help='input sizes (pixels)')
    parser.add_argument('--workers', nargs='+', type=count, default=[0],
                        help='numbers of workers; 0 loads in the main process')
    parser.add_argument('--batch-size', type=positive, default=50)
    parser.add_argument('--repeated-aug', action='store_true', help='load three copies of each image in a row')
    parser.add_argument('--repeats', type=positive, default=5, help='measured epochs')
    parser.add_argument('--json', type=output_file, metavar='FILE',
                        help='write all results with versions and hardware to this file')
    return parser


import numpy as np
import torch
from timm.data import create_loader
from timm.data.random_erasing import RandomErasing
from timm.utils import random_seed
from torchvision.transforms import v2

import utils
from datasets import build_dataset, has_split
from engine import Preprocessor
from fast_transforms import FastTransform
from loader import build_loader
from samplers import TrainSampler
from sources import EncodedImages
from transforms import build_transform


def torchvision_transform(size: int) -> v2.Compose:
    """Return torchvision's transforms v2 on uint8 tensors. Its reference scripts also decode with Pillow."""
    return v2.Compose([
        v2.PILToTensor(),
        v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        v2.RandAugment(2, 9, interpolation=v2.InterpolationMode.BILINEAR),
    ])


class DaliBatches:
    """Decode and augment in DALI's CPU pipeline: uint8 images (B, 3, H, W), in the data set's order.

    Nothing is loaded ahead of time, so that the CPU time belongs to the measured batch. Raise UsageError without DALI.
    """

    def __init__(self, dataset: EncodedImages, size: int, batch_size: int, threads: int):
        try:
            from nvidia.dali import fn, pipeline_def, types
            from nvidia.dali.auto_aug import rand_augment
        except ImportError:
            raise UsageError('--loaders dali needs DALI: install it with pip install nvidia-dali-cuda120') from None

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
    """Open the split train/ or val/ at `path`, or `path` itself as a folder of classes."""
    transform = torchvision_transform(size) if loader == 'torchvision' else build_transform(True, size)
    if loader == 'fast':
        transform = FastTransform(transform)
    split = next((split for split in ('train', 'val') if has_split(path, split)), None)
    return build_dataset('IMNET', split != 'val', path, size, transform, is_whole=split is None)


class Case:
    """Measure one loader on one form of the data ('original' or 'prepared'), at one input size."""

    def __init__(self, args: argparse.Namespace, dataset: EncodedImages, data: str, loader: str, size: int,
                 workers: int, device: torch.device):
        self.dataset, self.device, self.batch_size = dataset, device, args.batch_size
        self.setting = {'data': data, 'loader': loader, 'size': size, 'workers': workers}
        self.sampler = TrainSampler(len(dataset), args.batch_size, repeats=3 if args.repeated_aug else 1, even=True)
        if loader == 'timm':
            self.batches = create_loader(
                dataset, size, args.batch_size, is_training=True, re_prob=0.25, re_mode='pixel', re_count=1,
                auto_augment='rand-m9-mstd0.5-inc1', interpolation='bicubic', num_workers=workers, device=device,
                num_aug_repeats=0, persistent_workers=workers > 0, pin_memory=device.type == 'cuda')
        elif loader == 'dali':
            self.batches = DaliBatches(dataset, size, args.batch_size, max(workers, 1))
        else:
            self.batches = build_loader(dataset, args.batch_size, sampler=self.sampler, num_workers=workers,
                                        pin_memory=device.type == 'cuda')
        self.preprocess = Preprocessor(device, erasing=RandomErasing(0.25, mode='pixel', max_count=1, device=device))
        self.per_s: list[float] = []  # images per second in each epoch
        self.per_s_per_core: list[float] = []

    def run(self, epoch: int) -> Iterator[None]:
        """Measure one epoch, yielding after each batch. Epoch 0 is warm-up and does not count."""
        self.sampler.set_position(epoch)
        images, seconds, cpu_seconds, batches = 0, 0., 0., iter(self.batches)
        for step in range(len(self.batches)):
            began, cpu_began = time.perf_counter(), time.process_time()
            batch = next(batches)
            random_seed(step)
            if self.setting['loader'] != 'timm':  # timm's loader normalizes and erases by itself.
                self.preprocess(*batch)
            if self.device.type == 'cuda':
                torch.cuda.synchronize()
            seconds += time.perf_counter() - began
            cpu_seconds += time.process_time() - cpu_began
            images += len(batch[1])
            yield
        if epoch:
            busy = min(self.setting['workers'], cores())
            self.per_s.append(images / seconds)
            self.per_s_per_core.append(images / seconds / busy if busy else images / cpu_seconds)

    def record(self) -> dict:
        """Return the medians and ranges of all epochs."""
        results = {}
        for name, values in (('images_per_s', self.per_s), ('images_per_s_per_core', self.per_s_per_core)):
            results |= {name: statistics.median(values), f'{name}_min': min(values), f'{name}_max': max(values)}
        return {**self.setting, 'device': self.device.type, 'batch': self.batch_size, **results,
                'repeats': len(self.per_s)}


def measure(cases: list[Case], repeats: int) -> list[dict]:
    """Measure all cases in `repeats` epochs. Cases with workers run alone, since workers load ahead."""
    groups = [[case for case in cases if not case.setting['workers']],
              *([case] for case in cases if case.setting['workers'])]
    for epoch in range(repeats + 1):
        for group in groups:
            running = [case.run(epoch) for case in group]
            while running:
                running = [run for run in running if next(run, run) is None]
    records = [case.record() for case in cases]
    for record, case in zip(records, cases):
        setting = {**case.setting, 'data': 'original', 'loader': 'reference'}
        reference = next((other for other in cases if other.setting == setting), None)
        record['ratio'] = statistics.median(
            a / b for a, b in zip(case.per_s_per_core, reference.per_s_per_core)) if reference else None
    return records


def table(records: list[dict]) -> str:
    """Return the records as Markdown."""
    lines = ['| data | loader | pixels | workers | images/s (smallest to largest) '
             '| images/s a core (smallest to largest) | x reference |', '|---' * 7 + '|']
    for r in records:
        spreads = [f'{r[name]:.0f} ({r[f"{name}_min"]:.0f} to {r[f"{name}_max"]:.0f})'
                   for name in ('images_per_s', 'images_per_s_per_core')]
        ratio = f"{r['ratio']:.2f}" if r['ratio'] else ''
        cells = [r['data'], r['loader'], r['size'], r['workers'], *spreads, ratio]
        lines.append(f'| {" | ".join(map(str, cells))} |')
    return '\n'.join(lines)


def build_cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """Build the cases of all combinations of flags; raise UsageError if --prepared contains other images."""
    folders = {'original': args.data_path} | ({'prepared': args.prepared} if args.prepared else {})
    cases = [Case(args, open_images(folders[data], loader, size), data, loader, size, workers, device)
             for size, workers, data, loader in itertools.product(args.sizes, args.workers, folders, args.loaders)]
    if len({tuple(case.dataset.targets) for case in cases}) > 1:
        raise UsageError(f'--prepared {args.prepared} and --data-path {args.data_path} contain different images')
    return cases


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    with parser.usage_errors():
        records = measure(build_cases(args, device), args.repeats)
    print(table(records))
    if args.json:
        versions = {package.name: package.version for package in distributions()}
        args.json.write_text(encoding='utf-8', data=json.dumps({
            'command': f'python {shlex.join(sys.argv)}', 'system': utils.describe_system(device), 'versions': versions,
            'load': os.getloadavg(), 'records': records}, indent=1) + '\n')


if __name__ == '__main__':
    main()
