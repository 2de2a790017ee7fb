"""Define the flags of train.py, check them, and read YAML defaults.

Nothing here imports torch, NumPy or timm, so --help and mistakes take a tenth of a second instead of seconds.
"""
import argparse
import contextlib
import difflib
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

from errors import UsageError, mistake
from launch import read_launch

DATA_SETS = ('IMNET', 'CIFAR10', 'CIFAR100', 'CARS', 'FLOWERS102', 'PETS', 'INAT18', 'INAT19', 'INAT21', 'DIGITS')
INAT_CATEGORIES = ('kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name')
DTYPES = ('float32', 'tf32', 'bfloat16', 'float16')
# Paths that config.yaml and checkpoints store in absolute form. The second group may also be model names.
PATHS = 'data_path', 'class_map', 'train_json', 'val_json', 'train_images', 'val_images'
FILES_OR_NAMES = 'finetune', 'teacher_path', 'weights'
EXTENSIONS = '.pth', '.pt', '.bin', '.safetensors', '.ckpt'  # a copy, since weights.py imports torch
# Flags of the authors' code, DeiT and ConvNeXt that are not supported, with the reason.
REFUSED = {
    '--drop-block': 'CMT has no DropBlock',
    '--update-temperature': "the authors' code calls a method that never existed",
    **dict.fromkeys(('--warmup-drop-path', '--warmup-drop-path-epochs'), '--drop-path is constant'),
    '--patience-epochs': 'it is for the plateau schedule, which a resumed run cannot repeat',
    '--resplit': 'it needs augmentation splits, which no recipe uses',
    '--init-method': 'use --dist-url',
    '--debug': 'it skipped a FLOPs count, which scripts/profile_flops.py now does',
    # DeiT and ConvNeXt
    '--dist-eval': 'all processes always share the evaluation, and it is exact',
    **dict.fromkeys(('--nb-classes', '--num-classes'), 'the number of classes comes from the data'),
    '--unscale-lr': '--lr is for a global batch of 512',
    '--update-freq': 'use --accum-steps',
    '--auto-resume': 'use --resume auto',
    # timm
    **{flag: f'use {ours}' for flag, ours in (
        ('--img-size', '--input-size'), ('--data-dir', '--data-path'), ('--output', '--output-dir'),
        ('--amp', '--amp-dtype'), ('--pretrained', '--finetune'), ('--initial-checkpoint', '--finetune'),
        ('--grad-accum-steps', '--accum-steps'))},
}


# Parser and argument types

class Parser(argparse.ArgumentParser):
    """Report a mistake in one line, on rank 0 only; every rank exits with status 2."""

    def parse_known_args(self, args=None, namespace=None):
        """Also accept --switch=true, false, 1 or 0, as sweeps write them."""
        known, flags = self._option_string_actions, []
        for arg in sys.argv[1:] if args is None else args:
            flag, _, value = arg.partition('=')
            if not value or flag not in known or known[flag].nargs != 0:
                flags.append(arg)
            elif value.lower() not in ('true', 'false', '1', '0'):
                self.error(f'{arg}: use true or false')
            else:
                flags = [other for other in flags if other != flag]  # The command line overrides the config.
                opposite = f'--{flag[5:]}' if flag.startswith('--no-') else f'--no-{flag[2:]}'
                flags += [flag] if value.lower() in ('true', '1') else [opposite] * (opposite in known)
        return super().parse_known_args(flags, namespace)

    def error(self, message: str):
        if read_launch().rank == 0:
            sys.stderr.write(f'{self.prog}: error: ' + message.replace('\n', '\\n') + '\n')
        raise SystemExit(2)

    @contextlib.contextmanager
    def usage_errors(self):
        """Report a user's mistake in the block (errors.mistake) as `error` does; a bug keeps its traceback."""
        try:
            yield
        except (UsageError, OSError) as error:
            if mistake(error) is None:
                raise
            self.error(mistake(error))


