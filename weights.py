"""Read weights of any origin into one Weights value, infer the model that they fit, and load them.

Origins: runs of this project, the authors' release, safetensors, MindCV's MindSpore files, names of timm or the hub.
"""
import argparse
import logging
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.models import adapt_input_conv

import cmt
import mindspore
from checkpoints import LAST, newest_checkpoint, no_checkpoint, read_checkpoint
from errors import first_line

logger = logging.getLogger(__name__)

# what parsing tensors of unexpected dimensions or sizes raises
SHAPE_ERRORS = IndexError, RuntimeError, ZeroDivisionError, ValueError
MAX_LISTED = 8  # tensors that an error names
FILES = '.pth', '.pt', '.bin', '.safetensors', '.ckpt'


@dataclass(frozen=True)
class Weights:
    """Hold the tensors of a model with the metadata of their file.

    Attributes:
        state: tensors under the names of the file, without prefix (cmt.plain_weights).
        kind: 'model_ema' for any EMA, 'bare' (a file of tensors alone), 'mindspore', or one of cmt.WEIGHT_KEYS.
        source: file or name, for messages.
        model_args: arguments of cmt.CMT inferred from names and shapes; empty if the weights are of no CMT.
        run_args: arguments of the run that wrote the file; empty if the file contains none.
        classes: class names in the order of their index, or None.
        epoch: last epoch that was trained, or None.
        notes: what was removed from the names or left out of the file.
    """
    state: dict[str, torch.Tensor]
    kind: str
    source: str
    model_args: dict[str, Any]
    run_args: dict[str, Any]
    classes: list[str] | None
    epoch: int | None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, checkpoint: dict[str, Any], source: str, use_ema: bool = False) -> 'Weights':
        """Extract the weights from a checkpoint, or their EMA if `use_ema` and the checkpoint contains one.

        Raises:
            ValueError: a checkpoint without weights, or tensors of shapes that no model has.
        """
        state, key = cmt.find_weights(checkpoint, use_ema)
        try:
            state, notes = cmt.plain_weights(state)
        except ValueError as error:
            raise ValueError(f'{source}: {error}') from None
        kind = _checked_kind(state, key, checkpoint, source)
        try:
            model_args = model_args_of(state)
        except SHAPE_ERRORS as error:
            raise ValueError(f'{source} does not fit the model: tensors of odd shapes ({error})') from None
        args = checkpoint.get('args')
        run_args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
        classes, epoch = checkpoint.get('classes') or None, checkpoint.get('epoch')
        classes = classes if isinstance(classes, (list, tuple)) else None  # other tools may write a number
        if checkpoint.get('meters') and isinstance(epoch, int):  # an epoch in progress
            epoch -= 1
        share = _initial_share(checkpoint, run_args) if kind == 'model_ema' else 0
        if share > 0.05:
            notes = [*notes, f'{share:.0%} of this EMA is still the initial weights of the run, as its decay is slow; '
                     "the model's own weights, in the same file, may be better"]
        return cls(state, kind, source, model_args, run_args, classes, epoch, tuple(notes))

    def classes_for(self, model: nn.Module) -> list[str] | None:
        """Return the class names if there is one for each output of `model`."""
        return self.classes if self.classes and len(self.classes) == model.num_classes else None

    def for_classes(self, classes: list[str]) -> 'Weights':
        """Return the weights, without their head if its class names are known, and are not `classes` in this order."""
        names = self.classes or []
        is_known = len(names) == self.model_args.get('num_classes') and all(isinstance(name, str) for name in names)
        if not is_known or list(names) == classes:
            return self
        state = {name: value for name, value in self.state.items() if not name.startswith('head.')}
        return replace(self, state=state, notes=(*self.notes, 'its classes are others, or in another order'))


def _initial_share(checkpoint: dict[str, Any], run_args: dict[str, Any]) -> float:
    """Return the share of a run's initial weights in the EMA of its checkpoint; 0 if unknown."""
    try:
        updates = max(float(state['step']) for state in checkpoint['optimizer']['state'].values())
        return run_args['model_ema_decay'] ** updates
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):  # a file of another tool
        return 0


