"""Processes that start, hang and exit, and what a run shows elsewhere."""
import json
import os
import re
import resource
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import nano
import options
import utils


def on_two_ranks(rank: int, path: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{path}/meet', rank=rank, world_size=2)
    assert utils.all_reduce_max(rank + 3) == 4
    assert utils.gather_from_ranks({'rank': rank}) == [{'rank': 0}, {'rank': 1}]
    assert utils.reduce_(torch.tensor([rank, 5])).tolist() == [1, 10]
    os.environ['LOCAL_RANK'] = str(rank)
    with utils.first_on_each_node():
        assert rank == 0 or Path(path, 'unpacked').exists()
        Path(path, 'unpacked').touch()
    with pytest.raises(utils.UsageError, match='^--lr of rank 1$'):
        with utils.usage_errors():
            if rank == 1:
                raise ValueError('--lr of rank 1')
    dist.destroy_process_group()


def test_ranks_agree(tmp_path):
    assert utils.all_reduce_max(3) == 3 and utils.gather_from_ranks('a') == ['a']  # without a group
    assert (utils.get_rank(), utils.get_world_size()) == (0, 1)
    mp.start_processes(on_two_ranks, (str(tmp_path),), nprocs=2, start_method='fork')


@pytest.mark.parametrize('devices, launch, found', [
    (8, ('torchrun', 5, 5, 8, 8), 'cuda:5'),
    (8, ('srun', 5, 5, 8), 'cuda:5'),
    (1, ('srun', 5, 5, 8), 'cuda:0'),  # srun --gpus-per-task=1
    (1, (), 'cuda:0'),
    (1, ('torchrun', 1, 1, 2, 2), '2 processes on a machine with 1 CUDA devices'),
    (1, ('torchrun', 1), '2 processes on a machine with 1 CUDA devices'),  # a launcher that sets LOCAL_RANK alone
    (1, ('mpirun', 0, 0, 2, 2), '2 processes on a machine with 1 CUDA devices'),
    (4, ('srun', 4, 4, 8), '5 processes on a machine with 4 CUDA devices'),
    (0, (), '--device cuda: no CUDA device here'),
])
def test_a_process_has_its_own_gpu(devices, launch, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: devices)
    launch = options.Launch(*launch)
    if found.startswith('cuda:'):
        assert utils.find_device('cuda', launch) == torch.device(found)
    else:
        with pytest.raises(ValueError, match=found):
            utils.find_device('cuda', launch)
    assert utils.find_device('cpu', launch) == torch.device('cpu')


def test_a_hung_loader_ends_the_process_in_bounded_time(flags, tmp_path):
    """An image that is never there: --dist-timeout, and the loader's process does not keep the run alive."""
    def hang(rank):
        import datasets
        datasets.ImageFolder.__getitem__ = lambda self, index: time.sleep(1000)

    began = time.monotonic()
    run = nano.start(
        [*flags, '--num-workers', '1', '--dist-timeout', '2', '--output-dir', tmp_path / 'run'],
        output=tmp_path / 'out.txt', before=hang)
    nano.finish(run, status=1, timeout=60)
    assert time.monotonic() - began < 50
    assert 'timed out after 2' in (tmp_path / 'out.txt').read_text()


def test_profile_writes_a_trace_of_so_many_steps(flags, tmp_path):
    nano.train([*flags, '--epochs', '1', '--profile', '2', '--output-dir', tmp_path])
    trace = json.loads((tmp_path / 'trace.json').read_text())
    steps = {e['name'] for e in trace['traceEvents'] if e.get('name', '').startswith('ProfilerStep#')}
    assert len(steps) == 2


# trackers, with their packages

def test_tensorboard_shows_each_epoch_once_also_after_a_resume(flags, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = [*flags, '--log-tensorboard', '--output-dir', tmp_path]
    nano.train([*run, '--epochs', '2'])
    (tmp_path / 'checkpoint_prev.pth').replace(tmp_path / 'checkpoint_last.pth')  # epoch 1 is trained again
    nano.train([*run, '--resume', 'auto'])
    events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    records = [json.loads(line) for line in (tmp_path / 'log.txt').read_text().splitlines()]
    assert sorted(events.Tags()['scalars']) == sorted(records[0])
    for name in records[0]:
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(epoch, pytest.approx(record[name])) for epoch, record in enumerate(records)], name


def test_wandb_offline_keeps_its_id_until_the_run_is_replaced(flags, tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    run, ids = [*flags, '--epochs', 1, '--log-wandb', '--output-dir', tmp_path], []
    for change in ([], ['--resume', 'auto', '--epochs', 2], ['--overwrite']):
        nano.finish(nano.start([*run, *change], output=tmp_path / 'out.txt'))
        ids.append((tmp_path / 'wandb_id.txt').read_text())
    assert ids[0] == ids[1] != ids[2] and len(list(tmp_path.glob(f'wandb/offline-run-*-{ids[0]}'))) == 2


@pytest.mark.parametrize('change', [{}, {'WANDB_API_KEY': 'too short'}])
def test_an_old_run_stays_if_wandb_cannot_start(flags, tmp_path, monkeypatch, change):
    pytest.importorskip('wandb')
    run, output = [*flags, '--epochs', 1, '--output-dir', tmp_path / 'run'], tmp_path / 'out.txt'
    nano.train(run)
    before = {path: path.read_bytes() for path in (tmp_path / 'run').iterdir()}
    for name in ('WANDB_MODE', 'WANDB_API_KEY'):
        monkeypatch.delenv(name, raising=False)
    for name, value in {'HOME': str(tmp_path), 'NETRC': str(tmp_path / 'none'), **change}.items():
        monkeypatch.setenv(name, value)
    nano.finish(nano.start([*run, '--overwrite', '--log-wandb'], output=output), status=2)
    assert re.search('^train.py: error: --log-wandb: .*WANDB_MODE=offline', output.read_text(), re.M)
    assert 'Traceback' not in output.read_text()
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not (tmp_path / 'run' / 'wandb_id.txt').exists()


@pytest.mark.parametrize('name', ['wandb', 'tensorboard'])
@pytest.mark.parametrize('module', [None, types.ModuleType('folder')])
def test_trackers_that_are_not_installed_are_named(monkeypatch, name, module):
    """A folder of the package's name can be imported as well."""
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard' if name == 'tensorboard' else 'wandb', module)
    with pytest.raises(ValueError, match=f'--log-{name} needs .* pip install {name}'):
        utils.check_trackers(name == 'tensorboard', name == 'wandb')
    utils.check_trackers(False, False)


# faults of the system

@pytest.mark.parametrize('error, words', [
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. '), 'a loader process was killed.*memory'),
    (RuntimeError('DataLoader worker (pid(s) 7, 8) exited unexpectedly'), 'a loader process was killed.*memory'),
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...'), '--shm-size'),
    (RuntimeError('Caught RuntimeError in DataLoader worker process 0.\nTraceback ...\nRuntimeError: unable to '
                  'allocate shared memory(shm) for file </torch_7>: No space left on device (28)'), '--shm-size'),
    (OSError(24, 'Too many open files'), r'too many open files.*ulimit -n'),
    (RuntimeError('received 0 items of ancdata'), r'too many open files.*ulimit -n'),
    (RuntimeError('DataLoader timed out after 600 seconds'), '600 seconds: .*--data-path'),
    (OSError(12, 'Cannot allocate memory'), 'no memory is left'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.\nmore'), 'CUDA out of memory.*--accum-steps'),
    (ValueError('of the code'), None)])
def test_faults_outside_of_the_code_are_one_line(error, words):
    line = utils.explain(error)
    assert line is None if words is None else re.search(words, line) and '\n' not in line


@pytest.mark.parametrize('hard, wanted', [(resource.RLIM_INFINITY, 65536), (4096, 4096), (10 ** 6, 65536), (64, 64)])
def test_the_limit_of_open_files_is_raised(monkeypatch, hard, wanted):
    limits = {resource.RLIMIT_NOFILE: (64, hard)}
    monkeypatch.setattr(resource, 'getrlimit', limits.get)
    monkeypatch.setattr(resource, 'setrlimit', limits.__setitem__)
    utils.raise_file_limit()
    assert limits[resource.RLIMIT_NOFILE] == (wanted, hard)


def test_the_system_names_the_commit_of_the_project_alone(tmp_path, monkeypatch):
    def commit():
        return re.match(r'commit (\S+), Python 3', utils.describe_system(torch.device('cpu')))[1]

    def git(*args):
        subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=b', '-C', tmp_path, *args], check=True,
                       capture_output=True)

    (tmp_path / 'cmt').mkdir()
    monkeypatch.setattr(utils, '__file__', str(tmp_path / 'cmt' / 'utils.py'))
    git('init')
    git('commit', '--allow-empty', '-m', 'of another project')
    assert commit() == 'unknown'
    monkeypatch.setattr(utils, '__file__', str(tmp_path / 'utils.py'))
    assert re.fullmatch('[0-9a-f]{7,}', commit())
    (tmp_path / 'file').touch()
    git('add', 'file')
    assert commit().endswith('-dirty')
    monkeypatch.setenv('PATH', '')
    assert commit() == 'unknown'
