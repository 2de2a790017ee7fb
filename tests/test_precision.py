"""Under autocast to bfloat16 the residual stream is bfloat16, and results stay near float32's."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import benchmark
import cmt
import nano  # noqa: F401


def blocks(model):
    return [module for module in model.modules() if isinstance(module, cmt.CMTBlock)]


def stream(model):
    """A list that the dtypes of what blocks take and give are added to."""
    found = []
    for block in blocks(model):
        block.register_forward_hook(lambda module, args, out: found.extend((args[0].dtype, out.dtype)))
    return found


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize('dtype, expected', [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),  # its range may be too small for the stream
])
def test_stream_on_cuda(mode, dtype, expected, monkeypatch):
    """Autocast's rules for CUDA, which differ from the CPU's, on tensors that are shapes alone: no GPU needed."""
    # which reads a tensor: these have no values
    monkeypatch.setattr(cmt, 'calculate_drop_path_rates', lambda rate, depths, **kwargs: [0.] * sum(depths))
    enabled, before = torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')
    with FakeTensorMode():
        model = timm.create_model('cmt_nano', device='cuda').train(mode == 'train')
        found = stream(model)
        torch.set_autocast_dtype('cuda', dtype)
        torch.set_autocast_enabled('cuda', True)  # torch.autocast turns itself off where there is no GPU
        try:
            out = model(torch.empty(2, 3, 32, 32, device='cuda'))
        finally:
            torch.set_autocast_enabled('cuda', enabled)
            torch.set_autocast_dtype('cuda', before)
    assert found == [expected] * 8
    assert out.dtype == dtype


def test_stream_and_results_on_cpu():
    torch.manual_seed(0)
    model = timm.create_model('cmt_nano', img_size=64, num_classes=10, drop_rate=0.).train()
    images, targets = torch.randn(32, 3, 64, 64), torch.randint(10, (32,))
    found = stream(model)
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            logits = model(images)
        F.cross_entropy(logits.float(), targets).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((logits.detach().float(), grads))
    assert found == [torch.float32] * 8 + [torch.bfloat16] * 8
    (logits, grads), (low_logits, low_grads) = results
    assert (low_logits - logits).norm() < 2e-2 * logits.norm()
    assert (low_grads - grads).norm() < 5e-2 * grads.norm()  # 2.9e-2 seen, as before the stream was bfloat16 on CUDA


def test_bfloat16_costs_no_more_than_in_the_reference_form():
    """Gradients of a fresh cmt_ti are 9e-2 from float32's, those of the authors' arithmetic as well."""
    torch.manual_seed(0)
    model = timm.create_model('cmt_ti', img_size=64, drop_rate=0.)
    images, targets = torch.randn(8, 3, 64, 64), torch.randint(1000, (8,))
    errors = []
    for form in (model, benchmark.Reference(model)):
        results = []
        for enabled in (False, True):
            form = copy.deepcopy(form).train()  # with the statistics and gradients of no batch
            with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
                logits = form(images)
            F.cross_entropy(logits.float(), targets).backward()
            results.append((logits.detach().float(), torch.cat([p.grad.flatten() for p in form.parameters()])))
            form.zero_grad()
        errors.append([((low - exact).norm() / exact.norm()).item() for exact, low in zip(*results)])
    print(f'relative error of logits and gradients: here {errors[0]}, reference form {errors[1]}')
    for here, reference in zip(*errors):
        assert here < 1.2 * reference


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_layer_norm_is_torchs_without_autocast(dtype):
    x, weight, bias = torch.randn(4, 5, 6, dtype=dtype), torch.randn(6, dtype=dtype), torch.randn(6, dtype=dtype)
    assert torch.equal(cmt.layer_norm(x, weight, bias, 1e-6), F.layer_norm(x, (6,), weight, bias, 1e-6))


def test_small_depthwise_weights_survive_bfloat16():
    """1 + w would round to 1."""
    x = torch.randn(2, 8, 5, 5)
    weight, bias = torch.full((8, 1, 3, 3), 1e-3), torch.zeros(8)
    with torch.autocast('cpu', torch.bfloat16):
        added = cmt.add_depthwise(torch.zeros_like(x), weight, bias + 1e-3)
        out = cmt.add_depthwise(x, weight, bias)
    assert added.float().abs().min() > 5e-4
    assert not torch.equal(out.float(), x.bfloat16().float())
    wide = x.double()
    exact = wide + F.conv2d(wide, weight.double(), padding=1, groups=8)
    assert (cmt.add_depthwise(wide, weight.double(), bias.double()) - exact).abs().max() < 1e-12
