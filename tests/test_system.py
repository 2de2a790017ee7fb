"""What differs between operating systems, file systems and containers."""
import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import nano
import system

ROOT = Path(__file__).parent.parent


def test_a_share_that_cannot_sync_folders_is_enough(flags, whole, tmp_path, monkeypatch):
    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    sync = os.fsync
    monkeypatch.setattr(os, 'fsync', refuse)
    nano.train([*flags, '--output-dir', tmp_path / 'run'])
    nano.assert_same_run(whole, tmp_path / 'run')


# Cores

def tree(root, groups, **files):
    """Write /proc/self/cgroup with the lines `groups`, and files below /sys/fs/cgroup."""
    for name, text in {'proc/self/cgroup': groups, **{f'sys/fs/cgroup/{k}': v for k, v in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize('groups, files, expected', [
    ('', {}, 64),
    ('0::/\n', {'cpu.max': '200000 100000\n'}, 2),  # a container with a view of its own, version 2
    ('0::/\n', {'cpu.max': 'max 100000\n'}, 64),
    ('0::/user.slice/job\n', {'user.slice/cpu.max': '350000 100000', 'user.slice/job/cpu.max': 'max 100000'}, 4),
    ('4:cpuacct,cpu:/docker/abc\n', {'cpu/cpu.cfs_quota_us': '300000', 'cpu/cpu.cfs_period_us': '100000'}, 3),
    ('4:cpu:/a/b\n', {'cpu/a/cpu.cfs_quota_us': '150000', 'cpu/a/cpu.cfs_period_us': '50000',
                      'cpu/a/b/cpu.cfs_quota_us': '-1', 'cpu/a/b/cpu.cfs_period_us': '100000'}, 3)])
def test_the_quota_of_a_container_limits_the_cores(tmp_path, monkeypatch, groups, files, expected):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(64))
    tree(tmp_path, groups, **files)
    assert system.cores(tmp_path) == expected
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(2))
    assert system.cores(tmp_path) == min(expected, 2)


# Help

SCRIPTS = ['train.py', *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('scripts/[!_]*.py'))]
LOADED = '''import pathlib, runpy, sys
script, sys.argv = sys.argv[1], sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(script).parent))
try:
    runpy.run_path(script, run_name='__main__')
except SystemExit as stop:
    print(stop.code, *sorted({'torch', 'numpy', 'timm', 'matplotlib'} & set(sys.modules)), file=sys.stderr)
'''


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_and_wrong_flags_wait_for_no_import(script, tmp_path):
    for flag, status in (('--help', 0), ('--no-such-flag', 2)):
        result = subprocess.run([sys.executable, '-c', LOADED, ROOT / script, flag], capture_output=True, text=True,
                                cwd=tmp_path, timeout=60)
        assert result.stderr.splitlines()[-1] == str(status), result.stderr
        assert ('usage:' in result.stdout) == (flag == '--help')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('script', ['quickstart.sh', 'test.sh', 'slurm.sbatch'])
def test_help_of_shell_scripts_makes_no_environment(script, tmp_path):
    result = subprocess.run(['bash', ROOT / 'scripts' / script, '--help'], capture_output=True, text=True, timeout=10,
                            env={**os.environ, 'VENV': str(tmp_path / 'venv'), 'PYTHON': '/bin/false'})
    assert result.returncode == 0 and result.stdout.startswith(('bash', 'sbatch')) and not result.stderr
    assert not list(tmp_path.iterdir())
