"""torchrun --nproc-per-node 8 train.py --model cmt_s --data-path /path/to/imagenet --output-dir output/cmt_s

Train, resume and evaluate CMT: on one CPU, one GPU, eight GPUs or many nodes, with the same command line.
"""
import sys

import options

if __name__ == '__main__':
    ARGS = options.parse_args()  # Parse first, so that --help and mistakes do not wait for the imports below.

import argparse
import contextlib
import copy
import datetime
import functools
import logging
import os
import shlex
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers import set_fast_norm
from timm.utils import ModelEmaV3, distribute_bn, random_seed
from torch.utils.data import DataLoader, Dataset

import cmt
import datasets
import processes
import reports
import utils
from checkpoints import BEST, FORMAT, LAST, class_names, is_own, load_strictly
from datasets import build_dataset, check_two_classes, has_split
from engine import Meters, Preprocessor, TrainStep, check_faults, throughput, train_one_epoch
from errors import UsageError, printable
from evaluation import class_words, order_classes, score, score_checkpoint, write_report
from fast_transforms import HAS_FAST, FastTransform
from launch import read_launch
from loader import build_loader
from losses import DistillationLoss, Teacher, build_criterion
from optim import build_optimizer, build_scheduler, load_optimizer, position_schedule, schedule_warnings
from precision import ApexScaler, NativeScaler, autocast_to, build_precision, configure_cuda, load_scaler, resolve_dtype
from processes import usage_errors
from run import CONFIG, LOG, RunWriter, check_written, find_checkpoint, open_run, setup_process
from samplers import TrainSampler
from sources import EncodedImages, ImageFolder
from transforms import build_transform
from utils import Progress
from weights import Weights, build_teacher, create_cmt, create_for, load_weights, read_weights

logger = logging.getLogger(__name__)

# All ranks must act alike after a step: their requests are all-reduced with MAX, so the most urgent one wins.
CONTINUE, SAVE, STOP, FAIL = range(4)


@dataclass
class InitialState:
    """Hold the weights or the checkpoint that a run starts from, which are read before its data."""
    weights: Weights | None  # from --finetune, --eval, or another project's checkpoint in --resume
    checkpoint: dict[str, Any] | None  # from --resume
    file: str | None  # name of the file that contains `checkpoint`


@dataclass
class RunState:
    """Hold the position of a run and its best scores."""
    epoch: int = 0
    step: int = 0  # optimizer steps done in the epoch
    samples_seen: int = 0  # number of samples that all ranks have seen in the epoch
    seconds: float = 0.  # spent training in the epoch, up to the last checkpoint
    meters: list[list[float]] = field(default_factory=list)  # running sums of an unfinished epoch, by rank
    best: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """Hold everything an epoch needs. Checkpoints store its state."""
    args: argparse.Namespace
    device: torch.device
    core: cmt.CMT  # the model without wrappers, to save, evaluate and average
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any  # a timm scheduler
    scaler: NativeScaler
    train_step: TrainStep  # calls the wrapped model
    sampler: TrainSampler
    train_loader: DataLoader
    val_loader: DataLoader
    dtype: torch.dtype  # autocast dtype in training
    eval_autocast: Callable
    num_epochs: int  # including the cool-down
    updates_per_epoch: int
    state: RunState
    n_parameters: int  # count of trainable parameters
    writer: RunWriter | None = None  # on rank 0, with --output-dir
    profiler: torch.profiler.profile | None = None
    stop: processes.StopRequest | None = None
    meters: Meters | None = None  # running sums of the current epoch
    record: dict[str, Any] = field(default_factory=dict)  # the epoch's line in log.txt
    wait_share: float = 0.  # share of the epoch's time spent waiting for data
    eval_seconds: float = 0.  # duration of the last validation
    report: tuple = ()  # ('model' or 'EMA', module, columns of `score`) in the last epoch, for the better of the two
    epoch_began: float = 0.  # s, time.monotonic()
    saved_at: float = 0.  # s, time.monotonic() of the last checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Return the contents of a checkpoint."""
        state = self.state
        return {
            'format': FORMAT, 'model_args': self.core.model_args, 'model': self.core.state_dict(),
            'model_ema': self.ema.module.state_dict() if self.ema else None, 'optimizer': self.optimizer.state_dict(),
            'lr_scheduler': self.scheduler.state_dict(), 'loss_scaler': self.scaler.state_dict(), 'epoch': state.epoch,
            'step': state.step, 'meters': state.meters, 'best': state.best, 'world_size': processes.get_world_size(),
            'samples_seen': state.samples_seen, 'seconds': state.seconds, 'args': vars(self.args),
            'classes': list(self.val_loader.dataset.dataset.classes), 'training_images': self.sampler.length,
        }

    @usage_errors()
    def load_state_dict(self, checkpoint: dict[str, Any], file: str) -> None:
        """Load a checkpoint, except `model`, which was loaded when the model was built, before apex or DDP wrapped it.

        `lr_scheduler` is recomputed from the position (position_schedule). Another project's checkpoint provides only
        weights and epoch, since its optimizer orders the parameters differently.
        """
        epoch = checkpoint.get('epoch', self.args.start_epoch - 1)
        if type(epoch) is not int or epoch < -1:
            raise UsageError(f'the epoch in {file} is {epoch!r}: start from its weights with --finetune')
        self.state = RunState(epoch + 1)
        if is_own(checkpoint):
            if checkpoint['args']['opt'] != self.args.opt:
                raise UsageError(f"{file} was trained with --opt {checkpoint['args']['opt']}: use the same --opt")
            if self.ema is not None:
                load_strictly(self.ema.module, checkpoint['model_ema'] or checkpoint['model'], file)
            load_optimizer(self.optimizer, checkpoint['optimizer'], file)
            if checkpoint['loss_scaler']:
                load_scaler(self.scaler, checkpoint['loss_scaler'], file)
            self.state.best = checkpoint['best']
            if checkpoint['meters']:  # The epoch was in progress.
                self.state = RunState(epoch, checkpoint['step'], checkpoint['samples_seen'], checkpoint['seconds'],
                                      checkpoint['meters'], checkpoint['best'])
        else:
            logger.warning('%s has no optimizer state of this project, so moments start at zero', file)
            if self.ema is not None:
                load_weights(self.ema.module, Weights.from_checkpoint(checkpoint, file, use_ema=True))
        saved_images, images = checkpoint.get('training_images'), self.sampler.length
        if saved_images not in (None, images):
            logger.info('the training set has %d images now, but had %d before', images, saved_images)
        logger.info('resuming at epoch %d, step %d', self.state.epoch, self.state.step)

    def save(self, best: dict[str, float] | None = None) -> None:
        """Write a checkpoint in the background; for `best`, see RunWriter.save."""
        if self.writer is not None:
            self.writer.save(self.state_dict(), best)
        self.saved_at = time.monotonic()

    def save_in_epoch(self) -> None:
        """Write a checkpoint from which the epoch can be resumed; all ranks call it."""
        self.state.meters = self.meters.gather()
        self.save()

    def stop_signal(self) -> int:
        """Return the signal that asked any rank to stop, or 0; all ranks call it."""
        return processes.all_reduce_max(self.stop.signal)


