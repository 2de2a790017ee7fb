"""Dtypes, loss scaling, and the error of autocast to bfloat16."""
import sys
import types

import pytest
import timm
import torch
import torch.nn.functional as F

import nano  # noqa: F401
from precision import ApexScaler, NativeScaler, find_apex, resolve_dtype


@pytest.mark.parametrize('name, device, has_bfloat16, dtype', [
    ('auto', 'cpu', True, torch.float32),
    ('auto', 'cuda', True, torch.bfloat16),
    ('auto', 'cuda', False, torch.float16),
    ('float32', 'cuda', True, torch.float32),
    ('bfloat16', 'cpu', False, torch.bfloat16),
])
def test_dtypes(name, device, has_bfloat16, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: has_bfloat16)
    assert resolve_dtype(name, torch.device(device)) is dtype


def test_apex_is_found_only_with_the_amp_of_nvidia(monkeypatch):
    class Raises:
        def __getattr__(self, name):
            raise RuntimeError('written for Python 2')

    amp = types.SimpleNamespace(initialize=None, scale_loss=None)
    for apex, expected in ((None, None), (types.SimpleNamespace(), None), (Raises(), None),
                           (types.SimpleNamespace(amp=types.SimpleNamespace()), None),
                           (types.SimpleNamespace(amp=amp), amp)):
        monkeypatch.setitem(sys.modules, 'apex', apex)
        assert find_apex() is expected


def test_scaling_changes_no_gradient():
    """unscale_ removes a scale of 1024; a disabled scaler applies none."""
    weight = torch.nn.Parameter(torch.tensor([3.]))
    spare = torch.nn.Parameter(torch.tensor([3.]))
    optimizer = torch.optim.SGD([weight, spare], lr=1.)
    for scaler in (NativeScaler('cpu', init_scale=1024.), NativeScaler('cpu', enabled=False)):
        optimizer.zero_grad()
        scaler.backward(weight.square().sum(), optimizer, last=True)
        assert weight.grad.item() == (6144. if scaler.skips_overflows else 6.)
        scaler.unscale_(optimizer)
        assert weight.grad.item() == 6. and scaler.parameters(optimizer) == [weight]
    assert ApexScaler(None).skips_overflows


def test_bfloat16_results_stay_near_those_of_float32():
    torch.manual_seed(0)
    model = timm.create_model('cmt_nano', img_size=64, num_classes=10, drop_rate=0.).train()
    images, targets = torch.randn(32, 3, 64, 64), torch.randint(10, (32,))
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            logits = model(images)
        assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
        F.cross_entropy(logits.float(), targets).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((logits.detach().float(), grads))
    (logits, grads), (low_logits, low_grads) = results
    assert 0 < (low_logits - logits).norm() < 2e-2 * logits.norm()
    assert (low_grads - grads).norm() < 5e-2 * grads.norm()  # 2.9e-2 seen
