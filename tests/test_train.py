"""Runs from the command line to the last epoch: bits, resuming, stopping, mistakes."""
import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.utils import random_seed

import checkpoints
import engine
import errors
import loader
import nano
import optim
import options
import processes
import sources
import train

GOLDEN_LR = json.loads((Path(__file__).parent / 'golden_lr.json').read_text())
RECIPES = {
    'cmt_ti': '--epochs 800 --warmup-lr 1e-7 --warmup-epochs 20 --lr 8e-4 --min-lr 1e-5',
    'cmt_xs': '--epochs 400 --warmup-lr 1e-6 --warmup-epochs 20 --lr 7e-4 --min-lr 2e-5',
    'cmt_s': '--epochs 300 --warmup-lr 1e-7 --warmup-epochs 20',
    'cmt_b': '--epochs 300 --warmup-lr 1e-6 --min-lr 2e-5 --warmup-epochs 20',
}


# the schedule

@pytest.mark.parametrize('name', RECIPES)
@pytest.mark.parametrize('walking', [True, False], ids=['walking', 'resuming'])
def test_learning_rates_are_the_authors(name, walking):
    golden = GOLDEN_LR[name]
    args = options.parse_args(RECIPES[name].split())
    lr = args.lr * golden['recipe']['batch'] * 8 / 512
    assert lr == pytest.approx(golden['base_lr'], rel=1e-12)

    def fresh():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
        return optimizer, *optim.build_scheduler(args, optimizer, updates_per_epoch=7)

    optimizer, scheduler, num_epochs = fresh()
    assert num_epochs == golden['num_epochs'] == len(golden['lr_in_epoch'])
    for epoch, expected in enumerate(golden['lr_in_epoch']):
        if not walking:
            if epoch % 13 and epoch < num_epochs - 12:
                continue
            optimizer, scheduler, _ = fresh()
        optim.position_schedule(scheduler, epoch, 7 * epoch)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(expected, rel=1e-12, abs=0), epoch
        for update in range(7 * epoch, 7 * epoch + 7):
            scheduler.step_update(update + 1)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(expected, rel=1e-12, abs=0), epoch
        scheduler.step(epoch, None)


