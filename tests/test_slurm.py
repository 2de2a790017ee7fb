"""scripts/slurm.sbatch with stand-ins for SLURM's commands, and with a real cluster (soak)."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hosts
import nano

SCRIPT = Path(nano.__file__).parent.parent / 'scripts' / 'slurm.sbatch'
EPOCHS = ('--epochs', '4', '--print-freq', '1')
SIZE = ('--nodes=2', '--gpus-per-node=1', '--cpus-per-task=1')


def folder_with_train_py(folder: Path) -> Path:
    """Make a folder to submit jobs from, with a train.py that knows cmt_nano."""
    folder.mkdir(exist_ok=True)
    (folder / 'train.py').write_text(f'import runpy\nrunpy.run_path({nano.__file__!r}, run_name="__main__")\n')
    return folder


# restart, requeue or give up

@pytest.fixture
def script(tmp_path):
    """Return a function that runs the script with a stand-in for srun, and returns status, calls and stderr."""
    folder = folder_with_train_py(tmp_path / 'repository')
    commands = tmp_path / 'bin'
    commands.mkdir()

    def run(srun, *argv, cwd=folder, **variables):
        for name, text in (('srun', srun), ('scontrol', ':')):
            (commands / name).write_text(f'#!/bin/bash\necho {name} "$@" >>{tmp_path}/calls\n{text}\n')
            (commands / name).chmod(0o755)
        (tmp_path / 'calls').write_text('')
        variables = {'SLURM_JOB_ID': 7, 'SLURM_JOB_NUM_NODES': 2, 'SLURM_CPUS_ON_NODE': 96, **variables}
        done = subprocess.run(
            ['bash', SCRIPT, *argv], cwd=cwd, capture_output=True, text=True, timeout=60,
            env={**os.environ, 'PATH': f'{commands}:{os.environ["PATH"]}', **{k: str(v) for k, v in variables.items()}})
        return done.returncode, (tmp_path / 'calls').read_text().splitlines(), done.stderr
    return run


STOPPED = 'while [ "$1" != --stopped-file ]; do shift; done; touch "$2";'
REQUEUE = 'scontrol requeue 7'


@pytest.mark.parametrize('srun, status, attempts, requeued', [
    ('exit 0', 0, 1, False),
    ('exit 2', 2, 1, False),  # a mistake
    ('exit 1', 1, 4, False),  # a fault
    ('exit 233', 233, 1, True),  # a node on which nothing can be launched
    ('trap "" USR1; kill -USR1 $PPID; sleep 0.5; exit 0', 0, 1, False),  # it has done its last epoch
    ('trap "" USR1; kill -USR1 $PPID; sleep 0.5;' + STOPPED + 'exit 0', 0, 1, True),
    ('trap "" USR1; kill -USR1 $PPID; sleep 0.5; exit 138', 138, 1, True),  # before it could save
    (STOPPED + 'exit 0', 0, 1, False),  # a signal from the user
])
def test_a_job_restarts_or_is_requeued_only_if_that_helps(script, srun, status, attempts, requeued):
    result, calls, _ = script(srun, '--model', 'cmt_b')
    assert (result, sum(call.startswith('srun') for call in calls), REQUEUE in calls) == (status, attempts, requeued)
    assert 'python train.py --resume auto' in calls[0] and calls[0].endswith('--model cmt_b')


def test_a_warning_reaches_the_processes(script):
    srun = 'trap "echo warned >&2; exit 0" USR1; kill -USR1 $PPID; for i in {1..50}; do sleep 0.1; done; exit 1'
    assert script(srun)[::2] == (0, 'warned\n')


@pytest.mark.parametrize('variables, processes, cpus, threads', [
    ({'SLURM_GPUS_ON_NODE': 8}, 8, 12, 1),
    ({}, 1, 96, 96),  # no GPUs
    ({'GPUS_PER_NODE': 2}, 2, 48, 48),
    ({'SLURM_GPUS_ON_NODE': 8, 'SLURM_CPUS_PER_TASK': 12, 'SLURM_NTASKS_PER_NODE': 8}, 8, 12, 1),
])
def test_each_gpu_has_a_process(script, variables, processes, cpus, threads):
    status, (call,), stderr = script(
        'echo threads $OMP_NUM_THREADS $SLURM_GPUS_PER_NODE$SLURM_NTASKS_PER_NODE$SLURM_CPUS_PER_TASK >&2',
        OMP_NUM_THREADS='', SLURM_GPUS_PER_NODE=8, **variables)
    assert stderr == f'threads {threads}\n'
    assert f'--nodes=2 --ntasks-per-node={processes} --cpus-per-task={cpus} --kill-on-bad-exit=0' in call


@pytest.mark.parametrize('flag', [['--output-dir', 'out/seed_%a'], ['--output_dir=out/seed_%a']])
def test_tasks_of_an_array_have_different_folders(script, flag):
    status, calls, _ = script('exit 0', '--resume', 'auto', '--seed', '%a', *flag, SLURM_ARRAY_TASK_ID=3)
    assert status == 0 and calls[0].endswith(f'--seed 3 {" ".join(flag).replace("%a", "3")}')


@pytest.mark.parametrize('argv, more, words', [
    (['--seed', '%a', '--output-dir', 'out'], {'SLURM_ARRAY_TASK_ID': 3}, '--output-dir .*%a'),
    (['--resume', 'x.pth'], {}, '--resume'), (['--resume=x.pth', '--lr', '1'], {}, '--resume'),
    ([], {'cwd': '/'}, 'train.py.*--chdir')])
def test_a_job_that_could_not_resume_itself_is_refused(script, argv, more, words):
    status, calls, stderr = script('exit 0', *argv, **more)
    assert status == 2 and not calls and re.fullmatch(f'slurm.sbatch: .*{words}.*\n', stderr)


def test_a_node_that_never_launches_does_not_requeue_forever(script):
    assert REQUEUE not in script('exit 233', SLURM_RESTART_COUNT=20)[1]


# a real cluster

def soak(function):
    reason = hosts.why_no_slurm()
    return pytest.mark.soak(pytest.mark.skipif(bool(reason), reason=reason or '')(function))


class Cluster(hosts.Slurm):
    """A cluster whose jobs train cmt_nano."""

    def __init__(self, folder, **keywords):
        super().__init__(folder / 'slurm', **keywords)
        self.repository = folder_with_train_py(folder / 'repository')
        (self.repository / 'scripts').symlink_to(SCRIPT.parent)
        self.env['PATH'] = f'{Path(sys.executable).parent}:{self.env["PATH"]}'
        self.env['OMP_NUM_THREADS'] = '1'

    def train(self, flags, *sbatch, pause=0.2) -> str:
        """Submit scripts/slurm.sbatch with `flags` and a `pause` of seconds in each step; return the job."""
        return self.submit(*SIZE, *sbatch, 'scripts/slurm.sbatch', *flags, cwd=self.repository,
                           env={'NANO_PAUSE': str(pause)})

    def log(self, job) -> str:
        path = self.repository / f'slurm-{job}.log'
        return path.read_text() if path.exists() else ''

    def until(self, job, words) -> None:
        nano.wait_for(lambda: words in self.log(job), seconds=120)

    def finish(self, job) -> str:
        end = self.wait_for(job, 'COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT')
        assert end['JobState'] == 'COMPLETED', (end, self.log(job))
        return self.log(job)

    def run_again(self, job) -> None:
        """Start a requeued job, which would wait for two minutes."""
        self.wait_for(job, 'PENDING')
        time.sleep(2)  # SLURM refuses to start a job within the second of its kill.
        assert self.run('scontrol', 'update', f'JobId={job}', 'StartTime=now').returncode == 0


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp('cluster'), more='SlurmdTimeout=20\nKillWait=30') as started:
        yield started


@pytest.fixture(scope='module')
def undisturbed(flags, tmp_path_factory):
    """The folder of a local run with two ranks."""
    folder = tmp_path_factory.mktemp('undisturbed')
    nano.finish(nano.start([*flags, *EPOCHS, '--output-dir', folder], ranks=2))
    return folder


@soak
@pytest.mark.parametrize('what', [
    'nothing', 'warning', 'time limit', 'requeue', 'process', 'node'])
def test_a_job_ends_with_the_bits_of_an_undisturbed_run(cluster, flags, undisturbed, tmp_path, what):
    more = ['--time=2', '--signal=B:USR1@90'] if what == 'time limit' else ['--time=60']
    run = [*flags, *EPOCHS, '--save-every-steps', '2', '--output-dir', tmp_path / 'run']
    job = cluster.train(run, *more, pause=4 if what == 'time limit' else 0.5)
    if what == 'time limit':  # SLURM warns up to 60 s early.
        cluster.until(job, 'back into the queue')
    elif what != 'nothing':
        cluster.until(job, 'epoch 1/3  step 1/3')
    if what == 'warning':
        cluster.run('scancel', '--batch', '--signal=USR1', job)
    if what == 'requeue':
        cluster.run('scontrol', 'requeue', job)
    if what == 'process':
        pids = [pid for pid in cluster.pids('n2') if 'train.py' in Path(f'/proc/{pid}/cmdline').read_text()]
        os.kill(max(pids), signal.SIGKILL)
    if what == 'node':
        cluster.kill_host('n2')
        cluster.wait_for(job, 'PENDING')
        cluster.start_node('n2')
        time.sleep(10)  # SLURM is still ending the job's first start on n2.
    if what in ('warning', 'time limit', 'requeue', 'node'):
        cluster.run_again(job)
    text = cluster.finish(job)
    assert ('resuming at epoch' in text) == (what != 'nothing')
    assert 'Traceback' not in text and ('train.py: error: rank' in text) == (what in ('process', 'node'))
    nano.assert_same_run(undisturbed, tmp_path / 'run')
