"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import cmt

triton = pytest.importorskip('triton')  # torch installs it on Linux alone
import kernels  # noqa: E402

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
HALF = torch.bfloat16 if DEVICE == 'cuda' else torch.float16  # the interpreter's matrix products take no bfloat16
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # relative, of norms


def near(found, expected, dtype=torch.float32):
    assert found.shape == expected.shape and not found.isnan().any()
    return (found.double() - expected.double()).norm() <= TOLERANCE[dtype] * expected.double().norm()


def wide(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


# of a strip, of a block of channels and of a row of pixels, both ends are met
@pytest.mark.parametrize('shape, dtype, has_bias', [
    ((2, 66, 9, 17), torch.float32, True), ((1, 5, 17, 4), torch.bfloat16, True), ((3, 5, 1, 1), torch.float32, False),
    ((1, 16, 2, 18), torch.bfloat16, False)])
def test_add_depthwise(shape, dtype, has_bias):
    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(shape[1], 1, 3, 3, device=DEVICE, requires_grad=True)  # float32, whatever x is
    bias = torch.randn(shape[1], device=DEVICE, requires_grad=True)
    grad = torch.randn(shape, device=DEVICE).to(dtype)
    found = kernels.add_depthwise(x, weight, bias if has_bias else None)
    found.backward(grad)
    x64, weight64, bias64 = wide(x, weight, bias)
    expected = x64 + F.conv2d(x64, weight64, bias64 if has_bias else None, padding=1, groups=shape[1])
    expected.backward(grad.double())
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    assert near(found, expected, dtype) and near(x.grad, x64.grad, dtype) and near(weight.grad, weight64.grad)
    assert near(bias.grad, bias64.grad) if has_bias else bias.grad is None


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_affine_depthwise_gelu(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 70, 5, 19, device=DEVICE).to(dtype).to(memory_format=torch.channels_last)
    weight, bias, scale, shift = (
        torch.randn(size, device=DEVICE).to(dtype) for size in ((70, 1, 3, 3), (70,), (70, 1, 1), (70, 1, 1)))
    found = kernels.affine_depthwise_gelu(x, scale, shift, weight, bias)
    expected = F.gelu(F.conv2d(
        x.double() * scale.double() + shift.double(), weight.double(), bias.double(), padding=1, groups=70))
    assert found.dtype == dtype and near(found, expected, dtype)


# queries and keys of the four models' stages at small sizes, widths of their heads
@pytest.mark.parametrize('B, heads, N, M, d', [(3, 2, 100, 25, 46), (2, 1, 65, 64, 76), (2, 4, 9, 9, 16)])
@pytest.mark.parametrize('dtype', [torch.float32, HALF])
@pytest.mark.parametrize('has_bias', [True, False])
def test_attention(B, heads, N, M, d, dtype, has_bias):
    torch.manual_seed(0)
    q = torch.randn(B, N, heads, d, device=DEVICE).to(dtype).transpose(1, 2).requires_grad_()  # views, as LMHSA has
    kv = torch.randn(B, M, 2, heads, d, device=DEVICE).to(dtype).requires_grad_()
    bias = (3 * torch.randn(heads, N, M, device=DEVICE)).requires_grad_()
    grad = torch.randn(B, heads, N, d, device=DEVICE).to(dtype)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    found = kernels.attention(q, k, v, bias if has_bias else None, d ** -0.5)
    found.backward(grad)
    q64, kv64, bias64 = wide(q, kv, bias)
    k64, v64 = kv64.permute(2, 0, 3, 1, 4).unbind(0)
    scores = q64 @ k64.transpose(-2, -1) * d ** -0.5 + (bias64 if has_bias else 0)
    expected = scores.softmax(-1) @ v64
    expected.backward(grad.double())
    assert found.dtype == dtype and found.transpose(1, 2).is_contiguous()
    assert near(found, expected, dtype) and near(q.grad, q64.grad, dtype) and near(kv.grad, kv64.grad, dtype)
    assert near(bias.grad, bias64.grad, dtype) if has_bias else bias.grad is None


def test_the_gradient_of_the_bias_is_summed_over_chunks_of_the_batch(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, 'PROGRAMS', 10)  # chunks of two images, and one image
    B, heads, N, M, d = 5, 2, 65, 9, 16
    q, k, v = (torch.randn(B, heads, n, d, device=DEVICE) for n in (N, M, M))
    bias = torch.randn(heads, N, M, device=DEVICE, requires_grad=True)
    kernels.attention(q, k, v, bias, 0.25).sum().backward()
    bias64, = wide(bias)
    ((q.double() @ k.double().transpose(-2, -1) * 0.25 + bias64).softmax(-1) @ v.double()).sum().backward()
    assert near(bias.grad, bias64.grad)


def test_the_operators_fit_autograd_and_torch_compile():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 3, 5, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(size, device=DEVICE, requires_grad=True) for size in ((4, 1, 3, 3), (4,)))
    torch.library.opcheck(kernels._depthwise, (x, weight, bias, None, None, True, False))
    q, k, v = (torch.randn(1, n, 2, 16, device=DEVICE).transpose(1, 2).requires_grad_() for n in (5, 3, 3))
    table = torch.randn(2, 5, 3, device=DEVICE, requires_grad=True)
    torch.library.opcheck(kernels._attention, (q, k, v, table, 0.25))
    torch.library.opcheck(kernels._attention, (q, k, v, None, 0.25))


@pytest.fixture
def switched_on():
    cmt.use_kernels()
    yield
    cmt.use_kernels(False)


def counted(monkeypatch):
    calls = []
    for name in ('add_depthwise', 'affine_depthwise_gelu', 'attention'):
        call = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, name=name, call=call: (calls.append(name), call(*args))[1])
    return calls


