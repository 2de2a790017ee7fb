"""Read weights of any origin into one Weights value, build the model they fit, and load them.

Origins: runs of this project, the authors' release, safetensors, MindCV's MindSpore files, model names of timm or the
Hugging Face Hub.
"""
import argparse
import contextlib
import logging
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.models import adapt_input_conv

import checkpoints
import cmt
import mindspore
from checkpoints import BEST, FORMAT, LAST, is_own, load_strictly, no_checkpoint, read_checkpoint
from errors import UsageError, first_line

logger = logging.getLogger(__name__)

EXTENSIONS = '.pth', '.pt', '.bin', '.safetensors', '.ckpt'

# Keys of checkpoints, in order of preference.
WEIGHT_KEYS = 'model', 'state_dict', 'model_state_dict', 'net', 'network', 'weights', 'params', 'module'
EMA_KEYS = 'model_ema', 'state_dict_ema', 'ema', 'ema_state_dict', 'params_ema'
# Name components that DDP and AveragedModel, torch.compile, FSDP and activation checkpointing add.
_WRAPPERS = {'module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module'}
# A wrapper's prefix precedes both anchor keys; every CMT key starts with one of _COMPONENTS.
_ANCHORS = r'stem[._]conv1\.weight', r'(?:stages\.0\.blocks\.0\.lmhsa|blocks_a\.0\.attn)\.q\.weight'
_COMPONENTS = re.compile(r'(stem|stages|head_proj|head|(stem|patch_embed|relative_pos|blocks)_\w+|_fc|_bn)(\.|$)')


# Weights in a checkpoint

@dataclass(frozen=True)
class Weights:
    """Hold the tensors of a model with the metadata of their file.

    Attributes:
        state: tensors under the names of the file, without prefixes.
        is_ema: whether the tensors are an EMA.
        file: file or model name, for messages.
        model_args: arguments of cmt.CMT, from the file or inferred from shapes; empty if the weights are not a CMT's.
        name: model name from the file, or of the published model with these shapes; None if unknown.
        input_size: height of the images that the file was trained on, or None.
        crop_pct: fraction of the short side that evaluation keeps, from the file's arguments, else as published.
        classes: class names in index order, or None.
        epoch: last epoch that was trained, or None.
        is_own: whether the file is this project's, so that `model_args` are complete.
        notes: log messages about prefixes removed from names and entries of the file left out.
    """
    state: dict[str, torch.Tensor]
    is_ema: bool
    file: str
    model_args: dict[str, Any]
    name: str | None
    input_size: int | None
    classes: list[str] | None
    epoch: int | None
    crop_pct: float = 0.875
    is_own: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any], file: str, use_ema: bool = False) -> 'Weights':
        """Extract the weights from a checkpoint, or their EMA if `use_ema` and the checkpoint contains one.

        Raises:
            UsageError: the checkpoint has no weights, or contains two models.
        """
        args = checkpoint.get('args')
        args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
        name, size = args.get('model'), args.get('input_size')  # In other tools' files, check their types.
        if is_own(checkpoint):
            key = 'model_ema' if use_ema and checkpoint.get('model_ema') else 'model'
            state, notes = checkpoint[key], []
            model_args = {arg: tuple(value) if isinstance(value, list) else value  # config.json stores lists.
                          for arg, value in checkpoint['model_args'].items()}
        else:
            state, key = find_state_dict(checkpoint, use_ema)
            state, notes = clean_names(state, file)
            state = mindspore.to_torch(state) if any(tensor.endswith('.moving_mean') for tensor in state) else state
            model_args = model_args_of(state)
            if not isinstance(name, str) or name in (*cmt.MODELS, *cmt.ALIASES) or not timm.is_model(name):
                name = variant_of(model_args)  # Infer the name from the shapes, which are more reliable.
        if not state:
            keys = ', '.join(map(str, list(checkpoint)[:8])) or 'none'
            raise UsageError(f"{file}: no weights under a known key ({keys}): save the state dict under 'model'")
        epoch = checkpoint.get('epoch')
        if checkpoint.get('meters') and isinstance(epoch, int):  # This epoch was not completed.
            epoch -= 1
        size = model_args['img_size'][0] if 'img_size' in model_args else size
        size = size if isinstance(size, int) and size > 0 and size % 32 == 0 else None
        crop = args.get('crop_pct') or args.get('eval_crop_ratio')  # DeiT's name for crop_pct
        if not isinstance(crop, (int, float)) or not 0 < crop <= 1:
            crop = 1. if size == 32 else 0.875  # Images of 32 px are evaluated whole (transforms.build_transform).
        return cls(state, key in EMA_KEYS, file, model_args, name, size, checkpoints.class_names(checkpoint), epoch,
                   crop, is_own(checkpoint), tuple(notes))

    def class_names(self, model: nn.Module) -> list[str] | None:
        """Return the class names if there is one for each output of `model`."""
        return self.classes if self.classes and len(self.classes) == model.num_classes else None

    def drop_other_head(self, classes: list[str]) -> 'Weights':
        """Drop the head if it was trained on class names other than `classes`, or in another order."""
        names = self.classes or []
        if len(names) != self.model_args.get('num_classes') or names == classes:
            return self
        state = {name: value for name, value in self.state.items() if not name.startswith('head.')}
        return replace(self, state=state, notes=(*self.notes, 'head dropped, since its classes or their order differ'))

    def check_name(self, name: str | None) -> None:
        """Raise UsageError if the weights do not belong to the model `name`; None allows any model."""
        if not self.model_args:
            tensors = ', '.join(list(self.state)[:3])
            raise UsageError(f'{self.file} does not contain the weights of a CMT: its tensors are {tensors}, ...')
        is_mindcv = not self.model_args.get('position_bias', True)  # MindCV uses the same names for other widths.
        if name in (None, self.name) or is_mindcv and not variant_of(self.model_args):
            return
        args = create_cmt(name, device='meta').model_args
        if any(args[key] != self.model_args[key] for key in ('stem_chs', 'embed_dims', 'depths')):
            hint = f': it contains {self.name}; use --model {self.name}' if self.name else ''
            raise UsageError(f'{self.file} does not match the model {name}{hint}')


