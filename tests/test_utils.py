"""Profiles, trackers and limits."""
import json
import re
import resource
import sys

import pytest

import nano
import system
import utils


def test_profile_writes_a_trace_of_so_many_steps(flags, tmp_path):
    nano.train([*flags, '--epochs', '1', '--profile', '2', '--output-dir', tmp_path])
    trace = json.loads((tmp_path / 'trace.json').read_text())
    steps = {e['name'] for e in trace['traceEvents'] if e.get('name', '').startswith('ProfilerStep#')}
    assert len(steps) == 2


# trackers

def test_tensorboard_shows_each_epoch_once(flags, tmp_path):
    """Also an epoch that is trained again after a resume."""
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = [*flags, '--log-tensorboard', '--output-dir', tmp_path]
    nano.train([*run, '--epochs', '2'])
    (tmp_path / 'checkpoint_prev.pth').replace(tmp_path / 'checkpoint_last.pth')
    nano.train([*run, '--resume', 'auto'])
    events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    records = [json.loads(line) for line in (tmp_path / 'log.txt').read_text().splitlines()]
    assert sorted(events.Tags()['scalars']) == sorted(records[0])
    for name in records[0]:
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(epoch, pytest.approx(record[name])) for epoch, record in enumerate(records)], name


def test_a_tracker_that_fails_does_not_end_the_run(flags, tmp_path, monkeypatch, capsys):
    pytest.importorskip('tensorboard')
    monkeypatch.setattr('torch.utils.tensorboard.SummaryWriter.add_scalar', lambda *_: 1 / 0)
    nano.train([*flags, '--batch-size', 48, '--log-tensorboard', '--output-dir', tmp_path])
    assert nano.epochs(tmp_path) == [0, 1, 2] and capsys.readouterr().out.count('division by zero') == 1


def test_wandb_offline_keeps_its_id_until_the_run_is_replaced(flags, tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    run, ids = [*flags, '--epochs', 1, '--log-wandb', '--output-dir', tmp_path], []
    for change in ([], ['--resume', 'auto', '--epochs', 2], ['--overwrite']):
        nano.finish(nano.start([*run, *change], output=tmp_path / 'out.txt'))
        ids.append((tmp_path / 'wandb_id.txt').read_text())
    assert ids[0] == ids[1] != ids[2] and len(list(tmp_path.glob(f'wandb/offline-run-*-{ids[0]}'))) == 2


def test_an_old_run_stays_if_wandb_cannot_start(flags, tmp_path, monkeypatch):
    """Such as without a login."""
    pytest.importorskip('wandb')
    run, output = [*flags, '--epochs', 1, '--output-dir', tmp_path / 'run'], tmp_path / 'out.txt'
    nano.train(run)
    before = {path: path.read_bytes() for path in (tmp_path / 'run').iterdir()}
    for name in ('WANDB_MODE', 'WANDB_API_KEY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('NETRC', str(tmp_path / 'none'))
    nano.finish(nano.start([*run, '--overwrite', '--log-wandb'], output=output), status=2)
    assert re.search('^train.py: error: .*--log-wandb.*WANDB_MODE=offline', output.read_text(), re.M)
    assert 'Traceback' not in output.read_text()
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not (tmp_path / 'run' / 'wandb_id.txt').exists()


@pytest.mark.parametrize('name, module', [('wandb', 'wandb'), ('tensorboard', 'torch.utils.tensorboard')])
def test_trackers_that_are_not_installed_are_named(monkeypatch, tmp_path, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f'--log-{name}: .*pip install {name}'):
        utils.wandb_tracker(tmp_path, {}, 'x') if name == 'wandb' else utils.tensorboard_tracker(tmp_path, 0)


# the system

@pytest.mark.parametrize('hard, wanted', [(resource.RLIM_INFINITY, 65536), (4096, 4096), (10 ** 6, 65536), (64, 64)])
def test_the_limit_of_open_files_is_raised(monkeypatch, hard, wanted):
    limits = {resource.RLIMIT_NOFILE: (64, hard)}
    monkeypatch.setattr(resource, 'getrlimit', limits.get)
    monkeypatch.setattr(resource, 'setrlimit', limits.__setitem__)
    system.raise_file_limit()
    assert limits[resource.RLIMIT_NOFILE] == (wanted, hard)
