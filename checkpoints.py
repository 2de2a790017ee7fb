"""Files of a run: checkpoints that are whole whatever happens, safe to read, and the log; weights of any origin.

Apart from utils.py because nothing here knows of processes or devices: it is what every script reads weights with.
"""
import argparse
import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import pickle
import re
import shutil
import threading
import urllib.error
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.models import adapt_input_conv

import cmt
from utils import WANDB_ID

logger = logging.getLogger(__name__)

# released checkpoints hold their training arguments; a Namespace only carries attributes
torch.serialization.add_safe_globals([argparse.Namespace])

LAST, PREVIOUS, LOG = 'checkpoint_last.pth', 'checkpoint_prev.pth', 'log.txt'


def to_cpu(state: Any) -> Any:
    """A copy of nested dicts and lists whose tensors are on the CPU and nobody else's."""
    if isinstance(state, torch.Tensor):
        return state.detach().to('cpu', copy=True)
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(to_cpu(value) for value in state)
    return state


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, keep_previous: bool = False):
    """A temporary file beside `path` that takes its place once it is whole and on disk."""
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_previous:
            _keep_previous(path)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _keep_previous(path: Path) -> None:
    """Give the file at `path` a second name, checkpoint_prev.pth, that stays when it is replaced."""
    if not path.exists():
        return
    link = path.with_name(f'.{PREVIOUS}.tmp')
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links: for a moment there is the previous file alone
        os.replace(path, link)
    os.replace(link, path.with_name(PREVIOUS))


def _lock(path: Path) -> BinaryIO:
    """A file that this process alone has, until it ends however it ends. Loader processes do not inherit it."""
    file = open(path, 'wb')
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(f'another run is writing to {path.parent} (if it is gone, remove {path})') from None
    return file  # a file system without locks goes without


