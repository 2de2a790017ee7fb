"""Preparing batches, the train step, faults of the arithmetic, evaluation, apex."""
import contextlib
import copy
import functools
import json
import sys
import types

import pytest
import timm
import torch
import torch.nn as nn
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3, dispatch_clip_grad, random_seed

import nano
from engine import MAX_OVERFLOWS, Meters, Preprocessor, TrainStep, check_faults, evaluate, train_one_epoch
from errors import TrainingFault
from losses import build_criterion
from precision import NativeScaler
from utils import Progress

CPU = torch.device('cpu')
FLOAT32 = functools.partial(torch.autocast, 'cpu', enabled=False)


def model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('cmt_nano', num_classes=5, img_size=32, **kwargs)


def batch(size=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (size, 3, 32, 32), generator=g, dtype=torch.uint8), \
        torch.randint(5, (size,), generator=g)


def sgd(net, lr=1.):
    return torch.optim.SGD(net.parameters(), lr)


def train_step(net, optimizer=None, criterion=None, preprocess=None, scaler=None, autocast=FLOAT32, **kwargs):
    return TrainStep(
        net, criterion or build_criterion(False, 0.1), optimizer or sgd(net), preprocess or Preprocessor(CPU),
        scaler or NativeScaler('cpu', enabled=False), autocast, **kwargs)


def weights(net):
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


# preparing batches

@pytest.mark.parametrize('erasing', [None, RandomErasing(1., mode='pixel', device='cpu')])
def test_both_memory_formats_are_normalised_to_the_same_bits(erasing):
    images, mean, std = torch.randint(256, (3, 3, 20, 28), dtype=torch.uint8), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    prepare, out = Preprocessor(CPU, mean=mean, std=std, erasing=erasing), []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        random_seed(0)
        out.append(prepare(images.contiguous(memory_format=memory_format), torch.zeros(3))[0])
        assert out[-1].is_contiguous(memory_format=torch.channels_last) and out[-1].dtype == torch.float32
    assert torch.equal(*out)
    mean, std = torch.tensor([mean, std]).view(2, 3, 1, 1)
    assert erasing or torch.allclose(out[0], (images / 255 - mean) / std, atol=1e-5)


# the step

def test_draws_follow_from_seed_epoch_step_and_rank():
    def after(seed=1, epoch=2, step=3, rank=0, burn=0):
        net = model(drop_rate=0.5, drop_path_rate=0.5)
        torch.rand(burn)
        prepare = Preprocessor(CPU, Mixup(0.8, 1., num_classes=5), RandomErasing(0.5, mode='pixel', device='cpu'))
        train_step(net, preprocess=prepare, criterion=build_criterion(True), seed=seed, rank=rank)(
            [batch()], epoch, step, Meters(CPU))
        return weights(net)

    first = after()
    assert torch.equal(after(burn=7), first)
    assert not any(torch.equal(after(**change), first) for change in (
        dict(seed=2), dict(epoch=3), dict(step=4), dict(rank=1)))


@pytest.mark.parametrize('clip', [{}, dict(clip_grad=0.1)])
def test_two_half_batches_equal_a_whole_one(clip):
    images, targets = batch(8)
    halves = [(images[:4], targets[:4]), (images[4:], targets[4:])]
    results = []
    for batches in ([(images, targets)], halves):
        net, meters = model(drop_rate=0.).eval(), Meters(CPU)
        before = weights(net)
        train_step(net, **clip)(batches, 0, 0, meters)
        results.append((weights(net) - before, meters.read()))
    (whole, sums), (accumulated, other) = results
    assert whole.norm() > 0.05
    assert (whole - accumulated).norm() / whole.norm() < 1e-5
    assert sums == pytest.approx(other, rel=1e-5) and other['samples'] == 8