# main and its steps

def main(args: argparse.Namespace) -> None:
    """Train, evaluate or time a model.

    Raises:
        UsageError: flags, data or files are wrong; nothing was written.
        TrainingFault: losses or gradients are not finite, or the disk is full; the last checkpoint is intact.
        SystemExit: a signal stopped the run, after a checkpoint.
    """
    if args.stopped_file and read_launch().rank == 0:
        Path(args.stopped_file).unlink(missing_ok=True)
    stop = None if args.eval or args.throughput else processes.StopRequest()
    device = setup_process(args)
    args, initial = check_before_data(args, device)  # Fail on mistakes before data is read.
    if args.val_split and os.path.isdir(args.data_path or '') and has_split(args.data_path, 'val'):
        logger.info('%s has a validation split: --val-split %g is ignored', args.data_path, args.val_split)
        args.val_split = None
    check_ranks_agree(args, initial)
    if device.type == 'cuda':
        configure_cuda(args.amp_dtype, is_training=stop is not None, fixed_size=True)
    train_set, val_set = build_data(args, initial)
    model = load_model(args, initial, list(val_set.classes), device)

    if args.throughput or args.eval:
        score_only(args, model, val_set, device)
        return

    run = build_run(args, model, train_set, val_set, device)
    if initial.checkpoint is not None:
        run.load_state_dict(initial.checkpoint, initial.file)
    run.stop = stop
    if args.compile and run.state.epoch < run.num_epochs:
        with usage_errors():
            utils.check_compiler(device)
    stop.record_all()
    if run.state.epoch < run.num_epochs:  # Loading errors must appear before an old run is removed.
        run.sampler.set_position(run.state.epoch, run.state.samples_seen)
        run.train_loader.start()
    open_output(run, initial)
    del initial  # Free the memory of the checkpoint's tensors.
    describe(run)

    while run.state.epoch < run.num_epochs:
        if not train_epoch(run):
            break
        scores = evaluate_epoch(run)
        if scores is None:  # A signal stopped the evaluation.
            break
        end_epoch(run, scores)
        if run.stop_signal():
            break
    finish(run)


