"""Read MindSpore checkpoint files (.ckpt) without MindSpore, and rename their tensors as in torch."""
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from errors import UsageError

DTYPES = {
    'Float16': torch.float16, 'Float32': torch.float32, 'Float64': torch.float64, 'BFloat16': torch.bfloat16,
    'Int8': torch.int8, 'Int16': torch.int16, 'Int32': torch.int32, 'Int64': torch.int64, 'UInt8': torch.uint8,
    'Bool': torch.bool}
CRC_TAIL = 17  # bytes: b'crc_num', then the CRC-32 of everything before it as 10 bytes, big-endian


class _Damaged(Exception):
    """Report bytes that are not a MindSpore file."""


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the protobuf number at offset `at`, and the offset after it."""
    value = shift = 0
    while at < len(data) and shift <= 63:
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 0x7f) << shift, shift + 7
        if byte < 0x80:
            return value, at
    raise _Damaged


def _fields(data: int | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (number, value) of each field of a protobuf message: wire types 0 (number) and 2 (bytes)."""
    if isinstance(data, int):
        raise _Damaged
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value, at = _varint(data, at)
        if key & 7 == 2 and at + value <= len(data):
            value, at = data[at:at + value], at + value
        elif key & 7 != 0:
            raise _Damaged
        yield key >> 3, value


def _tensor(message: memoryview) -> tuple[list[int], str, memoryview]:
    """Return (dims, type, content) of a Tensor message. In proto2, dims are not packed."""
    fields = list(_fields(message))
    if any(isinstance(item, int) != (number == 1) for number, item in fields):
        raise _Damaged
    last = {2: b'Float32', 3: b'', **dict(fields)}
    return [item for number, item in fields if number == 1], bytes(last[2]).decode(errors='replace'), last[3]


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
        UsageError: a truncated file, a wrong checksum, or another format.
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
            if not isinstance(entry.get(1), memoryview) or not isinstance(entry.get(2), memoryview):
                raise _Damaged
            dims, kind, content = _tensor(entry[2])
            name = bytes(entry[1]).decode(errors='replace')
            slices.setdefault(name, (dims, kind, bytearray()))[2].extend(content)
    except _Damaged:
        slices = {}
    if not slices:
        raise UsageError(f'{path} is truncated, damaged, or not a MindSpore file')
    tensors = {}
    for name, (dims, kind, content) in slices.items():
        if kind not in DTYPES:
            raise UsageError(f'{path}: {name} has unsupported type {kind}')
        dtype = DTYPES[kind]
        shape = [] if dims == [0] else dims  # MindSpore writes a scalar with dims [0]
        if not content or len(content) != math.prod(shape) * dtype.itemsize:
            raise UsageError(f'{path}: {name} has {len(content)} bytes for shape {tuple(shape)}')
        tensors[name] = torch.frombuffer(content, dtype=dtype).reshape(shape)
    return tensors
