"""A run that was stopped or killed, and then resumed, is bit-identical to an uninterrupted one."""
import itertools
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import nano


def stop_at(step, number=signal.SIGTERM, rank=0):
    """Return a function for nano.start(before=): `rank` sends itself the signal in that step."""
    return lambda this: nano.at_step(step, lambda: this == rank and signal.raise_signal(number))


@pytest.mark.parametrize('workers', [0, 2])
def test_the_same_command_gives_the_same_bits(flags, whole, tmp_path, workers):
    nano.train([*flags, '--output-dir', tmp_path / 'run', '--num-workers', workers])
    nano.assert_same_run(whole, tmp_path / 'run')
    nano.train([*flags, '--output-dir', tmp_path / 'other', '--seed', 1, '--epochs', 1])
    assert nano.log(tmp_path / 'other')[0]['train_loss'] != nano.log(whole)[0]['train_loss']


@pytest.mark.parametrize('damage, resume', [(0, 'auto'), (1000, 'auto'), (1000, 'checkpoint_last.pth')])
def test_resume_from_the_end_of_an_epoch(flags, whole, tmp_path, capsys, damage, resume):
    """If the newest file is damaged, from the end of the epoch before."""
    run, path = [*flags, '--output-dir', tmp_path / 'run'], tmp_path / 'run' / 'checkpoint_last.pth'
    with nano.at_step(13, nano.die), pytest.raises(nano.Killed):
        nano.train(run)
    with open(tmp_path / 'run' / 'log.txt', 'a') as file:
        file.write('{"epoch": 2, "train_l')  # A kill while the line is written leaves this.
    assert nano.read(tmp_path / 'run')['epoch'] == 1
    path.write_bytes(path.read_bytes()[:path.stat().st_size - damage])
    capsys.readouterr()
    nano.train([*run, '--resume', resume if resume == 'auto' else path])
    assert bool(re.search(rf'{path} .*damaged', capsys.readouterr().out)) == bool(damage)
    nano.assert_same_run(whole, tmp_path / 'run')


def test_resume_in_mid_epoch(flags, whole, tmp_path, monkeypatch):
    """From a file that is written while training continues."""
    run = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto', '--save-every-steps', 2]
    steps, overtaken = [], []

    def save_late(*args, save=torch.save):
        step, deadline = len(steps), time.monotonic() + 5
        while step % 6 and step == len(steps) and time.monotonic() < deadline:  # No step follows an epoch's last one.
            time.sleep(0.01)
        overtaken.append(step % 6 == 0 or step < len(steps))
        save(*args)

    monkeypatch.setattr(torch, 'save', save_late)
    with register_optimizer_step_pre_hook(lambda *_: steps.append(1)), nano.at_step(11, nano.die), \
            pytest.raises(nano.Killed):
        nano.train(run)
    monkeypatch.undo()
    assert all(overtaken)
    saved = nano.read(tmp_path / 'run')
    assert (saved['epoch'], saved['step'], saved['samples_seen']) == (1, 4, 64)
    nano.train(run)
    nano.assert_same_run(whole, tmp_path / 'run')


def test_resume_of_a_finished_run_changes_nothing(flags, tmp_path):
    run = [*flags, '--output-dir', tmp_path, '--resume', 'auto', '--epochs', 1]
    nano.train(run)
    before = [(tmp_path / name).read_bytes() for name in ('checkpoint_last.pth', 'log.txt')]
    nano.train(run)
    assert before == [(tmp_path / name).read_bytes() for name in ('checkpoint_last.pth', 'log.txt')]