@usage_errors()
def check_before_data(args: argparse.Namespace, device: torch.device) -> tuple[argparse.Namespace, InitialState]:
    """Check everything that needs no data; return `args` with model and loader filled in, and the initial state."""
    is_training, world_size = not (args.eval or args.throughput), processes.get_world_size()
    if args.world_size not in (None, 1, world_size):  # DeiT's command lines may pass its default, 1.
        raise UsageError(f'--world-size {args.world_size}, but the launcher started {world_size} processes')
    if is_training and args.sync_bn and device.type != 'cuda':
        raise UsageError('--sync-bn needs CUDA, since torch has no SyncBatchNorm for the CPU: omit the flag')

    file, checkpoint = find_checkpoint(args, is_training)
    if args.config or args.finetune:
        options.check_paths(args, args.config, resumes=checkpoint is not None)
    weights, saved_name = None, 'cmt_s'
    if checkpoint is None and args.finetune:
        weights = read_weights(args.finetune)
    elif checkpoint is not None and is_own(checkpoint) and is_training:
        check_resumable(args, checkpoint, file)
        saved_name = checkpoint['args'].get('model')
    elif checkpoint is not None:
        weights = Weights.from_checkpoint(checkpoint, file, use_ema=args.model_ema and not is_training)
        args = args if is_training else with_saved_flags(args, weights, checkpoint, file)
    if checkpoint is None or weights is not None:
        with torch.device('meta'):
            model = create_model(args, num_classes=1, weights=weights)
        if model.in_chans != 3:
            raise UsageError(f'{weights.file if weights else args.model} has {model.in_chans} input channels, but '
                             'images have 3')

    args = argparse.Namespace(**{
        **vars(args), 'model': args.model or (weights.name if weights else saved_name),
        'loader': args.loader or ('fast' if HAS_FAST else 'reference')})
    return args, InitialState(weights, checkpoint, file)


def check_resumable(args: argparse.Namespace, checkpoint: dict[str, Any], file: str) -> None:
    """Raise UsageError if `args` cannot continue the run of this checkpoint."""
    name, (height, width) = checkpoint['args'].get('model'), checkpoint['model_args']['img_size']
    if not checkpoint.get('optimizer'):
        raise UsageError(f'{file} contains only weights: start from them with --finetune, or resume a {LAST}')
    if args.model and cmt.ALIASES.get(args.model, args.model) != cmt.ALIASES.get(name, name):
        raise UsageError(f'{file} contains {name or "a CMT without a name"}: ' + (
            f'use --model {name}' if name else 'omit --model'))
    if height != args.input_size or width != args.input_size:
        raise UsageError(f'{file} was trained at {height}x{width} px: use --input-size {height}, or start from its '
                         'weights with --finetune')


def with_saved_flags(
        args: argparse.Namespace, weights: Weights, checkpoint: dict[str, Any], file: str) -> argparse.Namespace:
    """Return `args` with the size, crop, precision and data of the checkpoint's run, unless flags set them.

    If the run's data is used, so is its --val-split, so that the held-out images are evaluated.
    """
    given = {flag.removeprefix('--').removeprefix('no-').replace('-', '_') for flag in args.given}
    flags, names = checkpoint['args'] if weights.is_own else {}, [
        'ignore_exif', 'amp_dtype', 'fast_norm', 'skip_damaged', 'max_image_pixels']
    if all(getattr(args, name) == flags.get(name) for name in {'data_set', 'data_path'} & given):
        names += ['data_set', 'data_path', 'val_split', 'inat_category']
    saved = {name: flags[name] for name in names if name in flags and name not in given}
    if weights.input_size and 'input_size' not in given:
        saved['input_size'] = weights.input_size
    args = argparse.Namespace(**{**vars(args), **saved, 'crop_pct': args.crop_pct or weights.crop_pct})
    options.check_paths(args, file, saved)
    return args


def check_ranks_agree(args: argparse.Namespace, initial: InitialState) -> None:
    """Raise UsageError on all ranks if their models or checkpoints differ. A rank that failed must not call this."""
    position = [(initial.checkpoint or {}).get(key) for key in ('epoch', 'step', 'samples_seen')]
    model_args = initial.weights.model_args if initial.weights else (initial.checkpoint or {}).get('model_args')
    state = (args.model, model_args, position)
    if any(other != state for other in processes.gather_from_ranks(state)):
        raise UsageError('processes found different checkpoints: --output-dir must be on a file system that all '
                         'nodes share')


