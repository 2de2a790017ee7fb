"""Files of a run: whole whatever happens, and safe to read."""
import argparse
import builtins
import logging
import os
import pickle
import random
import resource
import signal
from pathlib import Path

import pytest
import torch

import checkpoints
from checkpoints import LAST, PREVIOUS, RunWriter, newest_checkpoint, read_checkpoint
from weights import find_checkpoint


def state(number, size=20_000):
    return {'model': {'w': torch.full((size,), float(number))}, 'epoch': number}


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != '.lock')


def write(folder, *numbers, copies=(), **kwargs):
    writer = RunWriter(folder, **kwargs)
    for number in numbers:
        writer.save(state(number), copies)
        writer.wait()
    assert writer.error is None
    return writer


def number(loaded):
    assert (loaded['model']['w'] == loaded['epoch']).all() and len(loaded['model']['w']) == 20_000
    return loaded['epoch']


# writing

@pytest.mark.parametrize('links', [True, False], ids=['links', 'no links'])
def test_a_write_keeps_the_one_before_and_leaves_nothing_else(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, 'link', lambda *_: (_ for _ in ()).throw(PermissionError('no links')))
    write(tmp_path, 1)
    assert names(tmp_path) == [LAST]
    write(tmp_path, 2, copies=('checkpoint_best.pth',))
    assert {name: number(read_checkpoint(tmp_path / name)) for name in names(tmp_path)} == {
        LAST: 2, PREVIOUS: 1, 'checkpoint_best.pth': 2}


def test_what_is_written_is_what_was_when_it_was_saved(tmp_path, monkeypatch):
    """Training goes on meanwhile."""
    import threading
    go, save = threading.Event(), torch.save
    monkeypatch.setattr(torch, 'save', lambda *args: (go.wait(20), save(*args)))
    tensors = state(1)
    writer = RunWriter(tmp_path)
    writer.save(tensors)
    tensors['model']['w'] += 5
    assert not (tmp_path / LAST).exists()  # save() does not wait for the disk
    go.set()
    writer.wait()
    assert number(read_checkpoint(tmp_path / LAST)) == 1


def test_files_and_folder_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: calls.append(('sync', os.path.isdir(f'/proc/self/fd/{fd}'))) or
                        fsync(fd))
    monkeypatch.setattr(os, 'replace', lambda a, b: calls.append(('to', os.path.basename(b))) or replace(a, b))
    write(tmp_path, 1)
    assert calls == [('sync', False), ('to', LAST), ('sync', True)]


def limited(folder, count, kill):
    """In a process that can write no more than `count` bytes to a file: killed there, or told that the disk is full."""
    process = os.fork()
    if not process:
        status = 3
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (count, resource.RLIM_INFINITY))
            writer = RunWriter(folder)
            writer.save(state(7))
            writer.wait()
            status = 0 if writer.error is None else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize('kill', [True, False], ids=['killed', 'full'])
def test_a_write_that_breaks_off_anywhere_leaves_a_whole_checkpoint(tmp_path, kill):
    write(tmp_path, 5, 6)
    size = (tmp_path / LAST).stat().st_size
    rng = random.Random(0)
    for count in [0, 1, size - 1, *(rng.randrange(size) for _ in range(50))]:
        assert limited(tmp_path, count, kill) == (-signal.SIGXFSZ if kill else 1)
        assert number(read_checkpoint(tmp_path / LAST)) == 6
        assert number(read_checkpoint(tmp_path / PREVIOUS)) in (5, 6)
        if not kill:
            assert names(tmp_path) == [LAST, PREVIOUS]  # no half file fills the disk
    assert limited(tmp_path, 2 * size, kill) == 0
    assert number(newest_checkpoint(tmp_path)[1]) == 7 and number(read_checkpoint(tmp_path / PREVIOUS)) == 6


@pytest.mark.parametrize('step', ['link', 'replace', 'fsync'])
def test_a_kill_between_any_two_steps_leaves_a_whole_checkpoint(tmp_path, monkeypatch, step):
    """Each call of the system's is once the last one that is made."""
    for last_call in range(1, 6):
        folder = tmp_path / str(last_call)
        folder.mkdir()
        write(folder, 5, 6)
        process = os.fork()
        if not process:
            calls, call = [], getattr(os, step)

            def counted(*args, calls=calls, call=call, last_call=last_call, **kwargs):
                calls.append(1)
                if len(calls) == last_call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            setattr(os, step, counted)
            writer = RunWriter(folder)
            writer.save(state(7))
            writer.wait()
            os._exit(0)
        os.waitpid(process, 0)
        assert number(newest_checkpoint(folder)[1]) in (6, 7)


