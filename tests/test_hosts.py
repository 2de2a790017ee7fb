"""Several hosts: ranks that meet, and training that survives the loss of a host."""
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

import errors
import hosts
import nano
import processes

ROOT = Path(nano.__file__).parent.parent
NODES = '--nproc-per-node 1 --rdzv-backend c10d --rdzv-id test'


# a store for each launch

def join(host_store, rank, world_size, timeout_s=20):
    client = dist.TCPStore('127.0.0.1', host_store.port, is_master=False)
    wait = processes.Wait(timeout_s, is_logged=False)
    return processes.launch_store(client, rank, world_size, wait)


def join_all(host_store, world_size, order):
    """Let ranks join in `order`, some time apart; return the stores that they get."""
    with ThreadPoolExecutor(world_size) as pool:
        stores = []
        for rank in order:
            stores.append(pool.submit(join, host_store, rank, world_size))
            time.sleep(0.3)
        return [store.result(30) for store in stores]


def test_ranks_agree_whatever_earlier_launches_left():
    host_store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    with pytest.raises(errors.TrainingFault, match='ranks 1, 2 '):  # Rank 0 of this launch ends while it waits.
        join(host_store, 0, 3, timeout_s=0.5)
    with ThreadPoolExecutor(1) as pool:
        stale = pool.submit(join, host_store, 1, 9, timeout_s=3)
        for number, (world_size, order) in enumerate(((3, (1, 2, 0)), (2, (1, 0)), (4, (3, 0, 2, 1)), (2, (0, 1)))):
            stores = join_all(host_store, world_size, order)
            stores[0].set('this launch is', str(number))
            assert all(store.get('this launch is') == str(number).encode() for store in stores)
        assert isinstance(stale.exception(), errors.TrainingFault)


def test_runs_that_share_a_store_do_not_meet(monkeypatch):
    """Two torchruns may share one --rdzv-endpoint if their --rdzv-id differ."""
    server = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    wait = processes.Wait(5, is_logged=False)
    for name, value in dict(TORCHELASTIC_USE_AGENT_STORE=True, MASTER_ADDR='127.0.0.1', MASTER_PORT=server.port,
                            WORLD_SIZE=2, RANK=0).items():
        monkeypatch.setenv(name, str(value))
    stores = []
    for name in ('a', 'b', 'a'):
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', name)
        stores.append(processes.open_store('env://', 0, 2, wait))
    stores[0].set('first', 'a')
    assert stores[0].get('first') == b'a'  # set() does not wait for the server
    assert stores[2].check(['first']) and not stores[1].check(['first'])


def test_a_store_that_freezes_ends_the_process(tmp_path):
    """torch's calls do not return if the host does not answer."""
    with socket.create_server(('127.0.0.1', 0)) as silent:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, '-c', 'import threading, processes; threading.Timer = lambda s, end, timer='
             'threading.Timer: timer(s - 30, end); processes.init_distributed("cpu", timeout_s=2)'],
            cwd=ROOT, capture_output=True, text=True, timeout=60, env={
                **nano.ENVIRONMENT, 'RANK': '1', 'LOCAL_RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1',
                'MASTER_PORT': str(silent.getsockname()[1])})
    assert done.returncode == 1 and time.monotonic() - began < 40
    assert ': error: ' in done.stderr.splitlines()[-1] and 'Traceback' not in done.stderr


@pytest.mark.parametrize('absent, port, host, status, words', [
    (0, None, '127.0.0.1', 1, r'rank 0 at 127.0.0.1:\d+ \(Connection refused\)'),
    (1, None, 'no.host.invalid', 1, r'rank 0 at no.host.invalid:\d+ \(.*[Nn]ame'),
    (1, None, '127.0.0.1', 1, 'rank 1 .*--dist-timeout'),
    (1, 'taken', '127.0.0.1', 2, r'127.0.0.1:\d+.* MASTER_PORT'),
], ids=['rank 0', 'unknown host', 'rank 1', 'port'])
def test_a_rank_alone_gives_up_in_one_line(flags, tmp_path, absent, port, host, status, words):
    """Without pages of torch's C++ frames."""
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


def listening_ports() -> dict[int, str]:
    """Map the TCP ports at which this process listens to their addresses, in hexadecimal."""
    inodes = {os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')
              if os.path.lexists(f'/proc/self/fd/{fd}')}
    rows = [line.split() for name in ('tcp', 'tcp6') for line in Path('/proc/net', name).read_text().splitlines()[1:]]
    return {int(row[1].split(':')[1], 16): row[1].split(':')[0] for row in rows
            if row[3] == '0A' and f'socket:[{row[9]}]' in inodes}


@pytest.mark.parametrize('ranks', [1, 2])
def test_ports_are_as_documented(flags, tmp_path, ranks):
    """One process listens nowhere, rank 0 of several at MASTER_PORT on all interfaces."""
    def report(rank):
        if rank == 0:
            (tmp_path / 'ports.json').write_text(json.dumps([os.environ.get('MASTER_PORT'), listening_ports()]))

    run = [*flags, '--epochs', 1]
    nano.finish(nano.start(run, ranks, before=lambda rank: nano.at_step(1, lambda: report(rank))))
    port, ports = json.loads((tmp_path / 'ports.json').read_text())
    assert ports == {} if ranks == 1 else set(ports[port]) == {'0'}
    text = (ROOT / 'docs' / 'clusters.md').read_text().split('## Ports and networks')[1].split('\n## ')[0]
    assert 'MASTER_PORT' in text and 'opens no port' in text and '**all** network interfaces' in text