def build_data(args: argparse.Namespace, initial: InitialState) -> tuple[Dataset | None, Dataset]:
    """Build the training and the validation set, with the class indices of the checkpoint, if it names its classes.

    The training set is None for --eval and --throughput with only a validation folder.
    """
    is_training, saved_classes = not (args.eval or args.throughput), class_names(initial.checkpoint or {})
    is_folders, path = args.data_set.startswith(('IMNET', 'wds/')), args.data_path
    with usage_errors():  # Check before ranks wait for each other below.
        transform = build_transform(
            True, args.input_size, auto_augment=args.aa or None, color_jitter=args.color_jitter,
            interpolation=args.train_interpolation, hflip=args.hflip, scale=args.scale, ratio=args.ratio)
        if args.loader == 'fast':
            transform = FastTransform(transform)
        is_whole = args.eval and is_folders and bool(path) and not args.val_split and (
            datasets.is_unsplit(path) or args.val_split == 0 and not has_split(path, 'val'))
        has_train = is_training or saved_classes is None and not is_whole and (
            not path or bool(args.val_split) or not is_folders or has_split(path, 'train'))
        folder = Path(path or '') / 'train'
        is_folder = args.data_set == 'DIGITS' or (
            args.data_set == 'IMNET' and folder.is_dir() and not any(folder.glob('*.tar')))
    build = functools.partial(build_dataset, args.data_set, data_path=args.data_path, input_size=args.input_size,
                              val_split=args.val_split or 0., class_map=args.class_map, category=args.inat_category,
                              ignore_exif=args.ignore_exif, max_pixels=args.max_image_pixels)
    # One process per node downloads or indexes tars. Every process lists a plain folder by itself.
    local_rank0_first = not all(processes.gather_from_ranks(is_folder))
    with usage_errors(), processes.first_on_each_node() if local_rank0_first else contextlib.nullcontext():
        train = build(is_train=True, transform=transform, classes=saved_classes) if has_train else None
        rotated = None if is_training else torch.multiprocessing.RawArray('q', args.num_workers + 1)
        val = build(is_train=False, transform=build_transform(False, args.input_size, crop_pct=args.crop_pct),
                    classes=train.classes if train is not None else saved_classes, is_whole=is_whole,
                    rotated=rotated)
    with usage_errors():
        rank, world_size = processes.get_rank(), processes.get_world_size()
        for dataset in filter(None, (train, val) if args.skip_damaged and isinstance(val, EncodedImages) else ()):
            datasets.drop_damaged(dataset, rank, world_size, processes.gather_from_ranks)
        if is_training:
            check_two_classes(train, args.data_path)
            train = datasets.limit(train, args.max_train_images) if args.max_train_images else train
        if args.eval and saved_classes is None and not args.class_map and isinstance(val, EncodedImages):
            logger.info(order_classes(val, initial.weights.model_args.get('num_classes', 0)))
        if args.eval and args.val_split:
            logger.info('scoring the held-out %g of %s (--val-split 0 scores all images)', args.val_split, path)
        held_out = is_whole and initial.weights.is_own and initial.checkpoint['args'].get('val_split')
        if held_out and args.val_split is None:
            logger.warning('scoring all images of %s. If the run trained on some of them, use --val-split %g', path,
                           held_out)
        if saved_classes and list(val.classes) != list(saved_classes):
            raise UsageError(f'{initial.file} has other classes ({", ".join(map(str, saved_classes[:3]))}, ...) than '
                             f'the data ({", ".join(val.classes[:3])}, ...), or has them in another order: omit '
                             '--class-map or use --finetune')
    return train, val


def model_settings(args: argparse.Namespace, num_classes: int) -> dict[str, Any]:
    """Return the arguments of cmt.CMT that flags and data determine."""
    settings = dict(num_classes=num_classes, img_size=args.input_size, drop_path_rate=args.drop_path,
                    proj_drop_rate=args.drop)
    return settings if args.head_drop is None else {**settings, 'drop_rate': args.head_drop}


def create_model(args: argparse.Namespace, num_classes: int, weights: Weights | None) -> cmt.CMT:
    """Build the model of `weights`, checked against --model, or of --model."""
    settings = model_settings(args, num_classes)
    return create_for(weights, args.model, **settings) if weights else create_cmt(args.model or 'cmt_s', **settings)


@usage_errors()
def load_model(args: argparse.Namespace, initial: InitialState, classes: list[str], device: torch.device) -> cmt.CMT:
    """Build the model, load the initial weights, move it to the device, and freeze stages."""
    random_seed(args.seed)
    set_fast_norm(args.fast_norm)
    checkpoint, weights = initial.checkpoint, initial.weights
    if checkpoint is not None and weights is None:
        model = cmt.CMT(**{**checkpoint['model_args'], **model_settings(args, len(classes))})
        load_strictly(model, checkpoint['model'], initial.file)
    else:
        model = create_model(args, len(classes), weights)
        if checkpoint is not None:
            load_weights(model, weights)
        elif weights is not None:
            load_weights(model, weights.drop_other_head(classes), new_head=True)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.bn_momentum is not None:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = args.bn_momentum
    model.to(device)
    for module in frozen_modules(model, args.freeze_stages):
        module.requires_grad_(False)
    return model


