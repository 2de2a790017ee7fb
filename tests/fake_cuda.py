"""Run the project's own code on fake CUDA tensors, without a GPU.

torch's FakeTensorMode computes shapes, strides, dtypes and devices, but no values. It raises on operands of two devices
and where the host needs a value. `fake_cuda` replaces the few calls of a step that would ask the driver. It cannot show
what a GPU computes, or how fast.
"""
import contextlib
import heapq
import itertools
import traceback
import weakref
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device('cuda', 0)
ROOT = Path(__file__).parent.parent
sdpa = F.scaled_dot_product_attention


# Autograd

class Engine:
    """Compute gradients in Python, since torch's autograd engine asks the CUDA driver for the device of each node.

    `pack` and `unpack` are saved_tensors_hooks that release what a node has saved, as torch's engine does.

    Attributes:
        task: identifies the backward pass for non-reentrant checkpointing.
    """

    def __init__(self):
        self.task = -1
        self.unpacked = []  # what the current node has saved

    def pack(self, tensor):
        return [tensor]

    def unpack(self, box):
        self.unpacked.append(box)
        return box[0]

    @torch.no_grad()
    def backward(self, loss, gradient=None, retain_graph=None, create_graph=False, inputs=None):
        """Stand in for torch.autograd.backward with one loss."""
        self.task, before = self.task + 1000, self.task
        waiting, stack, seen = Counter(), [loss.grad_fn], {loss.grad_fn}  # number of gradients that a node waits for
        while stack:
            for node in next_nodes(stack.pop()):
                waiting[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
        gradients = defaultdict(dict, {loss.grad_fn: {loss.output_nr: torch.ones_like(loss)}})
        number = itertools.count()
        ready = [(0, next(number), loss.grad_fn)]
        while ready:
            node = heapq.heappop(ready)[2]
            outputs = self.run(node, gradients.pop(node, {}))
            while outputs:  # As in torch, nothing holds a gradient longer than needed.
                (target, i), output = node.next_functions[-len(outputs)], outputs.pop(0)
                if target is not None and output is not None:
                    other = gradients[target].pop(i, None)
                    gradients[target][i] = output if other is None else other + output
                output = other = None
            for target in next_nodes(node):
                waiting[target] -= 1
                if not waiting[target]:
                    # As in torch, leaves come first, then what the forward pass did last.
                    order = -1e18 if is_leaf(target) else -target._sequence_nr()
                    heapq.heappush(ready, (order, next(number), target))
        self.task = before

    def run(self, node, gradients):
        """Return the gradients of a node's inputs, after the checks of torch's engine."""
        if not gradients:
            return [None] * len(node.next_functions)
        arguments = []
        for i, expected in enumerate(node._input_metadata):
            gradient = gradients.get(i)
            if gradient is not None:
                assert gradient.device == expected.device, f'{node.name()}: gradient on {gradient.device}'
                gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
            arguments.append(gradient)
        gradients.clear()
        if is_leaf(node):
            if node.variable.grad is None:
                node.variable.grad = arguments[0]
            else:
                node.variable.grad += arguments[0]
            return []
        outputs = node(*arguments)
        for box in self.unpacked:  # Release what the node has saved.
            box[0] = None
        self.unpacked.clear()
        return list(outputs) if isinstance(outputs, tuple) else [outputs]


def next_nodes(node):
    return [target for target, _ in node.next_functions if target is not None]


def is_leaf(node):
    return node.name() == 'torch::autograd::AccumulateGrad'


# The device

@contextlib.contextmanager
def fake_cuda(has_bfloat16=True):
    """Let tensors be on CUDA, and yield the Engine of its backward passes; older devices only emulate bfloat16."""
    mode, engine, generator = FakeTensorMode(), Engine(), torch.Generator

    def to(module, device):  # torch's own refuses fake tensors that were copied.
        def move(t):
            return t.to(device) if isinstance(t, FakeTensor) else torch.empty_strided(
                t.shape, t.stride(), dtype=t.dtype, device=device)

        with mode:
            for m in module.modules():
                for tensors in m._parameters, m._buffers:
                    for name, t in tensors.items():
                        if isinstance(t, nn.Parameter):
                            tensors[name] = nn.Parameter(move(t).detach(), t.requires_grad)
                        elif t is not None:
                            tensors[name] = move(t)
        return module

    def waits(*args, **kwargs):
        raise AssertionError('this call waits for the device')

    with contextlib.ExitStack() as stack:
        for target, name, value in (
                (torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False),  # autocast and GradScaler
                (torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation or has_bfloat16),
                (nn.Module, 'to', to), (FakeTensor, '__repr__', waits), (torch.cuda, 'empty_cache', waits),
                (torch, 'Generator', lambda device='cpu': generator()),  # of ModelEmaV3
                (torch.utils.checkpoint, 'get_device_states', lambda *args: ([], [])),
                (torch.utils.checkpoint, 'set_device_states', lambda *args, **kwargs: None),
                (torch.autograd, 'backward', engine.backward),
                (torch._C, '_current_graph_task_id', lambda: engine.task),
                (F, 'scaled_dot_product_attention', attention)):
            stack.enter_context(mock.patch.object(target, name, value))
        # ModelEmaV3 copies the model, and with it the mode of its tensors.
        stack.enter_context(mock.patch.object(FakeTensorMode, '__deepcopy__', lambda self, memo: self, create=True))
        attention.calls.clear()
        stack.enter_context(mode)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield engine


def attention(q, k, v, attn_mask=None, dropout_p=0., scale=None):
    """Take the fused kernel that torch takes in training where its conditions hold, else plain matrix products.

    torch's own choice asks the driver for the compute capability.
    """
    keys = k.shape[2]
    is_aligned = attn_mask is None or all(stride % 8 == 0 for stride in attn_mask.stride()[:-1])
    is_fused = q.shape[-1] % (8 if q.dtype.itemsize == 2 else 4) == 0 and (
        attn_mask is None or attn_mask.dtype == q.dtype)
    batch = 1 if attn_mask is None else attn_mask.shape[0]
    attention.calls.append(Call(q.shape[-1], q.dtype, is_fused, is_aligned, batch, torch.is_grad_enabled()))
    if not is_fused:
        return sdpa(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale)
    if attn_mask is not None:
        attn_mask = attn_mask if is_aligned else F.pad(attn_mask, (0, -keys % 8))[..., :keys]
        attn_mask = attn_mask.expand(*q.shape[:3], keys)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, False, scale=scale)[0]


