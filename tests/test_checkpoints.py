"""Checkpoint files: whole whatever happens, and safe to read."""
import argparse
import contextlib
import itertools
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal

import pytest
import torch

import nano
from checkpoints import LAST, PREVIOUS, atomic_write, newest_checkpoint, read_checkpoint


def state(epoch, size=20_000):
    return {'model': {'w': torch.full((size,), float(epoch))}, 'epoch': epoch}


def write(folder, *epochs):
    for epoch in epochs:
        with atomic_write(folder / LAST, keep_previous=True) as file:
            torch.save(state(epoch), file)


def epoch_of(loaded):
    assert (loaded['model']['w'] == loaded['epoch']).all() and len(loaded['model']['w']) == 20_000
    return loaded['epoch']


def in_a_fork(action):
    """Return the exit status of a process that calls `action`, 1 for an OSError."""
    process = os.fork()
    if not process:
        status = 3
        try:
            action()
            status = 0
        except (OSError, RuntimeError):  # On a full disk torch.save raises a RuntimeError.
            status = 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# writing

@pytest.mark.parametrize('has_links', [True, False])
def test_a_write_keeps_the_file_before_and_nothing_else(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, 'link', nano.full_disk)
    write(tmp_path, 1)
    assert os.listdir(tmp_path) == [LAST]
    write(tmp_path, 2)
    assert {name: epoch_of(read_checkpoint(tmp_path / name)) for name in os.listdir(tmp_path)} == {LAST: 2, PREVIOUS: 1}