def frozen_modules(model: cmt.CMT, stages: int) -> list[nn.Module]:
    """Return what --freeze-stages N freezes: the stem and the first N stages, nothing for 0."""
    return [model.stem, *model.stages[:stages]] if stages else []


def loader_options(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return what the training and the validation loader share."""
    return dict(num_workers=args.num_workers, pin_memory=args.pin_mem and device.type == 'cuda',
                timeout=args.dist_timeout)


def build_val_loader(args: argparse.Namespace, val_set: Dataset, device: torch.device) -> DataLoader:
    """Build the loader of this rank's share of the validation set."""
    return build_loader(val_set, int(1.5 * args.batch_size), rank=processes.get_rank(),
                        world_size=processes.get_world_size(), **loader_options(args, device))


def score_only(args: argparse.Namespace, model: nn.Module, val_set: Dataset, device: torch.device) -> None:
    """Measure throughput or evaluate, as --throughput or --eval asks."""
    loader = build_val_loader(args, val_set, device)
    autocast = autocast_to(resolve_dtype(args.amp_dtype, device), device)
    if args.throughput:
        images, _ = Preprocessor(device)(*next(iter(loader)))
        logger.info('batch_size %d throughput %.1f', len(images), throughput(model, images, autocast))
    else:
        score_checkpoint(args, model, loader, device, autocast)


# Building a run

def build_run(
        args: argparse.Namespace, model: cmt.CMT, train_set: Dataset, val_set: Dataset, device: torch.device) -> Run:
    """Build EMA, optimizer, schedule, precision, wrappers and loaders around a model."""
    rank, world_size = processes.get_rank(), processes.get_world_size()
    has_mixup = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    sampler = TrainSampler(
        len(train_set), args.batch_size, args.accum_steps, repeats=3 if args.repeated_aug else 1,
        rank=rank, world_size=world_size, seed=args.seed, even=has_mixup)
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=args.model_ema_warmup,
                     device='cpu' if args.model_ema_force_cpu else None) if args.model_ema else None
    criterion, teacher = build_criterion(has_mixup, args.smoothing), None
    with usage_errors():  # Check before DDP, since its constructor waits for all ranks.
        optimizer = build_optimizer(args, model, learning_rate(args, sampler))
        scheduler, num_epochs = build_scheduler(args, optimizer, sampler.updates)
        if args.distillation_type != 'none':
            teacher = Teacher(build_teacher(args.teacher_model, args.teacher_path, val_set.classes)).to(device)
            criterion = DistillationLoss(
                criterion, args.distillation_type, args.distillation_alpha, args.distillation_tau)
    core, optimizer, scaler, dtype = build_precision(
        model, optimizer, device, args.amp_dtype, args.apex_opt_level if args.apex_amp else None)

    model = core
    if world_size > 1:
        # This warning is harmless: depthwise weights have one input channel, and its stride is arbitrary.
        warnings.filterwarnings('ignore', 'Grad strides do not match bucket view strides')
        warnings.filterwarnings('ignore', '.*broadcast_buffers. is deprecated')  # torch 2.11 has no replacement.
        model = nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == 'cuda' else None,
            broadcast_buffers=False, gradient_as_bucket_view=True)
    if args.compile:
        model = torch.compile(model)

    mixup = Mixup(
        mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax, prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
        num_classes=len(val_set.classes)) if has_mixup else None
    erasing = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=device) \
        if args.reprob > 0 else None
    train_step = TrainStep(
        model, criterion, optimizer, Preprocessor(device, mixup, erasing), scaler,
        autocast_to(dtype, device), ema=(ema, core) if ema else None, clip_grad=args.clip_grad,
        clip_mode=args.clip_mode, skip_nonfinite=args.on_nonfinite == 'skip', seed=args.seed, rank=rank,
        teacher=teacher, frozen=frozen_modules(core, args.freeze_stages), updates_per_epoch=sampler.updates)
    return Run(
        args, device, core, ema, optimizer, scheduler, scaler, train_step, sampler,
        train_loader=build_loader(train_set, args.batch_size, sampler=sampler, **loader_options(args, device)),
        val_loader=build_val_loader(args, val_set, device), dtype=dtype,
        # Validate in --amp-dtype even under --apex-amp, so that --eval reproduces the scores in the log.
        eval_autocast=autocast_to(resolve_dtype(args.amp_dtype, device), device),
        num_epochs=num_epochs, updates_per_epoch=sampler.updates, state=RunState(args.start_epoch),
        n_parameters=sum(p.numel() for p in core.parameters() if p.requires_grad))


def learning_rate(args: argparse.Namespace, sampler: TrainSampler) -> float:
    """Return the learning rate for the global batch; --lr is for 512 images."""
    return args.lr * sampler.samples_per_update / 512


# Output