@pytest.mark.parametrize('scale', [1, 1024])
@pytest.mark.parametrize('mode, value', [('norm', 0.05), ('value', 0.002), ('agc', 0.05)])
def test_clipping(mode, value, scale):
    """Gradients are unscaled before they are clipped."""
    images, targets = Preprocessor(CPU)(*batch())
    net = model().eval()
    other, before = copy.deepcopy(net), weights(net)
    build_criterion(False, 0.1)(other(images), targets).backward()
    dispatch_clip_grad(list(other.parameters()), value, mode)
    sgd(other).step()
    scaler = NativeScaler('cpu', init_scale=float(scale), enabled=scale > 1)
    train_step(net, clip_grad=value, clip_mode=mode, scaler=scaler)([batch()], 0, 0, Meters(CPU))
    moved = weights(net) - before
    assert torch.allclose(weights(net), weights(other), atol=1e-7) and moved.norm() > 0
    if mode == 'norm':
        assert moved.norm().item() == pytest.approx(0.05, rel=1e-3)


# nonfinite losses and gradients

def epoch(step, steps, skips=0):
    batches, meters, progress = [batch(seed=i) for i in range(steps)], Meters(CPU), Progress('', steps, enabled=False)
    list(train_one_epoch(step, batches, 0, 0, steps, 1, meters, progress, max_skips=skips))
    return meters.read()


def test_a_nonfinite_gradient_is_a_fault_at_once():
    net = model()
    net.head.weight.register_hook(lambda grad: grad * float('inf'))
    with pytest.raises(TrainingFault, match='epoch 0, step 0: .*--on-nonfinite skip'):
        epoch(train_step(net), 2)


@pytest.mark.parametrize('is_fused', [True, False])
def test_skipping_leaves_no_trace(is_fused):
    def run(*poisoned):
        net = model().train()
        ema = ModelEmaV3(net, decay=0.9)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2, fused=True) if is_fused else sgd(net, 0.1)
        step, states = train_step(net, optimizer, ema=(ema, net), skip_nonfinite=True), []
        with nano.poison(*poisoned):
            for i in range(4):
                step([batch(seed=i)], 0, i, meters := Meters(CPU))
                states.append((copy.deepcopy(net.state_dict()), meters.read()))
                assert nano.finite(net.state_dict()) and nano.finite(ema.module.state_dict())
        return states

    good, bad = run(), run(2)
    assert nano.same(good[1][0], bad[1][0]) and not nano.same(good[2][0], bad[2][0])
    for name, value in bad[2][0].items():  # The step before left these weights and statistics.
        if not name.endswith('num_batches_tracked'):
            assert torch.equal(value, bad[1][0][name]), name
    assert bad[2][1]['skipped'] == 1 and bad[2][1]['samples'] == bad[2][1]['loss'] == 0
    assert not nano.same(bad[3][0]['head.weight'], bad[2][0]['head.weight']) and bad[3][1]['skipped'] == 0


def test_skips_in_a_row_have_a_limit():
    net = model()
    step = train_step(net, sgd(net, 0.1), skip_nonfinite=True)
    with nano.poison(0, 1, 3, 4, 5), pytest.raises(TrainingFault, match='step 5: .*3 '):
        epoch(step, 8, skips=2)
    assert nano.finite(net.state_dict())
    with nano.poison(0, 1, 3, 4):
        assert epoch(step, 6, skips=2)['skipped'] == 4


# float16

def test_too_many_overflows_under_loss_scaling_are_a_fault():
    net = model()
    before = weights(net)
    scaler = NativeScaler('cpu', init_scale=2. ** 127, growth_interval=1000, enabled=True)
    large = build_criterion(False)
    step = train_step(
        net, torch.optim.AdamW(net.parameters(), 1e-3, fused=True), lambda *args: 100 * large(*args), scaler=scaler)
    sums = epoch(step, 1)
    assert sums['overflows'] == 1 and sums['skipped'] == 0 and scaler.get_scale() == 2. ** 126
    assert torch.equal(weights(net), before)
    check_faults(sums, 0, 0, 0)
    with pytest.raises(TrainingFault, match=f'{MAX_OVERFLOWS} times'):
        check_faults({**sums, 'overflows_in_a_row': MAX_OVERFLOWS + 1}, 0, 0, 0)
    with nano.poison(0), pytest.raises(TrainingFault):  # A nonfinite loss remains a fault.
        epoch(train_step(net, scaler=scaler), 1)