def test_schedule_on_updates_resumes_where_it_stood():
    args = options.parse_args('--epochs 4 --warmup-epochs 1 --cooldown-epochs 0 --sched-on-updates'.split())

    def rates(first):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.)
        scheduler, num_epochs = optim.build_scheduler(args, optimizer, updates_per_epoch=5)
        optim.position_schedule(scheduler, first // 5, first)
        for update in range(first, 5 * num_epochs):
            yield optimizer.param_groups[0]['lr']
            scheduler.step_update(update + 1)

    undisturbed = list(rates(0))
    assert len(set(undisturbed)) == 20
    assert list(rates(7)) == undisturbed[7:] and list(rates(10)) == undisturbed[10:]


# one run

def test_a_run_learns_and_writes_what_design_says(whole):
    lines = nano.log(whole)
    assert [line['epoch'] for line in lines] == [0, 1, 2]
    assert set(lines[0]) == {
        'epoch', 'train_lr', 'train_loss', 'skipped_updates', 'n_parameters', 'test_acc1', 'test_acc5', 'test_loss',
        'ema_test_acc1', 'ema_test_acc5', 'ema_test_loss'}
    assert lines[0]['train_lr'] == 1e-3 and lines[2]['test_acc5'] == 100 and lines[2]['skipped_updates'] == 0
    assert sorted(path.name for path in whole.iterdir()) == [
        '.lock', 'checkpoint_best.pth', 'checkpoint_ema_best.pth', 'checkpoint_last.pth', 'checkpoint_prev.pth',
        'config.yaml', 'log.txt']
    last = nano.read(whole)
    assert set(last) >= {
        'model', 'model_ema', 'optimizer', 'lr_scheduler', 'loss_scaler', 'epoch', 'step', 'meters', 'best',
        'world_size', 'samples_seen', 'args'}
    assert type(last['args']) is dict and last['args']['seed'] == 3407
    assert last['epoch'] == 2 and nano.read(whole, 'checkpoint_prev.pth')['epoch'] == 1
    best = max(line['test_acc1'] for line in lines)
    first = next(line['epoch'] for line in lines if line['test_acc1'] == best)
    assert last['best']['acc1'] == best and nano.read(whole, 'checkpoint_best.pth')['epoch'] == first
    assert all(int(state['step']) == 18 for state in last['optimizer']['state'].values())


def test_a_small_model_learns(flags, tmp_path):
    nano.train([
        *flags, '--output-dir', tmp_path / 'run', '--mixup', 0, '--cutmix', 0, '--aa', 'none', '--reprob', 0,
        '--drop', 0, '--drop-path', 0, '--no-repeated-aug', '--lr', 0.4, '--epochs', 5])
    lines = nano.log(tmp_path / 'run')
    assert lines[-1]['train_loss'] < 0.8 * lines[0]['train_loss'] and max(line['test_acc1'] for line in lines) > 60


@pytest.mark.parametrize('workers', [0, 2])
def test_the_same_command_gives_the_same_bits(flags, whole, tmp_path, workers):
    nano.train([*flags, '--output-dir', tmp_path / 'run', '--num-workers', workers])
    nano.assert_same_run(whole, tmp_path / 'run')


def test_another_seed_gives_other_bits(flags, whole, tmp_path):
    nano.train([*flags, '--output-dir', tmp_path / 'run', '--seed', 1, '--epochs', 1])
    assert nano.log(tmp_path / 'run')[0]['train_loss'] != nano.log(whole)[0]['train_loss']


def test_settings_beside_the_checkpoint_are_those_in_force(flags, whole):
    text = (whole / 'config.yaml').read_text()
    assert text.startswith(f'# train.py {" ".join(flags)}')
    system = text.splitlines()[1]
    for words in (f', torch {torch.__version__.split("+")[0]}', f', timm {timm.__version__}, 1 process on ', ': 1'):
        assert words in system
    again = vars(options.parse_args(['--config', str(whole / 'config.yaml')]))
    saved = nano.read(whole)['args']
    again.pop('config'), saved.pop('config')
    assert again == saved
    assert yaml.safe_load(text)['model-ema-decay'] == 0.9


def test_ema_averages_from_the_first_step_with_the_rate_given(flags, tmp_path):
    argv = [*flags, '--output-dir', tmp_path / 'run', '--epochs', 1, '--batch-size', 48, '--model-ema-decay', 0.75]
    nano.train(argv)
    last = nano.read(tmp_path / 'run')
    random_seed(3407)
    before = train.create_model(options.parse_args([str(arg) for arg in argv]), 3).state_dict()
    assert {int(state['step']) for state in last['optimizer']['state'].values()} == {1}
    for name, after in last['model'].items():
        if after.is_floating_point():
            expected = 0.75 * before[name] + 0.25 * after
            assert torch.allclose(last['model_ema'][name], expected, rtol=1e-5, atol=1e-7), name


def test_kept_files_are_those_of_the_best_and_the_last_epochs(flags, tmp_path, monkeypatch):
    scores = iter((50., 10., 70., 30., 60., 20.))  # of the model and its average by turns
    monkeypatch.setattr(train, 'evaluate', lambda *_, **__: dict(acc1=next(scores), acc5=100., loss=1., count=27))
    nano.train([*flags, '--output-dir', tmp_path, '--batch-size', 48, '--accum-steps', 1, '--keep-checkpoints', 2])
    assert nano.read(tmp_path, 'checkpoint_best.pth')['epoch'] == 1
    assert nano.read(tmp_path, 'checkpoint_ema_best.pth')['epoch'] == 1
    last = nano.read(tmp_path)
    assert last['best']['acc1'] == 70 and last['best']['ema_acc1'] == 30
    assert sorted(path.name[11:15] for path in tmp_path.glob('checkpoint_0*')) == ['0001', '0002']
    assert nano.same(nano.read(tmp_path, 'checkpoint_0002.pth'), last)


def test_head_drop_is_the_models_own_unless_given():
    args = options.parse_args(['--model', 'cmt_nano', '--input-size', '32', '--drop', '0.2'])
    assert train.create_model(args, 3).head_drop.p == 0.1
    args.head_drop = 0.4
    assert train.create_model(args, 3).head_drop.p == 0.4


def test_weight_decay_is_for_all_but_vectors_and_the_rate_follows_depth():
    args = options.parse_args(['--model', 'cmt_nano', '--input-size', '32', '--weight-decay', '0.07'])
    model = train.create_model(args, 3)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optim.build_optimizer(args, model, 1.).param_groups:
        for p in group['params']:
            plain = p.ndim <= 1 or names[id(p)].endswith('.bias')
            assert group['weight_decay'] == (0 if plain else 0.07), names[id(p)]

    args.layer_decay = 0.5
    groups = optim.build_optimizer(args, model, 1.).param_groups
    rates = {names[id(p)]: group.get('lr_scale', 1.) for group in groups for p in group['params']}
    depths = ['stem.conv1', *(f'stages.{i}.blocks.0.lpu.dw' for i in range(4)), 'head']
    assert [rates[f'{name}.weight'] for name in depths] == [0.5 ** i for i in range(5, -1, -1)]


@pytest.mark.parametrize('mixup', [True, False])
def test_smoothing_reaches_the_loss(flags, monkeypatch, mixup):
    seen, build = [], train.build_criterion

    def noted(*args):
        criterion = build(*args)
        return lambda outputs, targets: (seen.append((outputs.detach(), targets, criterion(outputs, targets))),
                                         seen[-1][2])[1]

    monkeypatch.setattr(train, 'build_criterion', noted)
    nano.train([*flags, '--epochs', 1, '--batch-size', 48, '--smoothing', 0.3,
                *([] if mixup else ['--mixup', 0, '--cutmix', 0])])
    outputs, targets, loss = seen[0]
    if mixup:
        assert targets.min().item() == pytest.approx(0.1, rel=1e-5)  # a third of it to each of three classes
    else:
        expected = torch.nn.functional.cross_entropy(outputs, targets, label_smoothing=0.3)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


# evaluation

@pytest.mark.parametrize('name, ema', [('checkpoint_best.pth', False), ('checkpoint_ema_best.pth', True)])
def test_eval_prints_what_the_log_has_from_the_validation_folder_alone(
        flags, images, whole, tmp_path, capsys, name, ema):
    (tmp_path / 'val').symlink_to(images / 'val')
    nano.train([*flags, '--data-path', tmp_path, '--eval', '--resume', whole / name,
                *([] if ema else ['--no-model-ema'])])
    line = nano.log(whole)[nano.read(whole, name)['epoch']]
    prefix = 'ema_test_' if ema else 'test_'
    acc1, acc5, loss = (line[prefix + key] for key in ('acc1', 'acc5', 'loss'))
    out = capsys.readouterr().out.splitlines()
    assert f'* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}' in out
    assert f'Accuracy of the network on the 27 test images: {acc1:.3f}%' in out
    assert not [line for line in out if 'was trained at' in line]
    share = 0.9 ** nano.read(whole, name)['optimizer']['state'][0]['step'].item()
    assert any(f'{share:.0%} of this EMA is still the initial weights of the run' in line for line in out) is ema
    nano.train([*flags, '--data-path', tmp_path, '--eval', '--resume', whole / name, '--input-size', 64])
    out = capsys.readouterr().out
    assert f'{whole / name} was trained at 32 px, and is evaluated at 64. Use --input-size 32 for its own size.' in out
    assert [path.name for path in tmp_path.iterdir()] == ['val']


def test_two_ranks_train_and_score_as_one_does(flags, tmp_path, capsys):
    folder, output = tmp_path / 'run', tmp_path / 'out.txt'
    nano.finish(nano.start([*flags, '--epochs', 1, '--output-dir', folder], ranks=2, output=output))
    assert nano.read(folder)['world_size'] == 2
    assert 'learning rate 0.00625 = 0.1 x 32 / 512 (global batch = 8 x 2 accumulated x 2 processes)' in \
        output.read_text()
    assert output.read_text().count('Accuracy of the network') == 2  # once each, of the model and its average

    nano.train([*flags, '--eval', '--no-model-ema', '--resume', folder / 'checkpoint_last.pth'])
    one = [line for line in capsys.readouterr().out.splitlines() if 'Acc' in line]
    line = nano.log(folder)[0]
    assert one == [
        f'* Acc@1 {line["test_acc1"]:.3f} Acc@5 {line["test_acc5"]:.3f} loss {line["test_loss"]:.3f}',
        f'Accuracy of the network on the 27 test images: {line["test_acc1"]:.3f}%']
    evaluated = tmp_path / 'eval.txt'
    nano.finish(nano.start(
        [*flags, '--eval', '--no-model-ema', '--resume', folder / 'checkpoint_last.pth'], ranks=2, output=evaluated))
    assert [line for line in evaluated.read_text().splitlines() if 'Acc' in line] == one


# resuming

@pytest.mark.parametrize('damaged', [False, True])
def test_resume_from_the_end_of_an_epoch(flags, whole, tmp_path, capsys, damaged):
    """From that of the epoch before, where the newest file is damaged."""
    run = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto']
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match='killed'):
        nano.at_step(patch, 13, lambda: (_ for _ in ()).throw(RuntimeError('killed')))
        nano.train(run)
    with open(tmp_path / 'run' / 'log.txt', 'a') as file:
        file.write('{"epoch": 2, "train_l')  # as a kill in mid-write leaves it
    assert nano.read(tmp_path / 'run')['epoch'] == 1
    path = tmp_path / 'run' / 'checkpoint_last.pth'
    path.write_bytes(path.read_bytes()[:-1000 if damaged else None])
    nano.train(run)
    out = capsys.readouterr().out
    assert bool(re.search(f'{path} is .*damaged', out)) == damaged
    assert 'EMA weights (model_ema)' in out and 'of this EMA is still' not in out
    nano.assert_same_run(whole, tmp_path / 'run')


@pytest.mark.parametrize('steps', [3, 6])
def test_the_speed_of_a_resumed_epoch_is_that_of_all_its_steps(flags, tmp_path, steps):
    """Also if it was stopped after its last step, and then again during the evaluation."""
    run = [*flags, '--epochs', 1, '--output-dir', tmp_path, '--resume', 'auto']
    nano.finish(nano.start(
        run, before=lambda rank: nano.at_step(pytest.MonkeyPatch(), steps - 1, lambda: os.kill(os.getpid(), 15))))
    before = nano.read(tmp_path)
    assert before['step'] == steps and before['seconds'] > 0

    def stopped(rank, score=train.score):
        train.score = lambda *args: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(1) or score(*args)
    nano.finish(nano.start(run, before=stopped))
    seconds = nano.read(tmp_path)['seconds']
    assert seconds == before['seconds'] if steps == 6 else seconds > before['seconds']
    nano.train(run)
    assert json.loads((tmp_path / 'log.txt').read_text())['train_images_per_s'] == 96 / seconds


