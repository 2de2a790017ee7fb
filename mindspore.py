"""Read MindSpore checkpoint files (.ckpt) without MindSpore, and rename their tensors as in torch."""
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from errors import UsageError

CRC_TAIL = 17  # bytes of the trailer: b'crc_num', then the CRC-32 of all before the trailer, padded to 10 bytes


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the protobuf varint at offset `at`, and the offset after it."""
    value = 0
    for shift in range(0, 64, 7):
        byte, at = data[at], at + 1
        value |= (byte & 0x7f) << shift
        if byte < 0x80:
            return value, at
    raise ValueError


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value) of each field of a protobuf message, of wire types 0 (varint) and 2 (bytes)."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value, at = _varint(data, at)
        if key & 7 == 2 and at + value <= len(data):
            value, at = data[at:at + value], at + value
        elif key & 7 != 0:
            raise ValueError
        yield key >> 3, value


def to_torch(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename MindSpore's parameters as in torch, and add BatchNorm's num_batches_tracked, which MindSpore lacks."""
    names = {'gamma': 'weight', 'beta': 'bias', 'moving_mean': 'running_mean', 'moving_variance': 'running_var'}
    out = {}
    for name, value in tensors.items():
        module, _, last = name.rpartition('.')
        out[f'{module}.{names.get(last, last)}' if module else last] = value
        if last == 'moving_mean':
            out[f'{module}.num_batches_tracked'] = torch.tensor(0)
    return out


def read(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a MindSpore checkpoint, under MindSpore's names, without MindSpore.

    The format is protobuf: Checkpoint{repeated Value value=1}, Value{string tag=1; Tensor tensor=2},
    Tensor{repeated int64 dims=1; string tensor_type=2; bytes tensor_content=3}. Several Values with one tag are slices
    of a large tensor.

    Raises:
        UsageError: the file is truncated, its checksum is wrong, or it has another format.
    """
    data = Path(path).read_bytes()
    if data[-CRC_TAIL:-10] == b'crc_num':
        if zlib.crc32(data[:-CRC_TAIL]) != int.from_bytes(data[-10:], 'big'):
            raise UsageError(f'{path} is damaged: its checksum is wrong')
        data = data[:-CRC_TAIL]
    slices: dict[str, tuple[list[int], str, bytearray]] = {}
    try:
        for _, value in _fields(memoryview(data)):
            entry = dict(_fields(value))
            tensor = list(_fields(entry[2]))
            dims = [item for number, item in tensor if number == 1]  # proto2 stores each dimension as its own field.
            name, kind, content = str(entry[1], 'utf-8'), str(dict(tensor)[2], 'utf-8'), dict(tensor)[3]
            slices.setdefault(name, (dims, kind, bytearray()))[2].extend(content)
    except (LookupError, TypeError, ValueError):
        slices = {}
    if not slices:
        raise UsageError(f'{path} is truncated, damaged, or not a MindSpore file')
    tensors = {}
    for name, (dims, kind, content) in slices.items():
        dtype = getattr(torch, kind.lower(), None)  # MindSpore writes Float32, BFloat16 and so on.
        shape = [] if dims == [0] else dims  # MindSpore writes a scalar with dims [0].
        if not content or not isinstance(dtype, torch.dtype) or len(content) != math.prod(shape) * dtype.itemsize:
            raise UsageError(f'{path}: {name} has {len(content)} bytes of type {kind} for shape {tuple(shape)}')
        tensors[name] = torch.frombuffer(content, dtype=dtype).reshape(shape)
    return tensors
