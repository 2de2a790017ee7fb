"""Checkpoint files: whole whatever happens, and safe to read."""
import argparse
import builtins
import contextlib
import functools
import http.server
import itertools
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import threading

import pytest
import torch

import nano
import train
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
    assert set(statuses) == {-signal.SIGKILL, 0} and len(statuses) > 15
    assert [path.name for path in epoch_files(folder)] == ['checkpoint_0006.pth', 'checkpoint_0007.pth'][:keep]


def test_twenty_kills_leave_at_most_one_temporary_file(tmp_path):
    rng, left = random.Random(0), 0
    for epoch in range(20):
        assert in_a_fork(functools.partial(save, tmp_path, epoch, rng.randint(3, 14), keep=2)) == -signal.SIGKILL
        left += len(temporary_files(tmp_path))
        assert len(temporary_files(tmp_path)) <= 1
    assert left > 5
    save(tmp_path, 20)
    assert not temporary_files(tmp_path)


def test_links_in_a_folder_are_not_followed(tmp_path):
    """A run folder from elsewhere may hold links under any name that a run writes."""
    folder, mine = tmp_path / 'run', tmp_path / 'mine'
    folder.mkdir()
    mine.write_text('mine')
    names = [LAST, PREVIOUS, *BEST, 'checkpoint_0001.pth', 'config.yaml', 'log.txt']
    for name in [*names, *(f'.{name}.tmp' for name in names)]:
        (folder / name).symlink_to(mine)
    save(folder, 1)
    save(folder, 2)
    assert mine.read_text() == 'mine' and epoch_of(newest_checkpoint(folder)[1]) == 2
    writer = RunWriter(folder)
    writer.log({'epoch': 3})
    assert writer.error is not None and 'log.txt' in str(writer.error)
    (folder / '.lock').unlink()
    (folder / '.lock').symlink_to(mine)
    with pytest.raises(OSError, match='lock'):
        RunWriter(folder)
    assert mine.read_text() == 'mine'


def test_a_lock_leaves_its_file_as_it_is(tmp_path):
    (tmp_path / '.lock').write_text('mine')
    RunWriter(tmp_path)
    assert (tmp_path / '.lock').read_text() == 'mine'


def test_only_a_runs_own_names_are_its_epochs(tmp_path):
    own = ['checkpoint_0000.pth', 'checkpoint_0012.pth', 'checkpoint_9999.pth', 'checkpoint_10000.pth']
    for name in [*own, 'checkpoint_2024_final.pth', 'checkpoint_0_mine.pth', 'checkpoint_2b.pth', 'checkpoint_12.pth',
                 'checkpoint_00012.pth', 'checkpoint_0012.pth.bak', 'checkpoint_²024.pth', LAST]:
        (tmp_path / name).touch()
    assert [path.name for path in epoch_files(tmp_path)] == own


@pytest.mark.parametrize('key, value', [
    ('meters', 3), ('best', None), ('epoch', 'x'), ('seconds', []), ('model_ema', {'a': 1}),
    ('exp_avg', torch.zeros(3)), ('exp_avg_sq', torch.zeros(7, 7)), ('state', 'x')])
def test_resuming_a_file_with_other_contents_is_one_line(flags, whole, tmp_path, capsys, key, value):
    """Moments of another shape would be read and written past their end by a fused optimizer."""
    state = nano.read(whole)
    place = state if key in state else state['optimizer'] if key == 'state' else state['optimizer']['state'][5]
    place[key] = value
    torch.save(state, tmp_path / 'checkpoint_last.pth')
    assert train.cli([*map(str, flags), '--resume', str(tmp_path / 'checkpoint_last.pth'), '--epochs', '4']) in (
        [0, 2] if key == 'model_ema' else [2])  # Weights without an EMA resume with a warning.
    assert 'Traceback' not in capsys.readouterr().err


