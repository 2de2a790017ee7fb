"""Loading batches: workers, signals, shared memory, unreadable images, files that hang."""
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import time
import types
from pathlib import Path

import pytest
import torch

import errors
import loader
import nano

# signals

def signal_group(process):
    """End a run and its workers from outside, as `timeout`, scancel and the end of a container do.

    A worker obeys the run alone, so it must look at the sender.
    """
    subprocess.run(['kill', '-s', 'TERM', '--', str(-os.getpgid(process))], start_new_session=True, check=True)


def test_a_signal_to_the_whole_group_spares_workers(flags, whole, tmp_path):
    def signal_all():
        workers = multiprocessing.active_children()
        signal_group(0)
        time.sleep(0.5)
        assert len(workers) == 4 and all(worker.is_alive() for worker in workers), workers

    run = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto', '--num-workers', 2]
    nano.finish(nano.start(run, output=tmp_path / 'out.txt', before=lambda rank: nano.at_step(8, signal_all)))
    assert nano.read(tmp_path / 'run')['step'] == 3
    nano.train(run)
    nano.assert_same_run(whole, tmp_path / 'run')


def in_a_new_worker(action):
    """Return a function for nano.start(before=): call `action` in each worker before it can handle signals."""
    def before(rank):
        run, set_num_threads = os.getpid(), torch.set_num_threads

        def hook(threads):
            if os.getppid() == run:
                action(run)
            set_num_threads(threads)  # torch calls this at the start of a worker.
        torch.set_num_threads = hook
    return before


def test_a_signal_while_workers_start_spares_them(flags, whole, tmp_path):
    """torch's workers would end by any SIGTERM until worker_init_fn is called."""
    def send(process):
        signal_group(process)
        time.sleep(1)

    run = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto', '--num-workers', 2]
    nano.finish(nano.start(run, output=tmp_path / 'out.txt', before=in_a_new_worker(send)))
    assert nano.read(tmp_path / 'run')['step'] == 1
    nano.train(run)
    nano.assert_same_run(whole, tmp_path / 'run')


def test_a_run_killed_while_workers_start_leaves_none_behind(flags, tmp_path):
    def kill(process):
        (tmp_path / f'{os.getpid()}.pid').touch()
        time.sleep(0.2)  # until the other worker is there
        os.kill(process, signal.SIGKILL)
        time.sleep(0.5)

    nano.finish(nano.start([*flags, '--num-workers', 2], before=in_a_new_worker(kill)), status=-signal.SIGKILL)
    def has_ended(worker):
        return not worker.exists() or 'State:\tZ' in (worker / 'status').read_text()  # Z: ended, not waited for

    workers = [Path('/proc') / path.stem for path in tmp_path.glob('*.pid')]
    assert workers
    nano.wait_for(lambda: all(map(has_ended, workers)), seconds=20)


@pytest.mark.parametrize('closed_pipe', [False, True])  # torch may see either first
def test_a_killed_worker_is_one_line(flags, tmp_path, closed_pipe):
    output = tmp_path / 'out.txt'
    run = [*flags, '--num-workers', 2, '--output-dir', tmp_path / 'run', '--resume', 'auto']

    def kill():
        multiprocessing.active_children()[0].kill()
        if closed_pipe:
            raise ConnectionResetError(104, 'Connection reset by peer')

    nano.finish(nano.start(run, output=output, before=lambda rank: nano.at_step(8, kill)), status=1)
    assert len(re.findall('^train.py: error: .*--num-workers', output.read_text(), re.M)) == 1
    assert 'Traceback' not in output.read_text()
    nano.train(run)
    assert nano.epochs(tmp_path / 'run') == [0, 1, 2]


# images

def test_an_unreadable_validation_image_is_named(flags, images, tmp_path):
    (tmp_path / 'train').symlink_to(images / 'train')
    (tmp_path / 'val' / 'class_1').mkdir(parents=True)
    (tmp_path / 'val' / 'class_1' / 'bad.png').write_bytes(b'no image')
    run = [*flags, '--data-path', tmp_path, '--output-dir', tmp_path / 'run', '--resume', 'auto', '--epochs', 1]
    for workers, more, status in ((0, [], 1), (2, [], 1), (2, ['--eval'], 2)):
        output = tmp_path / f'{workers}{status}.txt'
        nano.finish(nano.start([*run, '--num-workers', workers, *more], output=output), status=status)
        text = output.read_text()
        assert re.search(r'^train\.py: error: .*val/class_1/bad\.png', text, re.M) and 'Traceback' not in text
        if not more:  # The epoch is trained once.
            assert nano.read(tmp_path / 'run')['step'] == 6
            assert ('resuming at epoch 0, step 6' in text) == (workers == 2)


