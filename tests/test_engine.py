"""What happens to a batch."""
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

import engine
import nano
from engine import Meters, Preprocessor, TrainingFault, TrainStep, check_faults, evaluate, train_one_epoch
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


def train_step(net, optimizer=None, criterion=None, prepare=None, scaler=None, autocast=FLOAT32, **kwargs):
    return TrainStep(
        net, criterion or build_criterion(False, 0.1), optimizer or sgd(net), prepare or Preprocessor(CPU),
        scaler or NativeScaler('cpu', enabled=False), autocast, **kwargs)


def weights(net):
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def half_nan(criterion, at):
    """`criterion`, but NaN in the calls numbered in `at`."""
    calls = []

    def poisoned(outputs, targets):
        calls.append(1)
        return criterion(outputs, targets) * (float('nan') if len(calls) - 1 in at else 1.)
    return poisoned


# preparing

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

def test_order_of_a_step(monkeypatch):
    net, calls = model(), []

    def noted(name, call):
        return lambda *args, **kwargs: (calls.append(name), call(*args, **kwargs))[1]

    class Scaler(NativeScaler):
        backward = noted('backward', NativeScaler.backward)
        unscale_ = noted('unscale', NativeScaler.unscale_)
        step = noted('optimizer', NativeScaler.step)

    net.register_forward_pre_hook(lambda *_: calls.append('forward'))
    monkeypatch.setattr(engine, 'reduce_', noted('agree', engine.reduce_))
    monkeypatch.setattr(nn.utils, 'clip_grads_with_norm_', noted('clip', nn.utils.clip_grads_with_norm_))
    ema = ModelEmaV3(net)
    ema.update = noted('ema', ema.update)
    step = train_step(
        net, prepare=noted('prepare', Preprocessor(CPU)), criterion=noted('loss', build_criterion(False)),
        scaler=Scaler('cpu', enabled=False), ema=(ema, net), clip_grad=1.)
    step.prepare.device = CPU
    for i in range(2):
        calls.clear()
        step([batch(), batch()], 0, i, Meters(CPU))
        assert calls == ['prepare', 'forward', 'loss', 'backward'] * 2 + [
            'unscale', 'agree', 'clip', 'optimizer', 'ema']


def test_draws_follow_from_seed_epoch_step_and_rank():
    def after(seed=1, epoch=2, step=3, rank=0, burn=0):
        net = model(drop_rate=0.5, drop_path_rate=0.5)
        torch.rand(burn)
        prepare = Preprocessor(CPU, Mixup(0.8, 1., num_classes=5), RandomErasing(0.5, mode='pixel', device='cpu'))
        train_step(net, prepare=prepare, criterion=build_criterion(True), seed=seed, rank=rank)(
            [batch()], epoch, step, Meters(CPU))
        return weights(net)

    first = after()
    assert torch.equal(after(burn=7), first)
    assert not any(torch.equal(after(**change), first) for change in (
        dict(seed=2), dict(epoch=3), dict(step=4), dict(rank=1)))


@pytest.mark.parametrize('clip', [{}, dict(clip_grad=0.1)])
def test_two_half_batches_are_one_whole(clip):
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


def test_gradients_are_summed_over_ranks_in_the_last_backward_alone():
    net, inside = model(), []

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.syncing = net, True

        @contextlib.contextmanager
        def no_sync(self):
            self.syncing = False
            yield
            self.syncing = True

        def forward(self, x):
            inside.append(self.syncing)
            return self.net(x)

    wrapped = Wrapped()
    train_step(wrapped, sgd(net))([batch()] * 3, 0, 0, Meters(CPU))
    assert inside == [False, False, True]


