"""Ranks that agree, devices, and faults of the system."""
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import errors
import processes
from launch import Launch


def on_two_ranks(rank: int, path: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{path}/meet', rank=rank, world_size=2)
    assert processes.all_reduce_max(rank + 3) == 4
    assert processes.gather_from_ranks({'rank': rank}) == [{'rank': 0}, {'rank': 1}]
    assert processes.all_reduce_(torch.tensor([rank, 5])).tolist() == [1, 10]
    os.environ['LOCAL_RANK'] = str(rank)
    with processes.first_on_each_node():
        assert rank == 0 or Path(path, 'unpacked').exists()
        Path(path, 'unpacked').touch()
    with pytest.raises(errors.UsageError, match='^--lr of rank 1$'):
        with processes.usage_errors():
            if rank == 1:
                raise errors.UsageError('--lr of rank 1')
    dist.destroy_process_group()


def test_ranks_agree(tmp_path):
    assert processes.all_reduce_max(3) == 3 and processes.gather_from_ranks('a') == ['a']  # without a group
    assert (processes.get_rank(), processes.get_world_size()) == (0, 1)
    mp.start_processes(on_two_ranks, (str(tmp_path),), nprocs=2, start_method='fork')


@pytest.mark.parametrize('devices, launch, result', [
    (8, ('torchrun', 5, 5, 8, 8), 'cuda:5'),
    (1, ('srun', 5, 5, 8), 'cuda:0'),  # srun --gpus-per-task=1
    (1, (), 'cuda:0'),
    (1, ('torchrun', 1, 1, 2, 2), '2 .*1 '),
    (0, (), '--device cuda'),
])
def test_each_process_has_a_gpu(devices, launch, result, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: devices)
    launch = Launch(*launch)
    if result.startswith('cuda:'):
        assert processes.find_device('cuda', launch) == torch.device(result)
    else:
        with pytest.raises(ValueError, match=result):
            processes.find_device('cuda', launch)
    assert processes.find_device('cpu', launch) == torch.device('cpu')


@pytest.mark.parametrize('error, words', [
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. '), '--num-workers'),
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...'), '--shm-size'),
    (OSError(24, 'Too many open files'), 'ulimit -n'),
    (RuntimeError('DataLoader timed out after 600 seconds'), '--data-path'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.\nmore'), '--accum-steps'),
    (RuntimeError('[/pytorch/third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:5'),
     'rank 0 lost'),
    (dist.DistBackendError(
        '[Rank 2] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=10, OpType=BROADCAST, Timeout(ms)='
        '1800000) ran for 1805457 milliseconds before timing out.'), 'rank 0 lost'),
    (dist.DistBackendError('NCCL error in: ProcessGroupNCCL.cpp:1287, invalid usage, NCCL version 2.17.1\n'
                           'ncclInvalidUsage: This usually reflects invalid usage of NCCL library.'), None),
    (ValueError('from the code'), None)])
def test_faults_outside_the_code_are_one_line(error, words):
    line = processes.explain(error)
    assert line is None if words is None else words in line and '\n' not in line