def in_range(kind: type, low: float, high: float = float('inf'), above: bool = False) -> Callable:
    """Return an argparse type: a `kind` in [low, high], or in (low, high] if `above`."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not {'an integer' if kind is int else 'a number'}") from None
        if not (math.isfinite(value) and low <= value <= high) or above and value == low:
            upper = f' and at most {high}' if high < float('inf') else ''
            raise argparse.ArgumentTypeError(f'{text} must be {"above" if above else "at least"} {low}{upper}')
        return value
    return parse


count, positive = in_range(int, 0), in_range(int, 1)
non_negative, positive_float = in_range(float, 0), in_range(float, 0, above=True)
fraction, positive_fraction = in_range(float, 0, 1), in_range(float, 0, 1, above=True)


def image_size(text: str) -> int:
    """Check a height or width in pixels."""
    size = positive(text)
    if size % 32:
        nearest = max(32, (size + 16) // 32 * 32)
        raise argparse.ArgumentTypeError(f'{size} is not a multiple of 32 (nearest: {nearest})')
    return size


path = os.path.expanduser  # Expand ~ here: the shell does not do so in --flag=~/folder, nor does YAML.


def data_set(name: str) -> str:
    """Check the name of a data set."""
    if name not in DATA_SETS and not name.startswith(('torch/', 'wds/')):
        raise argparse.ArgumentTypeError(
            f"invalid choice: '{name}' (choose from {', '.join(DATA_SETS)}, torch/NAME, wds/NAME)")
    return name


def output_file(text: str) -> Path:
    """Check that a file can be written, before the work that fills it."""
    path = Path(text).expanduser()
    try:
        if path.exists():
            path.open('ab').close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"'{text}' cannot be written ({error.strerror}): choose a file in an existing folder") from None
    return path


def add_weights_flag(parser: argparse.ArgumentParser) -> None:
    """Add --no-model-ema, spelled as in train.py."""
    parser.add_argument('--no-model-ema', dest='model_ema', action='store_false',
                        help="use the model's own weights even if the checkpoint has an EMA")


def add_classifier_flags(parser: argparse.ArgumentParser) -> None:
    """Add the model argument of predict.py and demo.py, and the flags that evaluation.load_classifier reads."""
    parser.add_argument('model', metavar='CKPT|MODEL',
                        help='a checkpoint, a converted folder, or a name with published weights')
    parser.add_argument('--class-names', type=path, metavar='FILE', help='class names in index order, one per line')
    parser.add_argument('--input-size', type=image_size, metavar='N', help="pixels (default: the checkpoint's)")
    parser.add_argument('--crop-pct', type=positive_fraction, metavar='FRACTION',
                        help="fraction of an image's short side to keep (default: the checkpoint's)")
    add_weights_flag(parser)
    parser.add_argument('--device', help='default: cuda if available')


def add_run_flags(parser: argparse.ArgumentParser, seed: int, num_workers: int) -> None:
    """Add the flags that train.py and detection.py share, in the group 'run'."""
    g = parser.add_argument_group('run')
    g.add_argument('--config', type=path, metavar='YAML', help='file of "flag: value" lines: defaults for flags')
    g.add_argument('--output-dir', type=path, default='', help='folder for the run; without this, nothing is saved')
    g.add_argument('--resume', type=path, default='', metavar='CKPT', help='checkpoint to resume, or to evaluate with '
                   "--eval; 'auto': the newest intact checkpoint in --output-dir, if any")
    g.add_argument('--overwrite', action='store_true', help='replace the run in --output-dir')
    g.add_argument('--eval', action='store_true', help='evaluate the checkpoint of --resume and stop')
    g.add_argument('--print-freq', type=positive, default=10, help='steps between log lines with loss and speed')
    g.add_argument('--seed', type=in_range(int, 0, 2 ** 32 - 1), default=seed)
    g.add_argument('--num-workers', type=count, default=num_workers, help='data loading workers of each process')
    g.add_argument('--amp-dtype', default='auto', choices=('auto', *DTYPES),
                   help='auto: float32 on CPU, bfloat16 or else float16 on CUDA; tf32: float32, TF32 matmuls on CUDA')
    g.add_argument('--fast-norm', action=argparse.BooleanOptionalAction, default=False,
                   help="compute LayerNorm in autocast's dtype instead of float32")
    g.add_argument('--device', choices=('cuda', 'mps', 'cpu'), help='default: cuda if available, else cpu')
    g.add_argument('--dist-url', default='env://', help='rendezvous address')
    g.add_argument('--dist-timeout', type=positive_float, default=600, help='seconds that ranks wait for each other')


def get_parser() -> argparse.ArgumentParser:
    """Build the parser of train.py, with all flags in kebab-case."""
    parser = Parser(prog='train.py', description='Train and evaluate CMT.', allow_abbrev=False)
    toggle = argparse.BooleanOptionalAction

    add_run_flags(parser, seed=3407, num_workers=4)
    g = parser.add_argument_group('training')
    g.add_argument('--finetune', type=path, default='', metavar='FILE|NAME', help='weights to start from, with any '
                   'size and classes: a file, or a CMT in timm or on the Hugging Face Hub; --resume takes precedence')
    g.add_argument('--throughput', action='store_true', help='measure images/s of the forward pass and stop')
    g.add_argument('--start-epoch', type=count, default=0, help='epoch to start at when no checkpoint sets the epoch')
    g.add_argument('--epochs', type=positive, default=300, help='epochs to train, not counting --cooldown-epochs')
    g.add_argument('--test-freq', type=positive, default=20, help='validate every N epochs', metavar='N')
    g.add_argument('--test-epoch', type=int, default=260, help='validate after every epoch past this one')
    g.add_argument('--save-every-steps', type=count, default=0, help='steps between checkpoints within an epoch')
    g.add_argument('--save-every-minutes', type=non_negative, default=0, help='minutes between checkpoints in an epoch')
    g.add_argument('--stopped-file', type=lambda path: str(output_file(path)), metavar='FILE',
                   help='file to create if a signal stops the run, for job scripts that requeue the run')
    g.add_argument('--keep-checkpoints', type=count, default=0, help='recent epochs to keep as checkpoint_EEEE.pth')
    g.add_argument('--log-tensorboard', action=toggle, default=False, help="write each epoch's metrics for TensorBoard")
    g.add_argument('--log-wandb', action=toggle, default=False, help="send each epoch's metrics to Weights & Biases")
    g.add_argument('--profile', type=count, default=0, metavar='N', help='trace N steps into OUTPUT_DIR/trace.json')

    g = parser.add_argument_group('data')
    g.add_argument('--data-set', default='IMNET', type=data_set, metavar='NAME', help=f"{', '.join(DATA_SETS)}, "
                   'torch/NAME for a torchvision data set through timm, wds/NAME for WebDataset shards')
    g.add_argument('--data-path', type=path, help='IMNET: folder with train/ and val/, or with tars of them; INAT: '
                   'folder with the JSON files; others: folder of the data set, or to download the data set to')
    g.add_argument('--class-map', type=path, metavar='FILE', help='IMNET: file with the class folders in index order')
    g.add_argument('--val-split', type=fraction, help='fraction of each class to hold out if there is no val/ folder')
    g.add_argument('--skip-damaged', action=toggle, default=False, help='decode all images first; omit damaged ones')
    g.add_argument('--max-train-images', type=positive, help='train on this many images, balanced over the classes')
    g.add_argument('--inat-category', default='name', choices=INAT_CATEGORIES, help='INAT: taxonomic rank of classes')
    g.add_argument('--ignore-exif', action=toggle, default=False, help='ignore EXIF rotations, as published scores do')
    g.add_argument('--max-image-pixels', type=positive, default=64_000_000, help='larger images are not decoded')
    g.add_argument('--input-size', type=image_size, default=224, help='height and width in pixels, a multiple of 32')
    g.add_argument('--crop-pct', '--eval-crop-ratio', type=positive_fraction, help='fraction of the short side '
                   "that evaluation keeps (default: the checkpoint's, else 0.875, or 1 up to 32 px)")
    g.add_argument('--valid-labels', type=path, help='with --eval: score only among the class indices in '
                   "FILE, one per line, or 'all' (default: all; for ImageNet's classes, those in the data)")
    g.add_argument('--real-labels', type=path, nargs='?', const='', help='with --eval: also score by the '
                   "ReaL labels of ImageNet's validation images (default: timm's copy of real.json)")
    g.add_argument('--report', type=path, metavar='DIR', help='with --eval: write tables and figures to DIR')
    g.add_argument('--batch-size', type=positive, default=64, help='images per batch and process')
    g.add_argument('--loader', choices=('fast', 'reference'), help='transform training images with libjpeg-turbo and '
                   'OpenCV (fast, the default if they are installed) or with Pillow (reference)')
    g.add_argument('--pin-mem', action=toggle, default=True, help='load batches into pinned memory for CUDA')
    g.add_argument('--repeated-aug', action=toggle, default=True, help='use a third of the images, three copies each')

    g = parser.add_argument_group('augmentation')
    g.add_argument('--color-jitter', type=non_negative, default=0.4, help='strength, used with --aa none')
    g.add_argument('--aa', default='rand-m9-mstd0.5-inc1', help='name of a timm augmentation policy, or none')
    g.add_argument('--train-interpolation', default='bicubic', choices=('random', 'bilinear', 'bicubic'))
    g.add_argument('--hflip', type=fraction, default=0.5, help='probability of a horizontal flip')
    g.add_argument('--scale', type=fraction, nargs=2, help='range of the random crop\'s area (default: 0.08 1)')
    g.add_argument('--ratio', type=positive_float, nargs=2, help="range of the crop's aspect ratio (default: 3/4 4/3)")
    g.add_argument('--reprob', type=fraction, default=0.25, help='probability of random erasing')
    g.add_argument('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='fill with 0, a color, noise')
    g.add_argument('--recount', type=positive, default=1, help='maximum number of rectangles to erase')
    g.add_argument('--mixup', type=non_negative, default=0.8, help='alpha of mixup; 0 turns mixup off')
    g.add_argument('--cutmix', type=non_negative, default=1.0, help='alpha of CutMix; 0 turns CutMix off')
    g.add_argument('--cutmix-minmax', type=fraction, nargs=2, help="range of the CutMix box's sides; turns CutMix on")
    g.add_argument('--mixup-prob', type=fraction, default=1.0, help='probability of mixup or CutMix')
    g.add_argument('--mixup-switch-prob', type=fraction, default=0.5, help='probability of CutMix if both are on')
    g.add_argument('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help='per batch, pair or image')
    g.add_argument('--smoothing', type=fraction, default=0.1, help='label smoothing')

    g = parser.add_argument_group('model')
    g.add_argument('--model', default='cmt_s', help="name of a CMT (default: cmt_s, or the checkpoint's model)")
    g.add_argument('--freeze-stages', type=in_range(int, 0, 4), default=0, help='freeze the stem and this many stages')
    g.add_argument('--drop', type=fraction, default=0.0, help='dropout in LMHSA and IRFFN')
    g.add_argument('--head-drop', type=fraction, help="dropout before the classifier (default: the model's)")
    g.add_argument('--drop-path', type=fraction, default=0.1, help='rate in the last block, rising linearly from 0')
    g.add_argument('--grad-checkpointing', action=toggle, default=False, help='recompute activations to save memory')
    g.add_argument('--compile', action=toggle, default=False, help='run the training step through torch.compile')
    g.add_argument('--sync-bn', action=toggle, default=False, help='share BatchNorm statistics among all ranks (CUDA)')
    g.add_argument('--bn-momentum', type=positive_fraction, help="momentum of BatchNorm (default: the model's, 0.1)")
    g.add_argument('--dist-bn', default='broadcast', choices=('broadcast', 'reduce'),
                   help="BatchNorm statistics before evaluation: rank 0's, or the mean of all ranks")
    g.add_argument('--model-ema', action=toggle, default=True, help='keep an EMA of the weights; --eval scores it')
    g.add_argument('--model-ema-decay', type=fraction, default=0.99996, help='decay of the EMA in each optimizer step')
    g.add_argument('--model-ema-warmup', action=toggle, default=False, help='cap the decay at 1 - n^(-2/3) in step n')
    g.add_argument('--model-ema-force-cpu', action=toggle, default=False, help='keep the EMA in host memory (slow)')

    g = parser.add_argument_group('distillation')
    g.add_argument('--distillation-type', default='none', choices=('none', 'soft', 'hard'), help='teacher targets')
    g.add_argument('--teacher-model', help='name of a pretrained model in timm or on the Hugging Face Hub')
    g.add_argument('--teacher-path', type=path, metavar='FILE', help="file with the teacher's weights")
    g.add_argument('--distillation-alpha', type=fraction, default=0.5, help='weight of the distillation loss '
                   "(soft: both losses weigh the same at K / (K + 1) for K classes, since DeiT's code divides by K)")
    g.add_argument('--distillation-tau', type=positive_float, default=1.0, help='temperature of soft distillation')

    g = parser.add_argument_group('optimizer')
    g.add_argument('--opt', default='adamw', help="name of one of timm's optimizers")
    g.add_argument('--opt-eps', type=positive_float, default=1e-8, help='epsilon of the optimizer')
    g.add_argument('--opt-betas', type=fraction, nargs=2, help="two betas (default: the optimizer's)")
    g.add_argument('--momentum', type=fraction, default=0.9, help='momentum of SGD and its relatives')
    g.add_argument('--weight-decay', type=non_negative, default=0.05, help='weight decay, except for 1-D parameters')
    g.add_argument('--layer-decay', type=fraction, help='factor on the learning rate for each layer below the head')
    g.add_argument('--clip-grad', type=positive_float, help='threshold for --clip-mode (default: no clipping)')
    g.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='what --clip-grad limits')
    g.add_argument('--accum-steps', type=positive, default=1, help='batches for each optimizer step')
    g.add_argument('--on-nonfinite', default='stop', choices=('stop', 'skip'),
                   help='stop the run, or skip the optimizer step, if a loss or gradient is not finite')
    g.add_argument('--max-skips', type=positive, default=10, help='consecutive steps that may be skipped')

    g = parser.add_argument_group('schedule')
    g.add_argument('--sched', default='cosine', choices=('cosine', 'tanh', 'step', 'multistep', 'poly'))
    g.add_argument('--sched-on-updates', action=toggle, default=False, help='update the learning rate after each step')
    g.add_argument('--lr', type=positive_float, default=5e-4, help='rate for a global batch of 512, scaled linearly')
    g.add_argument('--lr-noise', type=float, nargs='+', help='fractions of the run at which noise starts and ends')
    g.add_argument('--lr-noise-pct', type=float, default=0.67, help='noise limit as a fraction of the learning rate')
    g.add_argument('--lr-noise-std', type=float, default=1.0, help='standard deviation of the noise')
    g.add_argument('--warmup-lr', type=non_negative, default=1e-6, help='learning rate at the start of the warm-up')
    g.add_argument('--min-lr', type=non_negative, default=1e-5, help='learning rate at the end, not scaled')
    g.add_argument('--warmup-epochs', type=count, default=5)
    g.add_argument('--warmup-prefix', action=toggle, default=False, help='warm up before the --epochs, not within them')
    g.add_argument('--cooldown-epochs', type=count, default=10, help='epochs at --min-lr after the --epochs')
    g.add_argument('--decay-epochs', type=positive_float, default=30, help='epochs between decays of --sched step')
    g.add_argument('--decay-rate', '--dr', type=non_negative, default=0.1, help='factor of each decay; power for poly')

    g = parser.add_argument_group('precision and processes')
    g.add_argument('--apex-amp', action=toggle, default=False,
                   help="train with NVIDIA's apex.amp, or torch's autocast to float16 (bfloat16 on a CPU)")
    g.add_argument('--apex-opt-level', default='O1', choices=('O0', 'O1', 'O2', 'O3'))
    g.add_argument('--world-size', type=positive, help='expected number of processes, checked against the launcher')
    g.add_argument('--local-rank', type=int, help=argparse.SUPPRESS)  # torch.distributed.launch passes this flag
    return add_defaults(parser)


def add_defaults(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add default values to the help texts; ArgumentDefaultsHelpFormatter skips flags without a help text."""
    for action in parser._actions:
        if action.default not in (None, False, '', argparse.SUPPRESS) and '(default:' not in (action.help or ''):
            action.help = f'{action.help or ""} (default: %(default)s)'.strip()
    return parser