def test_after_a_full_disk_nothing_more_is_written(tmp_path, monkeypatch):
    write(tmp_path, 1)
    writer = RunWriter(tmp_path)
    with monkeypatch.context() as patch:
        opened = builtins.open

        def full(file, mode='r', *args, **kwargs):
            if 'w' in mode:
                raise OSError(28, 'No space left on device')
            return opened(file, mode, *args, **kwargs)

        patch.setattr(builtins, 'open', full)
        writer.save(state(2))
        writer.wait()
    assert writer.error.errno == 28
    writer.save(state(3))
    writer.log({'epoch': 3})
    writer.wait()
    assert number(read_checkpoint(tmp_path / LAST)) == 1 and not (tmp_path / 'log.txt').exists()


def test_a_tracker_that_fails_ends_alone(tmp_path, caplog):
    writer, seen = checkpoints.RunWriter(tmp_path), []
    writer.trackers = [lambda record: 1 / 0, seen.append]
    writer.log({'epoch': 0})
    writer.log({'epoch': 1})
    assert seen == [{'epoch': 0}, {'epoch': 1}] and caplog.text.count('division by zero') == 1
    assert len((tmp_path / 'log.txt').read_text().splitlines()) == 2


@pytest.mark.parametrize('best', [
    {}, {'acc1': 50., 'epoch': 3}, {'acc1': 50., 'epoch': 3, 'ema_acc1': 60., 'ema_epoch': 2}])
def test_the_best_checkpoints_follow_a_run_that_goes_on_elsewhere(tmp_path, best, caplog):
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
    torch.save({'epoch': 3}, tmp_path / 'a' / 'checkpoint_best.pth')
    torch.save({'epoch': 5}, tmp_path / 'a' / 'checkpoint_ema_best.pth')  # of epochs that are trained again
    kept = checkpoints.copy_best(tmp_path / 'a' / 'checkpoint_last.pth', tmp_path / 'b', best)
    assert kept == {key: value for key, value in best.items() if not key.startswith('ema_')}
    assert [path.name for path in (tmp_path / 'b').iterdir()] == ['checkpoint_best.pth'] * bool(best)
    assert ('checkpoint_ema_best.pth of epoch 2 is not in' in caplog.text) == ('ema_epoch' in best)


def test_a_run_that_cannot_be_removed_whole_stays_whole(tmp_path, monkeypatch):
    for name in ('checkpoint_last.pth', 'checkpoint_best.pth', 'log.txt', 'wandb_id.txt'):
        (tmp_path / name).write_text(name)
    rename = Path.rename

    def refused(path, target):
        if path.name == 'log.txt':
            raise PermissionError(1, 'Operation not permitted', str(path))
        return rename(path, target)
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'rename', refused)
        with pytest.raises(PermissionError):
            checkpoints.remove_run(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        name: name for name in ('checkpoint_last.pth', 'checkpoint_best.pth', 'log.txt', 'wandb_id.txt')}
    checkpoints.remove_run(tmp_path)
    assert not list(tmp_path.iterdir())


def test_kept_epochs_are_the_last(tmp_path):
    writer = RunWriter(tmp_path, keep=2)
    for epoch in range(4):
        writer.save(state(epoch), (f'checkpoint_{epoch:04d}.pth',))
    writer.wait()
    assert names(tmp_path) == [
        'checkpoint_0002.pth', 'checkpoint_0003.pth', LAST, PREVIOUS]


def test_copies_are_there_before_the_last_checkpoint(tmp_path, monkeypatch):
    """A run that goes on from checkpoint_last.pth writes those of its epoch no more."""
    write(tmp_path, 1)
    replace = os.replace

    def killed(source, target):
        if target.name == LAST:
            raise OSError('killed')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', killed)
    writer = RunWriter(tmp_path)
    writer.save(state(2), ('checkpoint_best.pth',))
    writer.wait()
    assert number(read_checkpoint(tmp_path / LAST)) == 1
    assert number(read_checkpoint(tmp_path / 'checkpoint_best.pth')) == 2


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    writer = RunWriter(tmp_path)
    for expected in (2, 0):
        process = os.fork()
        if not process:
            try:
                RunWriter(tmp_path)
            except ValueError as error:
                os._exit(2 if f'another run is writing to {tmp_path}: end it first' in str(error) else 3)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == expected
        writer.lock.close()


def test_epochs_to_come_are_dropped(tmp_path):
    path = tmp_path / 'log.txt'
    path.write_text('{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n{"epo')
    for epoch in range(4):
        (tmp_path / f'checkpoint_{epoch:04d}.pth').touch()
    checkpoints.rewind(tmp_path, 2)
    assert path.read_text() == '{"epoch": 0}\n{"epoch": 1}\n'
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['checkpoint_0000.pth', 'checkpoint_0001.pth']