# evaluation

@pytest.mark.parametrize('classes', [2, 3, 5, 7])
def test_scores_are_exact_for_uneven_batches_and_few_classes(classes):
    g = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(23, classes, generator=g), torch.randint(classes, (23,), generator=g)
    images = torch.arange(23, dtype=torch.uint8).view(23, 1, 1, 1).expand(23, 3, 2, 2)
    net = nn.Module().train()
    net.forward = lambda x: logits[x[:, 0, 0, 0].round().long()]  # An image names its row in all pixels.
    loader = [(images[i:i + 9], targets[i:i + 9]) for i in range(0, 23, 9)]
    stats = evaluate(net, loader, Preprocessor(CPU, mean=(0.,) * 3, std=(1 / 255,) * 3), FLOAT32)
    ranks = [sorted(range(classes), key=lambda c, row=row: -row[c]) for row in logits.tolist()]
    hits = [[target in rank[:k] for rank, target in zip(ranks, targets.tolist())] for k in (1, 5)]
    assert stats['acc1'] == 100 * sum(hits[0]) / 23 and stats['acc5'] == 100 * sum(hits[1]) / 23
    assert stats['count'] == 23 and not net.training
    assert stats['loss'] == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)


# apex

def fake_apex(record):
    """Return modules like apex <= 25.04 that record their calls and scale by a power of two, which is exact."""
    apex, amp = types.ModuleType('apex'), types.ModuleType('apex.amp')

    def initialize(net, optimizer, opt_level):
        assert not isinstance(net, nn.parallel.DistributedDataParallel)
        record('initialize', opt_level)
        return net, optimizer

    @contextlib.contextmanager
    def scale_loss(loss, optimizer, delay_unscale=False):
        yield loss * 1024
        for p in amp.master_params(optimizer):
            p.grad.div_(1 if delay_unscale else 1024)

    amp.initialize, amp.scale_loss, apex.amp = initialize, scale_loss, amp
    amp.master_params = lambda optimizer: (p for group in optimizer.param_groups for p in group['params'])
    amp.state_dict = lambda: {'loss_scaler0': {'loss_scale': 1024., 'unskipped': 3}}
    amp.load_state_dict = lambda state: record('load', state)
    return {'apex': apex, 'apex.amp': amp}


def test_apex_scales_the_loss_and_its_state_is_saved(flags, tmp_path):
    """Two ranks with two batches a step get the weights of float32."""
    calls, scaler = tmp_path / 'calls', {'loss_scaler0': {'loss_scale': 1024., 'unskipped': 3}}

    def record(*call):
        with open(calls, 'a') as file:
            file.write(json.dumps(call) + '\n')

    def with_apex(rank):
        sys.modules.update(fake_apex(record if rank == 0 else lambda *_: None))

    run = [*flags, '--epochs', 1, '--batch-size', 24]
    nano.finish(nano.start([*run, '--output-dir', tmp_path / 'float32'], ranks=2))
    run += ['--apex-amp', '--apex-opt-level', 'O2', '--output-dir', tmp_path / 'run', '--resume', 'auto']
    nano.finish(nano.start(run, ranks=2, before=with_apex))
    saved = nano.read(tmp_path / 'run')
    assert nano.same(saved['model'], nano.read(tmp_path / 'float32')['model']) and saved['loss_scaler'] == scaler

    nano.finish(nano.start([*run, '--epochs', 2], ranks=2, before=with_apex))
    assert [json.loads(line) for line in calls.read_text().splitlines()] == [
        ['initialize', 'O2'], ['initialize', 'O2'], ['load', scaler]]


def test_training_continues_without_apexs_amp(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'apex', None)
    nano.train([*flags, '--epochs', 1, '--batch-size', 48, '--apex-amp', '--output-dir', tmp_path / 'run'])
    lines = [line for line in capsys.readouterr().out.splitlines() if 'apex' in line]
    assert len(lines) == 1 and '--apex-amp' in lines[0] and 'bfloat16' in lines[0]
    assert nano.read(tmp_path / 'run')['epoch'] == 0