def hint(parser: argparse.ArgumentParser, arg: str) -> str:
    """Return why a flag is not supported, or suggest a similar flag, as in '; did you mean --epochs?', or ''."""
    flag = arg.split('=')[0]
    if flag in REFUSED and parser.prog == 'train.py':
        return f' ({flag} is not supported: {REFUSED[flag]})'
    similar = difflib.get_close_matches(flag, parser._option_string_actions, 1)
    return f'; did you mean {similar[0]}?' if similar else ''


def parse_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, set[str]]:
    """Parse flags, spelled with - or _, over the defaults of --config.

    Returns:
        The arguments, and the flags that were given by the file or the command line.
    """
    argv = [re.sub('^--[^=]*', lambda flag: flag[0].replace('_', '-'), arg)
            for arg in (sys.argv[1:] if argv is None else argv)]
    config = parser.parse_known_args([a for a in argv if a not in ('-h', '--help')])[0].config
    from_config = config_flags(parser, config) if config else []
    args, unknown = parser.parse_known_args(from_config + argv)
    if unknown:
        parser.error(f'unrecognized arguments: {" ".join(unknown)}{hint(parser, unknown[0])}')
    folder = Path(args.config or '').parent
    if args.config and not args.output_dir and ((folder / '.lock').exists() or any(folder.glob('checkpoint_*.pth'))):
        args.output_dir = str(folder)  # An earlier run wrote this config, so use that run's folder.
    if args.eval and not args.resume:
        parser.error('--eval needs --resume CKPT')
    if args.resume == 'auto' and not args.output_dir:
        parser.error('--resume auto needs --output-dir')
    return args, {arg.split('=')[0] for arg in from_config + argv if arg.startswith('--')}


