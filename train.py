"""torchrun --nproc-per-node 8 train.py --model cmt_s --data-path /path/to/imagenet --output-dir output/cmt_s

Train, resume and evaluate CMT: on one CPU, one GPU, eight of them or many nodes, with the same command line.
"""
import argparse
import copy
import functools
import logging
import shlex
import signal
import sys
import time
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

import cmt
import utils
from datasets import DATA_SETS, build_dataset, build_loader, build_transform
from engine import ApexScaler, Meters, NativeScaler, Prepare, TrainingFault, TrainStep, check_faults, evaluate, \
    throughput, train_one_epoch
from losses import build_criterion
from samplers import TrainSampler
from utils import LAST, CheckpointWriter, Progress, UsageError, usage_errors

logger = logging.getLogger(__name__)

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


# ---------------------------------------------------------------------------------------------------------------------
# command line

class Parser(argparse.ArgumentParser):
    """One line an error, from the first rank alone; every rank exits with status 2."""

    def error(self, message: str):
        if world_info_from_env()[1] == 0:
            sys.stderr.write(f'{self.prog}: error: {message}\n')
        raise SystemExit(2)


class Refused(argparse.Action):
    """A flag of the authors' parser that does nothing there, or what CMT has no part for: `help` says why."""

    def __init__(self, option_strings, dest, reason: str):
        self.reason = reason
        super().__init__(option_strings, argparse.SUPPRESS, nargs='*', help=argparse.SUPPRESS)

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f'{option_string} is not supported: {self.reason}')