def test_resume_in_mid_epoch_loads_only_the_rest(flags, whole, tmp_path, monkeypatch):
    run = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto', '--save-every-steps', 2]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match='killed'):
        nano.at_step(patch, 11, lambda: (_ for _ in ()).throw(RuntimeError('killed')))
        nano.train(run)
    saved = nano.read(tmp_path / 'run')
    assert (saved['epoch'], saved['step'], saved['samples_seen']) == (1, 4, 64)

    loaded = []
    get = loader.SeededDataset.__getitem__
    monkeypatch.setattr(loader.SeededDataset, '__getitem__', lambda self, key: loaded.append(key) or get(self, key))
    nano.train(run)
    assert len(loaded) == (2 + 6) * 16
    nano.assert_same_run(whole, tmp_path / 'run')


@pytest.mark.parametrize('opt', ['adamw', 'lookahead_adamw'])
def test_a_run_of_commit_9777bd7_is_resumed_with_the_same_bits(flags, whole, tmp_path, opt):
    """Its 1x1 convolutions were linear layers: weights, EMA and moments have two dimensions. Its config.yaml names
    flags that are gone.
    """
    if opt != 'adamw':
        whole = tmp_path / 'whole'
        nano.train([*flags, '--opt', opt, '--output-dir', whole])
    run = [*flags, '--opt', opt, '--output-dir', tmp_path / 'run', '--save-every-steps', 2]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match='killed'):
        nano.at_step(patch, 11, lambda: (_ for _ in ()).throw(RuntimeError('killed')))
        nano.train(run)
    saved = nano.read(tmp_path / 'run')

    def squeezed(value):
        is_conv1x1 = isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[2:] == (1, 1)
        return value[:, :, 0, 0] if is_conv1x1 and value.shape[1] > 1 else value

    for state in (saved['model'], saved['model_ema'], *saved['optimizer']['state'].values()):
        state.update({key: squeezed(value) for key, value in state.items()})
    assert sum(value.ndim == 2 for value in saved['model'].values()) > 3 * 4
    saved['args'].update(cache='none', cache_dir=None, cache_size=None, kernels=False)
    torch.save(saved, tmp_path / 'run' / 'checkpoint_last.pth')
    config = tmp_path / 'run' / 'config.yaml'
    config.write_text(config.read_text() + 'cache: none\nkernels: false\n')
    nano.train(['--config', config, '--resume', 'auto'])
    nano.assert_same_run(whole, tmp_path / 'run')


def test_resume_of_a_finished_run_changes_nothing(flags, whole, tmp_path):
    run = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto', '--epochs', 1]
    nano.train(run)
    before = (tmp_path / 'run' / 'checkpoint_last.pth').read_bytes(), (tmp_path / 'run' / 'log.txt').read_text()
    nano.train(run)
    assert before == (
        (tmp_path / 'run' / 'checkpoint_last.pth').read_bytes(), (tmp_path / 'run' / 'log.txt').read_text())


def kill_and_restart(run, rng, kills, longest, ranks=1):
    for _ in range(kills):
        processes = nano.start(run, ranks)
        time.sleep(rng.uniform(0.3, longest))
        for process in processes:
            process.kill()
            process.join()
    nano.finish(nano.start(run, ranks))


def test_kill_9_at_any_moment(flags, whole, tmp_path):
    run = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto', '--save-every-steps', 1]
    kill_and_restart(run, random.Random(0), kills=3, longest=2)
    nano.assert_same_run(whole, tmp_path / 'run')


@pytest.mark.soak
@pytest.mark.parametrize('workers', [0, 1, 3])
def test_kill_9_at_twenty_moments(flags, whole, tmp_path, workers):
    for point in range(20):
        run = [*flags, '--output-dir', tmp_path / f'run{point}', '--resume', 'auto', '--save-every-steps', 2,
               '--num-workers', workers]
        kill_and_restart(run, random.Random(point), kills=1, longest=6)
        nano.assert_same_run(whole, tmp_path / f'run{point}')


def test_elastic_restart_sees_each_sample_once(flags, tmp_path, monkeypatch):
    """One rank after two, in mid-epoch: the rest of the same order."""
    run = [*flags, '--no-repeated-aug', '--epochs', 1, '--output-dir', tmp_path / 'run', '--resume', 'auto']
    seen = tmp_path / 'seen.txt'
    get = loader.SeededDataset.__getitem__

    def noted(self, key):
        with open(seen, 'a') as file:
            file.write(f'{key[0]}\n')
        return get(self, key)

    monkeypatch.setattr(loader.SeededDataset, '__getitem__', noted)

    def stop_early(rank):
        patch = pytest.MonkeyPatch()
        nano.at_step(patch, 1, lambda: rank == 1 and os.kill(os.getpid(), signal.SIGTERM))

    output = tmp_path / 'out.txt'
    nano.finish(nano.start(run, ranks=2, output=output, before=stop_early))
    saved = nano.read(tmp_path / 'run')
    assert (saved['world_size'], saved['step'], saved['samples_seen']) == (2, 2, 64)
    nano.finish(nano.start(run, output=output))
    order = seen.read_text().split()
    assert len(order) == len(set(order)) == 96
    assert '1 processes now, 2 before: 64 samples of epoch 0 are done' in output.read_text()
    assert 'learning rate 0.003125 = 0.1 x 16 / 512' in output.read_text()
    assert [line['epoch'] for line in nano.log(tmp_path / 'run')] == [0]


# stopping

@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops_within_a_step(flags, whole, tmp_path, monkeypatch, capsys, number, status):
    run = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto']
    sys.argv = ['train.py', *map(str, run)]
    with pytest.MonkeyPatch.context() as patch:
        nano.at_step(patch, 8, lambda: os.kill(os.getpid(), number))
        assert train.cli() == status
    saved = nano.read(tmp_path / 'run')
    assert (saved['epoch'], saved['step']) == (1, 3)
    assert 'stopped in epoch 1 after 3 of its steps' in capsys.readouterr().out
    nano.train(run)
    nano.assert_same_run(whole, tmp_path / 'run')


@pytest.mark.parametrize('where', ['setup_process', 'build_data', 'build_run'])
def test_a_warning_during_the_set_up_is_kept_for_the_first_step(flags, whole, tmp_path, where):
    """SLURM's SIGUSR1. SIGTERM ends a run that has nothing to save, as torchrun's restarts need."""
    def warned(rank, number=signal.SIGUSR1):
        step = getattr(train, where)
        setattr(train, where, lambda *args: os.kill(os.getpid(), number) or step(*args))

    run = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto']
    nano.finish(nano.start(run, before=warned))
    assert nano.read(tmp_path / 'run')['step'] == 1
    nano.finish(nano.start(run, before=lambda rank: warned(rank, signal.SIGTERM)), status=-signal.SIGTERM)
    nano.train(run)
    nano.assert_same_run(whole, tmp_path / 'run')


def test_job_scripts_see_whether_a_stopped_run_has_epochs_left(flags, tmp_path):
    """The exit status under --resume auto is 0 for both."""
    stopped = tmp_path / 'stopped'
    run = [*flags, '--epochs', 1, '--output-dir', tmp_path / 'run', '--resume', 'auto', '--stopped-file', stopped]
    nano.finish(nano.start(
        run, before=lambda rank: nano.at_step(pytest.MonkeyPatch(), 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))))
    assert stopped.exists()

    def warned_late(rank, log=checkpoints.RunWriter.log):
        checkpoints.RunWriter.log = lambda *args: os.kill(os.getpid(), signal.SIGUSR1) or log(*args)

    output = tmp_path / 'out.txt'
    nano.finish(nano.start(run, output=output, before=warned_late))
    assert 'stopped after epoch 0, which was the last' in output.read_text() and not stopped.exists()
    assert '\nstopped-file' not in (tmp_path / 'run' / 'config.yaml').read_text()