def _checked_kind(state: dict[str, torch.Tensor], key: str, checkpoint: dict[str, Any], source: str) -> str:
    """Return the kind of a state dict that was found under `key`; raise ValueError if it has no values to load."""
    if not state:
        keys = ', '.join(map(str, list(checkpoint)[:MAX_LISTED])) + ', ...' * (len(checkpoint) > MAX_LISTED)
        raise ValueError(f"{source}: it holds no weights under a known key; its keys are {keys or 'none'}: save the "
                         "state dict of the model under 'model'")
    empty = next((name for name, value in state.items() if value.numel() == 0), None)
    if empty:  # placeholders of weights that are sharded over other files
        raise ValueError(f'{source}: its tensor {empty} is empty')
    if not key and any(name.endswith(('.gamma', '.moving_mean')) for name in state):
        return 'mindspore'
    return 'model_ema' if key in cmt.EMA_KEYS else key or 'bare'


# reading

def read_weights(source: str, use_ema: bool = False) -> Weights:
    """Read the weights of a file or name; arguments and errors are those of `read` and Weights.of."""
    return Weights.of(read(source), source, use_ema)


def read(source: str) -> dict[str, Any]:
    """Read a checkpoint from a file of any kind, or the pretrained weights of a timm model.

    Args:
        source: .pth, .safetensors or MindSpore's .ckpt; an http(s) address of a .pth; a folder written by
            scripts/convert_checkpoint.py; or a name ('cmt_s', 'hf-hub:...', 'local-dir:...').

    Returns:
        Tensors on the CPU, in the nesting of the file.

    Raises:
        ValueError: no such file or name, a damaged file, or one that would run code when loaded.
    """
    config = Path(source.removeprefix('local-dir:')) / 'config.json'
    if config.is_file():
        source = f'local-dir:{config.parent}'
    # timm takes cmt_small.pth for a tag of cmt_s
    is_name = source.startswith(('hf-hub:', 'hf_hub:', 'local-dir:')) or \
        timm.is_model(source.split('.')[0]) and not source.endswith(FILES)
    if not os.path.exists(source) and not is_name and not source.startswith(('http://', 'https://')):
        raise ValueError(f'{no_checkpoint(source)}, nor a model of that name ({_names()})')
    if os.path.isfile(source) or not is_name:
        return read_file(source)
    if timm.is_model(source.split('.')[0]):
        create_cmt(source, device='meta')  # refuse other models before anything is fetched
    try:
        model = timm.create_model(source, pretrained=True)
    except Exception as error:  # clients of hubs raise anything
        raise ValueError(f'{source} could not be fetched ({first_line(error)}): download it elsewhere, and give its '
                         'file') from None
    args = {'model': model.pretrained_cfg.get('architecture'), 'input_size': getattr(model, 'img_size', None)}
    return {'model': model.state_dict(), 'args': args, 'classes': model.pretrained_cfg.get('label_names')}


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a file by the reader of its type; result and errors are those of `read`."""
    name = str(path)
    try:
        if name.endswith('.safetensors') and os.path.isfile(name):
            return safetensors.torch.load_file(name)
        if name.endswith('.ckpt') and os.path.isfile(name) and not _is_torch_file(name):
            return mindspore.read(name)
    except Exception as error:  # parsers fail anywhere on a damaged file
        reason = str(error) if 'checksum' in str(error) else f'{name} is cut short, damaged or no checkpoint'
        raise ValueError(reason) from None
    return read_checkpoint(name)


def find_checkpoint(
        resume: str, output_dir: Path | None, fall_back: bool) -> tuple[str, dict[str, Any]] | tuple[None, None]:
    """Return the name of the checkpoint to resume, and its contents.

    Args:
        resume: a file or address; 'auto' for the newest readable checkpoint in `output_dir`; '' for none.
        output_dir: folder of the run.
        fall_back: read the previous checkpoint if checkpoint_last.pth is damaged.

    Raises:
        ValueError: no readable checkpoint.
    """
    if not resume:
        return None, None
    if resume == 'auto':
        return newest_checkpoint(output_dir)
    if fall_back and Path(resume).name == LAST and Path(resume).is_file():
        return newest_checkpoint(Path(resume).parent)
    return resume, read(resume) if os.path.isdir(resume) else read_file(resume)


def _is_torch_file(name: str) -> bool:
    """Return whether a .ckpt is a zip archive or a pickle, as Lightning writes."""
    with open(name, 'rb') as file:
        return file.read(1) in (b'P', b'\x80')


# the model of weights

SHARED = dict(num_heads=(1, 2, 4, 8), sr_ratios=(8, 4, 2, 1), num_features=1280, qkv_bias=True)  # of all variants


def model_args_of(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Infer the arguments of cmt.CMT from the names and shapes of weights.

    Weights without position bias are assumed to be MindCV's: tanh GELU, LayerNorm eps 1e-7, and 1, 2, 4, 8, ... heads,
    which follow from no shape.

    Returns:
        Arguments by name; empty if the weights are of no CMT. Without `img_size` for MindCV's weights, which fit any
        size, and for released tables of an input that is not square.
    """
    shapes = {cmt._released_name(cmt._torch_name(name)): tuple(value.shape) for name, value in weights.items()}
    stages = [c for c in 'abcdefgh' if f'patch_embed_{c}.proj.weight' in shapes]
    depths = [len({n.split('.')[1] for n in shapes if n.startswith(f'blocks_{c}.')}) for c in stages]
    wanted = [f'blocks_{c}.0.mlp.conv1.0.weight' for c in stages] + ['stem_conv1.weight', '_fc.weight']
    if not stages or any(name not in shapes for name in wanted):
        return {}
    dims = [shapes[f'patch_embed_{c}.proj.weight'][0] for c in stages]
    tables = [shapes.get(f'relative_pos_{c}') for c in stages]
    args = dict(
        stem_chs=shapes['stem_conv1.weight'][0], in_chans=shapes['stem_conv1.weight'][1], embed_dims=tuple(dims),
        depths=tuple(depths),
        sr_ratios=tuple(shapes.get(f'blocks_{c}.0.attn.sr.0.weight', (1,))[-1] for c in stages),
        mlp_ratios=tuple(_ratio(d, shapes[f'blocks_{c}.0.mlp.conv1.0.weight'][0]) for c, d in zip(stages, dims)),
        num_features=shapes['_fc.weight'][0], num_classes=shapes.get('head.weight', (0,))[0],
        qkv_bias='blocks_a.0.attn.q.bias' in shapes)
    if None in tables:
        return dict(args, num_heads=tuple(2 ** i for i in range(len(stages))),
                    position_bias=False, act_layer='gelu_tanh', norm_eps=1e-7)
    args['num_heads'] = tuple(table[0] for table in tables)
    if len(tables[0]) == 5:
        args['img_size'] = (4 * tables[0][1], 4 * tables[0][2])
    elif math.isqrt(tables[0][1]) ** 2 == tables[0][1]:
        args['img_size'] = (4 * math.isqrt(tables[0][1]),) * 2
    return args