def number(kind: type, low: float, high: float = float('inf'), above: bool = False):
    """A type for argparse: a `kind` in [low, high], or in (low, high] where `above`."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not {'a whole ' if kind is int else 'a '}number") from None
        if not low <= value <= high or above and value == low:
            raise argparse.ArgumentTypeError(
                f'{text} is not {"above" if above else "at least"} {low}' + (f' and at most {high}' if high < 1e9 else ''))
        return value
    return parse


count, positive = number(int, 0), number(int, 1)
amount, rate, share = number(float, 0), number(float, 0, above=True), number(float, 0, 1)


def get_parser() -> argparse.ArgumentParser:
    """All flags, kebab-case; parse_args takes them with underscores too."""
    parser = Parser(prog='train.py', description='Train and evaluate CMT.', allow_abbrev=False)
    toggle = argparse.BooleanOptionalAction

    g = parser.add_argument_group('run')
    g.add_argument('--config', metavar='YAML', help='defaults for the flags, which override them')
    g.add_argument('--output-dir', default='', help='where checkpoints and log.txt go; nothing is saved without it')
    g.add_argument('--resume', default='', metavar='CKPT', help='go on from this checkpoint, or evaluate it; '
                   "'auto': from the newest good one in --output-dir where there is one")
    g.add_argument('--overwrite', action='store_true', help='replace the run that --output-dir holds')
    g.add_argument('--eval', action='store_true', help='evaluate --resume CKPT and stop')
    g.add_argument('--throughput', action='store_true', help='measure images/s of the forward pass and stop')
    g.add_argument('--seed', type=count, default=3407)
    g.add_argument('--start-epoch', type=count, default=0)
    g.add_argument('--epochs', type=positive, default=300)
    g.add_argument('--test-freq', type=positive, default=20, help='validate every so many epochs ...')
    g.add_argument('--test-epoch', type=int, default=260, help='... and in every epoch after this one')
    g.add_argument('--print-freq', type=positive, default=10, help='steps between two looks at loss and speed')
    g.add_argument('--save-every-steps', type=count, default=0, help='checkpoint inside an epoch')
    g.add_argument('--save-every-minutes', type=amount, default=0, help='checkpoint inside an epoch')
    g.add_argument('--keep-checkpoints', type=count, default=0, help="epochs whose checkpoints stay besides the last")

    g = parser.add_argument_group('data')
    g.add_argument('--data-set', default='IMNET', choices=DATA_SETS)
    g.add_argument('--data-path', help='IMNET: folder with train/ and val/; CIFAR: where it lies or is downloaded to')
    g.add_argument('--input-size', type=positive, default=224, help='pixels, a multiple of 32')
    g.add_argument('--batch-size', type=positive, default=64, help='of one process')
    g.add_argument('--num-workers', type=count, default=4, help='loader processes of each process')
    g.add_argument('--pin-mem', action=toggle, default=True)
    g.add_argument('--repeated-aug', action=toggle, default=True, help='each image three times in a third of an epoch')

    g = parser.add_argument_group('augmentation')
    g.add_argument('--color-jitter', type=amount, default=0.4, help='used where --aa is none')
    g.add_argument('--aa', default='rand-m9-mstd0.5-inc1', help="timm's RandAugment or AutoAugment; none for neither")
    g.add_argument('--train-interpolation', default='bicubic', choices=('random', 'bilinear', 'bicubic'))
    g.add_argument('--hflip', type=share, default=0.5, help='probability of a horizontal flip')
    g.add_argument('--scale', type=share, nargs=2, help='area of the random crop (default: 0.08 1)')
    g.add_argument('--ratio', type=rate, nargs=2, help='aspect of the random crop (default: 3/4 4/3)')
    g.add_argument('--reprob', type=share, default=0.25, help='probability of random erasing')
    g.add_argument('--remode', default='pixel', choices=('const', 'rand', 'pixel'))
    g.add_argument('--recount', type=positive, default=1)
    g.add_argument('--mixup', type=amount, default=0.8, help='alpha; 0 turns it off')
    g.add_argument('--cutmix', type=amount, default=1.0, help='alpha; 0 turns it off')
    g.add_argument('--cutmix-minmax', type=share, nargs=2)
    g.add_argument('--mixup-prob', type=share, default=1.0)
    g.add_argument('--mixup-switch-prob', type=share, default=0.5)
    g.add_argument('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'))
    g.add_argument('--smoothing', type=share, default=0.1)

    g = parser.add_argument_group('model')
    g.add_argument('--model', default='cmt_s', help='cmt_ti, cmt_xs, cmt_s, cmt_b')
    g.add_argument('--drop', type=share, default=0.0, help='dropout in LMHSA and IRFFN')
    g.add_argument('--head-drop', type=share, help="dropout before the classifier (default: the model's)")
    g.add_argument('--drop-path', type=share, default=0.1)
    g.add_argument('--grad-checkpointing', action='store_true')
    g.add_argument('--compile', action='store_true', help='torch.compile')
    g.add_argument('--sync-bn', action='store_true')
    g.add_argument('--dist-bn', default='broadcast', choices=('broadcast', 'reduce'),
                   help="BatchNorm statistics before evaluation: the first rank's, or the mean")
    g.add_argument('--model-ema', action=toggle, default=True)
    g.add_argument('--model-ema-decay', type=share, default=0.99996)
    g.add_argument('--model-ema-force-cpu', action='store_true')

    g = parser.add_argument_group('optimizer')
    g.add_argument('--opt', default='adamw')
    g.add_argument('--opt-eps', type=rate, default=1e-8)
    g.add_argument('--opt-betas', type=share, nargs='+')
    g.add_argument('--momentum', type=share, default=0.9)
    g.add_argument('--weight-decay', type=amount, default=0.05)
    g.add_argument('--layer-decay', type=share, help='factor of the learning rate from each depth to the one below')
    g.add_argument('--clip-grad', type=rate)
    g.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'))
    g.add_argument('--accum-steps', type=positive, default=1, help='batches to an update')
    g.add_argument('--on-nonfinite', default='stop', choices=('stop', 'skip'),
                   help='what to do about a loss or gradient that is not finite')
    g.add_argument('--max-skips', type=positive, default=10, help='updates in a row that may be skipped so')

    g = parser.add_argument_group('schedule')
    g.add_argument('--sched', default='cosine', choices=('cosine', 'tanh', 'step', 'multistep', 'poly', 'plateau'))
    g.add_argument('--sched-on-updates', action='store_true')
    g.add_argument('--lr', type=rate, default=5e-4, help='for a global batch of 512; it follows the global batch')
    g.add_argument('--lr-noise', type=float, nargs='+')
    g.add_argument('--lr-noise-pct', type=float, default=0.67)
    g.add_argument('--lr-noise-std', type=float, default=1.0)
    g.add_argument('--warmup-lr', type=amount, default=1e-6)
    g.add_argument('--min-lr', type=amount, default=1e-5)
    g.add_argument('--warmup-epochs', type=count, default=5)
    g.add_argument('--cooldown-epochs', type=count, default=10)
    g.add_argument('--decay-epochs', type=rate, default=30)
    g.add_argument('--patience-epochs', type=count, default=10)
    g.add_argument('--decay-rate', '--dr', type=amount, default=0.1)

    g = parser.add_argument_group('precision and processes')
    g.add_argument('--amp-dtype', default='auto', choices=('auto', *DTYPES),
                   help='auto: float32 on CPU, bfloat16 on CUDA, float16 where CUDA has no bfloat16')
    g.add_argument('--apex-amp', action='store_true', help="train with NVIDIA's apex.amp, or float16 where it is not")
    g.add_argument('--apex-opt-level', default='O1', choices=('O0', 'O1', 'O2', 'O3'))
    g.add_argument('--device', help='cuda or cpu (default: cuda where there is one)')
    g.add_argument('--dist-url', default='env://')
    g.add_argument('--dist-timeout', type=rate, default=600, help='seconds that ranks wait for each other')
    g.add_argument('--world-size', type=positive, help='checked against what the launcher started')
    g.add_argument('--local-rank', type=int, help=argparse.SUPPRESS)  # torch.distributed.launch passes it

    for flag, reason in {
        '--drop-block': 'CMT has no DropBlock',
        '--update-temperature': "the authors' code calls a method that never existed",
        '--warmup-drop-path': "the authors' models have nothing that it could act on; --drop-path is constant",
        '--warmup-drop-path-epochs': "the authors' models have nothing that it could act on",
        '--resplit': 'it acts on augmentation splits, which no recipe makes',
        '--inat-category': 'it goes with the iNaturalist data sets, which --data-set does not list',
        '--init-method': 'use --dist-url',
        '--debug': 'it left out a FLOPs count, which training no longer makes (scripts/profile_flops.py does)',
    }.items():
        parser.add_argument(flag, action=Refused, reason=reason)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags over the defaults of --config, spelt with - or _."""
    parser = get_parser()
    argv = [
        '='.join([(parts := arg.split('=', 1))[0].replace('_', '-'), *parts[1:]]) if arg.startswith('--') else arg
        for arg in (sys.argv[1:] if argv is None else argv)]
    config = parser.parse_known_args([a for a in argv if a not in ('-h', '--help')])[0].config
    if config:
        argv = config_flags(parser, config) + argv
    args = parser.parse_args(argv)
    mixup = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixup and args.batch_size % 2 and not args.eval:
        parser.error(f'--batch-size {args.batch_size} is odd: mixup and cutmix pair the images of a batch')
    if args.eval and not args.resume:
        parser.error('--eval needs --resume CKPT')
    if args.resume == 'auto' and not args.output_dir:
        parser.error('--resume auto needs --output-dir')
    if args.aa.lower() == 'none':
        args.aa = ''
    return args