def test_a_signal_to_one_of_two_ranks_stops_both(flags, tmp_path):
    run = [*flags, '--epochs', 2, '--output-dir', tmp_path / 'run', '--resume', 'auto']

    def signalled(rank):
        nano.at_step(pytest.MonkeyPatch(), 4, lambda: rank == 1 and os.kill(os.getpid(), signal.SIGTERM))

    nano.finish(nano.start(run, ranks=2, before=signalled))
    saved = nano.read(tmp_path / 'run')
    assert (saved['epoch'], saved['step'], saved['samples_seen']) == (1, 2, 64)
    nano.finish(nano.start(run, ranks=2))
    nano.finish(nano.start([*run[:-4], '--output-dir', tmp_path / 'whole'], ranks=2))
    nano.assert_same_run(tmp_path / 'whole', tmp_path / 'run')


def signal_group(number):
    """To all of this process's group, from outside it, as `timeout`, scancel and a container's end send it.

    Loader processes end by their parent's signal alone: they have to see that this one is not their parent's.
    """
    loaders = multiprocessing.active_children()
    subprocess.run(['kill', '-s', str(int(number)), '--', str(-os.getpgid(0))], start_new_session=True, check=True)
    time.sleep(0.5)
    assert len(loaders) == 4 and all(worker.is_alive() for worker in loaders), loaders


def test_a_signal_to_the_whole_group_spares_the_loaders_until_the_end(flags, whole, tmp_path):
    run = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto', '--num-workers', 2]
    nano.finish(nano.start(run, output=tmp_path / 'out.txt', before=lambda rank: nano.at_step(
        pytest.MonkeyPatch(), 8, lambda: signal_group(signal.SIGTERM))))
    assert nano.read(tmp_path / 'run')['step'] == 3
    nano.train(run)
    nano.assert_same_run(whole, tmp_path / 'run')


def test_a_signal_while_loaders_start_spares_them(flags, whole, tmp_path, monkeypatch):
    """torch's loader processes end by any SIGTERM until worker_init_fn is called: till then it has to wait."""
    def slow_start(worker, start=loader._leave_signals_to_the_run):
        if worker == 1:
            os.kill(os.getppid(), signal.SIGUSR2)  # signals of its own process would be its own
            time.sleep(1)
        start(worker)

    def before(rank):
        monkeypatch.setattr(loader, '_leave_signals_to_the_run', slow_start)
        signal.signal(signal.SIGUSR2, lambda *_: subprocess.Popen(
            ['kill', '-s', 'TERM', '--', str(-os.getpgid(0))], start_new_session=True))

    run = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto', '--num-workers', 2]
    nano.finish(nano.start(run, output=tmp_path / 'out.txt', before=before))
    assert nano.read(tmp_path / 'run')['step'] == 1
    nano.train(run)
    nano.assert_same_run(whole, tmp_path / 'run')


def test_two_ranks_under_torchrun_survive_the_kill_of_one(flags, tmp_path):
    """--max-restarts starts the group again, and the run ends with the bits of an undisturbed one."""
    run = [*flags, '--epochs', '2', '--resume', 'auto', '--save-every-steps', '1']
    nano.finish(nano.start([*run, '--output-dir', tmp_path / 'whole'], ranks=2))

    output = tmp_path / 'out.txt'
    with open(output, 'w') as file:
        torchrun = subprocess.Popen(
            [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--max-restarts', '3',
             '--monitor-interval', '0.1', nano.__file__, *run, '--output-dir', str(tmp_path / 'run')],
            stdout=file, stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    try:
        last = tmp_path / 'run' / 'checkpoint_last.pth'
        deadline = time.monotonic() + 120
        while not last.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(max(children_of(torchrun)), signal.SIGKILL)
        assert torchrun.wait(300) == 0, output.read_text()[-3000:]
    finally:
        ranks = children_of(torchrun)
        torchrun.kill()
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
    assert len(re.findall('resuming at epoch', output.read_text())) == 1
    nano.assert_same_run(tmp_path / 'whole', tmp_path / 'run')


def children_of(process):
    found = []
    for status in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            if int(status.read_text().rsplit(')', 1)[1].split()[1]) == process.pid:
                found.append(int(status.parent.name))
    return found


# faults

def poison(monkeypatch, number, what, rank=0):
    """A NaN in the loss or the input of one step."""
    prepare, calls = engine.Preprocessor.__call__, []

    def patched(self, images, targets):
        images, targets = prepare(self, images, targets)
        if torch.is_inference_mode_enabled():
            return images, targets
        calls.append(1)
        if len(calls) == number + 1 and processes.get_rank() == rank:
            (images if what == 'input' else targets)[1:3] = float('nan')
        return images, targets

    monkeypatch.setattr(engine.Preprocessor, '__call__', patched)


@pytest.mark.parametrize('what', ['input', 'loss'])
def test_a_nan_of_one_rank_stops_both_and_nothing_of_it_is_saved(flags, tmp_path, what):
    output = tmp_path / 'out.txt'
    began = time.monotonic()
    nano.finish(nano.start(
        [*flags, '--output-dir', tmp_path / 'run', '--save-every-steps', 1], ranks=2, output=output,
        before=lambda rank: poison(pytest.MonkeyPatch(), 8, what, rank=1)), status=1)
    assert time.monotonic() - began < 100
    text = output.read_text()
    assert text.count('train.py: error: epoch 1, step 1: loss or gradient is not finite') == 1
    assert 'Traceback' not in text
    saved = nano.read(tmp_path / 'run')
    assert (saved['epoch'], saved['step']) == (1, 1) and nano.finite(saved['model']) and nano.finite(saved['model_ema'])


def test_skipped_updates_leave_no_trace_and_are_counted(flags, tmp_path, monkeypatch):
    poison(monkeypatch, 5, 'input')
    nano.train([*flags, '--epochs', 2, '--on-nonfinite', 'skip', '--output-dir', tmp_path / 'run'])
    saved = nano.read(tmp_path / 'run')
    assert nano.finite(saved['model']) and nano.finite(saved['model_ema'])
    assert {int(state['step']) for state in saved['optimizer']['state'].values()} == {11}
    assert [line['skipped_updates'] for line in nano.log(tmp_path / 'run')] == [1, 0]


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(flags, tmp_path):
    run = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto']
    nano.train([*run, '--epochs', 1])
    before = nano.read(tmp_path / 'run')
    output = tmp_path / 'out.txt'
    nano.finish(nano.start(
        run, output=output,
        before=lambda rank: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))), status=1)
    text = output.read_text()
    assert text.count('can not be written to any more') == 1 and 'Traceback' not in text
    assert nano.same(nano.read(tmp_path / 'run'), before)


