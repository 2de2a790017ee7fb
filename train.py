"""torchrun --nproc-per-node 8 train.py --model cmt_s --data-path /path/to/imagenet --output-dir output/cmt_s

Train, resume and evaluate CMT: on one CPU, one GPU, eight of them or many nodes, with the same command line.
"""
import argparse
import contextlib
import copy
import functools
import logging
import os
import shlex
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import timm
import torch
import torch.nn as nn
import yaml
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn, random_seed
from timm.utils.distributed import world_info_from_env

import checkpoints
import cmt
import sources
import utils
from datasets import UnreadableImage, build_dataset, build_loader, build_transform, open_cache
from engine import (
    Meters,
    TrainingFault,
    TrainStep,
    check_faults,
    evaluate,
    throughput,
    train_one_epoch,
)
from losses import DistillationLoss, Teacher, build_criterion
from options import parse_args
from precision import ApexScaler, NativeScaler, find_apex, resolve_dtype
from samplers import TrainSampler
from transforms import HAS_FAST, Prepare
from utils import Progress, UsageError, usage_errors

logger = logging.getLogger(__name__)

GO_ON, SAVE, STOP, FAILED = range(4)  # what ranks agree on at a step's border, the largest wish of all


def build_data(args: argparse.Namespace):
    """Training and validation set; the first is None for --eval where there is only a validation folder."""
    if args.loader is None:
        args.loader = 'fast' if HAS_FAST else 'reference'
        if not HAS_FAST and not (args.eval or args.throughput):
            logger.info('no simplejpeg or OpenCV here: going on with --loader reference')
    train_transform = build_transform(
        True, args.input_size, auto_augment=args.aa or None, color_jitter=args.color_jitter,
        interpolation=args.train_interpolation, hflip=args.hflip, scale=args.scale, ratio=args.ratio,
        fast=args.loader == 'fast',
        # three copies are in a row over all ranks: from three ranks on, none has two
        keep_decoded=args.repeated_aug and utils.get_world_size() < 3)
    build = functools.partial(
        build_dataset, args.data_set, data_path=args.data_path, input_size=args.input_size,
        val_split=args.val_split or 0., class_map=args.class_map, category=args.inat_category)
    lacks_train = args.data_set.startswith(('IMNET', 'wds/')) and args.data_path and not args.val_split and \
        not sources.has_part(args.data_path, 'train')
    folder = args.data_set == 'IMNET' and args.data_path and (Path(args.data_path) / 'train').is_dir()
    # downloads, and indices of tars; each process lists a folder by itself
    with contextlib.nullcontext() if folder or args.data_set == 'DIGITS' else utils.first_on_each_node():
        train = None if args.eval and lacks_train else build(is_train=True, transform=train_transform)
        val = build(
            is_train=False, transform=build_transform(False, args.input_size), classes=train.classes if train else None)
    if args.cache != 'none' and not (args.eval or args.throughput):
        with utils.first_on_each_node():
            train.cache = open_cache(args.cache, args.cache_dir, args.cache_size, train)
    return train, val


def build_model(args: argparse.Namespace, num_classes: int, **form) -> cmt.CMT:
    """The model of --model; `form` sets it apart from the published one of its name (checkpoints.identify)."""
    if not timm.is_model(args.model):
        raise ValueError(f"unknown --model {args.model}: {', '.join(timm.list_models('cmt_*', module='cmt'))}")
    rates = dict(drop_path_rate=args.drop_path, proj_drop_rate=args.drop)
    if args.head_drop is not None:
        rates['drop_rate'] = args.head_drop
    model = checkpoints.create_cmt(args.model, num_classes=num_classes, img_size=args.input_size, **rates, **form)
    model.set_grad_checkpointing(args.grad_checkpointing)
    return model


def frozen_parts(model: cmt.CMT, stages: int) -> list[nn.Module]:
    return [model.stem, *model.stages[:stages]] if stages else []


