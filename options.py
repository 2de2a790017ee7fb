"""The flags of train.py, their checks, and the YAML files that set their defaults.

Apart from train.py so that the story of a run reads in one piece there.
"""
import argparse
import math
import sys
import tempfile
from pathlib import Path

import yaml
from timm.utils.distributed import world_info_from_env

from datasets import DATA_SETS, INAT_CATEGORIES

DTYPES = ('float32', 'bfloat16', 'float16')


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
        if not (math.isfinite(value) and low <= value <= high) or above and value == low:
            upper = f' and at most {high}' if high < float('inf') else ''
            raise argparse.ArgumentTypeError(f'{text} is not {"above" if above else "at least"} {low}{upper}')
        return value
    return parse


def data_set(name: str) -> str:
    if name not in DATA_SETS and not name.startswith(('torch/', 'wds/')):
        raise argparse.ArgumentTypeError(
            f"invalid choice: '{name}' (choose from {', '.join(DATA_SETS)}, torch/NAME, wds/NAME)")
    return name


def output_file(text: str) -> Path:
    """A type for argparse: a file that can be written, which is tried before the work whose results it takes."""
    path = Path(text)
    try:
        if path.exists():
            path.open('ab').close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"'{text}' cannot be written ({error.strerror}): give a file in a folder that is there") from None
    return path