def test_a_corrupt_validation_image_is_named(flags, images, tmp_path):
    (tmp_path / 'train').symlink_to(images / 'train')
    (tmp_path / 'val' / 'class_1').mkdir(parents=True)
    (tmp_path / 'val' / 'class_1' / 'bad.png').write_bytes(b'no image')
    run = [*flags, '--data-path', tmp_path, '--output-dir', tmp_path / 'run', '--resume', 'auto', '--epochs', 1]
    for workers, more, status in ((0, [], 1), (2, [], 1), (2, ['--eval'], 2)):
        output = tmp_path / f'{workers}{status}.txt'
        nano.finish(nano.start([*run, '--num-workers', workers, *more], output=output), status=status)
        text = output.read_text()
        line = r'^train\.py: error: cannot read validation image .*val/class_1/bad\.png \(not an image\)'
        assert re.search(line, text, re.MULTILINE) and 'Traceback' not in text
        if not more:  # the epoch is done once
            assert nano.read(tmp_path / 'run')['step'] == 6
            assert ('resuming at epoch 0, step 6' in text) == (workers == 2)


@pytest.mark.parametrize('name', ['adamw', 'lookahead_adamw', 'adafactor', 'adafactorbv', 'lamb'])
def test_optimizers_go_on_as_they_were(name, tmp_path):
    """With what timm's keep among their settings, and moments that have fewer numbers than their weights."""
    def run(model, optimizer, steps):
        for step in steps:
            loss = model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def fresh():
        random_seed(0)
        args = options.parse_args(['--opt', name])
        model = timm.create_model('cmt_nano', drop_rate=0., drop_path_rate=0.).train()
        return model, optim.build_optimizer(args, model, 1e-3)

    model, optimizer = fresh()
    run(model, optimizer, range(8))
    torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, tmp_path / 'last.pth')
    run(model, optimizer, range(8, 16))
    saved = checkpoints.read_checkpoint(tmp_path / 'last.pth')
    again, optimizer = fresh()
    again.load_state_dict(saved['model'])
    optim.load_optimizer(optimizer, saved['optimizer'], 'last.pth')
    run(again, optimizer, range(8, 16))
    assert nano.same(model.state_dict(), again.state_dict())


def test_factored_moments_of_linear_layers_are_refused(tmp_path):
    """Those of 1x1 convolutions in files of commit 9777bd7: no view makes them those of a convolution."""
    args = options.parse_args(['--opt', 'adafactor'])
    old, new = (optim.build_optimizer(args, m, 1e-3) for m in (torch.nn.Linear(32, 64), torch.nn.Conv2d(32, 64, 1)))
    for optimizer in (old, new):
        for group in optimizer.param_groups:
            for p in group['params']:
                p.grad = torch.ones_like(p)
        optimizer.step()
    optim.load_optimizer(new, new.state_dict(), 'new.pth')
    with pytest.raises(ValueError, match='old.pth, an older file, are of linear layers.*--finetune'):
        optim.load_optimizer(new, old.state_dict(), 'old.pth')


def test_a_run_that_is_killed_while_loaders_start_leaves_none_behind(flags, tmp_path):
    def slow_start(worker, start=loader._leave_signals_to_the_run):
        if worker == 1:
            (tmp_path / 'pid').write_text(str(os.getpid()))
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(0.5)
        start(worker)

    run = [*flags, '--num-workers', 2]
    nano.finish(nano.start(run, before=lambda rank: setattr(loader, '_leave_signals_to_the_run', slow_start)),
                status=-signal.SIGKILL)
    worker, until = Path('/proc') / (tmp_path / 'pid').read_text(), time.monotonic() + 20
    while worker.exists() and 'State:\tZ' not in (worker / 'status').read_text():  # Z: nobody waits for it
        assert time.monotonic() < until
        time.sleep(0.1)


# mistakes

def mistakes(images, whole, tmp_path):
    empty = tmp_path / 'empty'
    (empty / 'train' / 'class_0').mkdir(parents=True)
    foreign = tmp_path / 'foreign'
    (foreign / 'val' / 'unheard').mkdir(parents=True)
    (foreign / 'train').symlink_to(images / 'train')
    (tmp_path / 'text.pth').write_text('no checkpoint')
    (tmp_path / 'odd.yaml').write_text('modle: cmt_ti\n')
    torch.save({'model': [1]}, tmp_path / 'list.pth')
    torch.save({'model': {1: torch.zeros(1)}}, tmp_path / 'numbered.pth')
    torch.save({'model': {'a': torch.zeros(1)}}, tmp_path / 'other.pth')
    last = whole / 'checkpoint_last.pth'
    for name, change in (('bare', {'optimizer': None}), ('odd', {'epoch': 'best'})):
        torch.save({**nano.read(whole), **change}, tmp_path / f'{name}.pth')
    torch.save({'model': nano.small(in_chans=1).state_dict()}, tmp_path / 'grey.pth')
    (tmp_path / 'odd' / 'log.txt').mkdir(parents=True)
    return {
        'no data': (['--data-path', tmp_path / 'nowhere'], 'no folder'),
        'no path': (['--data-path', ''], '--data-path is missing'),
        'empty class': (['--data-path', empty], 'no images in .*class_0'),
        'unknown class': (['--data-path', foreign], 'classes that the training set, .* or --class-map lacks: unheard'),
        'unknown model': (['--model', 'cmt_xxl'], 'unknown model cmt_xxl: cmt_b, '),
        'other model': (['--model', 'resnet18'], 'resnet18 is no CMT'),
        'size': (['--input-size', 100], '100.*32'),
        'checkpoint of another model': (['--resume', tmp_path / 'other.pth'], 'does not fit the model'),
        'checkpoint of another size': (['--resume', last, '--model', 'cmt_ti'], 'does not fit the model'),
        'checkpoint without weights': (['--resume', tmp_path / 'list.pth'], 'holds no weights'),
        'checkpoint with numbers': (['--resume', tmp_path / 'numbered.pth'], 'holds no weights'),
        'no checkpoint': (['--resume', tmp_path / 'text.pth'], 'damaged or no checkpoint'),
        'missing checkpoint': (['--resume', tmp_path / 'none.pth'], 'no checkpoint at'),
        'checkpoint without optimizer': (['--resume', tmp_path / 'bare.pth'], 'holds no optimizer: .*--finetune'),
        'checkpoint without epoch': (['--resume', tmp_path / 'odd.pth'], "of epoch 'best': .*--finetune"),
        'nothing to evaluate': (['--eval', '--resume', 'auto'], 'no checkpoint in .*run'),
        'folder for a file': (['--output-dir', tmp_path / 'odd'], 'log.txt is a folder'),
        'misspelt key': (['--config', tmp_path / 'odd.yaml'], "unknown key 'modle'"),
        'eval without checkpoint': (['--eval'], '--eval needs --resume'),
        'negative batch': (['--batch-size', -1], '-1 is not at least 1'),
        'odd batch': (['--batch-size', 7], '--batch-size 7 is odd'),
        'run in the folder': (['--output-dir', whole], 'holds a run: --resume auto resumes it, --overwrite'),
        'file for a folder': (['--output-dir', tmp_path / 'text.pth'], 'no folder that can be written to'),
        'optimizer': (['--opt', 'adamwww'], 'adamwww'),
        'betas': (['--opt-betas', 0.9], 'opt-betas'),
        'augmentation': (['--aa', 'foo'], 'foo'),
        'seed': (['--seed', 5_000_000_000], '5000000000'),
        'cutmix range': (['--cutmix-minmax', 0.5, 0.2], 'cutmix-minmax'),
        'device': (['--device', 'foo'], 'foo'),
        'world size': (['--world-size', 3], '--world-size 3'),
        'infinite rate': (['--lr', 'inf'], 'inf'),
        'grey weights': (['--finetune', tmp_path / 'grey.pth'], 'has 1 input channels, images here have 3'),
        'SyncBatchNorm on a CPU': (['--sync-bn'], '--sync-bn needs CUDA: .*leave the flag out'),
        'flag that is gone': (['--cache', 'ram'], '--cache is not supported: '),
    }