def open_output(run: Run, initial: InitialState) -> None:
    """Open --output-dir, request a plot of the first batch, and start the profiler."""
    run.writer = open_run(run.args, 'train.py', run.device, run.state.epoch, initial.file, run.state.best)
    if run.writer is not None and initial.checkpoint is None:
        run.train_step.preprocess.on_first_batch = functools.partial(save_first_batch, run)
    if run.writer is not None and run.args.profile:
        run.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(skip_first=2, wait=0, warmup=2, active=run.args.profile, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(run.writer.folder / 'trace.json')))
        run.profiler.start()


def save_first_batch(run: Run, images: torch.Tensor, targets: torch.Tensor, limit: int = 16) -> None:
    """Write the first of these images (B, 3, H, W) to batch.jpg, with classes (B,) or mixed targets (B, classes)."""
    preprocess, words = run.train_step.preprocess, class_words(list(map(str, run.val_loader.dataset.dataset.classes)))
    pixels = images[:limit].permute(0, 2, 3, 1).float() * preprocess.std + preprocess.mean  # (B, H, W, 3)
    shares = targets[:limit].cpu()  # This is a host sync.
    shares = shares if shares.ndim == 2 else nn.functional.one_hot(shares, len(words))
    titles = [' + '.join(words[i] for i in row.topk(2).indices.tolist() if row[i] > 0.1) for row in shares]
    try:
        reports.save(reports.draw_batch(pixels.clamp(0, 255).byte().cpu().numpy(), titles),
                     run.writer.folder / 'batch.jpg')
    except Exception as error:  # Continue without this figure.
        logger.warning('batch.jpg could not be written: %s', error)


def describe(run: Run) -> None:
    """Log the model, the data, the learning rate and the schedule before training starts."""
    args, updates = run.args, run.updates_per_epoch * run.num_epochs
    rate = learning_rate(args, run.sampler)
    train_set, val_set = run.train_loader.dataset, run.val_loader.dataset
    logger.info('%s: %.2f M parameters, %d classes, %d training and %d validation images, %d steps per epoch',
                args.model or 'CMT', run.n_parameters / 1e6, run.core.num_classes, len(train_set), len(val_set),
                run.updates_per_epoch)
    if hasattr(train_set.dataset, 'targets') and hasattr(val_set.dataset, 'targets'):
        describe_classes(train_set.dataset, val_set.dataset)
    precision = f'apex {args.apex_opt_level}' if isinstance(run.scaler, ApexScaler) else str(run.dtype)[6:]
    if precision == 'float32' and torch.get_float32_matmul_precision() == 'high':
        precision = 'tf32'
    images, world_size = run.sampler.samples_per_update, processes.get_world_size()
    logger.info('learning rate %g = %g x %d / 512 (global batch = %d x %d accumulated x %d processes%s), %s, %s',
                rate, args.lr, images, args.batch_size, args.accum_steps, world_size,
                f'; an epoch has only {images}' if images < args.batch_size * args.accum_steps * world_size else '',
                run.device.type, precision)
    logger.info('%d epochs, %d of them cool-down', run.num_epochs, args.cooldown_epochs)
    for warning in schedule_warnings(args, rate, updates) if processes.get_rank() == 0 else ():
        logger.warning(warning)


def describe_classes(train_set: Dataset, val_set: Dataset) -> None:
    """Log the smallest and the largest training class, and the classes without validation images."""
    names = [printable(str(name)) for name in val_set.classes]
    counts, val_counts = (
        torch.bincount(torch.as_tensor(dataset.targets).view(len(dataset), -1)[:, 0], minlength=len(names)).tolist()
        for dataset in (train_set, val_set))  # QMNIST's targets have 8 columns; the first is the class.
    logger.info('training images per class: %d (%s) to %d (%s)', *min(zip(counts, names)), *max(zip(counts, names)))
    missing = [name for name, count in zip(names, val_counts) if not count]
    if missing:
        logger.warning('classes without validation images (%d): %s', len(missing), ', '.join(missing[:5]))


# An epoch