def make_paths_absolute(args: argparse.Namespace) -> None:
    """Make paths absolute, so that config.yaml and checkpoints can be used from any folder."""
    for name in PATHS + FILES_OR_NAMES:
        path = (getattr(args, name, None) or '').removeprefix('local-dir:')
        is_file = path.endswith(EXTENSIONS) and '://' not in path or any(Path(path).glob('config.*'))
        if path and (name in PATHS or is_file or os.path.isfile(path)):
            setattr(args, name, os.path.abspath(path))


def is_downloaded(data_set: str) -> bool:
    """Return whether torchvision downloads a data set to --data-path."""
    return not data_set.startswith(('IMNET', 'INAT', 'wds/', 'DIGITS', 'COCO', 'SHAPES'))


def check_paths(args: argparse.Namespace, file: str | None, values: dict | None = None, resumes: bool = False) -> None:
    """Raise UsageError if a path that `file` (a config, or a checkpoint with `values`) sets does not exist."""
    if values is None:  # Skip a pipe, which can be read only once.
        values = yaml.safe_load(Path(file).read_text('utf-8')) if os.path.isfile(file or '') else {}
    for name in PATHS + FILES_OR_NAMES:
        flag = '--' + name.replace('_', '-')
        path = os.path.abspath(os.path.expanduser(str(values.get(name) or values.get(flag[2:]))))
        if path != getattr(args, name, None) or os.path.exists(path):
            continue  # The command line overrides the path, the value is a model name, or the path exists.
        if name == 'data_path' and is_downloaded(args.data_set) or name in ('finetune', 'weights') and resumes:
            continue  # torchvision downloads the data, or the checkpoint's weights take precedence.
        raise UsageError(f'{path}, which {file} sets, does not exist: override it with {flag}')
    has_data = args.data_set != 'IMNET' or os.path.exists(args.data_path or '')  # Check before weights are downloaded.
    if vars(args).get('finetune') and not resumes and not has_data:
        raise UsageError(f'--data-path must be an existing folder of class folders, not {args.data_path or "missing"}')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags of train.py, and check them."""
    parser = get_parser()
    args, given = parse_flags(parser, argv)
    if (args.resume or args.finetune) and '--model' not in given:
        args.model = None  # The weights determine the model.
    problem = find_mistake(args)
    if problem:
        parser.error(problem)
    if args.aa.lower() == 'none':
        args.aa = ''
    if not args.data_path and is_downloaded(args.data_set):
        args.data_path = 'data'
    make_paths_absolute(args)
    if args.eval or args.throughput:  # In training, checkpoints would store this.
        args.given = given
    return args


def find_mistake(args: argparse.Namespace) -> str | None:
    """Describe the first combination of flags that cannot work, or return None."""
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    distils, teacher = args.distillation_type != 'none', args.teacher_model or args.teacher_path
    has_real = args.real_labels is not None
    checks = [
        (mixes and args.batch_size % 2 and not (args.eval or args.throughput),
         f'--batch-size {args.batch_size} is odd, but mixup and CutMix pair the images of a batch: use an even number'),
        (distils and not teacher,
         f'--distillation-type {args.distillation_type} needs --teacher-model or --teacher-path'),
        (teacher and not distils, 'a teacher needs --distillation-type soft or hard'),
        (args.profile and not args.output_dir, '--profile needs --output-dir'),
        ((args.valid_labels or has_real or args.report) and not args.eval,
         '--valid-labels, --real-labels and --report need --eval'),
        (args.valid_labels and has_real, '--real-labels scores among all classes: omit --valid-labels'),
        (args.valid_labels not in (None, 'all') and not os.path.isfile(args.valid_labels),
         f'--valid-labels {args.valid_labels}: no such file'),
        (args.data_set == 'DIGITS' and args.data_path,
         f'--data-set DIGITS takes no --data-path {args.data_path}: use --data-set IMNET to train on your own images'),
    ]
    for name in ('scale', 'ratio', 'cutmix_minmax'):
        low, high = getattr(args, name) or (0, 1)
        is_empty = name == 'cutmix_minmax' and int(args.input_size * low) == int(args.input_size * high)
        checks.append((low > high or is_empty,
                       f'--{name.replace("_", "-")} {low} {high}: give a smaller number, then a larger one'))
    return next((mistake for applies, mistake in checks if applies), None)


def config_flags(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """Turn a YAML file into flags, so that both are checked the same way."""
    try:
        config = yaml.safe_load(Path(path).read_text('utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f'--config {path}: {getattr(error, "strerror", None) or " ".join(str(error).split())}')
    if not isinstance(config, dict):
        parser.error(f'--config {path} does not consist of "flag: value" lines')
    known = parser._option_string_actions
    flags = []
    for key, value in config.items():
        flag = '--' + str(key).replace('_', '-')
        if flag not in known or flag in ('--config', '--help'):
            parser.error(f'--config {path}: unknown key {key!r}{hint(parser, flag)}')
        action = known[flag]
        is_switch = action.nargs == 0
        if value is None:
            continue
        if is_switch != isinstance(value, bool):
            parser.error(f'--config {path}: {key}: {value!r} is not ' + ('true or false' if is_switch else 'a value'))
        flags += [flag, *map(str, value)] if isinstance(value, list) else [f'{flag}={value}']
    return flags