def test_file_and_folder_are_on_disk_when_a_write_returns(tmp_path, monkeypatch):
    """A file that was renamed before it was synced may be empty after a power failure."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: calls.append(os.path.isdir(f'/proc/self/fd/{fd}')) or fsync(fd))
    monkeypatch.setattr(os, 'replace', lambda *paths: calls.append('rename') or replace(*paths))
    write(tmp_path, 1)
    assert calls == [False, 'rename', True]


@pytest.mark.parametrize('kill', [True, False], ids=['killed', 'full'])
def test_an_interrupted_write_leaves_a_whole_checkpoint(tmp_path, kill):
    """After any number of bytes, the process is killed or told that the disk is full."""
    def limited(count):
        def write_seven():
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (count, resource.RLIM_INFINITY))
            write(tmp_path, 7)
        return in_a_fork(write_seven)

    write(tmp_path, 5, 6)
    size = (tmp_path / LAST).stat().st_size
    rng = random.Random(0)
    for count in [0, 1, size - 1, *(rng.randrange(size) for _ in range(50))]:
        assert limited(count) == (-signal.SIGXFSZ if kill else 1)
        assert epoch_of(read_checkpoint(tmp_path / LAST)) == 6
        assert epoch_of(read_checkpoint(tmp_path / PREVIOUS)) in (5, 6)
        if not kill:
            assert sorted(os.listdir(tmp_path)) == [LAST, PREVIOUS]  # No half file fills the disk.
    assert limited(2 * size) == 0
    assert epoch_of(newest_checkpoint(tmp_path)[1]) == 7 and epoch_of(read_checkpoint(tmp_path / PREVIOUS)) == 6


@pytest.mark.parametrize('name', ['link', 'replace', 'fsync'])
def test_a_kill_between_any_two_steps_leaves_a_checkpoint(tmp_path, name):
    """Before each call of that function, and after the last."""
    def killed_at(folder, last):
        def write_seven():
            calls, call = [], getattr(os, name)

            def counted(*args, **kwargs):
                calls.append(1)
                if len(calls) == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            setattr(os, name, counted)
            write(folder, 7)
        return in_a_fork(write_seven)

    statuses = []
    for last in range(1, 6):
        folder = tmp_path / str(last)
        folder.mkdir()
        write(folder, 5, 6)
        statuses.append(killed_at(folder, last))
        assert epoch_of(newest_checkpoint(folder)[1]) in (6, 7)
    assert statuses[0] == -signal.SIGKILL and statuses[-1] == 0


@pytest.mark.soak
def test_a_kill_at_fifty_sizes_leaves_whole_files(tmp_path):
    """SIGKILL when the file that is being written has reached a random size."""
    def write_forever(folder):
        for epoch in itertools.count(1):
            for name in ('checkpoint_best.pth', LAST):
                with atomic_write(folder / name, keep_previous=name == LAST) as file:
                    torch.save(state(epoch, 4_000_000), file)

    rng, context = random.Random(0), multiprocessing.get_context('fork')
    for _ in range(50):
        folder = tmp_path / 'run'
        folder.mkdir()
        process = context.Process(target=write_forever, args=(folder,))
        process.start()
        nano.wait_for((folder / (PREVIOUS if rng.random() < 0.5 else LAST)).exists)
        size, pattern = rng.randint(0, 16_000_000), rng.choice((f'.{LAST}*', '.checkpoint_best*'))
        is_large = False
        while not is_large:
            with contextlib.suppress(FileNotFoundError):
                is_large = any(path.stat().st_size >= size for path in folder.glob(pattern))
        process.kill()
        process.join()
        for path in (newest_checkpoint(folder)[0], folder / 'checkpoint_best.pth'):
            loaded = read_checkpoint(path)
            assert loaded['model']['w'].eq(loaded['epoch']).all()
        shutil.rmtree(folder)


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
    with pytest.raises(ValueError, match=f'{last} .*damaged') as error:
        read_checkpoint(last)
    assert '\n' not in str(error.value)
    name, loaded = newest_checkpoint(tmp_path)
    assert name == str(tmp_path / PREVIOUS) and epoch_of(loaded) == 4
    assert len(caplog.records) == 1 and str(last) in caplog.text


def test_no_flipped_bit_goes_unnoticed(tmp_path, good):
    rng = random.Random(0)
    path = tmp_path / 'x.pth'
    for _ in range(90):
        path.write_bytes(flipped(good, rng.randrange(len(good))))
        try:
            loaded = read_checkpoint(path)
        except ValueError as error:
            assert '\n' not in str(error)
        else:  # The bit is in a field of the archive that nothing depends on.
            assert epoch_of(loaded) == 1


def test_folders_and_other_files_are_not_checkpoints(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / 'list.pth')
    for path in (tmp_path, tmp_path / 'none.pth', tmp_path / 'list.pth'):
        with pytest.raises(ValueError, match=str(path)):
            read_checkpoint(path)
    assert newest_checkpoint(tmp_path / 'nowhere') == (None, None)
    (tmp_path / LAST).write_text('x')
    with pytest.raises(ValueError, match=str(tmp_path)):
        newest_checkpoint(tmp_path)


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize('new_format', [True, False])
@pytest.mark.parametrize('raw', [True, False])
@pytest.mark.filterwarnings('ignore:Detected pickle protocol 4')
def test_a_file_that_would_run_code_runs_nothing(tmp_path, new_format, raw):
    path, trace = tmp_path / LAST, tmp_path / 'trace'
    evil = Evil(f'touch {trace}')
    if raw:
        path.write_bytes(pickle.dumps(evil, protocol=2 + 2 * new_format))
    else:
        torch.save({'model': {'w': torch.zeros(1)}, 'args': evil}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=str(path)) as error:
        read_checkpoint(path)
    assert '\n' not in str(error.value) and not trace.exists()
    if not raw or not new_format:
        assert 'posix.system' in str(error.value)


@pytest.mark.parametrize('new_format', [True, False])
def test_released_checkpoints_hold_a_namespace(tmp_path, new_format):
    content = {'model': {'w': torch.ones(2)}, 'args': argparse.Namespace(lr=0.1, model='cmt_s')}
    torch.save(content, tmp_path / 'released.pth', _use_new_zipfile_serialization=new_format)
    loaded = read_checkpoint(tmp_path / 'released.pth')
    assert loaded['args'].lr == 0.1 and loaded['model']['w'].tolist() == [1, 1]