def test_mistakes_get_one_line_and_status_2(flags, images, whole, tmp_path, capsys):
    before = sorted(whole.iterdir()), (whole / 'log.txt').read_text()
    wrong = []
    for name, (change, words) in mistakes(images, whole, tmp_path).items():
        sys.argv = ['train.py', *map(str, [*flags, '--output-dir', tmp_path / 'run', *change])]
        began = time.monotonic()
        try:
            status = train.cli()
        except SystemExit as stop:
            status = stop.code
        except Exception as error:
            status = f'{type(error).__name__}: {error}'
        err = capsys.readouterr().err
        if status != 2 or not re.fullmatch(rf'train\.py: error: [^\n]*{words}[^\n]*\n', err):
            wrong.append((name, status, err))
        assert not (tmp_path / 'run').exists() and time.monotonic() - began < 60
    assert not wrong
    assert before == (sorted(whole.iterdir()), (whole / 'log.txt').read_text())


def test_a_mistake_of_two_ranks_is_told_once(flags, tmp_path):
    output = tmp_path / 'out.txt'
    for change, words in ((['--data-path', tmp_path / 'nowhere'], 'no folder'), (['--lr', 'x'], "'x'"),
                          (['--device', 'cuda' if not torch.cuda.is_available() else 'foo'], '--device')):
        output.unlink(missing_ok=True)
        nano.finish(nano.start([*flags, *change], ranks=2, output=output), status=2)
        assert output.read_text().count('train.py: error:') == 1 and words in output.read_text()
        assert 'Traceback' not in output.read_text()


@pytest.mark.parametrize('damaged, words', [
    (False, 'processes found different checkpoints: --output-dir has to lie on a file system that all nodes share'),
    (True, 'no good checkpoint in run: .*')])
def test_folders_that_ranks_do_not_share_are_told(flags, whole, tmp_path, damaged, words):
    """Rank 1 alone finds a checkpoint, a good or a damaged one: one line, and no rank waits for the other."""
    (tmp_path / '0').mkdir()
    shutil.copytree(whole, tmp_path / '1' / 'run')
    for path in (tmp_path / '1' / 'run').glob('*.pth') if damaged else ():
        path.write_bytes(b'damaged')
    output = tmp_path / 'out.txt'
    run = [*flags[2:], '--resume', 'auto', '--output-dir', 'run']  # without --model: rank 0 would build cmt_s
    assert flags[0] == '--model'
    nano.finish(nano.start(run, ranks=2, output=output,
                           before=lambda rank: os.chdir(tmp_path / str(rank))), status=2)
    found = re.findall('train.py: error: (.*)', output.read_text())
    assert len(found) == 1 and re.fullmatch(words, found[0])


@pytest.mark.parametrize('fault', ['images', 'compiler', 'disk', 'config'])
def test_an_old_run_stays_until_nothing_can_fail_any_more(flags, images, tmp_path, monkeypatch, fault):
    run, output = [*flags, '--epochs', 1, '--output-dir', tmp_path / 'run'], tmp_path / 'out.txt'
    nano.train(run)
    before = {path: path.read_bytes() for path in (tmp_path / 'run').iterdir() if path.name != '.lock'}
    if fault == 'images':
        shutil.copytree(images / 'val', tmp_path / 'data' / 'val')
        for i in range(20):
            (tmp_path / 'data' / 'train' / f'class_{i % 3}').mkdir(parents=True, exist_ok=True)
            (tmp_path / 'data' / 'train' / f'class_{i % 3}' / f'{i}.png').write_text('no image')
        run += ['--data-path', tmp_path / 'data']
    elif fault == 'compiler':
        run.append('--compile')
        monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
        monkeypatch.setenv('PATH', '')
    elif fault == 'disk':
        monkeypatch.setattr(os, 'fsync', nano.full_disk)
    else:
        monkeypatch.setattr(checkpoints, 'atomic_write', nano.full_disk)
    nano.finish(nano.start([*run, '--overwrite'], output=output), status=1 if fault == 'images' else 2)
    assert output.read_text().count('train.py: error: ') == 1 and 'Traceback' not in output.read_text()
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_try_of_the_compiler_can_be_interrupted_and_a_finished_run_needs_none(flags, whole, tmp_path, monkeypatch):
    run, output = [*flags, '--compile', '--output-dir', tmp_path / 'run'], tmp_path / 'out.txt'
    shutil.copytree(whole, tmp_path / 'run')
    monkeypatch.setattr(train.utils, 'check_compiler', lambda device: os.kill(os.getpid(), signal.SIGINT))
    nano.finish(nano.start([*run, '--overwrite'], output=output), status=130)
    assert all((tmp_path / 'run' / path.name).read_bytes() == path.read_bytes() for path in whole.glob('*.*'))
    nano.finish(nano.start([*run, '--resume', 'auto'], output=output))
    assert 'nothing left to do' in output.read_text()


@pytest.mark.parametrize('elsewhere', [False, True])
def test_overwrite_clears_the_folder_also_for_a_run_that_goes_on_from_elsewhere(flags, whole, tmp_path, elsewhere):
    nano.train([*flags, '--epochs', 2, '--keep-checkpoints', 2, '--output-dir', tmp_path])
    assert (tmp_path / 'checkpoint_0001.pth').exists()
    more = ['--epochs', 4, '--resume', whole / 'checkpoint_last.pth'] if elsewhere else ['--epochs', 1]
    nano.train([*flags, *more, '--overwrite', '--output-dir', tmp_path])
    assert [line['epoch'] for line in nano.log(tmp_path)] == [3 if elsewhere else 0]
    assert not list(tmp_path.glob('checkpoint_0*'))
    assert (tmp_path / 'checkpoint_prev.pth').exists() == elsewhere  # the checkpoint that it goes on from


def test_each_epoch_but_the_last_says_when_the_run_ends(flags, capsys, monkeypatch):
    def left(run):
        assert run.state.seconds > 0 and run.eval_seconds > 0
        return 3602 * (run.state.epoch < 2)

    monkeypatch.setattr(train, 'seconds_left', left)
    nano.train([*flags, '--test-freq', 2])
    shown = re.findall(r'^epoch \d  train loss .*?(?:  run ends in (.*))?$', capsys.readouterr().out, re.M)
    assert shown == ['1:00:02', '1:00:02', '']


@pytest.mark.parametrize('epoch, seconds', [
    (0, 9 * 10 + 4 * 3), (1, 8 * 10 + 4 * 3), (3, 6 * 10 + 3 * 3), (7, 2 * 10 + 2 * 3), (9, 0)])
def test_the_time_left_is_that_of_training_and_of_validations_that_are_due(epoch, seconds):
    """Epochs 0, 3, 6, 8 and 9 of ten are validated."""
    run = types.SimpleNamespace(args=options.parse_args(['--test-freq', '3', '--test-epoch', '7']), num_epochs=10,
                                state=train.RunState(epoch, seconds=10.), eval_seconds=3.)
    assert train.seconds_left(run) == seconds


@pytest.mark.parametrize('pause, workers', [(0.05, 0), (0.05, 1), (0., 1)])
def test_a_run_that_waits_for_data_says_so(flags, monkeypatch, capsys, pause, workers):
    def slow(self, index, read=sources.EncodedImages.read):
        time.sleep(pause)
        return read(self, index)
    monkeypatch.setattr(sources.EncodedImages, 'read', slow)
    once = train.TrainStep.__call__
    monkeypatch.setattr(train.TrainStep, '__call__', lambda *a: time.sleep(0 if pause else 0.2) or once(*a))
    nano.train([*flags, '--epochs', 1, '--num-workers', workers, '--no-repeated-aug'])
    said = capsys.readouterr().out
    assert ('of the time went to waiting for data: more --num-workers' in said) == (pause > 0)
    assert ('waits for data ' in said) == (pause > 0)