class RunWriter:
    """Writes a run's checkpoints in the background, and its log; at any moment there is a whole checkpoint on disk.

    What goes wrong on disk is kept in `error`, for the ranks to agree on stopping; after that nothing more is written.

    Args:
        folder: where they go.
        keep: epochs whose checkpoints stay as checkpoint_EEEE.pth.

    Raises:
        ValueError: another run is writing there.

    Attributes:
        trackers: functions that are given each record too.
    """

    def __init__(self, folder: str | Path, keep: int = 0):
        self.folder = Path(folder)
        self.lock = _lock(self.folder / '.lock')
        self.keep = keep
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.trackers: list[Callable] = []

    def save(self, state: dict[str, Any], copies: tuple[str, ...] = ()) -> None:
        """Copy `state` to host memory, then write it as checkpoint_last.pth, and under the names `copies` too."""
        self.wait()
        if self.error is None:
            self.thread = threading.Thread(target=self._write, args=(to_cpu(state), copies), name='checkpoint')
            self.thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Add one JSON object as a line of log.txt, on disk when this returns."""
        if self.error is None:
            try:
                with open(self.folder / LOG, 'a') as file:
                    file.write(json.dumps(record) + '\n')
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                self.error = error
        for tracker in self.trackers:
            tracker(record)

    def wait(self) -> None:
        """Until the last checkpoint is on disk, or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _write(self, state: dict[str, Any], copies: tuple[str, ...]) -> None:
        try:
            last = self.folder / LAST
            with replacing(last, keep_previous=True) as file:
                torch.save(state, file)
                file.flush()
                for name in copies:  # first: a run killed in between does the epoch again, and writes them again
                    with open(file.name, 'rb') as source, replacing(self.folder / name) as copy:
                        shutil.copyfileobj(source, copy, 1 << 20)
            if self.keep:
                for old in sorted(self.folder.glob('checkpoint_[0-9]*.pth'))[:-self.keep]:
                    old.unlink()
        except Exception as error:  # torch.save covers a full disk with a RuntimeError of its own
            self.error = error.__context__ if isinstance(error.__context__, OSError) else error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running anything that it might contain.

    Args:
        path: .pth, .safetensors or MindSpore's .ckpt file, or http(s) address of a .pth.

    Returns:
        Tensors on the CPU, in the nesting of the file.

    Raises:
        ValueError: no such file, a damaged one, one that is no checkpoint, or one that would run code when loaded.
    """
    name = str(path)
    if not name.startswith(('http://', 'https://')) and not os.path.isfile(name):
        raise ValueError(f'no checkpoint at {name}')
    try:
        if name.startswith(('http://', 'https://')):
            state = torch.hub.load_state_dict_from_url(name, map_location='cpu', weights_only=True)
        elif name.endswith('.safetensors'):
            state = safetensors.torch.load_file(name)
        elif name.endswith('.ckpt') and not _is_torch_file(name):
            state = read_mindspore(name)
        else:
            if zipfile.is_zipfile(name):  # torch.load does not look at the checksums that torch.save wrote
                with zipfile.ZipFile(name) as archive:
                    damaged = archive.testzip()
                if damaged:
                    raise ValueError(f'{name} is damaged: the checksum of {damaged} is wrong')
            state = torch.load(name, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the parsers
        wanted = re.search(r'GLOBAL ([\w.]+)', str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if wanted:
            reason = f'{name} was not loaded: it asks for {wanted[1]}, which a checkpoint has no use for'
        elif isinstance(error, urllib.error.URLError):
            reason = f'{name} could not be downloaded ({error})'
        elif 'checksum' in str(error):
            reason = str(error)
        else:
            reason = f'{name} is cut short, damaged or no checkpoint'
        raise ValueError(reason) from None
    if not isinstance(state, dict):
        raise ValueError(f'{name} holds a {type(state).__name__}, not a checkpoint')
    return state


def _is_torch_file(name: str) -> bool:
    """A zip archive or a pickle: Lightning calls its files .ckpt too."""
    with open(name, 'rb') as file:
        return file.read(1) in (b'P', b'\x80')


MINDSPORE_TYPES = {
    'Float16': torch.float16, 'Float32': torch.float32, 'Float64': torch.float64, 'BFloat16': torch.bfloat16,
    'Int8': torch.int8, 'Int16': torch.int16, 'Int32': torch.int32, 'Int64': torch.int64, 'UInt8': torch.uint8,
    'Bool': torch.bool}
CRC_TAIL = 17  # b'crc_num' and the CRC-32 of all before as 10 bytes, the highest first


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A protobuf number, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 0x7f) << shift, shift + 7
        if shift > 70:
            raise ValueError('not of MindSpore')
        if byte < 0x80:
            return value, at


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field of a protobuf message; those of wire types 0 (number) and 2 (bytes)."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value, at = _varint(data, at)
        if key & 7 == 2:
            if at + value > len(data):
                raise ValueError('it ends too early')
            value, at = data[at:at + value], at + value
        elif key & 7 != 0:
            raise ValueError('not of MindSpore')
        yield key >> 3, value


def read_mindspore(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a MindSpore checkpoint, under MindSpore's names, without MindSpore.

    Checkpoint{repeated Value value=1}, Value{string tag=1; Tensor tensor=2},
    Tensor{repeated int64 dims=1; string tensor_type=2; bytes tensor_content=3}: a large tensor is several Values in a
    row under one tag.

    Raises:
        ValueError: truncated, or nothing that MindSpore writes.
    """
    data = Path(path).read_bytes()
    if data[-CRC_TAIL:-10] == b'crc_num':
        if zlib.crc32(data[:-CRC_TAIL]) != int.from_bytes(data[-10:], 'big'):
            raise ValueError(f'{path} is damaged: its checksum is wrong')
        data = data[:-CRC_TAIL]
    parts: dict[str, tuple[list[int], str, bytearray]] = {}
    try:
        for number, value in _fields(memoryview(data)):
            entry = dict(_fields(value))
            name = bytes(entry[1]).decode()
            dims, kind, content = [], 'Float32', b''
            for number, item in _fields(entry[2]):
                if number == 1 and isinstance(item, int):
                    dims.append(item)
                elif number == 1:  # packed
                    at = 0
                    while at < len(item):
                        dim, at = _varint(item, at)
                        dims.append(dim)
                elif number == 2:
                    kind = bytes(item).decode()
                elif number == 3:
                    content = item
            parts.setdefault(name, (dims, kind, bytearray()))[2].extend(content)
    except (IndexError, KeyError, TypeError, UnicodeDecodeError):
        raise ValueError('it ends too early or is not of MindSpore') from None
    if not parts:
        raise ValueError('it is empty')
    tensors = {}
    for name, (dims, kind, content) in parts.items():
        if kind not in MINDSPORE_TYPES:
            raise ValueError(f'{name} is of type {kind}')
        dtype = MINDSPORE_TYPES[kind]
        shape = [] if dims == [0] else dims  # MindSpore's way to write a scalar
        if len(content) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f'{name} has {len(content)} bytes for shape {tuple(shape)}')
        tensors[name] = torch.frombuffer(content, dtype=dtype).reshape(shape)
    return tensors