def build_optimizer(args: argparse.Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    options = dict(eps=args.opt_eps)
    if args.opt_betas:
        options['betas'] = tuple(args.opt_betas)
    if args.opt in ('adamw', 'adam'):
        options['fused'] = True  # the one that can leave a step out without a host sync
    return create_optimizer_v2(
        model, opt=args.opt, lr=lr, weight_decay=args.weight_decay, momentum=args.momentum,
        layer_decay=args.layer_decay, **options)


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int):
    """timm's scheduler, and the number of epochs with the cool-down."""
    noise = args.lr_noise[0] if args.lr_noise and len(args.lr_noise) == 1 else args.lr_noise
    return create_scheduler_v2(
        optimizer, sched=args.sched, num_epochs=args.epochs, decay_epochs=args.decay_epochs,
        cooldown_epochs=args.cooldown_epochs, decay_rate=args.decay_rate,
        min_lr=args.min_lr, warmup_lr=args.warmup_lr, warmup_epochs=args.warmup_epochs,
        warmup_prefix=args.warmup_prefix, noise=noise,
        noise_pct=args.lr_noise_pct, noise_std=args.lr_noise_std, noise_seed=args.seed,
        step_on_epochs=not args.sched_on_updates, updates_per_epoch=updates_per_epoch)


def position_schedule(scheduler, epoch: int, updates: int) -> None:
    """Set the learning rate in force in `epoch`, of a run that has done `updates` updates in all.

    As in the authors' code an epoch's rate is the schedule's value for the epoch before.
    """
    if scheduler.t_in_epochs and epoch > 0:
        scheduler.step(epoch - 1)
    elif not scheduler.t_in_epochs and updates > 0:
        scheduler.step_update(updates)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, source: str) -> None:
    """Load moments and counts; rates and decays stay as this command line sets them."""
    counts = ('params', 'step', 'lookahead_step')  # which some optimizers of timm keep among the settings
    settings = [{k: v for k, v in group.items() if k not in counts} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise ValueError(f'the optimizer state in {source} is of another model or optimizer ({error})') from None
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
        for p in group['params']:
            for moment in optimizer.state[p].values():  # torch does not look at shapes; factored ones have axes of 1
                if isinstance(moment, torch.Tensor) and moment.ndim == p.ndim and any(
                        a not in (1, b) for a, b in zip(moment.shape, p.shape)):
                    raise ValueError(f'the optimizer state in {source} is of another --input-size')


def main(args: argparse.Namespace) -> None:
    """Train or evaluate as `args` say.

    Raises:
        UsageError: what the user can mend; nothing was written.
        TrainingFault: losses or gradients that are not finite; the last checkpoint is good.
        SystemExit: stopped by a signal, after a checkpoint.
    """
    # processes
    utils.setup_logging()
    with usage_errors():
        device = utils.init_distributed(args.device, args.dist_url, args.dist_timeout)
    rank, world_size = utils.get_rank(), utils.get_world_size()
    output_dir = Path(args.output_dir) if args.output_dir else None
    is_training = not (args.eval or args.throughput)

    # what can be wrong without a look at the data
    with usage_errors():
        if args.world_size not in (None, 1, world_size):
            raise ValueError(f'--world-size {args.world_size}, but the launcher started {world_size}')
        if args.kernels and device.type != 'cuda':
            raise ValueError(f'--kernels needs CUDA, and this is --device {device.type}')
        cmt.use_kernels(args.kernels)
        utils.check_trackers(args.log_tensorboard, args.log_wandb)
        if is_training and output_dir:
            checkpoints.check_output_dir(
                output_dir, may_hold_run=args.overwrite or args.resume == 'auto' or
                bool(args.resume) and Path(args.resume).resolve().parent == output_dir.resolve())
        source, checkpoint = checkpoints.find_checkpoint(args.resume, output_dir, fall_back=is_training)
        start, form = checkpoint, {}
        if checkpoint is None and args.finetune:
            source, start = args.finetune, checkpoints.read_weights(args.finetune)
        if args.eval and checkpoint is None:
            raise ValueError(f'no checkpoint in {output_dir}: --eval needs one')
        if start is not None:
            args.model, form, _ = checkpoints.identify(start, source, model=args.model)
        args.model = args.model or 'cmt_s'
        with torch.device('meta'):
            build_model(args, num_classes=1, **form)

    # data
    with usage_errors():
        dataset_train, dataset_val = build_data(args)
    num_classes = len(dataset_val.classes)
    mixup_active = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    sampler = TrainSampler(
        len(dataset_train), args.batch_size, args.accum_steps, repeats=3 if args.repeated_aug else 1,
        rank=rank, world_size=world_size, seed=args.seed, even=mixup_active) if is_training else None

    # model
    random_seed(args.seed)
    with usage_errors():
        model = build_model(args, num_classes, **form)
        if start is not None:
            checkpoints.load_weights(model, start, source, use_ema=not is_training and args.model_ema,
                                     new_head=checkpoint is None)
        teacher = Teacher(checkpoints.build_teacher(args.teacher_model, args.teacher_path, dataset_val.classes)) \
            if is_training and args.distillation_type != 'none' else None
    model.to(device)
    for module in frozen_parts(model, args.freeze_stages):
        module.requires_grad_(False)
    loader_options = dict(
        num_workers=args.num_workers, pin_memory=args.pin_mem and device.type == 'cuda', timeout=args.dist_timeout)
    loader_val = build_loader(
        dataset_val, int(1.5 * args.batch_size), rank=rank, world_size=world_size, **loader_options)
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtype = resolve_dtype(args.amp_dtype, device)
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    def score(module: nn.Module) -> dict[str, float]:
        with contextlib.closing(Progress('test', len(loader_val), enabled=rank == 0)) as progress:
            return evaluate(module, loader_val, Prepare(device), autocast, progress)

    # evaluation only
    if args.throughput:
        images, _ = Prepare(device)(*next(iter(loader_val)))
        logger.info('batch_size %d throughput %.1f', len(images), throughput(model, images, autocast))
        return
    if args.eval:
        report(score(model))
        return

    # EMA, optimizer and schedule; the learning rate follows the global batch
    if args.sync_bn:
        model = utils.convert_sync_batchnorm(model, device)
    ema = ModelEmaV3(model, args.model_ema_decay, device='cpu' if args.model_ema_force_cpu else None) \
        if args.model_ema else None
    global_batch = args.batch_size * args.accum_steps * world_size
    lr = args.lr * global_batch / 512
    updates_per_epoch = sampler.updates
    with usage_errors():
        optimizer = build_optimizer(args, model, lr)
        scheduler, num_epochs = build_scheduler(args, optimizer, updates_per_epoch)

    # precision of training
    apex = find_apex() if args.apex_amp else None
    if apex is not None:
        model, optimizer = apex.initialize(model, optimizer, opt_level=args.apex_opt_level)
        dtype, scaler = torch.float32, ApexScaler(apex)
    else:
        if args.apex_amp:
            dtype = torch.float16 if device.type == 'cuda' else torch.bfloat16
            logger.info('--apex-amp: no apex.amp here, going on with torch.autocast to %s', str(dtype)[6:])
        scaler = NativeScaler(device.type, enabled=dtype == torch.float16)
    train_autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    # resume
    epoch, step, samples_seen, sums, best = args.start_epoch, 0, 0, None, {}
    with usage_errors():
        if checkpoint is not None:
            if ema is not None:
                checkpoints.load_weights(ema.module, checkpoint, source, use_ema=True)
            saved = checkpoint.get('args')
            if isinstance(saved, dict) and saved.get('opt', args.opt) != args.opt:
                raise ValueError(f"{source} was trained with --opt {saved['opt']}: go on with that")
            own = 'samples_seen' in checkpoint
            if own and not isinstance(checkpoint.get('optimizer'), dict):
                raise ValueError(f'{source} holds no optimizer: start from it by --finetune')
            if own:
                load_optimizer(optimizer, checkpoint['optimizer'], source)
            elif 'optimizer' in checkpoint:  # parameters in another order
                logger.warning("the optimizer's moments in %s are of another code: they start afresh", source)
            if own and checkpoint.get('loss_scaler'):
                try:
                    scaler.load_state_dict(checkpoint['loss_scaler'])
                except (KeyError, RuntimeError):
                    raise ValueError(f'{source} was trained with another loss scaling: give the same '
                                     '--apex-amp and --amp-dtype') from None
            best = own and checkpoint.get('best') or {}
            epoch = checkpoint.get('epoch', args.start_epoch - 1)
            if type(epoch) is not int or epoch < -1:
                raise ValueError(f'{source} is of epoch {epoch!r}: start from it by --finetune')
            epoch += 1
            if own and checkpoint.get('meters'):  # sums of an epoch that is not in the log yet
                epoch, step, samples_seen = (checkpoint[key] for key in ('epoch', 'step', 'samples_seen'))
                sums = checkpoint['meters']
            if checkpoint.get('world_size', world_size) != world_size:
                logger.info(
                    '%d processes now, %d before: %d samples of epoch %d are done, the base learning rate is %g',
                    world_size, checkpoint['world_size'], samples_seen, epoch, lr)
            logger.info('going on at epoch %d, step %d', epoch, step)
        if len(set(utils.of_all_ranks((epoch, step, samples_seen)))) > 1:
            raise ValueError('processes found different checkpoints: --output-dir has to lie on a file system that all '
                             'nodes share')

        if output_dir:
            output_dir.mkdir(parents=True, exist_ok=True)

    # wrappers
    core = model
    if world_size > 1:
        # of depthwise weights, whose one input channel may have any stride: the layouts are the same
        warnings.filterwarnings('ignore', 'Grad strides do not match bucket view strides')
        warnings.filterwarnings('ignore', '.*broadcast_buffers. is deprecated')  # torch 2.11 has no other name for it
        model = nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == 'cuda' else None,
            broadcast_buffers=False, gradient_as_bucket_view=True)
    if args.compile:
        model = torch.compile(model)

    # training step
    mixup = Mixup(
        mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax, prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
        num_classes=num_classes) if mixup_active else None
    erasing = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=device) \
        if args.reprob > 0 else None
    skips = args.max_skips if args.on_nonfinite == 'skip' else 0
    criterion = build_criterion(mixup_active, args.smoothing)
    if teacher is not None:
        teacher.to(device)
        criterion = DistillationLoss(criterion, args.distillation_type, args.distillation_alpha, args.distillation_tau)
    train_step = TrainStep(
        model, criterion, optimizer, Prepare(device, mixup, erasing), scaler, train_autocast,
        ema=(ema, core) if ema else None, clip_grad=args.clip_grad, clip_mode=args.clip_mode,
        skip_nonfinite=skips > 0, seed=args.seed, rank=rank, teacher=teacher,
        frozen=frozen_parts(core, args.freeze_stages))
    loader_train = build_loader(dataset_train, args.batch_size, sampler=sampler, **loader_options)

    # output
    writer = None
    with usage_errors():
        if output_dir and rank == 0:
            writer = checkpoints.RunWriter(output_dir, args.keep_checkpoints)
            is_inside = checkpoint is not None and Path(source).resolve().parent == output_dir.resolve()
            if is_inside:
                checkpoints.make_last(Path(source))
            elif checkpoint is None or args.overwrite:
                checkpoints.remove_run(output_dir)
            checkpoints.go_back(output_dir, epoch)
            settings = {key.replace('_', '-'): value for key, value in vars(args).items()
                        if key not in ('config', 'local_rank', 'resume', 'overwrite') and value is not None}
            with checkpoints.replacing(output_dir / 'config.yaml') as file:
                text = f'# train.py {shlex.join(sys.argv[1:])}\n' + yaml.safe_dump(settings, sort_keys=False)
                file.write(text.encode())
            writer.trackers = utils.build_trackers(args.log_tensorboard, args.log_wandb, output_dir, settings, epoch)
        elif rank == 0:
            logger.warning('no --output-dir: nothing will be saved')
    logger.info('%s: %.2f M parameters, %d classes, %d training and %d validation images, %d updates an epoch',
                args.model, n_parameters / 1e6, num_classes, len(dataset_train), len(dataset_val), updates_per_epoch)
    logger.info('learning rate %g = %g x %d / 512 (global batch = %d x %d accumulated x %d processes), %s, %s',
                lr, args.lr, global_batch, args.batch_size, args.accum_steps, world_size, device.type,
                f'apex {args.apex_opt_level}' if apex else str(dtype)[6:])
    kept = args.model_ema_decay ** (updates_per_epoch * num_epochs)
    if ema and kept > 0.05:
        logger.warning('the moving average, which evaluation prefers, will still be %.0f%% initial weights at the end: '
                       '--model-ema-decay %.4g is for %d updates, or --no-model-ema', 100 * kept,
                       1 - 10 / max(updates_per_epoch * num_epochs, 20), updates_per_epoch * num_epochs)
    if epoch >= num_epochs:
        logger.info('nothing left to do: %d of %d epochs are done', epoch, num_epochs)

    def save(meters: list, copies: tuple[str, ...] = ()) -> None:
        if writer is not None:
            writer.save({
                'model': core.state_dict(), 'model_ema': ema.module.state_dict() if ema else None,
                'optimizer': optimizer.state_dict(), 'lr_scheduler': scheduler.state_dict(),
                'loss_scaler': scaler.state_dict(), 'epoch': epoch, 'step': step, 'meters': meters, 'best': best,
                'world_size': world_size, 'samples_seen': samples_seen, 'args': vars(args),
                'classes': list(dataset_val.classes),
            }, copies)

    stop, wish = utils.StopRequest(), GO_ON

    def stopping() -> bool:
        return utils.largest(stop.signal) > 0

    profiler = utils.build_profiler(args.profile, output_dir / 'trace.json') if args.profile and writer else None
    if profiler is not None:
        profiler.start()
    for epoch in range(epoch, num_epochs):  # noqa: B020
        # train
        began = saved = time.monotonic()
        seen_before = samples_seen
        sampler.set_position(epoch, samples_seen)
        updates = sampler.updates
        all_updates = epoch * updates_per_epoch + samples_seen // sampler.samples_per_update
        position_schedule(scheduler, epoch, all_updates)
        learning_rate = max(group['lr'] for group in optimizer.param_groups)  # of the head, with layer decay
        meters = Meters(device, sums)
        progress = Progress(f'epoch {epoch}/{num_epochs - 1}', step + updates, step, args.print_freq, rank == 0)
        for step in train_one_epoch(  # noqa: B020
                train_step, loader_train, epoch, step, updates, args.accum_steps, meters, progress,
                check_every=1 if device.type == 'cpu' else args.print_freq, skips_in_a_row=skips):
            samples_seen += sampler.samples_per_update
            all_updates += 1
            scheduler.step_update(all_updates)
            if profiler is not None:
                profiler.step()
            due = args.save_every_steps and step % args.save_every_steps == 0 or \
                args.save_every_minutes and time.monotonic() - saved > 60 * args.save_every_minutes
            wish = FAILED if writer and writer.error else STOP if stop.signal else SAVE if due else GO_ON
            wish = utils.largest(wish)
            if wish in (SAVE, STOP):
                check_faults(meters.read(), epoch, step, skips)
                save(meters.of_all_ranks())
                saved = time.monotonic()
            if wish in (STOP, FAILED):
                break
        progress.close()
        if wish in (STOP, FAILED):
            break
        wait_share = progress.wait_share()
        train_seconds = time.monotonic() - began

        # figures of all ranks
        totals = meters.total()
        record = {
            'epoch': epoch, 'train_lr': learning_rate, 'train_loss': totals['loss'] / max(totals['samples'], 1),
            'skipped_updates': int(totals['skipped']), 'n_parameters': n_parameters,
            'train_images_per_s': (samples_seen - seen_before) / train_seconds,
        }

        # evaluate what is saved: the first rank's BatchNorm statistics, or their mean
        if world_size > 1:
            for module in filter(None, (core, ema and ema.module)):
                distribute_bn(module, world_size, reduce=args.dist_bn == 'reduce')
        copies = [f'checkpoint_{epoch:04d}.pth'] if args.keep_checkpoints else []
        if epoch % args.test_freq == 0 or epoch > args.test_epoch or epoch == num_epochs - 1:
            # evaluation takes its time: a run that is stopped or killed in it goes on with it
            is_long = args.save_every_steps or args.save_every_minutes or time.monotonic() - saved > 60
            if utils.largest(int(bool(is_long))):
                save(meters.of_all_ranks())
            scores = {}
            for prefix, module in (('', core), ('ema_', ema and ema.module)):
                if module is not None and not stopping():
                    away = next(module.parameters()).device != device  # --model-ema-force-cpu
                    try:
                        scores[prefix] = score(copy.deepcopy(module).to(device) if away else module)
                    except UnreadableImage:  # the epoch is not lost by it; other ranks would have to know
                        if world_size == 1 and writer is not None:
                            save(meters.of_all_ranks())
                            writer.wait()
                        raise
            if stopping():
                save(meters.of_all_ranks())
                wish = STOP
                break
            for prefix, stats in scores.items():
                report(stats, 'EMA ' if prefix else '')
                record.update({f'{prefix}test_{key}': stats[key] for key in ('acc1', 'acc5', 'loss')})
                if stats['acc1'] > best.get(f'{prefix}acc1', -1):
                    best = {**best, f'{prefix}acc1': stats['acc1'], f'{prefix}epoch': epoch}
                    copies.append(f'checkpoint_{prefix}best.pth')
        scheduler.step(epoch)

        # log, then save: a run killed in between drops the line when it goes on
        record.update(epoch_seconds=time.monotonic() - began, memory_mb=utils.memory_mb(device))
        if writer is not None:
            writer.log(record)
        save(meters=[], copies=tuple(copies))
        logger.info('epoch %d  train loss %.4f  lr %.2e  %.0f images/s  %.0f s%s', epoch, record['train_loss'],
                    learning_rate, record['train_images_per_s'], record['epoch_seconds'],
                    f"  best {best['acc1']:.3f}%" if best else '')
        if wait_share >= 0.1:
            logger.info(waiting(args, wait_share, can_cache=isinstance(dataset_train, sources.EncodedImages)))
        step, samples_seen, sums = 0, 0, None
        if stopping():
            wish = STOP
            break

    if profiler is not None:
        profiler.stop()
    if writer is not None:
        writer.wait()
    if utils.largest(FAILED if writer and writer.error else GO_ON) == FAILED:
        raise TrainingFault(f'{output_dir} can not be written to any more, the files before are good '
                            f'({writer and writer.error})')
    if wish == STOP:
        where = f'in epoch {epoch} after {step} of its steps' if step else f'after epoch {epoch}'
        logger.info('stopped %s; --resume auto goes on there', where)
        number = utils.largest(stop.signal)  # one rank may have had the signal alone
        goes_on = args.resume == 'auto' and number != signal.SIGINT
        raise SystemExit(0 if goes_on else 128 + number)