@pytest.mark.parametrize('decay, epochs, warning', [
    (0.99996, 1, 'EMA decay 0.99996 is too slow for 6 updates: 100% of its weights would still be initial, in '
                 'evaluation, prediction and export too. Use --no-model-ema.'),
    (0.9, 4, 'EMA decay 0.9 is too slow for 24 updates: 8% of its weights would still be initial, in '
             'evaluation, prediction and export too. Use --model-ema-decay 0.5833 or --no-model-ema.'),
    (0.5, 1, None),
])
def test_an_ema_decay_that_is_too_slow_is_warned_of(flags, capsys, decay, epochs, warning):
    nano.train([*flags, '--epochs', epochs, '--model-ema-decay', decay, '--seed', 1])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith('EMA decay')]
    assert said == ([warning] if warning else [])


def test_digits_need_no_data(tmp_path):
    nano.train([
        *nano.FLAGS, '--data-set', 'DIGITS', '--epochs', 1, '--batch-size', 96, '--aa', 'none', '--output-dir',
        tmp_path / 'run'])
    assert nano.read(tmp_path / 'run')['classes'] == list('0123456789')


# classes of the data and of the checkpoint

@pytest.fixture
def renamed(images, tmp_path):
    """Return a function that makes a data set of some classes under other names."""
    def make(**names):
        for part in ('train', 'val'):
            (tmp_path / 'data' / part).mkdir(parents=True, exist_ok=True)
            for new, old in names.items():
                (tmp_path / 'data' / part / new).symlink_to(images / part / old)
        return tmp_path / 'data'
    return make


def accuracy(capsys) -> float:
    return float(re.findall(r'^\* Acc@1 (\S+)', capsys.readouterr().out, re.MULTILINE)[-1])


def test_classes_are_scored_under_the_checkpoints_indices(flags, images, whole, renamed, tmp_path, capsys):
    """In another order, and a part of them."""
    evaluation = [*flags, '--no-model-ema', '--eval', '--resume']
    nano.train([*evaluation, whole / 'checkpoint_last.pth'])
    all_of_them = accuracy(capsys)
    (tmp_path / 'map').write_text('class_2\nclass_0\nclass_1\n')
    swapped = tmp_path / 'swapped'
    nano.train([*flags, '--class-map', tmp_path / 'map', '--output-dir', swapped])
    recorded = nano.log(swapped)[-1]['test_acc1']
    capsys.readouterr()
    nano.train([*evaluation, swapped / 'checkpoint_last.pth'])
    assert accuracy(capsys) == pytest.approx(recorded, abs=1e-3) and recorded > 40

    right, count = 0, 0
    for name in ('class_0', 'class_1', 'class_2'):
        data = renamed(**{name: name})
        (data / 'train').rename(tmp_path / f'unused_{name}')
        nano.train([*evaluation, whole / 'checkpoint_last.pth', '--data-path', data])
        images_of_it = len(list((images / 'val' / name).iterdir()))
        right, count = right + accuracy(capsys) * images_of_it, count + images_of_it
        shutil.rmtree(data)
    assert right / count == pytest.approx(all_of_them, abs=1e-3)


@pytest.mark.parametrize('change', [['--eval', '--resume', 'CKPT'], ['--resume', 'CKPT', '--output-dir', 'new']])
def test_classes_that_a_checkpoint_lacks_are_an_error(flags, whole, renamed, tmp_path, monkeypatch, change):
    data = renamed(class_0='class_0', dog='class_1', class_2='class_2')
    monkeypatch.chdir(tmp_path)
    run = [*flags, '--data-path', data, *(whole / 'checkpoint_last.pth' if x == 'CKPT' else x for x in change)]
    with pytest.raises(errors.UsageError, match='classes that the training set, the checkpoint .* lacks: dog$'):
        nano.train(run)
    assert not Path('new').exists()
    nano.train([*flags, '--data-path', data, '--finetune', whole / 'checkpoint_last.pth', '--epochs', 1])


def test_other_classes_of_a_data_set_without_folders_are_an_error(flags, whole):
    run = [*flags, '--data-set', 'DIGITS', '--eval', '--resume', whole / 'checkpoint_last.pth']
    words = 'trained on other classes .class_0, .* than these data have .0, 1, 2'
    with pytest.raises(errors.UsageError, match=words):
        nano.train(run)


def test_one_class_is_refused_for_training(flags, images, tmp_path):
    for part in ('train', 'val'):
        (tmp_path / part).mkdir()
        (tmp_path / part / 'images').symlink_to(images / part)
    words = 'has one class, images, which contains the folders class_0, class_1, '
    with pytest.raises(errors.UsageError, match=words):
        nano.train([*flags, '--data-path', tmp_path])


def test_another_number_of_training_images_is_said(flags, whole, renamed, tmp_path, capsys):
    data = renamed(class_0='class_0', class_1='class_1', class_2='class_2')
    shutil.copytree(whole, tmp_path / 'run')
    run = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto', '--epochs', 4]
    (data / 'train' / 'class_1').unlink()
    nano.train([*run, '--data-path', data])
    assert '76 training images now, 100 before' in capsys.readouterr().out


# the schedule as it will be

@pytest.mark.parametrize('change, words', [
    (['--epochs', 2, '--warmup-epochs', 5], 'the warm-up of 5 epochs is as long as the training: the learning rate '
     'never reaches 0.003125. Use --warmup-epochs 0.'),
    (['--epochs', 3, '--cooldown-epochs', 2], '5 epochs, 2 of them cool-down'),
    (['--epochs', 3, '--min-lr', 0.01], 'the learning rate 0.003125 is below --min-lr 0.01, so it rises towards the '
     'end. Use --min-lr 3.1e-05.'),
    (['--epochs', 3, '--batch-size', 4096], 'learning rate 0.0195312 = 0.1 x 100 / 512 (global batch = 4096 x 2 '
     'accumulated x 1 processes; an epoch has only 100), cpu, float32'),
])
def test_a_schedule_that_surprises_is_said(flags, capsys, change, words):
    nano.train([*flags, *change])
    said = capsys.readouterr().out
    assert words in said and ('is as long as' in said) == (change[1] < 3)


# limits of the system

@pytest.mark.parametrize('hard, status', [(4096, 0), (0, 1)])
def test_too_few_open_files_are_one_line_and_cost_no_epoch(flags, images, tmp_path, hard, status):
    """The soft limit is raised. Without that, validation's processes are those too many."""
    limit = len(os.listdir('/proc/self/fd')) + 58  # eight training processes need 38
    output, run = tmp_path / 'out.txt', [
        *flags, '--epochs', 1, '--batch-size', 16, '--output-dir', tmp_path / 'run']  # each batch needs two
    nano.finish(nano.start([*run, '--num-workers', 8], output=output, before=lambda rank: resource.setrlimit(
        resource.RLIMIT_NOFILE, (limit, hard or limit))), status=status)
    assert 'Traceback' not in output.read_text()
    if status:
        assert f'train.py: error: too many open files, of {limit} allowed (ulimit -n)' in output.read_text()
        assert nano.read(tmp_path / 'run')['step'] == 3
        nano.train([*run, '--resume', 'auto'])
    assert [line['epoch'] for line in nano.log(tmp_path / 'run')] == [0]