def _ratio(dim: int, hidden: int) -> float:
    """Return the ratio of fewest digits with int(dim * ratio) == hidden."""
    ratios = [round(hidden / dim, digits) for digits in range(8)]
    return next((ratio for ratio in ratios if int(dim * ratio) == hidden), (hidden + 0.5) / dim)


def variant_of(model_args: dict[str, Any]) -> str | None:
    """Return the name of the published model that these arguments make, if any."""
    if any(model_args.get(key) != value for key, value in SHARED.items()):
        return None
    keys = 'stem_chs', 'embed_dims', 'depths'
    return next((name for name, variant in cmt.MODELS.items()
                 if all(variant.model_args[key] == model_args[key] for key in keys)), None)


def _differences(model_args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that differ from the published model of the same widths, besides size and classes."""
    changed = {}
    if not model_args.get('position_bias', True):
        changed = {key: model_args[key] for key in ('position_bias', 'act_layer', 'norm_eps', 'mlp_ratios')}
    variant = variant_of(model_args)
    if variant:
        def hidden(ratios):
            return [int(dim * ratio) for dim, ratio in zip(model_args['embed_dims'], ratios)]
        if hidden(model_args['mlp_ratios']) != hidden(cmt.MODELS[variant].model_args['mlp_ratios']):
            changed['mlp_ratios'] = model_args['mlp_ratios']
    if model_args.get('in_chans', 3) != 3:
        changed['in_chans'] = model_args['in_chans']
    return changed


def identify(weights: Weights, model: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return the name of the model that weights fit, and the arguments that differ from that name's defaults.

    Args:
        weights: of a CMT.
        model: name to use instead of the one in the file.

    Returns:
        A name in timm; arguments of cmt.CMT besides input size and number of classes.

    Raises:
        ValueError: the weights are of no CMT.
    """
    args = weights.model_args
    if not args:
        names = '; '.join([', '.join(list(weights.state)[:3]) + ', ...', *weights.notes])
        raise ValueError(f'{weights.source} does not fit the model: it holds no CMT ({names})')
    saved, variant = weights.run_args.get('model'), variant_of(args)
    saved = saved if isinstance(saved, str) and timm.is_model(saved) else None
    if variant is None and cmt.ALIASES.get(saved, saved) in cmt.MODELS:
        saved = None  # the run began from weights of no published size, under the name of any model
    if saved or variant or (model and args.get('position_bias', True)):
        return model or saved or variant, _differences(args)
    # no published size: any name will do, since all of its arguments are replaced
    return model or 'cmt_s', {key: value for key, value in args.items() if key not in ('img_size', 'num_classes')}


def _names() -> str:
    return ', '.join(timm.list_models('cmt_*', module='cmt'))


def create_cmt(name: str, **kwargs) -> cmt.CMT:
    """Create a CMT by its name in timm.

    Raises:
        ValueError: no model of that name, or one that is no CMT.
    """
    if not timm.is_model(name):
        raise ValueError(f'unknown model {name}: {_names()}')
    try:
        model = timm.create_model(name, **kwargs)
    except TypeError as error:
        raise ValueError(f'{name} is no CMT ({error})') from None
    except RuntimeError as error:  # 'cmt_s.TAG'
        raise ValueError(f'{name}: {error}') from None
    if not isinstance(model, cmt.CMT):
        raise ValueError(f'{name} is no CMT')
    return model


# loading

def load_weights(model: nn.Module, weights: Weights, new_head: bool = False) -> str:
    """Load all tensors of `weights` into a model, or raise and load none.

    Args:
        model: a CMT, or another timm model whose names the weights have.
        weights: of the same model, under the names of any origin.
        new_head: keep the head of `model` if it has another number of classes, and adapt the first convolution to
            another number of input channels.

    Returns:
        One line on what was loaded, resampled and left new; also logged.

    Raises:
        ValueError: tensors missing, left over or of another shape; `model` is unchanged.
    """
    model_state, notes = model.state_dict(), list(weights.notes)
    if isinstance(model, cmt.CMT):
        try:
            state = cmt.to_model(weights.state, model)
        except SHAPE_ERRORS as error:
            raise ValueError(f'{weights.source} does not fit the model: {error}') from None
        before, now = weights.model_args.get('img_size'), model.img_size
        resampled = sum(name.endswith('position_bias') for name in model_state) if before not in (None, now) else 0
        if resampled:
            notes.append(f'{resampled} position biases resampled from {before[0]}x{before[1]} to {now[0]}x{now[1]}')
    else:
        own = {cmt.unwrapped_name(name): name for name in model_state}  # timm's iformer has modules named `module`
        state = {own.get(name, name): value for name, value in weights.state.items()}
    kept = []  # tensors that stay as `model` has them
    if new_head:
        for name in ('head.weight', 'head.bias'):
            if name not in model_state or name not in state or state[name].shape != model_state[name].shape:
                state.pop(name, None)
                kept += [name] if name in model_state else []
        if kept:
            notes.append(f'newly initialised: {", ".join(kept)}')
        notes += _adapt_first_conv(model, model_state, state, weights.source)
    _check_names_and_shapes(model_state, state, kept, weights)
    model.load_state_dict({**{name: model_state[name] for name in kept}, **state})
    words = {'model': 'weights', 'model_ema': 'EMA weights', 'mindspore': "weights in MindCV's form"}
    line = '; '.join([
        f'{weights.source}: {words.get(weights.kind, "weights")} ({weights.kind}), {len(state)} tensors', *notes])
    logger.info('loaded %s', line)
    return line


def _adapt_first_conv(model: nn.Module, model_state: dict, state: dict, source: str) -> list[str]:
    """Adapt the first convolution in `state` to the input channels of `model`; return notes for the log."""
    first = getattr(model, 'default_cfg', {}).get('first_conv', 'stem.conv1') + '.weight'
    if first not in state or first not in model_state or state[first].shape[1] == model_state[first].shape[1]:
        return []
    note = f'{first} adapted from {state[first].shape[1]} to {model_state[first].shape[1]} input channels'
    try:
        state[first] = adapt_input_conv(model_state[first].shape[1], state[first])
    except (NotImplementedError, AssertionError):
        raise ValueError(f'{source}: {note} is not possible, only from 3') from None
    return [note]


def _check_names_and_shapes(model_state: dict, state: dict, kept: list[str], weights: Weights) -> None:
    """Raise ValueError if `state` and the model's `model_state`, except `kept`, differ in names or shapes."""
    faults = [f'{name} missing' for name in model_state if name not in state and name not in kept]
    faults += [f'{name} left over' for name in state if name not in model_state]
    faults += [f'{name} {tuple(state[name].shape)} for {tuple(model_state[name].shape)}'
               for name in model_state if name in state and state[name].shape != model_state[name].shape]
    if faults:
        variant = variant_of(weights.model_args)
        is_other = variant and variant != variant_of(model_args_of(model_state))
        origin = f' (it holds {variant}: give --model {variant})' if is_other else ''
        more = f'; and {len(faults) - MAX_LISTED} more' if len(faults) > MAX_LISTED else ''
        raise ValueError(f'{weights.source} does not fit the model, its size or the number of classes{origin}: '
                         f'{len(faults)} tensors differ ({"; ".join(faults[:MAX_LISTED])}{more})')


def build_model(
        weights: Weights,
        name: str | None = None,
        num_classes: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        **kwargs,
) -> cmt.CMT:
    """Build the model of `weights`, load them, and set eval mode.

    Args:
        weights: of a CMT.
        name: of the model; None for the name that `identify` finds.
        num_classes: a number other than the file's makes a new head; None for the file's.
        img_size: input size (pixels); None for the file's, or 224 if the weights fit any (MindCV's).
        kwargs: further arguments of cmt.CMT, such as in_chans or dynamic_img_size.

    Raises:
        ValueError: weights of no CMT, or that do not fit `name` or `kwargs`.
    """
    name, differences = identify(weights, name)
    args = weights.model_args
    try:
        model = create_cmt(
            name, num_classes=args['num_classes'] if num_classes is None else num_classes,
            img_size=img_size or args.get('img_size') or weights.run_args.get('input_size') or 224,
            **{**differences, **kwargs})
    except (RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f'no model can be built for {weights.source}: {error}') from None
    load_weights(model, weights, new_head=num_classes is not None or 'in_chans' in kwargs)
    return model.eval()


def build_teacher(name: str | None, path: str | None, classes: list[str]) -> nn.Module:
    """Build the teacher of distillation, with its trained weights, not their EMA.

    Args:
        name: of any timm model; None for the model in `path`.
        path: file with its weights; None for the pretrained weights of `name`.
        classes: names of the classes of the data.

    Raises:
        ValueError: no such model or file, or a teacher of other classes.
    """
    if path is None:
        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as error:  # clients of hubs raise anything
            raise ValueError(f'--teacher-model {name}: {first_line(error)}') from None
    elif name is None or name.startswith('cmt_'):
        weights = read_weights(path)
        model = build_model(weights, name)
        if weights.classes_for(model) not in (None, list(classes)):
            raise ValueError(f'--teacher-path {path}: the teacher has other classes than the data')
    elif timm.is_model(name):
        model = timm.create_model(name, num_classes=len(classes))
        load_weights(model, Weights.of(read_file(path), path))
    else:
        raise ValueError(f'unknown --teacher-model {name}')
    if model.num_classes != len(classes):
        raise ValueError(f'the teacher has {model.num_classes} classes, the data {len(classes)}: '
                         '--teacher-path needs a teacher that was trained on this data')
    return model