def test_a_hung_file_system_ends_the_run_in_bounded_time(flags, images, tmp_path):
    """After --dist-timeout; the worker does not keep the run alive."""
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
        for name in ('class_0', 'class_1'):
            (tmp_path / split / name).symlink_to(images / split / name)
    (tmp_path / 'train' / 'class_2').mkdir()
    for i in range(40):
        os.mkfifo(tmp_path / 'train' / 'class_2' / f'{i}.png')  # Nobody writes to it, so reading it hangs.
    began = time.monotonic()
    run = [*flags, '--num-workers', '1', '--dist-timeout', '2', '--data-path', tmp_path]
    nano.finish(nano.start(run, output=tmp_path / 'out.txt'), status=1, timeout=60)
    assert time.monotonic() - began < 50
    assert re.search('^train.py: error: .*--data-path', (tmp_path / 'out.txt').read_text(), re.M)


@pytest.mark.parametrize('pause, workers', [(0.02, 0), (0.02, 1), (0., 1)])
def test_a_run_that_waits_for_data_says_so(flags, monkeypatch, capsys, pause, workers):
    monkeypatch.setattr(Path, 'read_bytes', lambda path, read=Path.read_bytes: time.sleep(pause) or read(path))
    with nano.on_forward(lambda model, _: time.sleep(0 if pause else 0.05)):
        nano.train([*flags, '--epochs', 1, '--num-workers', workers, '--no-repeated-aug'])
    assert ('--num-workers' in capsys.readouterr().out) == (pause > 0)


# limits of the system

@pytest.mark.parametrize('hard, status', [(4096, 0), (0, 1)])
def test_too_few_open_files_are_one_line_and_cost_no_epoch(flags, images, tmp_path, hard, status):
    """The soft limit is raised. Otherwise the workers of the validation are too many."""
    limit = len(os.listdir('/proc/self/fd')) + 58  # Eight training workers need 38, a batch two.
    output, run = tmp_path / 'out.txt', [*flags, '--epochs', 1, '--batch-size', 16, '--output-dir', tmp_path / 'run']
    nano.finish(nano.start([*run, '--num-workers', 8], output=output, before=lambda rank: resource.setrlimit(
        resource.RLIMIT_NOFILE, (limit, hard or limit))), status=status)
    assert 'Traceback' not in output.read_text()
    if status:
        assert re.search(f'^train.py: error: .*{limit}.*ulimit -n', output.read_text(), re.M)
        assert nano.read(tmp_path / 'run')['step'] == 3
        nano.train([*run, '--resume', 'auto'])
    assert nano.epochs(tmp_path / 'run') == [0]


@pytest.mark.parametrize('batch, workers, free, fits', [
    (8, 2, 29, False), (8, 2, 30, True),  # Two batches per worker and the one in use: 5 x 8 images of 3 KiB.
    (64, 2, 74, False), (64, 2, 75, True),  # The training set has only 100.
    (8, 0, 0, True)])
def test_shared_memory_holds_the_batches_of_all_workers(flags, tmp_path, monkeypatch, batch, workers, free, fits):
    """Of 32 px; `free` is in blocks of 4 KiB."""
    monkeypatch.setattr(loader, 'SHARED_MEMORY', tmp_path)  # macOS has no folder for it

    def statvfs(path, statvfs=os.statvfs):
        is_shm = path == tmp_path
        return types.SimpleNamespace(f_bavail=free, f_frsize=4096) if is_shm else statvfs(path)

    monkeypatch.setattr(os, 'statvfs', statvfs)
    run = [*flags, '--batch-size', batch, '--num-workers', workers]
    with nano.at_step(0, nano.die), pytest.raises(
            nano.Killed if fits else errors.UsageError, match=None if fits else '--num-workers.*--shm-size'):
        nano.train(run)