class Call(NamedTuple):
    width: int  # of a head
    dtype: torch.dtype
    is_fused: bool
    is_aligned: bool  # torch need not pad the mask
    batch: int  # of the mask
    has_grad: bool


attention.calls = []


@contextlib.contextmanager
def real():
    """Build modules from real tensors, which may need their values; Module.to() makes them fake."""
    with unset_fake_temporarily():
        yield


# What happens on the device

def place():
    """Return the innermost line of the project in the call stack, as 'engine.py:read'."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.parent in (ROOT, ROOT / 'scripts'):
            return f'{path.name}:{frame.name}'
    return 'test'


class Recorder(TorchDispatchMode):
    """Record what a GPU would be asked to do, and answer `answer` where the host needs a value.

    Args:
        batches: images and targets in pinned memory.

    Attributes:
        copies: (from, to, dtype, dtype there, non_blocking, whether of pinned memory) of copies, with their number.
        syncs: places of the project that wait for the device, with the number of values that they read.
        scalars: operators with a tensor on the device and a scalar tensor on the host, which would be copied.
        dtypes: floating-point dtypes of the operands with more than one element, for each operator.
        float64: places of the project with float64 tensors on the device.
        layouts: whether the maps that convolutions read are channels-last.
        bytes: bytes that operators read and write, without views.
        launches: operators that start a kernel.
    """

    def __init__(self, batches=(), answer=0):
        super().__init__()
        self.device, self.answer = CUDA, answer
        self.pinned = {t.untyped_storage()._cdata for batch in batches for t in batch}
        self.copies, self.syncs, self.scalars, self.launches = Counter(), Counter(), set(), Counter()
        self.dtypes, self.float64, self.layouts, self.bytes = defaultdict(set), set(), set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        name = {'conv2d': 'convolution', 'linear': 'addmm'}.get(name, name)  # In inference mode these stay whole.
        if name in ('_local_scalar_dense', 'item') and args[0].device == self.device:
            self.syncs[place()] += 1
            return self.answer
        result = function(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        tensors = inputs + [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors}
        if self.device.type not in devices:
            return result
        if name in ('_to_copy', 'copy_', 'to'):
            source, target = (args[1], args[0]) if name == 'copy_' else (args[0], result)
            named = dict(zip([argument.name for argument in function._schema.arguments], args)) | kwargs
            if source.device != target.device:
                self.copies[source.device.type, target.device.type, source.dtype, target.dtype, named.get(
                    'non_blocking', False), source.untyped_storage()._cdata in self.pinned] += 1
        elif len(devices) > 1:
            self.scalars.add(f'{name} at {place()}')
        if any(t.dtype == torch.float64 and t.device == self.device for t in tensors):
            self.float64.add(place())
        self.dtypes[name] |= {t.dtype for t in inputs if t.is_floating_point() and t.numel() > 1}
        if name == 'convolution':
            self.layouts.add(args[0].is_contiguous(memory_format=torch.channels_last))
        storages = {t.untyped_storage()._cdata for t in inputs}
        is_view = not function._schema.is_mutable and all(
            t.untyped_storage()._cdata in storages for t in tensors[len(inputs):])
        if not is_view and not name.startswith(('empty', 'new_empty')):
            self.launches[name] += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


class PeakMemory(TorchDispatchMode):
    """Sum the bytes of live storages on the device, in blocks as the caching allocator's, and keep their peak."""

    def __init__(self, *modules):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, {}
        for t in (t for module in modules for t in (*module.parameters(), *module.buffers())):
            self.add(t)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if tensor.device != CUDA or storage._cdata in self.alive:
            return
        size = -(-storage.size() // 512) * 512
        self.alive[storage._cdata] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result
