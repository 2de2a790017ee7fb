"""Hosts on one machine: network namespaces with their own names and addresses, and a SLURM cluster on them."""
import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path


def ip(*arguments, check=True) -> str:
    return subprocess.run(['ip', *arguments], check=check, capture_output=True, text=True).stdout


def why_no_hosts() -> str | None:
    """Return why this machine cannot have hosts, or None if it can."""
    if os.geteuid() != 0:
        return 'network namespaces need root'
    missing = [command for command in ('ip', 'unshare', 'hostname') if not shutil.which(command)]
    if missing:
        return f'{missing[0]} is not installed'
    with contextlib.suppress(subprocess.CalledProcessError):
        ip('netns', 'add', f'cmt{os.getpid()}')
        ip('netns', 'del', f'cmt{os.getpid()}')
        return None
    return 'network namespaces cannot be made here'


NUMBERS = itertools.count()

GUARD = '''
tail --pid="$0" -f /dev/null
for name; do
    while pids=$(ip netns pids "$name") && [ -n "$pids" ]; do kill -KILL $pids; sleep 0.1; done
    ip netns del "$name"
    rm -rf "/etc/netns/$name"
done
'''


class Hosts:
    """Network namespaces of the given names, joined by a bridge: 10.77.0.1, .2, ... and no other network."""

    def __init__(self, names: list[str]):
        self.address = {name: f'10.77.0.{number}' for number, name in enumerate(names, 1)}
        self.bridge = f'cmt{os.getpid()}.{next(NUMBERS)}'

    def namespace(self, name: str) -> str:
        return f'{self.bridge}-{name}'

    def __enter__(self):
        # The guard removes the hosts if this process is killed. Its own session protects it from Ctrl-C.
        self.guard = subprocess.Popen(
            ['sh', '-c', GUARD, str(os.getpid()), *map(self.namespace, self.address), self.bridge],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            ip('netns', 'add', self.bridge)
            ip('-n', self.bridge, 'link', 'add', 'bridge', 'type', 'bridge')
            ip('-n', self.bridge, 'link', 'set', 'bridge', 'up')
            entries = ''.join(f'{address} {name}\n' for name, address in self.address.items())
            for name, address in self.address.items():
                namespace = self.namespace(name)
                ip('netns', 'add', namespace)
                folder = Path('/etc/netns') / namespace
                folder.mkdir(parents=True)
                (folder / 'hosts').write_text('127.0.0.1 localhost\n' + entries)
                ip('-n', self.bridge, 'link', 'add', 'name', name, 'type', 'veth',
                   'peer', 'name', 'eth0', 'netns', namespace)
                ip('-n', self.bridge, 'link', 'set', 'dev', name, 'master', 'bridge', 'up')
                ip('-n', namespace, 'address', 'add', f'{address}/24', 'dev', 'eth0')
                ip('-n', namespace, 'link', 'set', 'eth0', 'up')
                ip('-n', namespace, 'link', 'set', 'lo', 'up')
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        for name in self.address:
            self.kill_host(name)
        for name in [*map(self.namespace, self.address), self.bridge]:
            ip('netns', 'del', name, check=False)
            shutil.rmtree(Path('/etc/netns') / name, ignore_errors=True)
        os.killpg(self.guard.pid, signal.SIGKILL)
        self.guard.wait()

    def start(self, name: str, command: list[str], output: Path, env=None, cwd=None) -> subprocess.Popen:
        """Start a command on a host, and append what it prints to `output`."""
        with open(output, 'a') as file:
            return subprocess.Popen(
                ['ip', 'netns', 'exec', self.namespace(name), 'unshare', '--uts', 'sh', '-c',
                 'hostname "$0"; exec "$@"', name, *map(str, command)],
                stdout=file, stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True)

    def pids(self, name: str) -> list[int]:
        return [int(pid) for pid in ip('netns', 'pids', self.namespace(name), check=False).split()]

    def kill_host(self, name: str) -> None:
        """Kill all processes of a host, as a power failure does."""
        while pids := self.pids(name):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


def why_no_slurm() -> str | None:
    """Return why this machine cannot have a SLURM cluster, or None if it can."""
    missing = [command for command in ('slurmctld', 'slurmd', 'sbatch', 'munged') if not shutil.which(command)]
    return why_no_hosts() or (f'{missing[0]} is not installed (Debian: slurm-wlm, munge)' if missing else None)


CONFIGURATION = """
ClusterName=test
SlurmctldHost=ctl(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SchedulerParameters=sched_interval=5,bf_interval=5
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm(Hosts):
    """A SLURM cluster: slurmctld on host ctl, a slurmd on each of n1, n2, ...

    Args:
        folder: for configuration, state and logs; the hosts share it, like all files.
        nodes: number of nodes with 2 CPUs each.
        gpus: number of simulated GPUs a node.
        more: further lines of slurm.conf.
    """

    def __init__(self, folder: Path, nodes: int = 2, gpus: int = 2, more: str = 'SlurmdTimeout=30\nKillWait=30'):
        self.nodes = [f'n{number}' for number in range(1, nodes + 1)]
        super().__init__(['ctl', *self.nodes])
        self.folder = folder
        for name in ('state', *(f'spool/{node}' for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        node = f'NodeName=n[1-{nodes}] CPUs=2 RealMemory=4000 State=UNKNOWN'
        if gpus:
            for number in range(gpus):
                (folder / f'gpu{number}').touch()
            (folder / 'gres.conf').write_text(f'NodeName=n[1-{nodes}] Name=gpu File={folder}/gpu[0-{gpus - 1}]\n')
            node = f'GresTypes=gpu\n{node} Gres=gpu:{gpus}'
        (folder / 'cgroup.conf').write_text('CgroupPlugin=cgroup/v1\n')
        (folder / 'slurm.conf').write_text(f'{CONFIGURATION.format(folder=folder)}{node}\n{more}\n')
        self.env = {**os.environ, 'SLURM_CONF': str(folder / 'slurm.conf')}

    def __enter__(self):
        super().__enter__()
        try:
            self.start_munged()
            self.start('ctl', ['slurmctld', '-D'], self.folder / 'out.txt', env=self.env)
            for node in self.nodes:
                self.start_node(node)
            self.wait_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def start_munged(self) -> None:
        """Start a munged with its own key and socket, so that two test runs share nothing."""
        folder = self.folder / 'munge'
        folder.mkdir(mode=0o711)
        (folder / 'key').touch(0o600)
        (folder / 'key').write_bytes(os.urandom(128))
        files = [f'--{name}-file={folder}/{name}' for name in ('key', 'pid', 'log', 'seed')]
        self.start('ctl', ['munged', '--foreground', '--force', f'--socket={folder}/socket', *files],
                   self.folder / 'out.txt')
        deadline = time.monotonic() + 30
        while subprocess.run(['munge', '-n', f'--socket={folder}/socket'], capture_output=True).returncode:
            assert time.monotonic() < deadline, (self.folder / 'out.txt').read_text()
            time.sleep(0.1)

    def start_node(self, node: str) -> None:
        self.start(node, ['slurmd', '-D', '-N', node], self.folder / 'out.txt', env=self.env)

    def run(self, *command, env=None, cwd=None, timeout=60) -> subprocess.CompletedProcess:
        """Run a command on host ctl."""
        return subprocess.run(
            ['ip', 'netns', 'exec', self.namespace('ctl'), 'unshare', '--uts', 'sh', '-c', 'hostname ctl; exec "$@"',
             'sh', *map(str, command)], env={**self.env, **(env or {})}, cwd=cwd, timeout=timeout, text=True,
            capture_output=True)

    def submit(self, *command, **keywords) -> str:
        """Submit a job by sbatch, and return its number."""
        done = self.run('sbatch', '--parsable', *command, **keywords)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        return dict(re.findall(r'(\S+?)=(\S*)', self.run('scontrol', 'show', 'job', '-o', job).stdout))

    def wait_for(self, job: str, *states: str, timeout: float = 300) -> dict[str, str]:
        """Wait until a job is in one of `states`."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)).get('JobState') not in states:
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
        return state

    def wait_idle(self, timeout: float = 60) -> None:
        """Wait until all nodes are idle."""
        deadline = time.monotonic() + timeout
        while self.run('sinfo', '-h', '-N', '-o', '%T').stdout.split() != ['idle'] * len(self.nodes):
            assert time.monotonic() < deadline, self.run('sinfo', '-N').stdout
            time.sleep(0.5)