def weights_of(checkpoint: dict[str, Any], use_ema: bool) -> tuple[dict[str, torch.Tensor], str]:
    """The state dict in a checkpoint, and what it is.

    Args:
        checkpoint: from read_checkpoint.
        use_ema: the average of the weights where there is one.

    Returns:
        Tensors by the file's own names; 'model', 'model_ema', 'state_dict', 'bare' or 'mindspore'.

    Raises:
        ValueError: it holds no weights.
    """
    averages = [('model_ema', 'model_ema'), ('state_dict_ema', 'model_ema')]  # the second is timm's
    plain = [('model', 'model'), ('state_dict', 'state_dict')]
    found, kind = checkpoint, 'bare'
    for key, name in averages + plain if use_ema else plain + averages:
        if isinstance(checkpoint.get(key), dict):
            found, kind = checkpoint[key], name
            break
    if not found or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in found.items()):
        raise ValueError('it holds no weights')
    empty = next((name for name, value in found.items() if value.numel() == 0), None)
    if empty:  # placeholders of weights that are sharded over other files
        raise ValueError(f'{empty} in it is empty')
    if kind == 'bare' and any(name.endswith(('.gamma', '.moving_mean')) for name in found):
        counters = ('epoch_num', 'step_num', 'global_step', 'learning_rate')  # what MindSpore's callbacks add
        return {name: value for name, value in found.items() if name not in counters}, 'mindspore'
    return found, kind


ODD_SHAPES = IndexError, RuntimeError, ZeroDivisionError, ValueError  # of what is made for other dimensions or sizes