@pytest.mark.parametrize('mode, value', [('norm', 0.05), ('value', 0.002), ('agc', 0.05)])
def test_clipping(mode, value):
    images, targets = Preprocessor(CPU)(*batch())
    net = model().eval()
    other, before = copy.deepcopy(net), weights(net)
    build_criterion(False, 0.1)(other(images), targets).backward()
    dispatch_clip_grad(list(other.parameters()), value, mode)
    sgd(other).step()
    train_step(net, clip_grad=value, clip_mode=mode)([batch()], 0, 0, Meters(CPU))
    moved = weights(net) - before
    assert torch.allclose(weights(net), weights(other), atol=1e-7) and moved.norm() > 0
    if mode == 'norm':
        assert moved.norm().item() == pytest.approx(0.05, rel=1e-3)


# what is not finite

def steps(step, number, skips=0, first=0):
    progress = Progress('epoch', number, enabled=False)
    meters = Meters(CPU)
    for _ in train_one_epoch(
            step, [batch(seed=i) for i in range(number)], 0, first, number, 1, meters, progress, skips_in_a_row=skips):
        pass
    return meters.read()


def test_a_loss_or_gradient_that_is_not_finite_is_a_fault_at_once():
    step = train_step(model(), criterion=half_nan(build_criterion(False), {2}))
    with pytest.raises(TrainingFault, match='epoch 0, step 2: loss or gradient is not finite; .*--on-nonfinite skip'):
        steps(step, 5)
    net = model()
    net.head.weight.register_hook(lambda grad: grad * float('inf'))
    with pytest.raises(TrainingFault, match='step 0'):
        steps(train_step(net), 2)


@pytest.mark.parametrize('opt', ['fused', 'plain'])
@pytest.mark.parametrize('what', ['input', 'loss'])
def test_skipping_leaves_no_trace(opt, what):
    def run(poisoned):
        net = model()
        ema = ModelEmaV3(net, decay=0.9)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2, fused=True) if opt == 'fused' else sgd(net, 0.1)
        prepare, calls = Preprocessor(CPU), []

        def poison(images, targets):
            images, targets = prepare(images, targets)
            calls.append(1)
            if poisoned and what == 'input' and len(calls) == 3:
                images[1, 0, 0, 0] = float('nan')
            return images, targets

        poison.device = CPU
        criterion = half_nan(build_criterion(False), {2} if poisoned and what == 'loss' else ())
        step = train_step(net, optimizer, criterion, poison, ema=(ema, net), skip_nonfinite=True)
        net.train()
        states = []
        for i in range(4):
            step([batch(seed=i)], 0, i, meters := Meters(CPU))
            states.append((copy.deepcopy(net.state_dict()), meters.read()))
            assert nano.finite(net.state_dict()) and nano.finite(ema.module.state_dict())
        return states

    good, bad = run(False), run(True)
    assert nano.same(good[1][0], bad[1][0]) and not nano.same(good[2][0], bad[2][0])
    for name, value in bad[2][0].items():  # weights and statistics as the step before left them
        if not name.endswith('num_batches_tracked'):
            assert torch.equal(value, bad[1][0][name]), name
    assert bad[2][1]['skipped'] == 1 and bad[2][1]['samples'] == bad[2][1]['loss'] == 0
    assert not nano.same(bad[3][0]['head.weight'], bad[2][0]['head.weight']) and bad[3][1]['skipped'] == 0


def test_skips_in_a_row_have_a_limit():
    net = model()

    def run(number, bad):
        criterion = half_nan(build_criterion(False), bad)
        return steps(train_step(net, sgd(net, 0.1), criterion, skip_nonfinite=True), number, skips=2)

    with pytest.raises(TrainingFault, match='step 5: loss or gradient is not finite, 3 updates in a row'):
        run(8, {0, 1, 3, 4, 5})
    assert nano.finite(net.state_dict())
    assert run(6, {0, 1, 3, 4})['skipped'] == 4


# float16

def test_float16_with_loss_scaling():
    net = model()
    before = weights(net)
    scaler = NativeScaler('cpu', init_scale=2. ** 8, enabled=True)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, fused=True)
    step = train_step(
        net, optimizer, scaler=scaler, autocast=functools.partial(torch.autocast, 'cpu', torch.float16), clip_grad=1.)
    sums = steps(step, 3)
    assert nano.finite(net.state_dict()) and not torch.equal(weights(net), before)
    assert sums['skipped'] == sums['overflows'] == 0
    assert scaler.get_scale() == 2. ** 8


