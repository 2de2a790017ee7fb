"""Dtypes, torch's options for CUDA, loss scaling, and the error of autocast to bfloat16."""
import functools
import sys
import types

import pytest
import timm
import torch
import torch.nn.functional as F

import detection
import loader
import nano
import train
from precision import ApexScaler, NativeScaler, build_precision, configure_cuda, find_apex, resolve_dtype


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


@pytest.mark.parametrize('gpu', ['T4', 'A100'])
def test_auto_is_the_same_in_detection(gpu, cuda, cuda_options, monkeypatch, tmp_path):
    pytest.importorskip('pycocotools')
    device, results = cuda(*GPUS[gpu]), []
    monkeypatch.setattr(detection, 'setup_process', lambda args: device)
    monkeypatch.setattr(torch.nn.Module, 'to', lambda module, device: module)
    monkeypatch.setattr(loader.SignalSafeLoader, 'start', lambda loader: None)
    monkeypatch.setattr(detection, 'train_epoch', lambda *args: (results.extend(args), nano.die()))
    detection.write_shapes(tmp_path, 2, 2, 64)
    with pytest.raises(nano.Killed):
        detection.main(detection.parse_args(
            ['--data-path', str(tmp_path), '--backbone', 'cmt_nano', '--input-size', '64', '64']))
    scaler, = [value for value in results if isinstance(value, NativeScaler)]
    autocast, = [value for value in results if isinstance(value, functools.partial)]
    assert scaler.is_enabled() == (gpu == 'T4')
    assert not torch.backends.cudnn.benchmark and not torch.backends.cuda.cudnn_sdp_enabled()  # Images differ in size.
    assert autocast.args == ('cuda', torch.float16 if gpu == 'T4' else torch.bfloat16)


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


@pytest.mark.parametrize('more, is_training', [([], True), (['--eval', '--resume', 'x.pth'], False)])
def test_train_configures_cuda(more, is_training, cuda_options, monkeypatch):
    """A run on CUDA is stopped before it reads data."""
    monkeypatch.setattr(train, 'setup_process', lambda args: torch.device('cuda', 0))
    monkeypatch.setattr(train, 'check_before_data', lambda args, device: (args, train.InitialState(None, None, None)))
    monkeypatch.setattr(train, 'build_data', lambda *args: nano.die())
    with pytest.raises(nano.Killed):
        nano.train(['--model', 'cmt_nano', *more])
    assert torch.backends.cudnn.benchmark and torch.backends.cuda.cudnn_sdp_enabled() != is_training


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
    optimizer = torch.optim.SGD([weight], lr=1.)
    for scaler in (NativeScaler('cpu', init_scale=1024.), NativeScaler('cpu', enabled=False)):
        optimizer.zero_grad()
        scaler.backward(weight.square().sum(), optimizer, last=True)
        assert weight.grad.item() == (6144. if scaler.skips_overflows else 6.)
        scaler.unscale_(optimizer)
        assert weight.grad.item() == 6.
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