def train_epoch(run: Run) -> bool:
    """Train for the rest of the epoch; return False if the run has to stop, after saving."""
    args, state = run.args, run.state
    run.epoch_began = run.saved_at = time.monotonic()
    began = run.epoch_began - state.seconds  # includes the time before an interruption
    run.sampler.set_position(state.epoch, state.samples_seen)
    updates_left = run.sampler.updates  # in the epoch
    updates_done = state.epoch * run.updates_per_epoch + state.samples_seen // run.sampler.samples_per_update
    position_schedule(run.scheduler, state.epoch, updates_done)
    run.meters = Meters(run.device, state.meters)
    skips = args.max_skips if args.on_nonfinite == 'skip' else 0
    title = f'epoch {state.epoch}/{run.num_epochs - 1}'
    progress = Progress(title, state.step + updates_left, state.step, args.print_freq, processes.get_rank() == 0)
    action = CONTINUE
    for step in train_one_epoch(
            run.train_step, run.train_loader, state.epoch, state.step, updates_left, args.accum_steps, run.meters,
            progress, check_every=1 if run.device.type == 'cpu' else args.print_freq, max_skips=skips):
        state.step, state.samples_seen = step, state.samples_seen + run.sampler.samples_per_update
        updates_done += 1
        run.scheduler.step_update(updates_done)
        if run.profiler is not None:
            run.profiler.step()
        action = processes.all_reduce_max(requested_action(run))
        if action in (SAVE, STOP):
            check_faults(run.meters.read(), state.epoch, state.step - 1, skips)
            state.seconds = time.monotonic() - began
            run.save_in_epoch()
        if action in (STOP, FAIL):
            break
    progress.close()
    if action in (STOP, FAIL):
        return False

    run.wait_share = progress.wait_share()
    if updates_left or not state.seconds:
        state.seconds = time.monotonic() - began
    position_schedule(run.scheduler, state.epoch, updates_done - 1)  # for a run that resumed after the last step
    rate = max(group['lr'] for group in run.optimizer.param_groups)  # of the last step; with layer decay, the head's
    totals = run.meters.total()
    run.record = {
        'epoch': state.epoch, 'train_lr': rate, 'train_loss': totals['loss'] / max(totals['samples'], 1),
        'skipped_updates': int(totals['skipped']), 'n_parameters': run.n_parameters,
        'train_images_per_s': state.samples_seen / state.seconds,
    }
    return True


def requested_action(run: Run) -> int:
    """Return what this rank requests after a step."""
    args = run.args
    if run.writer is not None and run.writer.error:
        return FAIL
    if run.stop.signal:
        return STOP
    is_due = args.save_every_steps and run.state.step % args.save_every_steps == 0 or \
        args.save_every_minutes and time.monotonic() - run.saved_at > 60 * args.save_every_minutes
    return SAVE if is_due else CONTINUE


def is_validated(run: Run, epoch: int) -> bool:
    """Return whether validation is due in `epoch`."""
    return epoch % run.args.test_freq == 0 or epoch > run.args.test_epoch or epoch == run.num_epochs - 1


def evaluate_epoch(run: Run) -> dict[str, dict[str, float]] | None:
    """Evaluate model and EMA if validation is due in this epoch.

    Return scores by the prefix of their keys in log.txt ('' and 'ema_'); {} if validation is not due; None if stopped.
    """
    args, state, world_size = run.args, run.state, processes.get_world_size()
    models = {'': run.core, 'ema_': run.ema.module} if run.ema else {'': run.core}
    if world_size > 1:  # Do this before every save, so that the saved BatchNorm statistics are those that are scored.
        for model in models.values():
            distribute_bn(model, world_size, reduce=args.dist_bn == 'reduce')
    if not is_validated(run, state.epoch):
        return {}

    # Save before a long evaluation, so that a run that is killed during the evaluation resumes with it.
    is_long = args.save_every_steps or args.save_every_minutes or time.monotonic() - run.saved_at > 60
    if processes.all_reduce_max(int(bool(is_long))):
        run.save_in_epoch()
    scores, began = {}, time.monotonic()
    for prefix, model in models.items():
        if run.stop_signal():
            break
        if next(model.parameters()).device.type != run.device.type:  # as with --model-ema-force-cpu
            model = copy.deepcopy(model).to(run.device)
        scores[prefix], columns = score(model, run.val_loader, run.device, run.eval_autocast, lambda: run.stop.signal)
        if state.epoch == run.num_epochs - 1 and scores[prefix] == max(scores.values(), key=lambda s: s['acc1']):
            run.report = 'EMA' if prefix else 'model', model, columns
    if run.stop_signal():
        run.save_in_epoch()
        return None
    run.eval_seconds = time.monotonic() - began
    return scores


