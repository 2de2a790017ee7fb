"""Checkpoint files: whole whatever happens, and safe to read."""
import builtins
import functools
import http.server
import itertools
import os
import pickle
import random
import re
import resource
import signal
import threading

import pytest
import torch

import nano
from checkpoints import BEST, LAST, PREVIOUS, epoch_files, newest_checkpoint, read_checkpoint
from errors import UsageError
from run import RunWriter
from system import atomic_write


def state(epoch, size=20_000):
    return {'model': {'w': torch.full((size,), float(epoch))}, 'epoch': epoch}


def write(folder, *epochs):
    for epoch in epochs:
        with atomic_write(folder / LAST, folder / PREVIOUS) as file:
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


def save(folder, epoch, kill_before=0, keep=0):
    """Save an epoch as a run does; before the given one of the calls that change the folder, kill the process."""
    calls = itertools.count(1)

    def counted(call):
        return lambda *args, **kwargs: (
            os.kill(os.getpid(), signal.SIGKILL) if next(calls) == kill_before else call(*args, **kwargs))

    if kill_before:
        for owner, name in ((builtins, 'open'), (os, 'fsync'), (os, 'unlink'), (os, 'link'), (os, 'replace')):
            setattr(owner, name, counted(getattr(owner, name)))
    writer = RunWriter(folder, keep)
    writer.save({**state(epoch), 'model_ema': state(epoch)['model']}, {'acc1': 1., 'ema_acc1': 2.})
    writer.wait()
    assert writer.error is None


def temporary_files(folder):
    return [path for path in folder.iterdir() if path.name.endswith('.tmp')]


@pytest.mark.parametrize('has_links, keep', [(True, 0), (True, 2), (False, 0)])
def test_a_kill_between_any_two_steps_leaves_a_checkpoint(tmp_path, monkeypatch, has_links, keep):
    if not has_links:
        monkeypatch.setattr(os, 'link', nano.full_disk)
    statuses = []
    while 0 not in statuses:
        folder = tmp_path / f'{len(statuses)}'
        folder.mkdir()
        for epoch in (4, 5, 6):
            save(folder, epoch, keep=keep)
        statuses.append(in_a_fork(functools.partial(save, folder, 7, len(statuses) + 1, keep)))
        assert epoch_of(newest_checkpoint(folder)[1]) in (6, 7)
        assert (read_checkpoint(folder / LAST) if has_links else True) and len(temporary_files(folder)) <= 1
        for name in BEST:
            assert epoch_of(read_checkpoint(folder / name)) in (6, 7)
        save(folder, 8, keep=keep)
        assert not temporary_files(folder)
    assert set(statuses) == {-signal.SIGKILL, 0} and len(statuses) > 15
    assert [path.name for path in epoch_files(folder)] == ['checkpoint_0007.pth', 'checkpoint_0008.pth'][:keep]


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


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve tmp_path/www over HTTP, and return the address; a file named cut-* ends after half of its bytes."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, outputfile):
            content = source.read()
            outputfile.write(content[:len(content) // 2] if 'cut' in self.path else content)

        def log_message(self, *args):
            asked.append(self.path)

    asked = []
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    for folder in ('a', 'b'):
        (tmp_path / 'www' / folder).mkdir(parents=True)
        torch.save(state('ab'.index(folder)), tmp_path / 'www' / folder / 'best.pth')
    handler = functools.partial(Handler, directory=tmp_path / 'www')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{serving.server_port}', asked
        serving.shutdown()


def test_each_address_is_downloaded_once(server, caplog, tmp_path):
    """Also if two of them end in the same name; a file replaced on the server is named as an older download."""
    address, asked = server
    for _ in range(2):
        assert [epoch_of(read_checkpoint(f'{address}/{folder}/best.pth')) for folder in 'ab'] == [0, 1]
    assert epoch_of(read_checkpoint(f'{address}/a/best.pth?version=2')) == 0
    assert asked == ['/a/best.pth', '/b/best.pth', '/a/best.pth?version=2']
    torch.save(state(7), tmp_path / 'www/a/best.pth')
    caplog.clear()
    caplog.set_level('INFO')
    assert epoch_of(read_checkpoint(f'{address}/a/best.pth')) == 0
    cached, = re.findall(r'/\S*cache/\S+', caplog.text)
    os.remove(cached)
    assert epoch_of(read_checkpoint(f'{address}/a/best.pth')) == 7


def test_a_cut_download_is_named_and_repeated(server, tmp_path):
    address, asked = server
    (tmp_path / 'www/cut').mkdir()
    torch.save(state(3), tmp_path / 'www/cut/best.pth')
    (tmp_path / 'www/cut/page.pth').write_text('<html>Please log in</html>')
    for name in ('best.pth', 'page.pth', 'best.pth'):
        with pytest.raises(UsageError, match=f'{address}/cut/{name}'):
            read_checkpoint(f'{address}/cut/{name}')
        assert not [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()]
    assert len(asked) == 3


def test_addresses_without_a_file_are_one_line(server, tmp_path):
    for address in (f'{server[0]}/none.pth', 'http://127.0.0.1:1/best.pth'):
        with pytest.raises(UsageError, match='could not be downloaded'):
            read_checkpoint(address)
    assert not [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()]
