"""Several hosts: ranks that meet, and training that survives the loss of a host."""
import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

import hosts
import nano

ROOT = Path(nano.__file__).parent.parent
NODES = '--nproc-per-node 1 --rdzv-backend c10d --rdzv-id test'


@pytest.mark.parametrize('absent, port, status, words', [
    (0, None, 1, r'rank 0 at 127.0.0.1:\d+ \(Connection refused\)'),
    (1, None, 1, 'rank 1 .*--dist-timeout'),
    (1, 'taken', 2, r'127.0.0.1:\d+.* MASTER_PORT'),
], ids=['rank 0', 'rank 1', 'port'])
def test_a_rank_alone_gives_up_in_one_line(flags, tmp_path, absent, port, status, words):
    """Without pages of torch's C++ frames."""
    output = tmp_path / 'out.txt'
    with socket.create_server(('127.0.0.1', 0)) as taken:
        def before(rank):
            if rank == absent:
                os._exit(0)
            os.environ['LOCAL_RANK'] = '0'
            if port:
                os.environ['MASTER_PORT'] = str(taken.getsockname()[1])

        ranks = nano.start([*flags, '--dist-timeout', '1'], ranks=2, output=output, before=before)
        nano.finish([ranks[1 - absent]], status=status)
    lines = output.read_text().splitlines()
    assert re.search(f'train.py: error: .*{words}', lines[-1])
    assert len(lines) == 1 if port else len(lines) == 2 and re.search(r' rank \d.*--dist-timeout', lines[0])


@pytest.mark.parametrize('number, words', [(signal.SIGKILL, '(closed|reset) by peer'), (signal.SIGSTOP, 'Timed out')])
def test_a_rank_that_loses_another_ends_with_one_line(flags, tmp_path, number, words):
    output = tmp_path / 'out.txt'
    ranks = nano.start(
        [*flags, '--dist-timeout', '3'], ranks=2, output=output, before=lambda rank: nano.at_step(
            3, lambda: rank == 1 and os.kill(os.getpid(), number)))
    nano.finish(ranks[:1], status=1)
    ranks[1].kill()
    assert re.search(fr'\ntrain\.py: error: rank 0 .*({words}).*\n$', output.read_text())
    assert 'Traceback' not in output.read_text()


# torchrun on one machine

@pytest.mark.parametrize('options', [
    pytest.param('--nproc-per-node 2', marks=pytest.mark.soak), f'{NODES} --nnodes 2'], ids=['one', 'two'])
def test_torchrun_survives_the_kill_of_a_worker(flags, pair, tmp_path, options):
    """While the other worker is in a long step. Ranks cannot meet by the restart count, which each torchrun keeps."""
    last, output = tmp_path / 'run' / 'checkpoint_last.pth', tmp_path / 'out.txt'
    command = nano.torchrun(f'{options} --rdzv-endpoint localhost:{nano.free_port()}', [
        *flags, '--epochs', 2, '--resume', 'auto', '--save-every-steps', 1, '--dist-timeout', 20,
        '--output-dir', last.parent])
    with open(output, 'w') as file:
        agents = [subprocess.Popen(command, stdout=file, stderr=file, env=nano.ENVIRONMENT)
                  for _ in range(2 if NODES in options else 1)]
    try:
        nano.wait_for(last.exists)
        workers = [pid for agent in agents for pid in nano.children_of(agent.pid)]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGSTOP)
        os.kill(workers[1], signal.SIGKILL)
        time.sleep(3)
        os.kill(workers[0], signal.SIGCONT)
        assert [agent.wait(120) for agent in agents] == [0] * len(agents), output.read_text()[-5000:]
    finally:
        for pid in [pid for agent in agents for pid in (*nano.children_of(agent.pid), agent.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert 'resuming at epoch' in output.read_text()
    nano.assert_same_run(pair, last.parent)


# hosts as network namespaces

needs_hosts = pytest.mark.skipif(bool(hosts.why_no_hosts()), reason=hosts.why_no_hosts() or '')


@needs_hosts
def test_two_hosts_train_as_two_local_ranks_do(flags, pair, tmp_path):
    run, output = [*flags, '--epochs', 2, '--output-dir', tmp_path / 'run'], tmp_path / 'out.txt'
    with hosts.Hosts(['h1', 'h2']) as network:
        agents = [network.start(name, nano.torchrun(f'{NODES} --nnodes 2 --rdzv-endpoint h1:29500', run), output,
                                env=nano.ENVIRONMENT) for name in ('h1', 'h2')]
        assert [agent.wait(120) for agent in agents] == [0, 0], output.read_text()[-5000:]
    nano.assert_same_run(pair, tmp_path / 'run')


@pytest.mark.soak
@needs_hosts
@pytest.mark.parametrize('disturb', ['late', 'kill'])
def test_elastic_training_survives_the_loss_of_a_host(flags, tmp_path, disturb):
    """Rank 0 and the writer are on h1, the first name, which joins late or is lost; the rendezvous is on h2."""
    run = [*flags, '--epochs', '60', '--resume', 'auto', '--save-every-steps', '5', '--dist-timeout', '20']
    output, last = tmp_path / 'out.txt', tmp_path / 'run' / 'checkpoint_last.pth'
    command = nano.torchrun(f'{NODES} --nnodes 1:2 --rdzv-endpoint h2:29500 --rdzv-conf last_call_timeout=5',
                            [*run, '--output-dir', tmp_path / 'run'])
    environment = {**nano.ENVIRONMENT, 'NANO_PAUSE': '0.3', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}

    with hosts.Hosts(['h1', 'h2']) as network:
        def start(name):
            return network.start(name, command, output, env=environment)

        survivor = start('h2')
        if disturb == 'kill':
            start('h1')
        nano.wait_for(last.exists)
        if disturb == 'kill':
            network.kill_host('h1')
        else:
            start('h1')
        nano.wait_for(lambda: 'resuming at epoch' in output.read_text())
        assert survivor.wait(300) == 0, output.read_text()[-5000:]
    assert nano.epochs(tmp_path / 'run') == list(range(60))