# reading

@pytest.fixture(scope='module')
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp('good')
    write(folder, 1)
    return (folder / LAST).read_bytes()


def flipped(data, position):
    data = bytearray(data)
    data[position] ^= 1
    return bytes(data)


@pytest.mark.parametrize('damage', [
    lambda data: data[:-1], lambda data: data[:len(data) // 2], lambda data: data[:10], lambda data: b'',
    lambda data: b'not a checkpoint\n' * 10, lambda data: bytes(len(data)),
    lambda data: flipped(data, len(data) // 2),
], ids=['end', 'half', 'start', 'empty', 'text', 'zeros', 'bit'])
def test_a_damaged_file_is_named_and_the_one_before_used(tmp_path, good, caplog, damage):
    write(tmp_path, 4, 5)
    last = tmp_path / LAST
    last.write_bytes(damage(good))
    with pytest.raises(ValueError, match=f'^{last} is .*damaged') as error:
        read_checkpoint(last)
    assert '\n' not in str(error.value)
    for resume in ('auto', str(last)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            name, found = find_checkpoint(resume, tmp_path, fall_back=True)
        assert name == str(tmp_path / PREVIOUS) and number(found) == 4
        assert len(caplog.records) == 1 and str(last) in caplog.text
    with pytest.raises(ValueError, match='damaged'):
        find_checkpoint(str(last), tmp_path, fall_back=False)  # who evaluates a file wants that one


@pytest.mark.parametrize('seed', range(3))
def test_no_flipped_bit_goes_unnoticed(tmp_path, good, seed):
    rng = random.Random(seed)
    path = tmp_path / 'x.pth'
    for _ in range(30):
        path.write_bytes(flipped(good, rng.randrange(len(good))))
        try:
            loaded = read_checkpoint(path)
        except ValueError as error:
            assert '\n' not in str(error)  # noqa: PT017
        else:  # in a field of the archive that nothing depends on
            assert number(loaded) == 1


def test_folders_and_other_things_are_no_checkpoints(tmp_path):
    for path in (tmp_path, tmp_path / 'none.pth'):
        with pytest.raises(ValueError, match='no checkpoint at'):
            read_checkpoint(path)
    torch.save([torch.zeros(1)], tmp_path / 'list.pth')
    with pytest.raises(ValueError, match='holds a list, not a checkpoint'):
        read_checkpoint(tmp_path / 'list.pth')
    assert newest_checkpoint(tmp_path / 'nowhere') == (None, None)
    (tmp_path / LAST).write_text('x')
    with pytest.raises(ValueError, match='no good checkpoint in'):
        newest_checkpoint(tmp_path)


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize('new_format', [True, False])
@pytest.mark.parametrize('raw', [True, False])
def test_a_file_that_would_run_code_runs_nothing(tmp_path, new_format, raw):
    path, trace = tmp_path / LAST, tmp_path / 'trace'
    content = {'model': {'w': torch.zeros(1)}, 'args': Evil(f'touch {trace}')}
    if raw:
        path.write_bytes(pickle.dumps(Evil(f'touch {trace}'), protocol=2 + 2 * new_format))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError) as error:
        read_checkpoint(path)
    assert '\n' not in str(error.value) and str(path) in str(error.value)
    if not raw or not new_format:
        assert 'posix.system' in str(error.value)
    assert not trace.exists()


def test_released_checkpoints_hold_a_namespace(tmp_path):
    content = {'model': {'w': torch.ones(2)}, 'args': argparse.Namespace(lr=0.1, model='cmt_s')}
    for new_format in (True, False):
        torch.save(content, tmp_path / 'released.pth', _use_new_zipfile_serialization=new_format)
        loaded = read_checkpoint(tmp_path / 'released.pth')
        assert loaded['args'].lr == 0.1 and loaded['model']['w'].tolist() == [1, 1]


# the folder

def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    checkpoints.check_output_dir(tmp_path / 'new' / 'deep', False)
    assert not (tmp_path / 'new').exists()
    (tmp_path / 'notes.txt').touch()
    checkpoints.check_output_dir(tmp_path, False)
    for name in (LAST, 'checkpoint_best.pth', 'log.txt'):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match='--resume auto resumes it, --overwrite replaces it'):
            checkpoints.check_output_dir(tmp_path, False)
        checkpoints.check_output_dir(tmp_path, True)
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match='no folder that can be written to'):
        checkpoints.check_output_dir(tmp_path / 'notes.txt', False)