def waiting(args: argparse.Namespace, share: float, can_cache: bool) -> str:
    """A line for a run whose data come too slowly."""
    cores, processes = utils.cores(), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    changes = []
    if args.loader == 'reference':
        changes.append('--loader fast')
    if args.num_workers * processes < cores:
        changes.append(f'more --num-workers ({args.num_workers} now, {cores} cores for {processes} '
                       f'process{"es" if processes > 1 else ""})')
    if args.cache == 'none' and can_cache:
        changes.append('--cache ram where the files come from a slow disk')
    return (f'{share:.0%} of the time went to waiting for data: '
            + ', '.join(changes or ['more cores, or a larger --model']) + ' (scripts/benchmark_data.py measures)')


def report(stats: dict[str, float], title: str = '') -> None:
    """The authors' two lines."""
    logger.info('* %sAcc@1 %.3f Acc@5 %.3f loss %.3f', title, stats['acc1'], stats['acc5'], stats['loss'])
    logger.info('%sAccuracy of the network on the %d test images: %.3f%%', title, stats['count'], stats['acc1'])


def cli() -> int:
    """Exit status: 0 done or stopped under --resume auto, 1 a fault, 2 a mistake, 128 + n stopped by signal n."""
    args = parse_args()
    try:
        try:
            main(args)
        finally:  # only a run that is killed leaves it, to the next one on the same data
            for cache in sources.in_memory:
                cache.remove()
        status = 0
    except (UsageError, TrainingFault) as error:
        if world_info_from_env()[1] == 0:
            sys.stderr.write(f'train.py: error: {error}\n')
        status = 2 if isinstance(error, UsageError) else 1
    except SystemExit as stopped:
        status = stopped.code
    except UnreadableImage as error:  # of one rank: the others wait for it
        sys.stderr.write(f'train.py: error: {error.line}\n')
        utils.leave_at_once(2 if args.eval else 1)
    except KeyboardInterrupt:
        utils.leave_at_once(130)
    except Exception:
        traceback.print_exc()
        utils.leave_at_once(1)
    if torch.distributed.is_initialized():  # all ranks come here
        torch.distributed.destroy_process_group()
    return status


if __name__ == '__main__':
    sys.exit(cli())
