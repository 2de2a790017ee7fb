"""What several processes do together, and what a run shows elsewhere."""
import json
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn

import nano
import utils


def joint_step(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Running statistics and gradients of a loss that no two images share."""
    outputs = model(images)
    (outputs.square() * torch.arange(outputs[0].numel()).view_as(outputs[0])).mean().backward()
    return {**{name: p.grad for name, p in model.named_parameters()}, **dict(model.named_buffers())}


def norm_model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
    return nn.Sequential(*layers).double()


def sync_rank(rank: int, path: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{path}/meet', rank=rank, world_size=2)
    images = torch.load(f'{path}/images.pt')
    model = utils.convert_sync_batchnorm(norm_model(), torch.device('cpu'))
    model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    got = joint_step(model, images[rank::2])
    torch.save({name.removeprefix('module.'): value for name, value in got.items()}, f'{path}/{rank}.pt')
    dist.destroy_process_group()


def test_sync_batchnorm_on_two_ranks_is_one_rank_on_the_joint_batch(tmp_path):
    images = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    torch.save(images, tmp_path / 'images.pt')
    mp.start_processes(sync_rank, (str(tmp_path),), nprocs=2, start_method='fork')
    expected = joint_step(norm_model(), images)
    for rank in (0, 1):
        got = torch.load(tmp_path / f'{rank}.pt')
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=f'{name} of rank {rank}')


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
    seen = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            seen.append(('open', folder, purge_step))

        def add_scalar(self, name, value, epoch):
            seen.append((name, value, epoch))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', type(sys)('tensorboard'))
    sys.modules['torch.utils.tensorboard'].SummaryWriter = SummaryWriter
    monkeypatch.setattr(utils, 'check_trackers', lambda *wanted: None)
    nano.train([*flags, '--epochs', '1', '--log-tensorboard', '--output-dir', tmp_path])
    assert seen[0] == ('open', tmp_path / 'tensorboard', 0)
    record = json.loads((tmp_path / 'log.txt').read_text())
    assert seen[1:] == [(name, value, 0) for name, value in record.items()]


def test_trackers_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(utils.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='--log-wandb needs .* pip install wandb'):
        utils.check_trackers(False, True)
    utils.check_trackers(False, False)