def config_flags(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """The flags that a YAML file stands for, so that they are checked as those of the command line are."""
    try:
        config = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f'--config {path}: {" ".join(str(error).split())}')
    if not isinstance(config, dict):
        parser.error(f'--config {path} is no list of "flag: value" lines')
    known = parser._option_string_actions
    flags = []
    for key, value in config.items():
        flag = '--' + str(key).replace('_', '-')
        if flag not in known or flag in ('--config', '--help'):
            parser.error(f'--config {path}: unknown key {key!r}')
        is_switch = known[flag].nargs == 0
        if is_switch != isinstance(value, bool) and value is not None:
            parser.error(f'--config {path}: {key}: {value!r} is ' + ('not true or false' if is_switch else 'no value'))
        if value is True:
            flags.append(flag)
        elif value is False:
            flags += [f'--no-{flag[2:]}'] if f'--no-{flag[2:]}' in known else []
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        elif value is not None:
            flags.append(f'{flag}={value}')
    return flags


# ---------------------------------------------------------------------------------------------------------------------
# builders

def build_data(args: argparse.Namespace, mixup: bool):
    """Training and validation set; the first is None for --eval where there is only a validation folder."""
    train_transform = build_transform(
        True, args.input_size, auto_augment=args.aa or None, color_jitter=args.color_jitter,
        interpolation=args.train_interpolation, hflip=args.hflip, scale=args.scale, ratio=args.ratio)
    build = functools.partial(build_dataset, args.data_set, data_path=args.data_path, input_size=args.input_size)
    lacks_train = args.data_set == 'IMNET' and args.data_path and not (Path(args.data_path) / 'train').is_dir()
    with utils.first_on_each_node():
        train = None if args.eval and lacks_train else build(is_train=True, transform=train_transform)
        val = build(
            is_train=False, transform=build_transform(False, args.input_size), classes=train.classes if train else None)
    if not len(val) or train is not None and not len(train):
        raise ValueError(f'no images in {args.data_path}')
    return train, val