def test_overflows_under_loss_scaling_are_the_scalers_business_until_there_are_too_many(monkeypatch):
    net = model()
    before = weights(net)
    scaler = NativeScaler('cpu', init_scale=2. ** 127, growth_interval=1000, enabled=True)
    large = build_criterion(False)
    step = train_step(
        net, torch.optim.AdamW(net.parameters(), 1e-3, fused=True), lambda *args: 100 * large(*args), scaler=scaler)
    sums = steps(step, 1)
    assert sums['overflows'] == 1 and sums['skipped'] == 0 and scaler.get_scale() == 2. ** 126
    assert torch.equal(weights(net), before)
    check_faults(sums, 0, 0, 0)
    with pytest.raises(TrainingFault, match=f'overflowed {engine.OVERFLOWS_IN_A_ROW} times in a row'):
        check_faults({**sums, 'overflows_in_a_row': engine.OVERFLOWS_IN_A_ROW + 1}, 0, 0, 0)
    with pytest.raises(TrainingFault):  # a loss that is not finite stays a fault
        steps(train_step(net, criterion=half_nan(build_criterion(False), {0}), scaler=scaler), 1)


@pytest.mark.parametrize('kind', ['float32', 'skip', 'float16'])
def test_no_step_waits_for_the_device(monkeypatch, kind):
    """What would be a copy to the host on a GPU."""
    net = model(drop_path_rate=0.2)
    ema = ModelEmaV3(net)
    step = train_step(
        net, torch.optim.AdamW(net.parameters(), 1e-3, fused=True), build_criterion(True),
        Preprocessor(CPU, Mixup(0.8, 1., num_classes=5), RandomErasing(1., mode='pixel', device='cpu')),
        NativeScaler('cpu', enabled=kind == 'float16'),
        functools.partial(torch.autocast, 'cpu', torch.float16, enabled=kind == 'float16'),
        ema=(ema, net), clip_grad=1., skip_nonfinite=kind == 'skip')
    batches, meters = [batch(), batch(seed=1)], Meters(CPU)
    step(batches, 0, 0, meters)
    waits = []
    with monkeypatch.context() as patch:
        for name in ('item', 'tolist', 'numpy', 'cpu', '__bool__', '__float__', '__int__', '__index__', 'nonzero'):
            original = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, lambda self, *args, name=name, original=original, **kwargs: (
                waits.append(name), original(self, *args, **kwargs))[1])
        assert torch.ones(1).item() == 1 and waits.pop() == 'item'
        for i in range(1, 4):
            step(batches, 0, i, meters)
    assert not waits


# evaluation