@pytest.mark.soak
def test_a_kill_at_fifty_sizes_leaves_whole_files(tmp_path):
    """SIGKILL when the file that is being written has reached a random size."""
    def write_forever(folder):
        for epoch in itertools.count(1):
            for name in ('checkpoint_best.pth', LAST):
                with atomic_write(folder / name, folder / PREVIOUS if name == LAST else None) as file:
                    torch.save(state(epoch, 4_000_000), file)

    rng, context = random.Random(0), multiprocessing.get_context('fork')
    for _ in range(50):
        folder = tmp_path / 'run'
        folder.mkdir()
        process = context.Process(target=write_forever, args=(folder,))
        process.start()
        nano.wait_for((folder / (PREVIOUS if rng.random() < 0.5 else LAST)).exists)
        size, pattern = rng.randint(0, 16_000_000), '.*.tmp'
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
        write_file(tmp_path / 'www' / folder / 'best.pth', 'ab'.index(folder))
    handler = functools.partial(Handler, directory=tmp_path / 'www')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{serving.server_port}', asked
        serving.shutdown()


def write_file(path, epoch, new_format=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state(epoch), path, _use_new_zipfile_serialization=new_format)


def test_each_address_is_downloaded_once(server, caplog, tmp_path):
    """Also if two of them end in the same name; a file replaced on the server is named as an older download."""
    address, asked = server
    for _ in range(2):
        assert [epoch_of(read_checkpoint(f'{address}/{folder}/best.pth')) for folder in 'ab'] == [0, 1]
    assert epoch_of(read_checkpoint(f'{address}/a/best.pth?version=2')) == 0
    assert asked == ['/a/best.pth', '/b/best.pth', '/a/best.pth?version=2']
    write_file(tmp_path / 'www/a/best.pth', 7)
    caplog.clear()
    caplog.set_level('INFO')
    assert epoch_of(read_checkpoint(f'{address}/a/best.pth')) == 0
    cached, = re.findall(r'/\S*cache/\S+', caplog.text)
    os.remove(cached)
    assert epoch_of(read_checkpoint(f'{address}/a/best.pth')) == 7


@pytest.mark.parametrize('new_format', [True, False])
def test_a_cut_download_is_named_and_repeated(server, tmp_path, new_format):
    address, asked = server
    write_file(tmp_path / 'www/cut/best.pth', 3, new_format)
    (tmp_path / 'www/cut/page.pth').write_text('<html>Please log in</html>')
    for name in ('best.pth', 'page.pth', 'best.pth'):
        with pytest.raises(UsageError, match=f'{address}/cut/{name}'):
            read_checkpoint(f'{address}/cut/{name}')
        assert not [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()]
    assert len(asked) == 3


def test_a_damaged_cached_file_is_named_and_removed(server, tmp_path):
    address, _ = server
    read_checkpoint(f'{address}/a/best.pth')
    cached, = [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()]
    content = bytearray(cached.read_bytes())
    content[len(content) // 2] ^= 1
    cached.write_bytes(content)
    with pytest.raises(UsageError, match=str(cached)):
        read_checkpoint(f'{address}/a/best.pth')
    assert epoch_of(read_checkpoint(f'{address}/a/best.pth')) == 0


@pytest.mark.parametrize('path', ['/none.pth', '/two words.pth', ':1/best.pth'])
def test_addresses_without_a_file_are_one_line(server, tmp_path, path):
    with pytest.raises(UsageError, match='could not be downloaded'):
        read_checkpoint(re.sub(r':\d+$', '', server[0]) + path if path[0] == ':' else server[0] + path)
    assert not [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()]


@pytest.mark.filterwarnings('ignore')
def test_exported_models_are_not_damaged_checkpoints(tmp_path):
    (tmp_path / 'model.onnx').write_bytes(b'\x08\x0a\x12\x07pytorch')
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / 'model.pt')
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.ones(1),)), tmp_path / 'model.pt2')
    for name in ('model.onnx', 'model.pt', 'model.pt2'):
        with pytest.raises(UsageError, match=f'{name} is an exported model'):
            read_checkpoint(tmp_path / name)