def build_model(args: argparse.Namespace, num_classes: int) -> cmt.CMT:
    if not timm.is_model(args.model):
        raise ValueError(f"unknown --model {args.model}: {', '.join(timm.list_models('cmt_*', module='cmt'))}")
    rates = dict(drop_path_rate=args.drop_path, proj_drop_rate=args.drop)
    if args.head_drop is not None:
        rates['drop_rate'] = args.head_drop
    try:
        model = timm.create_model(args.model, num_classes=num_classes, img_size=args.input_size, **rates)
    except TypeError as error:
        raise ValueError(f'--model {args.model} is no CMT ({error})') from None
    model.set_grad_checkpointing(args.grad_checkpointing)
    return model


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
        cooldown_epochs=args.cooldown_epochs, patience_epochs=args.patience_epochs, decay_rate=args.decay_rate,
        min_lr=args.min_lr, warmup_lr=args.warmup_lr, warmup_epochs=args.warmup_epochs, noise=noise,
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


def find_apex():
    """apex.amp where NVIDIA's apex is installed and still has it, else None. (PyPI's apex is something else.)"""
    try:
        from apex import amp
    except Exception:  # whatever an unrelated package of that name does when imported
        return None
    return amp if hasattr(amp, 'initialize') and hasattr(amp, 'scale_loss') else None


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != 'auto':
        return DTYPES[name]
    if device.type != 'cuda':
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load_weights(model: nn.Module, state: dict, source: str) -> None:
    """Load a state dict under this project's or the released names, all of it or nothing.

    Raises:
        ValueError: tensors missing, left over or of another shape.
    """
    state = cmt.checkpoint_filter_fn(state, model)
    own = model.state_dict()
    faults = [f'{name} missing' for name in own if name not in state]
    faults += [f'{name} left over' for name in state if name not in own]
    faults += [f'{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}'
               for name in own if name in state and state[name].shape != own[name].shape]
    if faults:
        raise ValueError(f'{source} does not fit the model, its size or the number of classes: '
                         f'{len(faults)} tensors differ ({"; ".join(faults[:3])})')
    model.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# stopping

