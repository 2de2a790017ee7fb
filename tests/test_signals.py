"""Signals that reach a run from a terminal that closes, and runs in notebooks."""
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

import nano
import train


def test_a_run_whose_terminal_is_gone_goes_on(flags, whole, tmp_path):
    """As after `disown` and a closed ssh session: no signal comes, but every write to the terminal fails."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, nano.__file__, *map(str, flags), '--output-dir', tmp_path / 'run'],
                               stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                               env={**nano.ENVIRONMENT, 'NANO_PAUSE': '0.1'})
    os.close(theirs)
    nano.wait_for((tmp_path / 'run' / 'config.yaml').exists)
    os.close(ours)
    assert process.wait(100) == 0
    nano.assert_same_run(whole, tmp_path / 'run')


def test_nohup_keeps_a_run_that_gets_sighup(flags, whole, tmp_path):
    process = subprocess.Popen(['nohup', sys.executable, nano.__file__, *map(str, flags), '--output-dir',
                                tmp_path / 'run'], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               env={**nano.ENVIRONMENT, 'NANO_PAUSE': '0.1'})
    nano.wait_for((tmp_path / 'run' / 'checkpoint_last.pth').exists)
    process.send_signal(signal.SIGHUP)
    assert process.wait(100) == 0
    nano.assert_same_run(whole, tmp_path / 'run')


# In a notebook, the process outlives the run.

STOPS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP')]


def fail(*args):
    raise KeyError('a bug')


@pytest.mark.parametrize('flag, status', [
    ([], 0), (['--data-path', 'gone'], 2), (['--num-workers', 2], 1)])
def test_a_run_leaves_no_trace_in_a_notebook(flags, tmp_path, flag, status):
    """Whether it ends well, with a mistake, or in a bug while workers run; then the same folder is free."""
    run = [str(arg) for arg in (*flags, '--epochs', 1, '--output-dir', tmp_path / 'run', *flag)]
    before, children = [signal.getsignal(number) for number in STOPS], nano.children_of(os.getpid())
    threads = threading.active_count()
    with nano.at_step(1, fail if status == 1 else time.time):
        assert train.cli(run) == status
    assert [signal.getsignal(number) for number in STOPS] == before
    assert nano.children_of(os.getpid()) == children and threading.active_count() <= threads
    assert not [fd for fd in os.listdir('/proc/self/fd') if 'run/.lock' in os.path.realpath(f'/proc/self/fd/{fd}')]
    assert train.cli([*run[:len(flags)], '--epochs', '1', '--output-dir', str(tmp_path / 'run'), '--overwrite']) == 0


def test_an_interrupted_cell_saves_and_the_next_resumes(flags, whole, tmp_path):
    run, before = [*map(str, flags), '--output-dir', str(tmp_path / 'run'), '--resume', 'auto'], signal.getsignal(2)
    with nano.at_step(8, lambda: signal.raise_signal(signal.SIGINT)):
        assert train.cli(run) == 130
    assert train.cli(run) == 0
    nano.assert_same_run(whole, tmp_path / 'run')
    with nano.at_step(0, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]):
        assert train.cli([*run[:-2], '--overwrite']) == 130
    assert signal.getsignal(signal.SIGINT) == before


def test_wrong_flags_are_a_status_in_a_notebook(capsys):
    assert train.cli(['--epoch', '1']) == 2 and '--epochs' in capsys.readouterr().err
    assert train.cli(['--help']) == 0