@pytest.mark.parametrize('form', [
    'eager', 'fused', 'autocast', pytest.param('compiled', marks=pytest.mark.soak)])
def test_a_model_on_kernels_computes_what_it_does_without(form, switched_on, monkeypatch):
    """In 16 bits, what it computes is as near to float32's result as without them."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    model = timm.create_model('cmt_nano', img_size=32, num_classes=10, drop_rate=0.).to(DEVICE)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    model.eval()  # BatchNorm over two pixels would magnify what is rounded
    images, targets = torch.randn(2, 3, 32, 32, device=DEVICE), torch.randint(10, (2,), device=DEVICE)

    def results(on, half):
        cmt.use_kernels(on)
        calls = counted(monkeypatch) if on else []
        with torch.autocast(DEVICE, HALF, enabled=half):
            if form == 'fused':
                with torch.no_grad():
                    return model.fuse()(images), None, calls
            model.zero_grad()
            run = torch.compile(model, fullgraph=True, backend='aot_eager') if form == 'compiled' else model
            logits = run(images)
        F.cross_entropy(logits.float(), targets).backward()
        torch._dynamo.reset()
        return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()]), calls

    *exact, _ = results(False, False)
    *without, _ = results(False, form != 'eager')
    *found, calls = results(True, form != 'eager')
    blocks = sum(len(stage.blocks) for stage in model.stages)
    if form == 'fused':
        assert calls.count('affine_depthwise_gelu') == calls.count('attention') == blocks
    elif form != 'compiled':  # which keeps the operators alone
        assert calls.count('add_depthwise') == 2 * blocks
        assert calls.count('attention') == (0 if form == 'eager' else blocks)
    for a, b, c in zip(exact, without, found):
        if a is not None:
            assert (c - a).norm() <= 1.5 * (b - a).norm() + 1e-5 * a.norm()


def test_what_the_kernels_do_not_take_runs_without_them(switched_on, monkeypatch):
    calls = counted(monkeypatch)
    model = timm.create_model('cmt_nano', img_size=32, num_classes=10).double().to(DEVICE)
    model(torch.randn(2, 3, 32, 32, dtype=torch.float64, device=DEVICE))
    q = torch.randn(1, 1, 4, 16, device=DEVICE, dtype=HALF)
    many = torch.randn(1, 1, 169, 16, device=DEVICE, dtype=HALF)  # keys of 416 px
    cmt.attend(q, q, q, None, 0.25, 0.5, True)
    cmt.attend(q, many, many, None, 0.25, 0., True)
    cmt.attend(q.float(), q.float(), q.float(), None, 0.25, 0., True)
    assert calls == []
    cmt.attend(q, q, q, None, 0.25, 0., True)
    assert calls == ['attention']


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernels

ATTENTION = dict(BIAS=True, BLOCK_N=64, BLOCK_M=64, BLOCK_D=64)
for kernel, half, fixed in (
        (kernels._depthwise_forward, 'bf16',
         dict(IDENTITY=True, BIAS=True, AFFINE=False, GELU=False, BLOCK_W=16, BLOCK_C=64, scale=None, shift=None)),
        (kernels._depthwise_forward, 'bf16',
         dict(IDENTITY=False, BIAS=True, AFFINE=True, GELU=True, BLOCK_W=8, BLOCK_C=64)),
        (kernels._depthwise_backward, 'bf16', dict(W=56, ROWS=16, BLOCK_W=16, BLOCK_C=64)),
        (kernels._attention_forward, 'bf16', ATTENTION),
        (kernels._attention_backward_queries, 'bf16', dict(ATTENTION, CHUNK=4)),
        (kernels._attention_backward_keys, 'bf16', dict(ATTENTION, N=196)),
        (kernels._attention_backward_keys, 'bf16', dict(ATTENTION, N=256, BLOCK_D=128)),
        (kernels._attention_backward_keys, 'fp16', dict(ATTENTION, N=256, BLOCK_M=128, BLOCK_D=128))):
    wide = {'weight', 'bias', 'shift', 'grad_bias', 'sums'} | ({'scale'} if 'depthwise' in kernel.__name__ else set())
    narrow = {'x', 'out', 'grad', 'grad_x', 'q', 'k', 'v', 'grad_q', 'grad_k', 'grad_v'}
    signature = {name: 'constexpr' if name in fixed else '*fp32' if name in wide else f'*{half}' if name in narrow else
                 'fp32' if name == 'scale' else 'i32' for name in kernel.arg_names}
    # as at a launch: addresses and strides that 16 divides are what loads are made asynchronous for
    even = {(i,): [['tt.divisibility', 16]] for i, (name, kind) in enumerate(signature.items())
            if kind[0] == '*' or kind == 'i32' and name not in ('H', 'W', 'N', 'M', 'heads', 'rows', 'B', 'CHUNK')}
    options = kernels._keys_options(fixed['BLOCK_D']) if 'keys' in kernel.__name__ else {}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): v for name, v in fixed.items()}, even)
    for capability, shared in ((89, 101376), (90, 232448)):
        made = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
        assert len(made.asm['cubin']) > 1000
        # the models' heads are at most 76 wide, their keys 64
        assert made.metadata.shared <= shared or fixed.get('BLOCK_M') == 128, (kernel.__name__, made.metadata.shared)
print('compiled')
"""


def test_kernels_compile_for_a_gpu_that_is_not_there():
    """To machine code of compute capability 8.9 and 9.0, and into their memory, by Triton's own assembler."""
    done = subprocess.run([sys.executable, '-c', COMPILE], cwd=Path(kernels.__file__).parent, capture_output=True,
                          text=True, env={k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'})
    assert done.stdout == 'compiled\n', done.stderr