class StopRequest:
    """SIGTERM, SIGUSR1 (SLURM's warning) or Ctrl-C: stop at the next step's border. A second Ctrl-C stops at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self)

    def __call__(self, number: int, frame) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


# ---------------------------------------------------------------------------------------------------------------------

def main(args: argparse.Namespace) -> None:
    """Train or evaluate as `args` say.

    Raises:
        UsageError: what the user can mend; nothing was written.
        TrainingFault: losses or gradients that are not finite; the last checkpoint is good.
    """
    utils.setup_logging()
    try:
        device = utils.init_distributed(args.device, args.dist_url, args.dist_timeout)
    except ValueError as error:
        raise UsageError(str(error)) from None
    rank, world_size = utils.get_rank(), utils.get_world_size()
    output_dir = Path(args.output_dir) if args.output_dir else None

    # what can be wrong without looking at data
    with usage_errors():
        if args.world_size not in (None, 1, world_size):
            raise ValueError(f'--world-size {args.world_size}, but the launcher started {world_size}')
        build_model(args, num_classes=1)
        if output_dir and output_dir.exists() and not output_dir.is_dir():
            raise ValueError(f'--output-dir {output_dir} is a file')
        is_training = not (args.eval or args.throughput)
        holds_run = output_dir and ((output_dir / 'log.txt').exists() or any(output_dir.glob('checkpoint_*.pth')))
        if is_training and holds_run and not args.resume and not args.overwrite:
            raise ValueError(f'{output_dir} holds a run: --resume auto goes on with it, --overwrite replaces it')
        checkpoint = None
        if args.resume == 'auto':
            found = utils.newest_checkpoint(output_dir / LAST)
            source, checkpoint = found or (None, None)
        elif args.resume:
            source = args.resume
            if Path(source).name == LAST and is_training and Path(source).exists():
                source, checkpoint = utils.newest_checkpoint(Path(source))
            else:
                checkpoint = utils.read_checkpoint(source)

    # data
    mixup_active = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    with usage_errors():
        dataset_train, dataset_val = build_data(args, mixup_active)
        num_classes = len(dataset_val.classes)
    pin_memory = args.pin_mem and device.type == 'cuda'
    loader_val = build_loader(
        dataset_val, int(1.5 * args.batch_size), rank=rank, world_size=world_size,
        num_workers=args.num_workers, pin_memory=pin_memory, timeout=args.dist_timeout)

    # model
    random_seed(args.seed)
    with usage_errors():
        model = build_model(args, num_classes)
    dtype = resolve_dtype(args.amp_dtype, device)
    eval_autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    prepare_eval = Prepare(device)
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)

    if args.eval or args.throughput:
        with usage_errors():
            if checkpoint is not None:
                kind = 'model_ema' if args.model_ema and checkpoint.get('model_ema') else 'model'
                load_weights(model, checkpoint.get(kind, checkpoint), source)
                logger.info('loaded %s from %s', kind if kind in checkpoint else 'weights', source)
        model.to(device)
        if args.throughput:
            images, _ = prepare_eval(*next(iter(loader_val)))
            logger.info('batch_size %d throughput %.1f', len(images), throughput(model, images, eval_autocast))
        else:
            report(evaluate(model, loader_val, prepare_eval, eval_autocast))
        return

    model.to(device)
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ema = ModelEmaV3(model, args.model_ema_decay, device='cpu' if args.model_ema_force_cpu else None) \
        if args.model_ema else None

    # optimizer; the learning rate follows the global batch
    global_batch = args.batch_size * args.accum_steps * world_size
    lr = args.lr * global_batch / 512
    optimizer = build_optimizer(args, model, lr)
    sampler = TrainSampler(
        len(dataset_train), args.batch_size, args.accum_steps, repeats=3 if args.repeated_aug else 1,
        rank=rank, world_size=world_size, seed=args.seed, even=mixup_active)
    updates_per_epoch = sampler.updates
    scheduler, num_epochs = build_scheduler(args, optimizer, updates_per_epoch)

    # precision
    amp = find_apex() if args.apex_amp else None
    if amp is not None:
        model, optimizer = amp.initialize(model, optimizer, opt_level=args.apex_opt_level)
        scaler, autocast = ApexScaler(amp), functools.partial(torch.autocast, device.type, enabled=False)
    else:
        if args.apex_amp:
            dtype = torch.float16 if device.type == 'cuda' else torch.bfloat16
            logger.info('--apex-amp: no apex.amp here, going on with torch.autocast to %s', str(dtype)[6:])
        scaler = NativeScaler(device.type, enabled=dtype == torch.float16)
        autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    # resume
    start_epoch, first_step, samples_seen, sums, best = args.start_epoch, 0, 0, None, {}
    with usage_errors():
        if checkpoint is not None:
            load_weights(model, checkpoint.get('model', checkpoint), source)
            if ema is not None:
                load_weights(ema.module, checkpoint.get('model_ema') or checkpoint.get('model', checkpoint), source)
            if 'optimizer' in checkpoint:
                load_optimizer(optimizer, checkpoint['optimizer'], source)
            if checkpoint.get('loss_scaler'):
                scaler.load_state_dict(checkpoint['loss_scaler'])
            best = checkpoint.get('best') or {}
            start_epoch = checkpoint.get('epoch', -1) + 1
            if checkpoint.get('meters'):  # sums of an epoch that is not in the log yet
                start_epoch, first_step = checkpoint['epoch'], checkpoint['step']
                samples_seen, sums = checkpoint['samples_seen'], checkpoint['meters']
                if len(sums) != world_size:  # the first of the new ranks carries on for all of the old
                    sums = [[sum(of_rank) for of_rank in zip(*sums)], *[None] * (world_size - 1)]
                sums = sums[rank]
            if checkpoint.get('world_size', world_size) != world_size:
                logger.info('saved by %d processes, going on with %d: %d samples of epoch %d are done, '
                            'the base learning rate is %g now',
                            checkpoint['world_size'], world_size, samples_seen, start_epoch, lr)
            logger.info('resumed %s at epoch %d, step %d', source, start_epoch, first_step)
        if output_dir:
            try:
                output_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f'--output-dir {output_dir}: {error.strerror}') from None

    # wrappers
    core = model
    if utils.get_world_size() > 1:
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
    train_step = TrainStep(
        model, build_criterion(mixup_active, args.smoothing), optimizer, Prepare(device, mixup, erasing), scaler,
        autocast, ema=(ema, core) if ema else None, clip_grad=args.clip_grad, clip_mode=args.clip_mode,
        skip_nonfinite=args.on_nonfinite == 'skip', seed=args.seed, rank=rank)
    skips_in_a_row = args.max_skips if args.on_nonfinite == 'skip' else 0
    loader_train = build_loader(
        dataset_train, args.batch_size, sampler=sampler, num_workers=args.num_workers, pin_memory=pin_memory,
        timeout=args.dist_timeout)

    # output
    writer = log = None
    if output_dir and rank == 0:
        writer, log = CheckpointWriter(output_dir, args.keep_checkpoints), output_dir / 'log.txt'
        if args.overwrite and checkpoint is None:
            for old in [log, *output_dir.glob('checkpoint_*.pth')]:
                old.unlink(missing_ok=True)
        utils.trim_log(log, start_epoch)
        settings = {key.replace('_', '-'): value for key, value in vars(args).items()
                    if key not in ('config', 'local_rank') and value is not None}
        (output_dir / 'config.yaml').write_text(
            f'# train.py {shlex.join(sys.argv[1:])}\n' + yaml.safe_dump(settings, sort_keys=False))
    elif rank == 0:
        logger.warning('no --output-dir: nothing will be saved')
    logger.info('%s: %.2f M parameters, %d classes, %d training and %d validation images, %d updates an epoch',
                args.model, n_parameters / 1e6, num_classes, len(dataset_train), len(dataset_val), updates_per_epoch)
    logger.info('learning rate %g = %g x %d / 512 (global batch = %d x %d accumulated x %d processes), %s, %s',
                lr, args.lr, global_batch, args.batch_size, args.accum_steps, world_size, device.type,
                'apex ' + args.apex_opt_level if amp else str(dtype)[6:])

    def state_of(epoch: int, step: int, samples_seen: int, meters: list) -> dict:
        return {
            'model': core.state_dict(), 'model_ema': ema.module.state_dict() if ema else None,
            'optimizer': optimizer.state_dict(), 'lr_scheduler': scheduler.state_dict(),
            'loss_scaler': scaler.state_dict(), 'epoch': epoch, 'step': step, 'meters': meters, 'best': best,
            'world_size': world_size, 'samples_seen': samples_seen, 'args': vars(args),
            'classes': list(dataset_val.classes),
        }

    stop, saved_at = StopRequest(), time.monotonic()
    for epoch in range(start_epoch, num_epochs):
        # train
        began = time.monotonic()
        seen_before = samples_seen
        sampler.set_position(epoch, samples_seen)
        updates_before = epoch * updates_per_epoch + samples_seen // sampler.samples_per_update
        position_schedule(scheduler, epoch, updates_before)
        meters = Meters(device, sums)
        learning_rate = optimizer.param_groups[0]['lr']
        updates = sampler.updates
        progress = Progress(f'epoch {epoch}/{num_epochs - 1}', first_step + updates, first_step, args.print_freq, rank == 0)
        stopped = False

        def after_step(done: int) -> bool:
            """Save or stop at a step's border, where all ranks agree to; this waits for no device but to save."""
            nonlocal saved_at, stopped
            samples = seen_before + (done - first_step) * sampler.samples_per_update
            if not scheduler.t_in_epochs:
                scheduler.step_update(updates_before + done - first_step)
            wants_save = writer is not None and (
                args.save_every_steps and done % args.save_every_steps == 0
                or args.save_every_minutes and time.monotonic() - saved_at > 60 * args.save_every_minutes)
            failed = writer is not None and writer.error is not None
            wants = torch.tensor([3 if failed else 2 if stop.signal else 1 if wants_save else 0])
            wants = int(utils.reduce_(wants, torch.distributed.ReduceOp.MAX))
            if wants == 0:
                return False
            if wants < 3:
                check_faults(meters.read(), epoch, done - 1, skips_in_a_row)
                state = state_of(epoch, done, samples, meters.of_all_ranks())
                if writer is not None:
                    writer.save(state)
                saved_at = time.monotonic()
            stopped = wants > 1
            return stopped

        train_one_epoch(
            train_step, loader_train, epoch, first_step, updates, args.accum_steps, meters, progress, after_step,
            check_every=1 if device.type == 'cpu' else args.print_freq, skips_in_a_row=skips_in_a_row)
        progress.close()
        if stopped:
            break
        done, samples_seen = first_step + updates, samples_seen + updates * sampler.samples_per_update
        train_seconds = time.monotonic() - began

        # figures of all ranks
        totals = {name: sum(values) for name, values in zip(Meters.NAMES, zip(*meters.of_all_ranks()))}
        record = {
            'train_lr': learning_rate, 'train_loss': totals['loss'] / max(totals['samples'], 1),
            'epoch': epoch, 'n_parameters': n_parameters,
            'train_images_per_s': (samples_seen - seen_before) / train_seconds,
            'skipped_updates': int(totals['skipped'] / world_size),
        }

        # evaluate what is saved: one rank's BatchNorm statistics, or their mean, on all
        if world_size > 1:
            for module in (core, ema.module if ema else None):
                if module is not None:
                    distribute_bn(module, world_size, reduce=args.dist_bn == 'reduce')
        is_best, metric = [], None
        if epoch % args.test_freq == 0 or epoch > args.test_epoch or epoch == num_epochs - 1:
            stats = evaluate(core, loader_val, prepare_eval, eval_autocast)
            report(stats)
            metric = stats['acc1']
            record.update(test_acc1=stats['acc1'], test_acc5=stats['acc5'], test_loss=stats['loss'])
            if stats['acc1'] > best.get('acc1', -1):
                best = {**best, 'acc1': stats['acc1'], 'epoch': epoch}
                is_best.append('checkpoint_best.pth')
            if ema is not None:
                averaged = ema.module if ema.device is None else copy.deepcopy(ema.module).to(device)
                stats = evaluate(averaged, loader_val, prepare_eval, eval_autocast)
                report(stats, 'EMA ')
                record.update(ema_test_acc1=stats['acc1'], ema_test_acc5=stats['acc5'], ema_test_loss=stats['loss'])
                if stats['acc1'] > best.get('ema_acc1', -1):
                    best = {**best, 'ema_acc1': stats['acc1'], 'ema_epoch': epoch}
                    is_best.append('checkpoint_ema_best.pth')
        if scheduler.t_in_epochs:
            scheduler.step(epoch, metric)

        # log, then save: a run killed in between drops the line when it resumes
        record['epoch_seconds'] = time.monotonic() - began
        record['memory_mb'] = memory_mb(device)
        if writer is not None:
            utils.append_log(log, record)
            names = (f'checkpoint_{epoch:04d}.pth',) if args.keep_checkpoints else ()
            writer.save(state_of(epoch, done, samples_seen, []), copies=(*is_best, *names))
        first_step, samples_seen, sums, saved_at = 0, 0, None, time.monotonic()
        logger.info('epoch %d  train loss %.4f  lr %.2e  %.0f images/s  %.0f s%s', epoch, record['train_loss'],
                    learning_rate, record['train_images_per_s'], record['epoch_seconds'],
                    f"  best {best['acc1']:.3f}%" if best else '')
    if writer is not None:
        writer.wait()
    if stop.signal:
        logger.info('stopped by %s%s', signal.Signals(stop.signal).name,
                    f'; --resume auto goes on from {output_dir / LAST}' if output_dir else '')
        if stop.signal == signal.SIGINT:
            raise KeyboardInterrupt


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, source: str) -> None:
    """Load moments and counts; rates and decays stay as this command line sets them."""
    settings = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise ValueError(f'the optimizer state in {source} is of another model or optimizer ({error})') from None
    for group, setting in zip(optimizer.param_groups, settings):
        group.update(setting)


def memory_mb(device: torch.device) -> float:
    """Peak memory of this process so far: of the device on CUDA, else resident."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report(stats: dict[str, float], title: str = '') -> None:
    """The authors' two lines."""
    logger.info('* %sAcc@1 %.3f Acc@5 %.3f loss %.3f', title, stats['acc1'], stats['acc5'], stats['loss'])
    logger.info('%sAccuracy of the network on the %d test images: %.3f%%', title, stats['count'], stats['acc1'])


def cli() -> int:
    args = parse_args()
    try:
        main(args)
    except UsageError as error:
        if utils.get_rank() == 0:
            sys.stderr.write(f'train.py: error: {error}\n')
        return 2
    except TrainingFault as error:
        if utils.get_rank() == 0:
            sys.stderr.write(f'train.py: {error}\n')
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == '__main__':
    sys.exit(cli())
