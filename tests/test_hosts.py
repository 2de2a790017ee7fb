"""Several hosts: a start on which all ranks agree, and training that survives the loss of a host."""
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

import errors
import hosts
import nano
import processes

ROOT = Path(nano.__file__).parent.parent
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def torchrun(nnodes, endpoint, argv, *more) -> list[str]:
    return [
        sys.executable, '-m', 'torch.distributed.run', '--nnodes', str(nnodes), '--nproc-per-node', '1',
        '--rdzv-backend', 'c10d', '--rdzv-endpoint', endpoint, '--rdzv-id', 'test', '--max-restarts', '3',
        '--monitor-interval', '0.1', *more, nano.__file__, *map(str, argv)]


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            if int(status.read_text().rsplit(')', 1)[1].split()[1]) == pid:
                found.append(int(status.parent.name))
    return found


def wait_for(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, 'waited in vain'
        time.sleep(0.02)
    return found


# a name for each start

def store_of(host_store, rank, world_size, timeout_s=20):
    client = dist.TCPStore('127.0.0.1', host_store.port, is_master=False)
    wait = processes.Wait(timeout_s, is_logged=False)
    return processes.launch_store(client, rank, world_size, wait)


def start_of(host_store, world_size, order):
    """Let ranks join in `order`, some time apart; return the stores that they got."""
    stores = {}
    threads = []
    for rank in order:
        threads.append(threading.Thread(target=lambda rank=rank: stores.update(
            {rank: store_of(host_store, rank, world_size)})))
        threads[-1].start()
        time.sleep(0.3)
    for thread in threads:
        thread.join(30)
    return stores


def test_ranks_of_a_start_agree_whatever_earlier_starts_left():
    host_store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    with pytest.raises(errors.TrainingFault, match='ranks 1, 2 did not answer within 0.5 s'):  # dies while it waits
        store_of(host_store, 0, 3, timeout_s=0.5)
    for number, (world_size, order) in enumerate(((3, (1, 2, 0)), (2, (1, 0)), (4, (3, 0, 2, 1)), (2, (0, 1)))):
        stores = start_of(host_store, world_size, order)
        assert len(stores) == world_size
        stores[0].set('rank 0 says', str(number))
        assert all(store.get('rank 0 says') == str(number).encode() for store in stores.values())


def test_runs_that_share_a_store_do_not_meet(monkeypatch):
    """Two torchruns may have one --rdzv-endpoint, if their --rdzv-id differ."""
    server = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    wait = processes.Wait(5, is_logged=False)
    monkeypatch.setenv('TORCHELASTIC_USE_AGENT_STORE', 'True')
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    monkeypatch.setenv('MASTER_PORT', str(server.port))
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '0')
    stores = []
    for name in ('a', 'b', 'a'):
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', name)
        stores.append(processes.open_store('env://', 0, 2, wait))
    stores[0].set('first', 'of a')
    assert stores[0].get('first') == b'of a'  # set() does not wait for the server
    assert stores[2].check(['first']) and not stores[1].check(['first'])


def test_a_process_of_an_earlier_start_does_not_join_one_of_another_size():
    host_store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    old = threading.Thread(
        target=lambda: pytest.raises(errors.TrainingFault, store_of, host_store, 1, 3, timeout_s=3))
    old.start()
    assert len(start_of(host_store, 2, (0, 1))) == 2
    old.join()


def test_a_store_that_freezes_ends_the_process(tmp_path):
    """Without an answer of its host, torch's calls do not come back."""
    with socket.create_server(('127.0.0.1', 0)) as silent:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, '-c', 'import sys, processes; processes.threading.Timer = lambda s, end, timer='
             'processes.threading.Timer: timer(s - 30, end); processes.init_distributed("cpu", timeout_s=2)'],
            cwd=ROOT, capture_output=True, text=True, timeout=60, env={
                **ENVIRONMENT, 'RANK': '1', 'LOCAL_RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1',
                'MASTER_PORT': str(silent.getsockname()[1])})
    assert done.returncode == 1 and time.monotonic() - began < 40
    assert done.stderr.splitlines()[-1] == 'train.py: error: the store by which processes meet does not answer (32 s)'


