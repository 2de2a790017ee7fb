"""Training on a GPU, against the CPU. Nobody has run this file on a GPU yet.

    pytest -s tests/test_cuda.py
    CMT_TEST_DEVICE=cpu pytest tests/test_cuda.py    # try the tests themselves without a GPU
"""
import contextlib
import copy
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import engine
import nano
import options
import train
from precision import NativeScaler, configure_cuda
from test_cmt import check_golden_values
from test_cuda_without_gpu import FORMS, RECIPES, Data, batches

DEVICE = torch.device(os.environ.get('CMT_TEST_DEVICE', 'cuda'))
MODELS = 'cmt_ti', 'cmt_xs', 'cmt_s', 'cmt_b'
ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(DEVICE.type == 'cuda' and not torch.cuda.is_available(), reason='no CUDA device')


@pytest.fixture(scope='module', autouse=True)
def _as_in_training():
    if DEVICE.type == 'cuda':
        configure_cuda('auto', is_training=True, fixed_size=True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize('name', MODELS)
def test_golden_values(name):
    check_golden_values(name, DEVICE)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_attention_is_fused_in_both_directions(name, dtype):
    """Without another kernel to fall back to, torch raises where the fused one refuses."""
    model = timm.create_model(name, depths=(1,) * 4, num_classes=10).to(DEVICE).train()
    allowed = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if DEVICE.type == 'cuda' else contextlib.nullcontext()
    with allowed, torch.autocast(DEVICE.type, dtype):
        model(torch.randn(4, 3, *model.img_size, device=DEVICE)).square().sum().backward()
    assert all(stage.position_bias.grad.isfinite().all() for stage in model.stages)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_near_the_cpus(dtype):
    """Five steps of cmt_ti; the first loss shows the forward pass, the last one the gradients."""
    def losses(device, dtype):
        torch.manual_seed(0)
        model = timm.create_model('cmt_ti', img_size=64, num_classes=10, drop_rate=0.).train()
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
        scaler = NativeScaler(device.type, enabled=dtype == torch.float16, init_scale=1024.)
        step = engine.TrainStep(
            model, F.cross_entropy, optimizer, engine.Preprocessor(device), scaler,
            lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32))
        generator, values = torch.Generator().manual_seed(0), []
        images = torch.randint(256, (16, 3, 64, 64), dtype=torch.uint8, generator=generator)
        targets = torch.randint(10, (16,), generator=generator)
        for i in range(5):
            meters = engine.Meters(device)
            step([(images, targets)], 0, i, meters)
            values.append(meters.read()['loss'] / 16)
        return values

    expected, result = losses(torch.device('cpu'), torch.float32), losses(DEVICE, dtype)
    print(dtype, expected, result)
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    assert result[0] == pytest.approx(expected[0], rel=tolerance)
    assert result[-1] == pytest.approx(expected[-1], rel=5 * tolerance)


def start(*argv, ranks=1):
    """Start a run in a new process: CUDA does not survive a fork."""
    launcher = ['-m', 'torch.distributed.run', '--nproc-per-node', str(ranks)] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *launcher, nano.__file__, *map(str, argv)], cwd=ROOT,
                            env={**nano.ENVIRONMENT, 'NANO_PAUSE': '0.2'})


@pytest.mark.parametrize('dtype', ['auto', 'float16', 'tf32'])
def test_a_killed_run_is_resumed(dtype, flags, tmp_path):
    """Bits may differ on a GPU, since each process chooses cuDNN's algorithms; the test prints whether they do."""
    flags = [*flags, '--device', DEVICE.type, '--amp-dtype', dtype, '--save-every-steps', 2]
    assert start(*flags, '--output-dir', tmp_path / 'whole').wait(600) == 0
    killed = start(*flags, '--output-dir', tmp_path / 'killed')
    nano.wait_for(lambda: (tmp_path / 'killed' / 'log.txt').exists())
    time.sleep(0.5)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert start(*flags, '--output-dir', tmp_path / 'killed', '--resume', 'auto').wait(600) == 0
    whole, resumed = nano.read(tmp_path / 'whole'), nano.read(tmp_path / 'killed')
    print(dtype, 'the same bits:', nano.same(whole['model'], resumed['model']))
    assert nano.finite(resumed['model']) and nano.epochs(tmp_path / 'killed') == [0, 1, 2]
    a, b = ([line['train_loss'] for line in nano.log(tmp_path / name)] for name in ('whole', 'killed'))
    assert a == pytest.approx(b, rel=0.05)


def test_compiled_losses_are_those_of_eager():
    torch.manual_seed(0)
    model = timm.create_model('cmt_nano', img_size=64, num_classes=10, drop_rate=0.).to(DEVICE).train()
    images, targets = torch.randn(8, 3, 64, 64, device=DEVICE), torch.arange(8, device=DEVICE)
    results = []
    for form in (model, torch.compile(copy.deepcopy(model), fullgraph=True)):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = F.cross_entropy(form(images), targets)
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in form.parameters()])))
    (loss, gradient), (compiled_loss, compiled_gradient) = results
    assert compiled_loss == pytest.approx(loss, rel=1e-2)
    assert (compiled_gradient - gradient).norm() < 0.1 * gradient.norm()


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', RECIPES)
def test_memory_is_that_of_the_table(name, form):
    size, batch = RECIPES[name]
    page = (ROOT / 'docs' / 'performance.md').read_text()
    row, = re.findall(rf'^\| {name} \| {batch} at {size} px \|(.*)\|$', page, re.MULTILINE)
    estimate = float(row.split('|')[list(FORMS).index(form)].split('/')[0])  # GiB
    if DEVICE.type != 'cuda':
        batch = 2
    elif estimate + 3 > torch.cuda.mem_get_info()[1] / 2 ** 30:
        pytest.skip(f'needs about {estimate:.0f} GiB')
    args = options.parse_args(['--config', str(ROOT / 'configs' / f'{name}.yaml'), '--batch-size', str(batch),
                               '--no-apex-amp', '--num-workers', '0', '--no-pin-mem', *FORMS[form].split()])
    model = train.load_model(args, train.InitialState(None, None, None), Data.classes, DEVICE)
    run, meters = train.build_run(args, model, Data(), Data(), DEVICE), engine.Meters(DEVICE)
    del model
    run.train_step.model.train()
    run.train_step(batches(args, 1), 0, 0, meters)
    if DEVICE.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        run.train_step(batches(args, 1), 0, 1, meters)
        peak = torch.cuda.max_memory_allocated() / 2 ** 30
        print(f'{name}, {form}: {peak:.1f} GiB, estimated {estimate:.1f} GiB')
        assert 0.9 * estimate < peak < 1.1 * estimate + 0.5


@pytest.mark.skipif(DEVICE.type == 'cuda' and torch.cuda.device_count() < 2, reason='fewer than two CUDA devices')
@pytest.mark.parametrize('more', [[], ['--grad-checkpointing', '--sync-bn']])
def test_two_devices(more, flags, tmp_path):
    more = more if DEVICE.type == 'cuda' else more[:-1]
    run = [*flags, *more, '--device', DEVICE.type, '--output-dir', tmp_path / 'run']
    assert start(*run, ranks=2).wait(600) == 0
    assert nano.epochs(tmp_path / 'run') == [0, 1, 2] and nano.finite(nano.read(tmp_path / 'run')['model'])
