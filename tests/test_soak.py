"""The long form of a promise: pytest -m soak tests/test_soak.py (about three minutes)."""
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoints

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}

WRITER = '''
import sys, torch
sys.path.insert(0, {root!r})
from checkpoints import RunWriter
writer = RunWriter({folder!r})
for number in range(1000):
    writer.save({{'number': number, 'weights': torch.full((4_000_000,), float(number))}}, ('checkpoint_best.pth',))
    writer.wait()
    print(number, flush=True)
'''


@pytest.mark.soak
def test_killed_at_fifty_byte_counts(tmp_path):
    """SIGKILL when the file being written has reached a random size: there is always a whole one."""
    draw = random.Random(0)
    for _ in range(50):
        folder = tmp_path / 'run'
        folder.mkdir()
        process = subprocess.Popen(
            [sys.executable, '-c', WRITER.format(root=str(ROOT), folder=str(folder))], env=ENVIRONMENT,
            stdout=subprocess.PIPE, text=True)
        for _ in range(draw.randint(1, 3)):
            written = int(process.stdout.readline())
        size, name = draw.randint(0, 16_000_000), draw.choice(('.checkpoint_last.pth.tmp', '.checkpoint_best.pth.tmp'))
        while True:
            try:
                if (folder / name).stat().st_size >= size:
                    break
            except FileNotFoundError:
                pass
        process.kill()
        process.communicate()
        for path in (checkpoints.newest_checkpoint(folder)[0], folder / 'checkpoint_best.pth'):
            state = checkpoints.read_checkpoint(path)
            assert state['number'] >= written
            assert state['weights'].eq(state['number']).all()
        shutil.rmtree(folder)