@pytest.mark.parametrize('absent, port, host, status, words', [
    (0, None, '127.0.0.1', 1, r'rank 0 at 127.0.0.1:\d+ \(Connection refused\) did not answer within 1 s'),
    (0, None, 'no.host.invalid', 1, r'rank 0 at no.host.invalid:\d+ \(.*[Nn]ame.*\) did not answer within 1 s'),
    (1, None, 'no.host.invalid', 1, r'rank 0 at no.host.invalid:\d+ \(.*[Nn]ame.*\) did not answer within 1 s'),
    (1, None, '127.0.0.1', 1, r'rank 1 did not answer within 1 s \(--dist-timeout\)'),
    (1, 'taken', '127.0.0.1', 2, r'another process listens at 127.0.0.1:\d+: set MASTER_PORT to another port'),
], ids=['rank 0', 'unknown host', 'unknown name', 'rank 1', 'port'])
def test_a_rank_alone_gives_up_in_one_line(flags, tmp_path, absent, port, host, status, words):
    """Without torch's pages of C++ frames."""
    output = tmp_path / 'out.txt'
    with socket.create_server(('127.0.0.1', 0)) as taken:
        def before(rank):
            if rank == absent:
                os._exit(0)
            os.environ.update(LOCAL_RANK='0', MASTER_ADDR=host)
            if port:
                os.environ['MASTER_PORT'] = str(taken.getsockname()[1])

        ranks = nano.start([*flags, '--dist-timeout', '1'], ranks=2, output=output, before=before)
        nano.finish([ranks[1 - absent]], status=status)
    lines = output.read_text().splitlines()
    assert re.search(f'train.py: error: {words}', lines[-1])
    assert len(lines) == 1 if port else len(lines) == 2 and re.fullmatch(
        fr'(rank 1: )?waiting for rank ({absent}|0 at no.host).* until \d\d:\d\d:\d\d \(--dist-timeout 1\)', lines[0])


@pytest.mark.parametrize('number, words', [(signal.SIGKILL, '(closed|reset) by peer'), (signal.SIGSTOP, 'Timed out')])
def test_a_rank_that_loses_another_ends_with_a_line(flags, tmp_path, number, words):
    output = tmp_path / 'out.txt'
    ranks = nano.start(
        [*flags, '--dist-timeout', '3'], ranks=2, output=output, before=lambda rank: nano.at_step(
            pytest.MonkeyPatch(), 3, lambda: rank == 1 and os.kill(os.getpid(), number)))
    nano.finish(ranks[:1], status=1)
    ranks[1].kill()
    assert re.search(fr'\ntrain\.py: error: rank 0 lost another process \(.*({words}).*\)\n$', output.read_text())
    assert 'Traceback' not in output.read_text()


# two torchruns on one machine

