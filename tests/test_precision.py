"""Dtypes, torch's options for CUDA, and the error of autocast to bfloat16."""
import sys
import types

import pytest
import timm
import torch
import torch.nn.functional as F

from precision import build_precision, configure_cuda, find_apex, resolve_dtype


@pytest.fixture
def cuda(monkeypatch):
    """Return a function that pretends to have a GPU; torch emulates bfloat16 on those before compute capability 8."""
    def pretend(major, minor):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
        monkeypatch.setattr(torch.cuda, '_check_bf16_tensor_supported', lambda device: True)
        monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: types.SimpleNamespace(
            major=major, minor=minor))
        return torch.device('cuda', 0)
    return pretend


@pytest.fixture
def cuda_options():
    """Restore torch's options for CUDA."""
    benchmark, precision = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.benchmark = benchmark
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(True)


GPUS = {'T4': (7, 5), 'V100': (7, 0), 'RTX 2080': (7, 5), 'A100': (8, 0), 'H100': (9, 0)}
BFLOAT16 = 'A100', 'H100'


@pytest.mark.parametrize('gpu', GPUS)
def test_auto_is_bfloat16_where_the_gpu_has_it(gpu, cuda):
    device, layer = cuda(*GPUS[gpu]), torch.nn.Linear(1, 1)
    _, _, scaler, dtype = build_precision(layer, torch.optim.SGD(layer.parameters(), 1.), device, 'auto')
    assert dtype == (torch.bfloat16 if gpu in BFLOAT16 else torch.float16)
    assert scaler.is_enabled() == (gpu not in BFLOAT16)


def test_dtypes_that_are_given(cuda):
    for device in cuda(7, 5), torch.device('cpu'):
        for name in ('float32', 'bfloat16', 'float16'):
            assert resolve_dtype(name, device) == getattr(torch, name)
        assert resolve_dtype('tf32', device) == torch.float32
    assert resolve_dtype('auto', torch.device('cpu')) == torch.float32


def test_training_tunes_convolutions_and_avoids_cudnns_attention(cuda_options):
    configure_cuda('auto', is_training=False, fixed_size=False)
    assert torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == 'highest'
    configure_cuda('tf32', is_training=True, fixed_size=True)
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cudnn.benchmark
    assert torch.backends.cuda.matmul.allow_tf32


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
