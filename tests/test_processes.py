"""Ranks that agree, processes that hang, and faults of the system."""
import os
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import errors
import nano
import processes
from launch import Launch


def on_two_ranks(rank: int, path: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{path}/meet', rank=rank, world_size=2)
    assert processes.all_reduce_max(rank + 3) == 4
    assert processes.gather_from_ranks({'rank': rank}) == [{'rank': 0}, {'rank': 1}]
    assert processes.reduce_(torch.tensor([rank, 5])).tolist() == [1, 10]
    os.environ['LOCAL_RANK'] = str(rank)
    with processes.first_on_each_node():
        assert rank == 0 or Path(path, 'unpacked').exists()
        Path(path, 'unpacked').touch()
    with pytest.raises(errors.UsageError, match='^--lr of rank 1$'):
        with processes.usage_errors():
            if rank == 1:
                raise ValueError('--lr of rank 1')
    dist.destroy_process_group()


def test_ranks_agree(tmp_path):
    assert processes.all_reduce_max(3) == 3 and processes.gather_from_ranks('a') == ['a']  # without a group
    assert (processes.get_rank(), processes.get_world_size()) == (0, 1)
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
    launch = Launch(*launch)
    if found.startswith('cuda:'):
        assert processes.find_device('cuda', launch) == torch.device(found)
    else:
        with pytest.raises(ValueError, match=found):
            processes.find_device('cuda', launch)
    assert processes.find_device('cpu', launch) == torch.device('cpu')


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
    line = processes.explain(error)
    assert line is None if words is None else re.search(words, line) and '\n' not in line