# torchrun on one machine

@pytest.mark.parametrize('options, env', [
    ('--nproc-per-node 2', {}), (f'{NODES} --nnodes 2', {}),
    (f'{NODES} --nnodes 2', {'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})], ids=['one', 'two', 'two with own stores'])
def test_torchrun_survives_the_kill_of_a_worker(flags, pair, tmp_path, options, env):
    """While the other worker is in a long step. Ranks cannot meet by the restart count, which each torchrun keeps."""
    last, output = tmp_path / 'run' / 'checkpoint_last.pth', tmp_path / 'out.txt'
    command = nano.torchrun(f'{options} --rdzv-endpoint localhost:{nano.free_port()}', [
        *flags, '--epochs', 2, '--resume', 'auto', '--save-every-steps', 1, '--dist-timeout', 20,
        '--output-dir', last.parent])
    with open(output, 'w') as file:
        agents = [subprocess.Popen(command, stdout=file, stderr=file, env={**nano.ENVIRONMENT, **env})
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
def test_the_command_of_the_docs_runs_verbatim(images, tmp_path):
    """On two hosts, with eight processes of the real train.py on each."""
    page = (ROOT / 'docs' / 'training.md').read_text()
    command, = re.findall(r'^    (torchrun --nnodes .* train\.py) \.\.\.$', page, re.MULTILINE)
    flags = (f'--data-path {images} --output-dir {tmp_path}/run --model cmt_ti --input-size 32 --batch-size 2 '
             '--num-workers 0 --epochs 1 --cooldown-epochs 0').split()
    output = tmp_path / 'out.txt'
    environment = {**nano.ENVIRONMENT, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    with hosts.Hosts(['HOST', 'n2']) as network:
        agents = [network.start(name, [*command.split(), *flags], output, env=environment, cwd=ROOT)
                  for name in ('HOST', 'n2')]
        assert [agent.wait(500) for agent in agents] == [0, 0], output.read_text()[-5000:]
    assert 'x 16 processes' in output.read_text() and nano.epochs(tmp_path / 'run') == [0]


@pytest.mark.soak
@needs_hosts
@pytest.mark.parametrize('disturb', ['late', 'kill', 'cut'])
def test_elastic_training_survives_the_loss_of_a_host(flags, tmp_path, disturb):
    """Rank 0 and the writer are on h1, the first name; the rendezvous is on h2.

    h1 joins late, is lost, or is restarted after its link was cut.
    """
    run = [*flags, '--epochs', '60', '--resume', 'auto', '--save-every-steps', '5', '--dist-timeout', '20']
    output, last = tmp_path / 'out.txt', tmp_path / 'run' / 'checkpoint_last.pth'
    command = nano.torchrun(f'{NODES} --nnodes 1:2 --rdzv-endpoint h2:29500 --rdzv-conf last_call_timeout=5',
                            [*run, '--output-dir', tmp_path / 'run'])
    environment = {**nano.ENVIRONMENT, 'NANO_PAUSE': '0.3', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}

    def resumed(times):
        return lambda: output.read_text().count('resuming at epoch') >= times

    with hosts.Hosts(['h1', 'h2']) as network:
        def start(name):
            return network.start(name, command, output, env=environment)

        survivor = start('h2')
        if disturb != 'late':
            start('h1')
        nano.wait_for(last.exists)
        if disturb == 'kill':
            network.kill_host('h1')
            nano.wait_for(resumed(1))
        if disturb == 'cut':
            network.set_link('h1', 'down')
            nano.wait_for(resumed(1))
            network.set_link('h1', 'up')
            network.kill_host('h1')
        if disturb != 'kill':
            start('h1')
            nano.wait_for(resumed(2 if disturb == 'cut' else 1))
        assert survivor.wait(300) == 0, output.read_text()[-5000:]
    replay(run, launches(output.read_text()), tmp_path / 'replayed')
    nano.assert_same_run(tmp_path / 'replayed', tmp_path / 'run')


def launches(text: str) -> list[tuple[int, tuple[int, int]]]:
    """Return the world size of each launch of a run, and the epoch and step where it began."""
    position, result = (0, 0), []
    for line in text.splitlines():
        if resumed := re.search(r'resuming at epoch (\d+), step (\d+)', line):
            position = int(resumed[1]), int(resumed[2])
        elif described := re.search(r'accumulated x (\d+) processes', line):
            result.append((int(described[1]), position))
    return result


def replay(run, launched, folder) -> None:
    """Train as those launches did, each to where the next one began, and nothing twice."""
    def stop_at(end, epoch, step):
        def before(rank):
            position = [epoch, step]

            def move(*new):
                position[:] = new
                if rank == 0 and new == end:
                    signal.raise_signal(signal.SIGTERM)

            register_optimizer_step_pre_hook(lambda *_: move(position[0], position[1] + 1))
            nano.on_log(lambda: move(position[0] + 1, 0))
        return before

    assert len(launched) > 1
    for (world_size, began), (_, end) in zip(launched, [*launched[1:], (None, None)]):
        if began != end:
            ranks = nano.start([*run, '--output-dir', folder], world_size, before=stop_at(end, *began))
            nano.finish(ranks, timeout=300)
