"""torch.compile: one graph, compiled once, with the model's results; and the files of train.py --compile."""
import copy
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor

import pytest
import timm
import torch
import torch.nn.functional as F
from numpy.linalg import norm
from torch._dynamo.testing import CompileCounterWithBackend

import cmt
import nano

MODELS = ['cmt_nano', *(pytest.param(name, marks=pytest.mark.soak) for name in ('cmt_ti', 'cmt_xs', 'cmt_s', 'cmt_b'))]
ONE_STAGE = dict(
    stem_chs=4, embed_dims=(8,), depths=(1,), num_heads=(1,), sr_ratios=(8,), mlp_ratios=(2,), num_features=16)


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize('mode, checkpointing', [('train', False), ('train', True), ('eval', False)])
@pytest.mark.parametrize('name', MODELS)
def test_one_graph(name, mode, checkpointing):
    """Compile once, without a graph break, and get eager mode's gradients and statistics, random draws included."""
    model = timm.create_model(name, img_size=32, drop_path_rate=0.2, proj_drop_rate=0.1).train(mode == 'train')
    plain = copy.deepcopy(model)
    model.set_grad_checkpointing(checkpointing)
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(3):
        x = torch.randn(2, 3, 32, 32)
        for form in (compiled, plain):
            torch.manual_seed(seed)
            form(x).square().sum().backward()
    assert counter.frame_count == 1
    for (key, p), q in zip(plain.named_parameters(), model.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-4), key
    for (key, a), b in zip(plain.named_buffers(), model.buffers()):
        assert torch.allclose(a, b, atol=1e-6), key


def results(model, images, targets, train=True):
    """Logits and gradients of a training-mode step if `train`, and logits in eval mode after it, all in float64."""
    values = []
    if train:
        model.train()
        logits = model(images)
        F.cross_entropy(logits, targets).backward()
        values = [logits, torch.cat([p.grad.flatten() for p in model.parameters()])]
    model.eval()
    with torch.no_grad():
        values.append(model(images))
    return [value.detach().double().numpy() for value in values]


def compiled_results(*args, **kwargs):
    """Compile in another process: a compiled backward pass starts threads, and other tests fork this process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(_compiled_results, *args, **kwargs).result()


def _compiled_results(model, *args, **kwargs):
    return results(torch.compile(model, fullgraph=True), *args, **kwargs)


@pytest.mark.parametrize('name, train', [
    (None, False), *(pytest.param(name, True, marks=pytest.mark.soak)
                     for name in (None, 'cmt_nano', 'cmt_ti', 'cmt_xs', 'cmt_s', 'cmt_b'))])
def test_parity(name, train):
    """Inductor's float32 against float64 eager. None is a model of one stage, which compiles in less than 30 s."""
    torch.manual_seed(0)
    settings = dict(img_size=64, num_classes=10, drop_rate=0.)
    model = timm.create_model(name, **settings) if name else cmt.CMT(**settings, **ONE_STAGE)
    images, targets = torch.randn(4, 3, 64, 64), torch.randint(10, (4,))
    expected = results(copy.deepcopy(model).double(), images.double(), targets, train=train)
    compiled = compiled_results(model, images, targets, train=train)
    assert len(compiled) == (3 if train else 1)
    for a, b in zip(compiled, expected):
        assert norm(a - b) < 1e-4 * norm(b)


@pytest.mark.soak
@pytest.mark.parametrize('more', [['--grad-checkpointing'], ['--sync-bn']])
def test_train_in_two_ranks(flags, tmp_path, more):
    log = tmp_path / 'out'
    nano.finish(nano.start([*flags, '--compile', *more, '--output-dir', tmp_path], ranks=2, output=log), timeout=900)
    assert [line['epoch'] for line in nano.log(tmp_path)] == [0, 1, 2]
    assert not any(name.startswith(('module.', '_orig_mod.')) for name in nano.read(tmp_path)['model'])


@pytest.mark.soak
def test_a_compiled_run_resumes_with_the_same_bits(flags, tmp_path):
    whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
    nano.finish(nano.start([*flags, '--compile', '--output-dir', whole]), timeout=900)
    nano.finish(nano.start([*flags, '--compile', '--output-dir', stopped, '--save-every-steps', 4],
                           before=lambda rank: nano.at_step(
                               9, lambda: os.kill(os.getpid(), signal.SIGTERM))),
                status=128 + signal.SIGTERM, timeout=900)
    nano.finish(nano.start([*flags, '--compile', '--output-dir', stopped, '--resume', 'auto']), timeout=900)
    nano.assert_same_run(whole, stopped)


@pytest.mark.soak
def test_loss_curves(tmp_path):
    """Compare DIGITS runs of three seeds: in every epoch the mean losses differ by at most two standard errors, and the
    final scores are alike. -s prints the figures.
    """
    argv = (
        '--model cmt_nano --device cpu --data-set DIGITS --input-size 32 --batch-size 32 --num-workers 0 --epochs 6 '
        '--warmup-epochs 0 --cooldown-epochs 0 --lr 0.064 --mixup 0 --cutmix 0 --aa none --hflip 0 --reprob 0 '
        '--color-jitter 0 --no-repeated-aug --no-model-ema --test-freq 9 --print-freq 1000').split()
    losses, scores = {}, {}
    for flag in ('--no-compile', '--compile'):
        logs = []
        for seed in (1, 2, 3):
            folder = tmp_path / f'{flag}{seed}'
            nano.finish(nano.start([*argv, flag, '--seed', seed, '--output-dir', folder]), timeout=1500)
            logs.append(nano.log(folder))
        losses[flag] = torch.tensor([[line['train_loss'] for line in log] for log in logs], dtype=torch.float64)
        scores[flag] = torch.tensor([log[-1]['test_acc1'] for log in logs])
        print(flag, 'mean loss', losses[flag].mean(0), 'standard deviation', losses[flag].std(0), 'top-1', scores[flag])
    plain, compiled = losses.values()
    assert ((plain.mean(0) - compiled.mean(0)).abs() <= 2 * plain.std(0) / 3 ** 0.5 + 1e-3).all()
    a, b = scores.values()
    assert (a.mean() - b.mean()).abs() <= a.std() + b.std() + 0.5
