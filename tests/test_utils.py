"""Processes that start, hang and exit, and what a run shows elsewhere."""
import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

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


def test_figures_go_to_tensorboard(flags, tmp_path, monkeypatch):
    """With a stand-in for its writer: the package is not among the requirements."""
    package = mock.Mock()
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', package)
    monkeypatch.setattr(utils, 'check_trackers', lambda *wanted: None)
    nano.train([*flags, '--epochs', '1', '--log-tensorboard', '--output-dir', tmp_path])
    assert package.SummaryWriter.call_args == mock.call(tmp_path / 'tensorboard', purge_step=0)
    record = json.loads((tmp_path / 'log.txt').read_text())
    assert package.SummaryWriter().method_calls == [
        *(mock.call.add_scalar(name, value, 0) for name, value in record.items()), mock.call.flush()]


def test_trackers_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(utils.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='--log-wandb needs .* pip install wandb'):
        utils.check_trackers(False, True)
    utils.check_trackers(False, False)