def test_another_number_of_training_images_is_logged(flags, whole, renamed, tmp_path, capsys):
    data = renamed(class_0='class_0', class_1='class_1', class_2='class_2')
    (data / 'train' / 'class_1').unlink()
    shutil.copytree(whole, tmp_path / 'run')
    with nano.at_step(0, nano.die), pytest.raises(nano.Killed):
        nano.train([*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto', '--epochs', 4, '--data-path', data])
    assert re.search(r'\b76 images.*\b100\b', capsys.readouterr().out)


@pytest.mark.parametrize('opt', ['lookahead_adamw', 'adafactor'])
def test_optimizers_resume_where_they_stood(flags, tmp_path, opt):
    """Some of timm's keep counts among their settings, or moments of other shapes than the weights."""
    run = [*flags, '--epochs', 1, '--accum-steps', 1, '--opt', opt, '--no-model-ema', '--save-every-steps', 8]
    nano.train([*run, '--output-dir', tmp_path / 'whole'])
    batches = itertools.count()
    with nano.on_forward(lambda *_: next(batches) == 10 and nano.die()), pytest.raises(nano.Killed):
        nano.train([*run, '--output-dir', tmp_path / 'run'])
    assert nano.read(tmp_path / 'run')['step'] == 8
    nano.train([*run, '--output-dir', tmp_path / 'run', '--resume', 'auto'])
    nano.assert_same_run(tmp_path / 'whole', tmp_path / 'run')


# kills

def test_kill_9_at_any_moment(flags, whole, tmp_path):
    run, rng = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto', '--save-every-steps', 1], random.Random(0)
    for _ in range(3):
        process, = nano.start(run)
        time.sleep(rng.uniform(0.3, 2))
        process.kill()
        process.join()
    nano.finish(nano.start(run))
    nano.assert_same_run(whole, tmp_path / 'run')


@pytest.mark.parametrize('name', ['checkpoint_best.pth', 'checkpoint_last.pth'])
def test_a_kill_between_best_and_last_repeats_the_epoch(flags, whole, tmp_path, name):
    """Kill at the last write of checkpoint_best.pth, or at the first of checkpoint_last.pth."""
    scores = [-1, *(line['test_acc1'] for line in nano.log(whole))]
    count = sum(score > max(scores[:i]) for i, score in enumerate(scores) if i) if 'best' in name else 1

    def kill_at_last(rank, replace=os.replace):
        writes = itertools.count(1)

        def patched(source, target):
            if Path(target).name == name and next(writes) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
        os.replace = patched

    run = [*flags, '--output-dir', tmp_path, '--resume', 'auto']
    nano.finish(nano.start(run, before=kill_at_last), status=-signal.SIGKILL)
    nano.train(run)
    nano.assert_same_run(whole, tmp_path)
    for best in ('checkpoint_best.pth', 'checkpoint_ema_best.pth'):
        assert nano.same(*(nano.read(folder, best)['model'] for folder in (whole, tmp_path)))


# signals

@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops_within_a_step(flags, whole, tmp_path, number, status):
    run = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto']
    nano.finish(nano.start(run, before=stop_at(8, number)), status)
    saved = nano.read(tmp_path / 'run')
    assert (saved['epoch'], saved['step']) == (1, 3)
    nano.train(run)
    nano.assert_same_run(whole, tmp_path / 'run')


def test_job_scripts_see_whether_a_stopped_run_has_epochs_left(flags, tmp_path):
    """The exit status under --resume auto is 0 for both."""
    stopped = tmp_path / 'stopped'
    run = [*flags, '--epochs', 1, '--output-dir', tmp_path / 'run', '--resume', 'auto', '--stopped-file', stopped]
    nano.finish(nano.start(run, before=stop_at(2, signal.SIGUSR1)))
    assert stopped.exists()
    nano.finish(nano.start(run, before=lambda rank: nano.on_log(lambda: signal.raise_signal(signal.SIGUSR1))))
    assert nano.epochs(tmp_path / 'run') == [0] and not stopped.exists()
    assert '\nstopped-file' not in (tmp_path / 'run' / 'config.yaml').read_text()


def test_only_a_run_that_was_saved_is_said_to_resume(flags, tmp_path):
    for argv, saves in (([], False), (['--output-dir', tmp_path / 'run'], True)):
        output = tmp_path / f'{saves}.txt'
        nano.finish(nano.start([*flags, *argv], before=stop_at(3), output=output), 128 + signal.SIGTERM)
        line, = re.findall('.*stopped .*', output.read_text())
        assert ('--resume auto' in line) == saves and ('nothing was saved' in line) != saves


def test_a_signal_to_one_of_two_ranks_stops_both(flags, pair, tmp_path):
    run = [*flags, '--epochs', 2, '--resume', 'auto', '--output-dir', tmp_path / 'run']
    nano.finish(nano.start(run, ranks=2, before=stop_at(4, rank=1)))
    saved = nano.read(tmp_path / 'run')
    assert (saved['epoch'], saved['step'], saved['samples_seen']) == (1, 2, 64)
    nano.finish(nano.start(run, ranks=2))
    nano.assert_same_run(pair, tmp_path / 'run')


def test_elastic_restart_sees_each_sample_once(flags, tmp_path, monkeypatch):
    """One rank after two, in mid-epoch: the rest of the same order."""
    run = [*flags, '--no-repeated-aug', '--epochs', 1, '--output-dir', tmp_path / 'run', '--resume', 'auto']
    seen = tmp_path / 'seen.txt'

    def read_bytes(path, read=Path.read_bytes):
        if 'train' in path.parts:
            with open(seen, 'a') as file:
                file.write(f'{path}\n')
        return read(path)

    monkeypatch.setattr(Path, 'read_bytes', read_bytes)
    nano.finish(nano.start(run, ranks=2, before=stop_at(1, rank=1)))
    saved = nano.read(tmp_path / 'run')
    assert (saved['world_size'], saved['step'], saved['samples_seen']) == (2, 2, 64)
    output = tmp_path / 'out.txt'
    nano.finish(nano.start(run, output=output))
    order = seen.read_text().split()
    assert len(order) == len(set(order)) == 96 and nano.epochs(tmp_path / 'run') == [0]
    assert '0.003125 = 0.1 x 16 / 512' in output.read_text()