class Fixed(nn.Module):
    """Hands out the logits of the images' numbers, which their first pixel holds."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits[x[:, 0, 0, 0].round().long()]


@pytest.mark.parametrize('classes', [2, 3, 5, 7])
def test_scores_are_exact_for_uneven_batches_and_few_classes(classes):
    g = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(23, classes, generator=g), torch.randint(classes, (23,), generator=g)
    images = torch.arange(23, dtype=torch.uint8).view(23, 1, 1, 1).expand(23, 3, 2, 2)
    net = Fixed(logits).train()
    loader = [(images[i:i + 9], targets[i:i + 9]) for i in range(0, 23, 9)]
    stats = evaluate(net, loader, Preprocessor(CPU, mean=(0.,) * 3, std=(1 / 255,) * 3), FLOAT32)
    ranks = [sorted(range(classes), key=lambda c, row=row: -row[c]) for row in logits.tolist()]
    hits = [[target in rank[:k] for rank, target in zip(ranks, targets.tolist())] for k in (1, 5)]
    assert stats['acc1'] == 100 * sum(hits[0]) / 23 and stats['acc5'] == 100 * sum(hits[1]) / 23
    assert stats['count'] == 23 and not net.training
    assert stats['loss'] == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)


# apex

def fake_apex(record):
    """What apex <= 25.04 looks like, noting what is asked of it."""
    amp = types.ModuleType('apex.amp')

    def initialize(net, optimizer, opt_level):
        assert not isinstance(net, nn.parallel.DistributedDataParallel)
        record('initialize', opt_level)
        return net, optimizer

    @contextlib.contextmanager
    def scale_loss(loss, optimizer, delay_unscale=False):
        record('scale_loss', delay_unscale)
        yield loss * 1024
        for group in optimizer.param_groups:
            for p in group['params']:
                p.grad.div_(1024 if not delay_unscale else 1)

    amp.initialize, amp.scale_loss = initialize, scale_loss
    amp.master_params = lambda optimizer: (p for group in optimizer.param_groups for p in group['params'])
    amp.state_dict = lambda: {'loss_scaler0': {'loss_scale': 1024., 'unskipped': 3}}
    amp.load_state_dict = lambda state: record('load', state)
    apex = types.ModuleType('apex')
    apex.amp = amp
    return {'apex': apex, 'apex.amp': amp}


def test_apex_is_initialised_before_ddp_scales_the_loss_and_is_saved(flags, tmp_path):
    events = tmp_path / 'events'

    def record(*what):
        with open(events, 'a') as file:
            file.write(json.dumps(what) + '\n')

    def with_apex(rank):
        sys.modules.update(fake_apex(record if rank == 0 else lambda *_: None))
        wrap = nn.parallel.DistributedDataParallel.__init__
        nn.parallel.DistributedDataParallel.__init__ = lambda *args, **kwargs: (
            rank == 0 and record('ddp'), wrap(*args, **kwargs))[1]

    run = [*flags, '--output-dir', tmp_path / 'run', '--epochs', 1, '--batch-size', 24, '--apex-amp',
           '--apex-opt-level', 'O2', '--resume', 'auto']
    output = tmp_path / 'out.txt'
    nano.finish(nano.start(run, ranks=2, before=with_apex, output=output))
    noted = [json.loads(line) for line in events.read_text().splitlines()]
    assert noted[:2] == [['initialize', 'O2'], ['ddp']] and len(noted) > 3
    assert noted[2:] == [['scale_loss', True], ['scale_loss', False]] * (len(noted) // 2 - 1)
    saved = nano.read(tmp_path / 'run')
    assert saved['loss_scaler'] == {'loss_scaler0': {'loss_scale': 1024., 'unskipped': 3}}
    assert 'apex O2' in output.read_text() and 'no apex.amp here' not in output.read_text()
    assert nano.finite(saved['model'])

    events.unlink()
    nano.finish(nano.start(run[:-2] + ['--epochs', 2, '--resume', 'auto'], ranks=2, before=with_apex, output=output))
    noted = [json.loads(line) for line in events.read_text().splitlines()]
    assert ['load', {'loss_scaler0': {'loss_scale': 1024., 'unskipped': 3}}] in noted


@pytest.mark.parametrize('which', ['none', 'later', 'unrelated'])
def test_without_apexs_amp_training_goes_on_and_says_so(flags, tmp_path, monkeypatch, capsys, which):
    if which == 'none':
        monkeypatch.setitem(sys.modules, 'apex', None)
    else:
        apex = types.ModuleType('apex')
        if which == 'unrelated':
            apex.amp = types.ModuleType('apex.amp')
        monkeypatch.setitem(sys.modules, 'apex', apex)
        monkeypatch.delitem(sys.modules, 'apex.amp', raising=False)
    nano.train([*flags, '--epochs', 1, '--batch-size', 48, '--apex-amp', '--output-dir', tmp_path / 'run'])
    out = capsys.readouterr().out
    assert out.count('apex') == 2 and '--apex-amp: apex.amp is not installed, using torch.autocast to bfloat16' in out
    assert nano.read(tmp_path / 'run')['epoch'] == 0
