"""Signals that reach a run from a terminal that closes, and runs in notebooks and threads."""
import multiprocessing
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


def start(command, output, pause='0', **options):
    with open(output, 'wb') as file:
        return subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True,
                                env={**nano.ENVIRONMENT, 'NANO_PAUSE': pause}, **options)


@pytest.mark.parametrize('pause, phase, steps', [
    pytest.param('1', lambda run, out: 'step 1/3' in out, 1, marks=pytest.mark.soak),
    ('0,9', lambda run, out: 'epoch 0/1  step 3/3' in out, 3),
    pytest.param('0,0,1', lambda run, out: (run / 'log.txt').exists(), 3, marks=pytest.mark.soak),
], ids=['training', 'validation', 'save'])
def test_a_closed_terminal_costs_no_step_under_nohup(flags, pair, tmp_path, pause, phase, steps):
    """torchrun sets its own handler of SIGHUP, although nohup ignores it, and passes the signal on."""
    run, output = tmp_path / 'run', tmp_path / 'out.txt'
    command = ['nohup', *nano.torchrun(f'--nproc-per-node 2 --rdzv-endpoint localhost:{nano.free_port()}', [
        *flags, '--epochs', 2, '--print-freq', 1, '--resume', 'auto', '--output-dir', run])]
    process = start(command, output, pause)
    try:
        nano.wait_for(lambda: phase(run, output.read_text()), 60)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGHUP)
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = output.read_text()
    assert 'stopped' in text and nano.updates(run) >= steps, text[-3000:]
    again = start(command, output)
    assert again.wait(100) == 0, output.read_text()[-3000:]
    assert 'resuming' in output.read_text()
    nano.assert_same_run(pair, run)


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
    process = start(['nohup', sys.executable, nano.__file__, *map(str, flags), '--output-dir', tmp_path / 'run'],
                    tmp_path / 'out.txt', '0.1')
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


def test_a_failing_run_spares_other_children(flags):
    child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(100,), daemon=True)
    with nano.at_step(0, child.start), nano.at_step(1, fail):
        assert train.cli([*map(str, flags), '--num-workers', '2']) == 1
    assert child.is_alive()
    child.kill()


def test_a_run_works_in_a_thread(flags, whole, tmp_path):
    status = []
    thread = threading.Thread(target=lambda: status.append(train.cli(
        [*map(str, flags), '--num-workers', '2', '--output-dir', str(tmp_path / 'run')])))
    thread.start()
    thread.join()
    assert status == [0]
    nano.assert_same_run(whole, tmp_path / 'run')