def size(text: str) -> int:
    units = {'K': 2 ** 10, 'M': 2 ** 20, 'G': 2 ** 30, 'T': 2 ** 40}
    unit = units.get(text[-1:].upper())
    return int(amount(text[:-1] if unit else text) * (unit or 1))


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
    g.add_argument('--finetune', default='', metavar='FILE|NAME',
                   help='start from these weights, of any input size and number of classes: a file, or a name of '
                   "timm's or the hub's; what --resume finds goes before it")
    g.add_argument('--overwrite', action='store_true', help='replace the run that --output-dir holds')
    g.add_argument('--eval', action='store_true', help='evaluate --resume CKPT and stop')
    g.add_argument('--throughput', action='store_true', help='measure images/s of the forward pass and stop')
    g.add_argument('--seed', type=number(int, 0, 2 ** 32 - 1), default=3407)
    g.add_argument('--start-epoch', type=count, default=0)
    g.add_argument('--epochs', type=positive, default=300)
    g.add_argument('--test-freq', type=positive, default=20, help='validate every so many epochs ...')
    g.add_argument('--test-epoch', type=int, default=260, help='... and in every epoch after this one')
    g.add_argument('--print-freq', type=positive, default=10, help='steps between two looks at loss and speed')
    g.add_argument('--save-every-steps', type=count, default=0, help='checkpoint inside an epoch')
    g.add_argument('--save-every-minutes', type=amount, default=0, help='checkpoint inside an epoch')
    g.add_argument('--keep-checkpoints', type=count, default=0, help="epochs whose checkpoints stay besides the last")
    g.add_argument('--log-tensorboard', action=toggle, default=False, help='figures of each epoch for TensorBoard too')
    g.add_argument('--log-wandb', action=toggle, default=False, help='... for Weights & Biases too')
    g.add_argument('--profile', type=count, default=0, metavar='N',
                   help='trace of N steps to --output-dir/trace.json, for a browser (ui.perfetto.dev)')

    g = parser.add_argument_group('data')
    g.add_argument('--data-set', default='IMNET', type=data_set, metavar='NAME',
                   help=f"{', '.join(DATA_SETS)}, torch/NAME for one of timm's torchvision readers, "
                   'wds/NAME for WebDataset shards')
    g.add_argument('--data-path', help='IMNET: folder with train/ and val/, or tars of them; INAT: where its JSON '
                   'files are; others: where it lies or is downloaded to')
    g.add_argument('--class-map', metavar='FILE', help='IMNET: class folders in the order of their index, one a line')
    g.add_argument('--val-split', type=share, metavar='FRACTION',
                   help='IMNET without val/: hold out this share of each class, the same images in every run')
    g.add_argument('--inat-category', default='name', choices=INAT_CATEGORIES, help='what the classes of INAT are')
    g.add_argument('--input-size', type=positive, default=224, help='pixels, a multiple of 32')
    g.add_argument('--batch-size', type=positive, default=64, help='of one process')
    g.add_argument('--num-workers', type=count, default=4, help='loader processes of each process')
    g.add_argument('--loader', choices=('fast', 'reference'),
                   help='decode and augment training images by libjpeg-turbo, torch and OpenCV, or by Pillow, with '
                   'the same draws (default: fast where simplejpeg and OpenCV are installed)')
    g.add_argument('--cache', default='none', choices=('none', 'ram', 'disk'),
                   help='keep training files, as they are read first, in memory or on a local disk')
    g.add_argument('--cache-dir', metavar='FOLDER', help='where (default: /dev/shm, or ~/.cache/cmt)')
    g.add_argument('--cache-size', type=size, metavar='BYTES',
                   help='as 64G or 500M, for all processes of a machine (default: half of what is free there)')
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
    g.add_argument('--model', default='cmt_s', help='cmt_ti, cmt_xs, cmt_s, cmt_b (default: that of the weights given)')
    g.add_argument('--freeze-stages', type=number(int, 0, 4), default=0, metavar='N',
                   help='keep the stem and the first N stages as they are')
    g.add_argument('--drop', type=share, default=0.0, help='dropout in LMHSA and IRFFN')
    g.add_argument('--head-drop', type=share, help="dropout before the classifier (default: the model's)")
    g.add_argument('--drop-path', type=share, default=0.1)
    g.add_argument('--grad-checkpointing', action=toggle, default=False)
    g.add_argument('--compile', action=toggle, default=False, help='torch.compile')
    g.add_argument('--kernels', action=toggle, default=False,
                   help='Triton kernels for CUDA (kernels.py); not measured on a GPU yet')
    g.add_argument('--sync-bn', action=toggle, default=False)
    g.add_argument('--dist-bn', default='broadcast', choices=('broadcast', 'reduce'),
                   help="BatchNorm statistics before evaluation: the first rank's, or the mean (with which a run "
                   'resumed in mid-epoch does not end with the same bits)')
    g.add_argument('--model-ema', action=toggle, default=True)
    g.add_argument('--model-ema-decay', type=share, default=0.99996)
    g.add_argument('--model-ema-force-cpu', action=toggle, default=False)

    g = parser.add_argument_group('distillation')
    g.add_argument('--distillation-type', default='none', choices=('none', 'soft', 'hard'))
    g.add_argument('--teacher-model', help="any of timm's, or a name of the hub's; with its pretrained weights, unless")
    g.add_argument('--teacher-path', metavar='FILE', help="... the teacher's weights are in this file")
    g.add_argument('--distillation-alpha', type=share, default=0.5,
                   help="share of the teacher's part in the loss; as DeiT's code divides the soft loss by the number K "
                   'of classes, both parts weigh the same at K / (K + 1): 0.91 for 10 classes')
    g.add_argument('--distillation-tau', type=rate, default=1.0, help='temperature of soft distillation')

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
    g.add_argument('--sched', default='cosine', choices=('cosine', 'tanh', 'step', 'multistep', 'poly'))
    g.add_argument('--sched-on-updates', action=toggle, default=False)
    g.add_argument('--lr', type=rate, default=5e-4, help='for a global batch of 512; it follows the global batch')
    g.add_argument('--lr-noise', type=float, nargs='+')
    g.add_argument('--lr-noise-pct', type=float, default=0.67)
    g.add_argument('--lr-noise-std', type=float, default=1.0)
    g.add_argument('--warmup-lr', type=amount, default=1e-6)
    g.add_argument('--min-lr', type=amount, default=1e-5)
    g.add_argument('--warmup-epochs', type=count, default=5)
    g.add_argument('--warmup-prefix', action=toggle, default=False, help='warm up before the --epochs, not in them')
    g.add_argument('--cooldown-epochs', type=count, default=10)
    g.add_argument('--decay-epochs', type=rate, default=30)
    g.add_argument('--decay-rate', '--dr', type=amount, default=0.1)

    g = parser.add_argument_group('precision and processes')
    g.add_argument('--amp-dtype', default='auto', choices=('auto', *DTYPES),
                   help='auto: float32 on CPU, bfloat16 on CUDA, float16 where CUDA has no bfloat16')
    g.add_argument('--apex-amp', action=toggle, default=False,
                   help="train with NVIDIA's apex.amp, or in float16 where it is not")
    g.add_argument('--apex-opt-level', default='O1', choices=('O0', 'O1', 'O2', 'O3'))
    g.add_argument('--device', choices=('cuda', 'cpu'), help='default: cuda where there is one')
    g.add_argument('--dist-url', default='env://')
    g.add_argument('--dist-timeout', type=rate, default=600, help='seconds that ranks wait for each other')
    g.add_argument('--world-size', type=positive, help='checked against what the launcher started')
    g.add_argument('--local-rank', type=int, help=argparse.SUPPRESS)  # torch.distributed.launch passes it

    for flag, reason in {
        '--drop-block': 'CMT has no DropBlock',
        '--update-temperature': "the authors' code calls a method that never existed",
        '--warmup-drop-path': "the authors' models have nothing that it could act on; --drop-path is constant",
        '--warmup-drop-path-epochs': "the authors' models have nothing that it could act on",
        '--patience-epochs': 'it goes with the plateau schedule, whose state no restart could repeat',
        '--resplit': 'it acts on augmentation splits, which no recipe makes',
        '--init-method': 'use --dist-url',
        '--debug': 'it left out a FLOPs count, which training no longer makes (scripts/profile_flops.py does)',
    }.items():
        parser.add_argument(flag, action=Refused, reason=reason)
    for action in parser._actions:  # argparse's own formatter tells the defaults of flags with a text alone
        if action.default not in (None, False, '', argparse.SUPPRESS) and '(default:' not in (action.help or ''):
            action.help = f'{action.help or ""} (default: %(default)s)'.strip()
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
    if (args.resume or args.finetune) and not any(arg.split('=')[0] == '--model' for arg in argv):
        args.model = None  # that of the weights
    mixup = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixup and args.batch_size % 2 and not args.eval:
        parser.error(f'--batch-size {args.batch_size} is odd: mixup and cutmix pair the images of a batch')
    for name in ('scale', 'ratio', 'cutmix_minmax'):
        pair = getattr(args, name)
        if pair and pair[0] >= pair[1]:
            parser.error(f'--{name.replace("_", "-")} {pair[0]} {pair[1]}: the first must be below the second')
    if args.distillation_type != 'none' and not (args.teacher_model or args.teacher_path):
        parser.error(f'--distillation-type {args.distillation_type} needs --teacher-model or --teacher-path')
    if args.distillation_type == 'none' and (args.teacher_model or args.teacher_path):
        parser.error('a teacher needs --distillation-type soft or hard')
    if args.opt_betas and len(args.opt_betas) != 2:
        parser.error('--opt-betas takes two numbers')
    if args.eval and not args.resume:
        parser.error('--eval needs --resume CKPT')
    if args.resume == 'auto' and not args.output_dir:
        parser.error('--resume auto needs --output-dir')
    if args.profile and not args.output_dir:
        parser.error('--profile needs --output-dir')
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