def find_state_dict(checkpoint: dict[str, Any], use_ema: bool = False) -> tuple[dict[str, Any], str]:
    """Return the state dict in a checkpoint, its EMA first if `use_ema`, and its key; '' for the checkpoint itself."""
    for key in EMA_KEYS + WEIGHT_KEYS if use_ema else WEIGHT_KEYS + EMA_KEYS:
        if isinstance(checkpoint.get(key), dict):
            state, inner = find_state_dict(checkpoint[key], use_ema)
            if any(isinstance(value, torch.Tensor) for value in state.values()):
                return state, inner if inner in EMA_KEYS else key
    return checkpoint, ''


def unwrapped_name(name: str) -> str:
    """Remove the components that wrappers such as DDP add to a name."""
    return '.'.join(component for component in name.split('.') if component not in _WRAPPERS)


def clean_names(state_dict: dict[str, Any], file: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Remove wrappers' components from the names and, for a CMT, a prefix and the tensors of other modules.

    Return tensors by name, and notes on what was removed. Raise UsageError if `file` contains two models.
    """
    tensors, names, others, notes = {}, {}, [], []
    for name, value in state_dict.items():
        plain = unwrapped_name(str(name))
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            others.append(str(name))
        elif plain in tensors:
            raise UsageError(f'{file}: {names[plain]} and {name} belong to two models: save only one of them')
        else:
            tensors[plain], names[plain] = value, name
    matches = [map(re.compile(rf'(.*\.)?{anchor}').fullmatch, tensors) for anchor in _ANCHORS]
    prefixes = sorted(set.intersection(*({match[1] or '' for match in anchor if match} for anchor in matches)))
    if len(prefixes) > 1:
        names = ' and '.join(prefix or '(none)' for prefix in prefixes)
        raise UsageError(f'{file} contains models under the prefixes {names}: save only one of them')
    for prefix in prefixes:
        names = {name for name in tensors if name.startswith(prefix) and _COMPONENTS.match(name, len(prefix))}
        others += [name for name in tensors if name not in names]
        tensors = {name[len(prefix):]: value for name, value in tensors.items() if name in names}
        notes += [f'prefix {prefix} removed'] if prefix else []
    if others:
        notes.append(f'left out {len(others)} other entries, such as {", ".join(others[:3])}')
    return tensors, notes


# Reading

def read_weights(file: str, use_ema: bool = False) -> Weights:
    """Read the weights of a file, run or name; arguments and errors are those of `read` and Weights.from_checkpoint."""
    file = best_of_run(file, use_ema)
    return Weights.from_checkpoint(read(file), file, use_ema)


def best_of_run(name: str, use_ema: bool = True) -> str:
    """Return the best checkpoint of a run folder by accuracy, else its last one; `name` if it is not a run folder."""
    files = [file for file in (LAST, *list(BEST)[:1 + use_ema]) if Path(name, file).is_file()]
    if timm.is_model(name) or not files:
        return name
    scores = {}
    for file in filter(BEST.__contains__, files):
        with contextlib.suppress(UsageError):  # Skip a damaged file.
            scores[file] = read_checkpoint(Path(name, file)).get('acc1', 0)
    best = Path(name, max(scores, key=scores.get, default=files[0]))
    logger.warning('%s is a run folder, reading %s', name, best.name)
    return str(best)


def read(file: str) -> dict[str, Any]:
    """Read a checkpoint from a file of any kind, or the pretrained weights of a timm model.

    Args:
        file: .pth, .safetensors or MindSpore's .ckpt; an http(s) URL of a .pth; a folder written by
            scripts/convert_checkpoint.py; or a name ('cmt_s', 'hf-hub:...', 'local-dir:...').

    Returns:
        The contents of the file, with tensors on the CPU.

    Raises:
        UsageError: the file or name does not exist, or the file is damaged or would run code when loaded.
    """
    config = Path(file.removeprefix('local-dir:')) / 'config.json'
    if config.is_file():
        file = f'local-dir:{config.parent}'
    # timm would parse cmt_small.pth as the model cmt_small with the tag pth.
    is_name = file.startswith(('hf-hub:', 'hf_hub:', 'local-dir:')) or \
        timm.is_model(file.split('.')[0]) and not file.endswith(EXTENSIONS)
    if not is_name and not os.path.exists(file) and not file.startswith(('http://', 'https://')):
        raise UsageError(f'{no_checkpoint(file)}, and no model has that name')
    if os.path.isfile(file) or not is_name:
        return read_file(file)
    if timm.is_model(file.split('.')[0]):
        create_cmt(file, device='meta')  # Refuse other models before anything is downloaded.
    try:
        model = timm.create_model(file, pretrained=True)
    except Exception as error:  # Hub clients can raise exceptions of any type.
        raise UsageError(f'{file} could not be downloaded ({first_line(error)}): download it on another machine (see '
                         'README.md), and pass the path of the file instead of the name') from None
    if not isinstance(model, cmt.CMT):
        raise UsageError(f'{file} is not a CMT')
    return {'format': FORMAT, 'model': model.state_dict(), 'model_args': model.model_args,
            'args': {'model': model.pretrained_cfg.get('architecture'), 'crop_pct': model.pretrained_cfg['crop_pct']},
            'classes': model.pretrained_cfg.get('label_names')}


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a file with the reader for its extension. Result and errors are those of `read`."""
    name = str(path)
    if name.endswith('.safetensors') and os.path.isfile(name):
        try:
            return safetensors.torch.load_file(name)
        except safetensors.SafetensorError:
            raise UsageError(f'{name} is truncated, damaged, or not a safetensors file') from None
    if name.endswith('.ckpt') and os.path.isfile(name):
        with open(name, 'rb') as file:
            if file.read(1) not in (b'P', b'\x80'):  # Lightning's files are zip archives or pickles.
                return mindspore.read(name)
    return read_checkpoint(name)


# The model that weights fit

def model_args_of(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Infer the arguments of cmt.CMT from the names and shapes of weights.

    Weights without position bias are assumed to be MindCV's: tanh GELU, LayerNorm eps 1e-7, and 1, 2, 4, 8, ... heads,
    since shapes do not determine these.

    Returns:
        Arguments by name; empty if the weights are not a CMT's. `img_size` is missing for MindCV's weights, which fit
        any size, and for released tables of an input that is not square.
    """
    shapes = {cmt.released_name(name): tuple(value.shape) for name, value in weights.items()}
    stages = [c for c in 'abcdefgh' if f'patch_embed_{c}.proj.weight' in shapes]
    tables = [shapes.get(f'relative_pos_{c}') for c in stages]  # position biases
    convs = ['stem_conv1', '_fc', *(f'blocks_{c}.0.mlp.conv1.0' for c in stages)]
    if not stages or any(len(shapes.get(f'{name}.weight', ())) != 4 for name in convs):
        return {}
    dims = [shapes[f'patch_embed_{c}.proj.weight'][0] for c in stages]
    args = dict(
        stem_chs=shapes['stem_conv1.weight'][0], in_chans=shapes['stem_conv1.weight'][1], embed_dims=tuple(dims),
        depths=tuple(len({n.split('.')[1] for n in shapes if n.startswith(f'blocks_{c}.')}) for c in stages),
        sr_ratios=tuple(shapes.get(f'blocks_{c}.0.attn.sr.0.weight', (1,))[-1] for c in stages),
        mlp_ratios=tuple(_ratio(d, shapes[f'blocks_{c}.0.mlp.conv1.0.weight'][0]) for c, d in zip(stages, dims)),
        num_features=shapes['_fc.weight'][0], num_classes=shapes.get('head.weight', (0,))[0],
        qkv_bias='blocks_a.0.attn.q.bias' in shapes)
    if None in tables:
        args.update(num_heads=tuple(2 ** i for i in range(len(stages))),
                    position_bias=False, act_layer='gelu_tanh', norm_eps=1e-7)
    else:
        args['num_heads'] = tuple(table[0] for table in tables)
        height, width = tables[0][1:3] if len(tables[0]) == 5 else [math.isqrt(tables[0][1])] * 2
        if len(tables[0]) == 5 or height * width == tables[0][1]:
            args['img_size'] = (4 * height, 4 * width)
    return args


def _ratio(dim: int, hidden: int) -> float:
    """Return the ratio with the fewest digits such that int(dim * ratio) == hidden."""
    ratios = [round(hidden / dim, digits) for digits in range(8)]
    return next((ratio for ratio in ratios if int(dim * ratio) == hidden), (hidden + 0.5) / dim)


def variant_of(model_args: dict[str, Any]) -> str | None:
    """Return the name of the published model with these arguments, if any."""
    shared = dict(num_heads=(1, 2, 4, 8), sr_ratios=(8, 4, 2, 1), num_features=1280, qkv_bias=True)
    keys = *shared, 'stem_chs', 'embed_dims', 'depths'
    return next((name for name, variant in cmt.MODELS.items() if all(
        model_args.get(key) == {**shared, **variant.model_args}[key] for key in keys)), None)


def create_cmt(name: str, **kwargs) -> cmt.CMT:
    """Create a CMT by its name in timm; raise UsageError if no model has that name, or if the model is not a CMT."""
    if not timm.is_model(name):
        raise UsageError(f"unknown model {name}: choose from {', '.join(timm.list_models('cmt_*', module='cmt'))}")
    architecture = name.split('.')[0]
    entrypoint = timm.models.model_entrypoint(cmt.ALIASES.get(architecture, architecture))
    if entrypoint.__module__.startswith('timm.'):
        raise UsageError(f'{name} is not a CMT')
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag
        raise UsageError(f'{name}: {error}') from None
    return timm.create_model(name, **kwargs)


def create_for(weights: Weights, name: str | None = None, **kwargs) -> cmt.CMT:
    """Create the model of `weights` without loading them; see build_model for arguments and errors."""
    weights.check_name(name)
    size = weights.input_size or 224  # for weights that fit any size
    args, name = {'img_size': size, **weights.model_args, **kwargs}, name or weights.name
    if not weights.is_own and name is not None:
        return create_cmt(name, **args)
    try:
        return cmt.CMT(**args)
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        raise UsageError(f'{weights.file} does not describe a CMT ({first_line(error)})') from None


# Loading

def load_weights(model: cmt.CMT, weights: Weights, new_head: bool = False) -> str:
    """Load all tensors of `weights`, under the names of any origin, into a model; return and log a line about them.

    With `new_head`, `model` keeps its head if it has a different number of classes, and the first convolution is
    adapted to a different number of input channels.

    Raises:
        UsageError: tensors are missing, unexpected or have another shape.
    """
    model_state, notes, new = model.state_dict(), list(weights.notes), []  # new: tensors that keep `model`'s values
    try:
        state = cmt.to_model(weights.state, model)
    except (ValueError, RuntimeError) as error:
        if weights.is_own:
            raise
        raise UsageError(f'{weights.file} does not match the model: {error}') from None
    before, now = weights.model_args.get('img_size'), model.img_size
    resampled = sum(name.endswith('position_bias') for name in model_state) if before not in (None, now) else 0
    if resampled:
        notes.append(f'{resampled} position biases resampled from {before[0]}x{before[1]} to {now[0]}x{now[1]}')
    if new_head:
        for name in ('head.weight', 'head.bias'):
            if name not in model_state or name not in state or state[name].shape != model_state[name].shape:
                state.pop(name, None)
                new += [name] if name in model_state else []
        if new:
            notes.append(f'newly initialized: {", ".join(new)}')
        first = 'stem.conv1.weight'
        if first in state and state[first].shape[1] != model.in_chans:
            if state[first].shape[1] != 3:
                raise UsageError(f'{weights.file}: {first} can be adapted only from 3 input channels, not from '
                                 f'{state[first].shape[1]}')
            state[first] = adapt_input_conv(model.in_chans, state[first])
            notes.append(f'{first} adapted from 3 to {model.in_chans} input channels')
    state.update({name: model_state[name] for name in new})
    load_strictly(model, state, weights.file)
    kind = 'EMA weights' if weights.is_ema else 'weights'
    form = '' if weights.model_args.get('position_bias', True) else " in MindCV's form"
    line = '; '.join([f'{weights.file}: {kind}{form}, {len(state) - len(new)} tensors', *notes])
    logger.info('loaded %s', line)
    return line


def build_model(weights: Weights, name: str | None = None, num_classes: int | None = None, **kwargs) -> cmt.CMT:
    """Build the model of `weights`, load them, and set eval mode.

    Args:
        weights: weights of a CMT.
        name: the model's name, checked against the weights; None for any.
        num_classes: number of classes, None for the file's; a different number makes a new head.
        kwargs: arguments of cmt.CMT that replace those of the weights, such as img_size (pixels, multiples of 32).

    Returns:
        The model. Its `pretrained_cfg` has input size, crop, mean, standard deviation and interpolation, as
        timm.data.resolve_model_data_config reads them, and the class names or None as `label_names`.

    Raises:
        UsageError: the weights are not a CMT's, or do not fit `name` or `kwargs`.
    """
    if num_classes is not None:
        kwargs['num_classes'] = num_classes
    model = create_for(weights, name, **kwargs)
    load_weights(model, weights, new_head='num_classes' in kwargs or 'in_chans' in kwargs)
    cfg = getattr(model, 'pretrained_cfg', None) or cmt.default_cfgs['cmt_s'].default.to_dict()
    model.pretrained_cfg = {
        **cfg, 'input_size': (model.in_chans, *model.img_size), 'num_classes': model.num_classes,
        'crop_pct': weights.crop_pct, 'label_names': weights.class_names(model)}
    return model.eval()


def load_model(file: str, use_ema: bool = True, **kwargs) -> cmt.CMT:
    """Load a model with its weights, for use in Python; `file` is as in `read`, the rest as in build_model."""
    return build_model(read_weights(file, use_ema), **kwargs)


def build_teacher(name: str | None, path: str | None, classes: list[str]) -> nn.Module:
    """Build the teacher for distillation: any timm model `name`, with the weights (not their EMA) in the file `path`.

    Without `path`, use timm's pretrained weights. Without `name`, build the model that `path` contains.

    Raises:
        UsageError: the model or file does not exist, or the teacher has other classes.
    """
    if path is not None and (name is None or name.startswith('cmt_')):
        weights = read_weights(path)
        model = build_model(weights, name)
        if weights.class_names(model) not in (None, list(classes)):
            raise UsageError(f'--teacher-path {path}: the teacher has other classes than the data')
    else:
        settings = dict(pretrained=True) if path is None else dict(num_classes=len(classes))
        try:
            model = timm.create_model(name, **settings)
        except Exception as error:  # Hub clients can raise exceptions of any type.
            raise UsageError(f'--teacher-model {name}: {first_line(error)}') from None
        if path is not None:
            names = {unwrapped_name(key): key for key in model.state_dict()}  # iformer has modules named `module`.
            state, _ = find_state_dict(read_file(path))
            load_strictly(model, {names.get(unwrapped_name(str(key)), key): v for key, v in state.items()}, path)
    if model.num_classes != len(classes):
        raise UsageError(f'the teacher has {model.num_classes} classes, but the data has {len(classes)}: '
                         '--teacher-path needs a teacher that was trained on this data')
    return model
