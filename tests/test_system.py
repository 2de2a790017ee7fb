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


def test_affinity_limits_the_cores(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0})
    assert system.cores() == 1


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