def model_args_of(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments of cmt.CMT that the names and shapes of weights tell.

    Weights without position bias are MindCV's: tanh GELU, LayerNorm eps 1e-7, and 1, 2, 4, 8, ... heads, which no shape
    tells. They fit any input size, so there is no `img_size`, nor where a table is of no square input.

    Returns:
        Arguments by name; empty where the weights are of no CMT.
    """
    shapes = {cmt._released_name(cmt._plain_name(name)): tuple(value.shape) for name, value in weights.items()}
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
    """The shortest number by which int(dim * ratio) == hidden."""
    ratios = [round(hidden / dim, digits) for digits in range(8)]
    return next((ratio for ratio in ratios if int(dim * ratio) == hidden), (hidden + 0.5) / dim)


# stem channels, widths and depths -> name
VARIANTS = {
    (16, (46, 92, 184, 368), (2, 2, 10, 2)): 'cmt_ti', (16, (52, 104, 208, 416), (3, 3, 12, 3)): 'cmt_xs',
    (32, (64, 128, 256, 512), (3, 3, 16, 3)): 'cmt_s', (38, (76, 152, 304, 608), (4, 4, 20, 4)): 'cmt_b'}
RATIOS = {'cmt_ti': 3.6, 'cmt_xs': 3.77, 'cmt_s': 4., 'cmt_b': 4.}
SAME_IN_ALL = dict(num_heads=(1, 2, 4, 8), sr_ratios=(8, 4, 2, 1), num_features=1280, qkv_bias=True)


def variant_of(model_args: dict[str, Any]) -> str | None:
    """Name of the published model that these arguments make, if any."""
    if any(model_args.get(key) != value for key, value in SAME_IN_ALL.items()):
        return None
    return VARIANTS.get(tuple(model_args[key] for key in ('stem_chs', 'embed_dims', 'depths')))


def form_of(model_args: dict[str, Any]) -> dict[str, Any]:
    """What sets these weights apart from the released ones of the same name: MindCV's form, the input channels."""
    form = {}
    if not model_args.get('position_bias', True):
        form = {key: model_args[key] for key in ('position_bias', 'act_layer', 'norm_eps', 'mlp_ratios')}
    ratio = RATIOS.get(variant_of(model_args))
    if ratio and any(int(d * r) != int(d * ratio) for d, r in zip(model_args['embed_dims'], model_args['mlp_ratios'])):
        form['mlp_ratios'] = model_args['mlp_ratios']
    if model_args.get('in_chans', 3) != 3:
        form['in_chans'] = model_args['in_chans']
    return form


def load_weights(
        model: nn.Module, checkpoint: dict[str, Any], source: str, use_ema: bool = False, new_head: bool = False,
) -> str:
    """Load weights of any origin, all of them or nothing.

    Args:
        model: a CMT, or another timm model whose names the file uses.
        checkpoint: from read_checkpoint.
        source: where it is from, for messages.
        use_ema: the average of the weights where there is one.
        new_head: a head of another class count stays as `model` has it, and the first convolution is adapted to
            another number of input channels.

    Returns:
        One line on what was done.

    Raises:
        ValueError: tensors missing, left over or of another shape; `model` is as it was.
    """
    try:
        weights, kind = weights_of(checkpoint, use_ema)
    except ValueError as error:
        raise ValueError(f'{source}: {error}') from None
    own = model.state_dict()
    args, resampled, notes = {}, 0, []
    if isinstance(model, cmt.CMT):
        try:
            args = model_args_of(weights)
            state = cmt.checkpoint_filter_fn(weights, model)
        except ODD_SHAPES as error:
            raise ValueError(f'{source} does not fit the model: {error}') from None
        before = args.get('img_size')
        resampled = sum(name.endswith('position_bias') for name in own) if before not in (None, model.img_size) else 0
    else:
        state = {re.sub(r'^(module\.|_orig_mod\.)+', '', name): value for name, value in weights.items()}
    count = len(state)
    if resampled:
        notes.append(f'{resampled} position biases resampled from {before[0]}x{before[1]} to '
                     f'{model.img_size[0]}x{model.img_size[1]}')
    if new_head:
        fresh = [name for name in ('head.weight', 'head.bias')
                 if name in own and (name not in state or state[name].shape != own[name].shape)]
        for name in ('head.weight', 'head.bias'):
            if name in fresh:
                state[name] = own[name]
            elif name not in own:
                count -= state.pop(name, None) is not None
        count -= len(fresh)
        if fresh:
            notes.append(f'newly initialised: {", ".join(fresh)}')
        first = getattr(model, 'default_cfg', {}).get('first_conv', 'stem.conv1') + '.weight'
        if first in state and first in own and state[first].shape[1] != own[first].shape[1]:
            notes.append(f'{first} adapted from {state[first].shape[1]} to {own[first].shape[1]} input channels')
            try:
                state[first] = adapt_input_conv(own[first].shape[1], state[first])
            except (NotImplementedError, AssertionError):
                raise ValueError(f'{source}: {notes[-1]} is not possible, only from 3') from None
    faults = [f'{name} missing' for name in own if name not in state]
    faults += [f'{name} left over' for name in state if name not in own]
    faults += [f'{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}'
               for name in own if name in state and state[name].shape != own[name].shape]
    if faults:
        origin = f' (it holds {variant_of(args)})' if variant_of(args) else ''
        more = f'; and {len(faults) - SHOWN} more' if len(faults) > SHOWN else ''
        raise ValueError(f'{source} does not fit the model, its size or the number of classes{origin}: '
                         f'{len(faults)} tensors differ ({"; ".join(faults[:SHOWN])}{more})')
    model.load_state_dict(state)
    words = {'model': 'weights', 'model_ema': 'EMA weights', 'mindspore': "weights in MindCV's form"}
    line = '; '.join([f'{source}: {words.get(kind, "weights")} ({kind}), {count} tensors', *notes])
    logger.info('loaded %s', line)
    return line


SHOWN = 8  # tensors that an error names


def identify(
        checkpoint: dict[str, Any], source: str, use_ema: bool = False, model: str | None = None,
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What model a checkpoint is of.

    Args:
        checkpoint, source, use_ema: as for load_weights.
        model: name that was asked for.

    Returns:
        Name of the model, the arguments besides size and classes that make of it what the weights are of, and all
        arguments of cmt.CMT that the weights tell.

    Raises:
        ValueError: it holds no CMT.
    """
    try:
        weights, _ = weights_of(checkpoint, use_ema)
    except ValueError as error:
        raise ValueError(f'{source}: {error}') from None
    try:
        args = model_args_of(weights)
    except ODD_SHAPES as error:
        raise ValueError(f'{source} does not fit the model: tensors of odd shapes ({error})') from None
    if not args:
        names = ', '.join(list(weights)[:3])
        raise ValueError(f'{source} does not fit the model: it holds no CMT ({names}, ...)')
    saved, variant = saved_args(checkpoint).get('model'), variant_of(args)
    own = saved if isinstance(saved, str) and timm.is_model(saved) else None
    if variant is None and cmt.ALIASES.get(own, own) in VARIANTS.values():
        own = None  # a run from weights of no published size has the name that stood in for one
    if own or variant or (model and args.get('position_bias', True)):
        return model or own or variant, form_of(args), args
    # no published size: any entry, all of whose arguments are replaced
    other = {key: value for key, value in args.items() if key not in ('img_size', 'num_classes')}
    return model or 'cmt_s', other, args


def saved_args(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the run that wrote a checkpoint, as far as it holds them."""
    args = checkpoint.get('args')
    return vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}


def build_model(
        checkpoint: dict[str, Any] | None,
        source: str,
        model: str | None = None,
        num_classes: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        use_ema: bool = True,
        **kwargs,
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a checkpoint is of, loaded and in eval mode.

    Args:
        checkpoint: from read_checkpoint; None for what read_weights(source) gives.
        source: where it is from.
        model: name of the model; the checkpoint's own where None.
        num_classes: another count than the checkpoint's gives a new head.
        img_size: input size; the checkpoint's own where None. Weights of MindCV tell none: 224.
        use_ema: the average of the weights where there is one, which after a short run is none to use.
        kwargs: further arguments of the model, such as in_chans or dynamic_img_size.

    Returns:
        The model, and name, classes (list of names, or None), img_size (height, width), kind, epoch (or None),
        model_args (what makes the model from its name, besides size and classes).

    Raises:
        ValueError: no checkpoint, of no CMT, or one that does not fit.
    """
    if checkpoint is None:
        checkpoint = read_weights(source)
    name, form, args = identify(checkpoint, source, use_ema, model)
    model_args = {**form, **kwargs}
    try:
        net = create_cmt(
            name, num_classes=args['num_classes'] if num_classes is None else num_classes,
            img_size=img_size or args.get('img_size') or saved_args(checkpoint).get('input_size') or 224, **model_args)
    except (RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f'{source} makes no model: {error}') from None
    load_weights(net, checkpoint, source, use_ema, new_head=num_classes is not None or 'in_chans' in kwargs)
    classes = checkpoint.get('classes')
    if not classes or len(classes) != net.num_classes:
        classes = None
    return net.eval(), dict(
        name=name, classes=classes, img_size=net.img_size, kind=weights_of(checkpoint, use_ema)[1],
        epoch=checkpoint.get('epoch'), model_args=model_args)


def build_teacher(name: str | None, path: str | None, classes: list[str]) -> nn.Module:
    """The teacher of distillation, with its weights as they were trained, not their average.

    Args:
        name: any timm model; the one of `path` where None.
        path: file with its weights; the pretrained ones where None.
        classes: names of the classes of the data.

    Raises:
        ValueError: it can't be had, or knows other classes.
    """
    if path is None:
        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as error:  # whatever the clients of hubs raise
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ValueError(f'--teacher-model {name}: {reason}') from None
    elif name is None or name.startswith('cmt_'):
        model, info = build_model(None, path, model=name, use_ema=False)
        if info['classes'] not in (None, list(classes)):
            raise ValueError(f'--teacher-path {path}: the teacher has other classes than the data')
    elif timm.is_model(name):
        model = timm.create_model(name, num_classes=len(classes))
        load_weights(model, read_checkpoint(path), path)
    else:
        raise ValueError(f'unknown --teacher-model {name}')
    if model.num_classes != len(classes):
        raise ValueError(f'the teacher has {model.num_classes} classes, the data {len(classes)}: '
                         '--teacher-path takes one that was trained on this data')
    return model


def create_cmt(name: str, **kwargs) -> cmt.CMT:
    """A CMT by its name in timm; ValueError where there is none of that name."""
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


def _names() -> str:
    return ', '.join(timm.list_models('cmt_*', module='cmt'))


def read_weights(source: str) -> dict[str, Any]:
    """The checkpoint in a file, or the pretrained weights of a timm model ('cmt_s', 'hf-hub:...', 'local-dir:...').

    A folder that scripts/convert_checkpoint.py wrote needs no 'local-dir:'; its class names come along.

    Raises:
        ValueError: no such file or model, or it could not be fetched.
    """
    config = Path(source.removeprefix('local-dir:')) / 'config.json'
    if config.is_file():
        source = f'local-dir:{config.parent}'
    is_name = source.startswith(('hf-hub:', 'hf_hub:', 'local-dir:')) or timm.is_model(source.split('.')[0])
    if not os.path.exists(source) and not is_name and not source.startswith(('http://', 'https://')):
        raise ValueError(f'no checkpoint at {source}, nor a model of that name ({_names()})')
    if os.path.isfile(source) or not is_name:
        return read_checkpoint(source)
    if timm.is_model(source.split('.')[0]):
        create_cmt(source, device='meta')  # before anything is fetched
    try:
        model = timm.create_model(source, pretrained=True)
    except Exception as error:  # whatever the clients of hubs raise
        raise ValueError(f'{source} could not be fetched: {(str(error).strip() or repr(error)).splitlines()[0]}') \
            from None
    args = {'model': model.pretrained_cfg.get('architecture'), 'input_size': getattr(model, 'img_size', None)}
    classes = json.loads(config.read_text()).get('label_names') if config.is_file() else None
    return {'model': model.state_dict(), 'args': args, 'classes': classes}


def newest_checkpoint(folder: Path) -> tuple[str, dict[str, Any]] | tuple[None, None]:
    """The newest good checkpoint of a folder, and its contents; None where it holds none at all.

    Raises:
        ValueError: there are some but none is good.
    """
    kept = sorted(folder.glob('checkpoint_[0-9]*.pth'), reverse=True)
    faults = []
    for path in (folder / LAST, folder / PREVIOUS, *kept):
        if path.is_file():
            try:
                return str(path), read_checkpoint(path)
            except ValueError as error:
                faults.append(str(error))
                logger.warning('%s: looking for the one before', error)
    if faults:
        raise ValueError(f'no good checkpoint in {folder}: {faults[0]}')
    others = list(folder.glob('checkpoint_*.pth'))
    if others:
        raise ValueError(f'{folder} holds {others[0].name} but no {LAST}: name a file with --resume, or choose another '
                         '--output-dir')
    return None, None


def make_last(path: Path) -> None:
    """Let the checkpoint that a run goes on from be checkpoint_last.pth of its folder, in place of a damaged one.

    Else the next save would keep that one as the previous, and for a moment there would be no good one.
    """
    if path.name != LAST:
        with open(path, 'rb') as source, replacing(path.with_name(LAST)) as file:
            shutil.copyfileobj(source, file, 1 << 20)


def find_checkpoint(
        resume: str, output_dir: Path | None, fall_back: bool) -> tuple[str, dict[str, Any]] | tuple[None, None]:
    """What --resume names, and its contents.

    Args:
        resume: a file or address; 'auto' for the newest good one in `output_dir`; '' for none.
        output_dir: of the run.
        fall_back: take the one before where checkpoint_last.pth is damaged.

    Raises:
        ValueError: there is no good one.
    """
    if not resume:
        return None, None
    if resume == 'auto':
        return newest_checkpoint(output_dir)
    if fall_back and Path(resume).name == LAST and Path(resume).is_file():
        return newest_checkpoint(Path(resume).parent)
    return resume, read_weights(resume) if os.path.isdir(resume) else read_checkpoint(resume)


def check_output_dir(folder: Path, may_hold_run: bool) -> None:
    """Raise ValueError where a run can't be written to `folder`, or would be lost; writes nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f'--output-dir {folder}: {there} is no folder that can be written to')
    for path in [folder / LOG, folder / 'config.yaml', *folder.glob('*.pth'), *folder.glob('.*.tmp')]:
        if path.is_dir():
            raise ValueError(f'--output-dir {folder}: {path} is a folder')
    if not may_hold_run and run_files(folder):
        raise ValueError(f'{folder} holds a run: --resume auto goes on with it, --overwrite replaces it')


def run_files(folder: Path) -> list[Path]:
    """What a run leaves in its folder, without the settings."""
    return [*folder.glob('checkpoint_*.pth'), *folder.glob(LOG), *folder.glob(WANDB_ID)]


def remove_run(folder: Path) -> None:
    """Clear `folder` of the run that it holds."""
    for path in run_files(folder):
        path.unlink()


def go_back(folder: Path, epoch: int) -> None:
    """Drop what `folder` holds of `epoch` and later, which are about to be run again: kept checkpoints, lines of the
    log, and what a killed run left half-written of them.
    """
    for path in folder.glob('checkpoint_[0-9]*.pth'):
        if int(path.stem.split('_')[1]) >= epoch:
            path.unlink()
    path = folder / LOG
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors='replace').splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)['epoch'] < epoch:
                kept.append(line + '\n')
    with replacing(path) as file:
        file.write(''.join(kept).encode())