def end_epoch(run: Run, scores: dict[str, dict[str, float]]) -> None:
    """Log the epoch, save it, and advance to the next."""
    state, record = run.state, run.record
    best = {}
    for prefix, stats in scores.items():
        record.update({f'{prefix}test_{key}': stats[key] for key in ('acc1', 'acc5', 'loss')})
        if stats['acc1'] > state.best.get(f'{prefix}acc1', -1):
            best[f'{prefix}acc1'] = stats['acc1']
            state.best |= {f'{prefix}acc1': stats['acc1'], f'{prefix}epoch': state.epoch}
    state.best = dict(sorted(state.best.items()))  # Restore the order if a score was removed and added again.
    run.scheduler.step(state.epoch)

    # Log first. If the run is killed before it saves, the resumed run drops this line and repeats the epoch.
    record.update(epoch_seconds=time.monotonic() - run.epoch_began, **utils.memory_mb(run.device))
    if run.writer is not None:
        run.writer.log(record)
    state.meters = []
    run.save(best)
    epochs = range(state.epoch + 1, run.num_epochs)
    left = len(epochs) * state.seconds + sum(is_validated(run, epoch) for epoch in epochs) * run.eval_seconds
    logger.info('epoch %d/%d  train loss %.4f  lr %.2e  %.0f images/s  %.0f s%s', state.epoch, run.num_epochs - 1,
                record['train_loss'], record['train_lr'], record['train_images_per_s'], record['epoch_seconds'],
                f'  eta {datetime.timedelta(seconds=round(left))}' if left else '')
    if scores:
        logger.info('  val acc1 %.3f%%  acc5 %.3f%%  loss %.4f%s  best %.3f%%', *(
            record[f'test_{key}'] for key in ('acc1', 'acc5', 'loss')),
            f"  EMA acc1 {record['ema_test_acc1']:.3f}%" if run.ema else '',
            max(state.best.get(key, 0) for key in ('acc1', 'ema_acc1')))
    if run.wait_share >= 0.1:
        logger.info('%.0f%% of the time was spent waiting for data: try --loader fast, more --num-workers, prepared '
                    'images (docs/data.md) or more cores', 100 * run.wait_share)
    run.state = RunState(state.epoch + 1, best=state.best)


def finish(run: Run) -> None:
    """Write the results of a complete run, and wait for the last checkpoint.

    After a signal, touch --stopped-file if epochs are left, and raise SystemExit with the run's exit status.
    """
    args, state, is_complete = run.args, run.state, run.state.epoch >= run.num_epochs
    if run.profiler is not None:
        run.profiler.stop()
    if run.writer is not None and is_complete:
        write_results(run)
    check_written(run.writer)
    stop_signal = run.stop_signal()
    if not stop_signal:
        return
    where = f'in epoch {state.epoch} after {state.step} steps' if state.step else f'after epoch {state.epoch - 1}'
    outcome = ', which was the last' if is_complete else '; --resume auto resumes there'
    logger.info('stopped %s%s', where, outcome if args.output_dir else '; nothing was saved without --output-dir')
    if args.stopped_file and args.output_dir and processes.get_rank() == 0 and not is_complete:
        Path(args.stopped_file).touch()
    resumes_itself = args.resume == 'auto' and stop_signal != signal.SIGINT
    raise SystemExit(0 if resumes_itself else 128 + stop_signal)


def write_results(run: Run) -> None:
    """Write the report on the last validation and the curves; log the best scores and the next commands."""
    folder, best, dataset = run.writer.folder, run.state.best, run.val_loader.dataset.dataset
    run.writer.wait()  # Finish writing the checkpoint first.
    with run.writer.defer_disk_errors():
        if run.report:
            title, model, columns = run.report
            logger.info('report on the last epoch (%s):', title)
            write_report(folder, dataset, columns, list(range(run.core.num_classes)), model, run.device)
        if (folder / LOG).exists():  # A finished run that is resumed in a new folder has no log there.
            curves = reports.draw_curves({folder.resolve().name: reports.read_log(folder / LOG)})
            reports.save(curves, folder / 'curves.png')
    logger.info('run in %s: %s', folder, ', '.join(
        name for name in ('curves.png', 'batch.jpg', LOG, CONFIG) if (folder / name).exists()))
    scores = {file: best[f'{prefix}acc1'] for file, prefix in BEST.items() if f'{prefix}acc1' in best}
    for file, acc1 in scores.items():
        logger.info('best %s: %.3f%%, epoch %d, %s', 'EMA' if BEST[file] else 'model', acc1,
                    best[f'{BEST[file]}epoch'], folder / file)
    if scores:
        here, file = Path(__file__).resolve().parent, folder / max(scores, key=scores.get)
        images = dataset.roots[0] if isinstance(dataset, ImageFolder) else 'IMAGE'
        for script, *flags in (
                ('train.py', '--eval', '--resume', file, '--report', folder / 'report'),
                ('scripts/predict.py', file, images, '--picture', folder / 'predictions.jpg'),
                ('scripts/export.py', file, folder / ('model.onnx' if find_spec('onnxscript') else 'model.pt2'))):
            words = str(here / script).removeprefix(os.getcwd() + os.sep), *flags
            logger.info('  python %s', shlex.join(Path(word).as_posix() for word in words))


def cli(argv: list[str] | None = None, args: argparse.Namespace | None = None, exits: bool = False) -> int:
    """Run main with `args`, or with the flags `argv` (default: sys.argv); return the exit status."""
    try:
        args = args or options.parse_args(argv)
    except SystemExit as stopped:
        return stopped.code
    return processes.run_main('train.py', main, args, unreadable_status=2 if args.eval else 1, exits=exits)


if __name__ == '__main__':
    sys.exit(cli(args=ARGS, exits=True))