@pytest.mark.parametrize('shared', [True, False], ids=['shared', 'own store'])
def test_a_worker_is_killed_while_the_other_is_in_a_long_step(flags, tmp_path, shared):
    """Each torchrun counts its own restarts: the ranks may not meet by that number."""
    run = [*flags, '--epochs', '2', '--resume', 'auto', '--save-every-steps', '1', '--dist-timeout', '20']
    nano.finish(nano.start([*run, '--output-dir', tmp_path / 'whole'], ranks=2))

    environment = {**ENVIRONMENT, **({} if shared else {'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})}
    endpoint = f'localhost:{free_port()}'
    outputs = [tmp_path / 'a.txt', tmp_path / 'b.txt']
    agents = []
    try:
        for output in outputs:
            with open(output, 'w') as file:
                agents.append(subprocess.Popen(
                    torchrun(2, endpoint, [*run, '--output-dir', tmp_path / 'run']), stdout=file,
                    stderr=subprocess.STDOUT, env=environment, start_new_session=True))
        wait_for((tmp_path / 'run' / 'checkpoint_last.pth').exists)
        stopped, killed = (children_of(agent.pid)[0] for agent in agents)
        os.kill(stopped, signal.SIGSTOP)
        os.kill(killed, signal.SIGKILL)
        time.sleep(3)
        os.kill(stopped, signal.SIGCONT)
        statuses = [agent.wait(120) for agent in agents]
        text = ''.join(output.read_text() for output in outputs)
        assert statuses == [0, 0], text[-5000:]
    finally:
        for agent in agents:
            for pid in (*children_of(agent.pid), agent.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert len(re.findall('resuming at epoch', text)) >= 1
    assert 'did not answer' not in text and 'cannot connect' not in text
    nano.assert_same_run(tmp_path / 'whole', tmp_path / 'run')


# hosts as network namespaces

needs_hosts = pytest.mark.skipif(bool(hosts.why_no_hosts()), reason=hosts.why_no_hosts() or '')


@needs_hosts
def test_two_hosts_train_as_two_local_ranks_do(flags, tmp_path):
    run = [*flags, '--epochs', '1']
    output = tmp_path / 'out.txt'
    with hosts.Hosts(['h1', 'h2']) as network:
        agents = [network.start(name, torchrun(2, 'h1:29500', [*run, '--output-dir', tmp_path / 'run']), output,
                                env=ENVIRONMENT) for name in ('h1', 'h2')]
        nano.finish(nano.start([*run, '--output-dir', tmp_path / 'local'], ranks=2))
        assert [agent.wait(120) for agent in agents] == [0, 0], output.read_text()[-5000:]
    nano.assert_same_run(tmp_path / 'local', tmp_path / 'run')


@pytest.mark.soak
@needs_hosts
def test_the_line_of_the_docs_runs_as_it_stands(images, tmp_path):
    """On two hosts, with eight processes of the real train.py on each."""
    page = (ROOT / 'docs' / 'training.md').read_text()
    command, = re.findall(r'^    (torchrun --nnodes .* train\.py) \.\.\.$', page, re.MULTILINE)
    flags = (f'--data-path {images} --output-dir {tmp_path}/run --model cmt_ti --input-size 32 --batch-size 2 '
             '--num-workers 0 --epochs 1 --cooldown-epochs 0').split()
    output = tmp_path / 'out.txt'
    environment = {**ENVIRONMENT, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    with hosts.Hosts(['HOST', 'n2']) as network:
        agents = [network.start(name, [*command.split(), *flags], output, env=environment, cwd=ROOT)
                  for name in ('HOST', 'n2')]
        assert [agent.wait(500) for agent in agents] == [0, 0], output.read_text()[-5000:]
    assert 'x 16 processes' in output.read_text() and [line['epoch'] for line in nano.log(tmp_path / 'run')] == [0]


@pytest.mark.soak
@needs_hosts
@pytest.mark.parametrize('disturb', ['late', 'kill', 'cut'])
def test_elastic_training_survives_what_happens_to_a_host(flags, tmp_path, disturb):
    """Rank 0 and the writer are on h1, the first name; the rendezvous is on h2.

    A host that joins late; a host that is lost; a host whose link is cut and mended, which is started again.
    """
    run = [*flags, '--epochs', '60', '--resume', 'auto', '--save-every-steps', '5', '--dist-timeout', '20']
    output, last = tmp_path / 'out.txt', tmp_path / 'run' / 'checkpoint_last.pth'
    command = torchrun('1:2', 'h2:29500', [*run, '--output-dir', tmp_path / 'run'],
                       '--rdzv-conf', 'last_call_timeout=5')
    environment = {**ENVIRONMENT, 'NANO_PAUSE': '0.3', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}

    def resumed(times):
        return lambda: output.read_text().count('resuming at epoch') >= times

    with hosts.Hosts(['h1', 'h2']) as network:
        def start(name):
            return network.start(name, command, output, env=environment)

        survivor = start('h2')
        if disturb != 'late':
            start('h1')
        wait_for(last.exists)
        if disturb == 'kill':
            network.kill_host('h1')
            wait_for(resumed(1))
        if disturb == 'cut':
            network.cut('h1')
            wait_for(resumed(1))
            network.mend('h1')
            network.kill_host('h1')
        if disturb != 'kill':
            start('h1')
            wait_for(resumed(2 if disturb == 'cut' else 1))
        assert survivor.wait(300) == 0, output.read_text()[-5000:]
    replay(run, starts_in(output.read_text()), tmp_path / 'replayed')
    nano.assert_same_run(tmp_path / 'replayed', tmp_path / 'run')


def starts_in(text: str) -> list[tuple[int, tuple[int, int]]]:
    """World sizes of a run's starts, and where they began: epoch and step."""
    position, starts = (0, 0), []
    for line in text.splitlines():
        if found := re.search(r'resuming at epoch (\d+), step (\d+)', line):
            position = int(found[1]), int(found[2])
        elif found := re.search(r'accumulated x (\d+) processes', line):
            starts.append((int(found[1]), position))
    return starts


def replay(run, starts, folder) -> None:
    """Train as those starts did, each to where the next one began, and nothing twice."""
    def stop_at(position):
        def before(rank):
            import train
            requested, stopped = train.requested_action, train.Run.stop_signal

            def is_there(run):
                return (run.state.epoch, run.state.step) == position
            train.requested_action = lambda run: train.STOP if is_there(run) else requested(run)
            train.Run.stop_signal = lambda run: signal.SIGTERM if is_there(run) else stopped(run)
        return before

    assert len(starts) > 1
    for (world_size, began), (_, end) in zip(starts, [*starts[1:], (None, None)]):
        if began != end:
            nano.finish(nano.start([*run, '--output-dir', folder], ranks=world_size, before=stop_at(end)), timeout=300)