@pytest.mark.parametrize('free, workers, words', [
    (0, 2, '/shm has 0 MB free, but loader processes need 0 MB: use fewer --num-workers .* --shm-size=1g'),
    (0, 0, None), (10 ** 9, 2, None)])
def test_little_shared_memory_is_said_before_training(flags, tmp_path, monkeypatch, free, workers, words):
    found = os.statvfs(tmp_path)
    monkeypatch.setattr(loader, 'SHARED_MEMORY', tmp_path / 'shm')
    (tmp_path / 'shm').mkdir()
    monkeypatch.setattr(os, 'statvfs', lambda path: types.SimpleNamespace(f_bavail=free // 4096, f_frsize=4096) if
                        path == tmp_path / 'shm' else found)
    run = [*flags, '--epochs', 1, '--num-workers', workers]
    if words is None:
        nano.train(run)
    else:
        with pytest.raises(errors.UsageError, match=words):
            nano.train(run)


@pytest.mark.parametrize('images, batch, workers, free, fits', [
    (600, 64, 4, 64, False), (600, 64, 2, 64, True), (36, 64, 4, 64, True), (10 ** 6, 256, 8, 1024, True),
    (10 ** 6, 256, 16, 1024, False)])
def test_shared_memory_is_for_two_batches_a_process_and_the_one_in_use(monkeypatch, images, batch, workers, free, fits):
    """Of 224 px. free: MiB, 64 in docker unless asked for more."""
    monkeypatch.setattr(os, 'statvfs', lambda path: types.SimpleNamespace(f_bavail=free * 256, f_frsize=4096))
    ready = train.images_in_shared_memory(options.parse_args(
        ['--batch-size', str(batch), '--num-workers', str(workers)]), images, 0)
    if fits:
        loader.check_shared_memory(ready, 224, workers)
    else:
        with pytest.raises(ValueError, match='free, but loader processes need'):
            loader.check_shared_memory(ready, 224, workers)


@pytest.mark.parametrize('closed_pipe', [False, True])  # torch may see either first
def test_a_loader_process_that_is_killed_is_one_line(flags, tmp_path, closed_pipe):
    output = tmp_path / 'out.txt'
    run = [*flags, '--num-workers', 2, '--output-dir', tmp_path / 'run', '--resume', 'auto']

    def kill():
        multiprocessing.active_children()[0].kill()
        if closed_pipe:
            raise ConnectionResetError(104, 'Connection reset by peer')

    nano.finish(nano.start(run, output=output, before=lambda rank: nano.at_step(pytest.MonkeyPatch(), 8, kill)),
                status=1)
    assert output.read_text().count('train.py: error: a loader process was killed') == 1
    assert 'Traceback' not in output.read_text()
    nano.train(run)
    assert [line['epoch'] for line in nano.log(tmp_path / 'run')] == [0, 1, 2]


# names of files

def test_names_of_any_bytes_and_lines_go_through_a_run(flags, images, tmp_path):
    folder, data = os.fsdecode(bytes(tmp_path) + b'/a\xff\nb'), os.fsdecode(bytes(tmp_path) + b'/d\xff\n\xe2\x80\xa8')
    shutil.copytree(images, data)
    bad = os.fsdecode(b'bad\xff\nname.png')
    Path(data, 'train', 'class_0', bad).write_text('no image')
    output, run = tmp_path / 'out.txt', [*flags, '--no-repeated-aug', '--data-path', data]
    nano.finish(nano.start([*run, '--output-dir', folder], output=output))
    log = output.read_text()
    assert r'/d\udcff\n\u2028/train/class_0/bad\udcff\nname.png (not an image)' in log and 'Logging error' not in log
    again = ['--config', f'{folder}/config.yaml', '--resume', 'auto', '--epochs', 4]
    nano.finish(nano.start(again, output=output))
    assert Path(folder, 'config.yaml').read_text().startswith('# train.py --config ')
    assert [line['epoch'] for line in nano.log(folder)] == [0, 1, 2, 3]

    Path(data, 'val', 'class_0', bad).write_text('no image')
    for workers in (0, 2):
        output.unlink()
        nano.finish(nano.start([*again, '--epochs', 5, '--num-workers', workers], output=output), status=1)
        error = re.search('^train.py: error: (.*)', output.read_text(), re.M)[1]
        assert r'/d\udcff\n\u2028/val/class_0/bad\udcff\nname.png (not an image)' in error


def test_a_run_that_goes_on_elsewhere_takes_its_best_checkpoint_along(flags, whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'a')
    run = [*flags, '--epochs', 4, '--lr', 1e-9, '--warmup-lr', 0, '--resume', tmp_path / 'a' / 'checkpoint_last.pth']
    nano.train([*run, '--output-dir', tmp_path / 'b'])
    best = nano.read(tmp_path / 'b')['best']
    assert nano.read(tmp_path / 'b', 'checkpoint_best.pth')['epoch'] == best['epoch']
    (tmp_path / 'a' / 'checkpoint_best.pth').unlink()
    nano.train([*run, '--output-dir', tmp_path / 'c'])
    best = nano.read(tmp_path / 'c')['best']
    assert best['epoch'] == 3 and nano.read(tmp_path / 'c', 'checkpoint_best.pth')['epoch'] == 3
    nano.train([*run, '--output-dir', tmp_path / 'd', '--epochs', 3])  # nothing left to do
    assert nano.same(nano.read(tmp_path / 'd')['model'], nano.read(whole)['model'])


@pytest.mark.parametrize('change', ['rewound', 'missing'])
def test_a_best_score_has_its_checkpoint(flags, tmp_path, change):
    run = [*flags, '--output-dir', tmp_path, '--keep-checkpoints', 9]
    nano.train(run)
    if change == 'missing':
        (tmp_path / 'checkpoint_best.pth').unlink()
        nano.train([*run, '--epochs', 4, '--resume', 'auto'])
    else:
        state = nano.read(tmp_path, 'checkpoint_0001.pth')
        torch.save({**state, 'best': {'acc1': 100., 'epoch': 7}}, tmp_path / 'checkpoint_0001.pth')
        nano.train([*run, '--resume', tmp_path / 'checkpoint_0001.pth'])
    best = nano.read(tmp_path)['best']
    assert nano.read(tmp_path, 'checkpoint_best.pth')['epoch'] == best['epoch']


def test_one_class_of_many_is_refused_for_training(flags, images, tmp_path):
    for part in ('train', 'val'):
        shutil.copytree(images / part / 'class_1', tmp_path / part / 'class_1')
    (tmp_path / 'map.txt').write_text('class_0\nclass_1\n')
    with pytest.raises(errors.UsageError, match='has one class, class_1'):
        nano.train([*flags, '--data-path', tmp_path, '--class-map', tmp_path / 'map.txt'])


def test_a_checkpoint_that_may_not_be_read_is_no_damaged_one(flags, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / 'run')
    before = (tmp_path / 'run' / 'checkpoint_last.pth').read_bytes()

    def load(path, *args, read=torch.load, **kwargs):
        if str(path).endswith('checkpoint_last.pth'):
            raise PermissionError(13, 'Permission denied', str(path))
        return read(path, *args, **kwargs)
    monkeypatch.setattr(torch, 'load', load)
    with pytest.raises(errors.UsageError, match='Permission denied'):
        nano.train([*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto'])
    assert (tmp_path / 'run' / 'checkpoint_last.pth').read_bytes() == before
