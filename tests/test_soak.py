"""The long forms of promises that the other tests keep in short: pytest -m soak tests/test_soak.py (about an hour)."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoints

ROOT = Path(__file__).parent.parent
RUN = [
    sys.executable, str(ROOT / 'tests/nano.py'), '--model', 'cmt_nano', '--data-set', 'DIGITS', '--input-size', '32',
    '--batch-size', '32', '--accum-steps', '2', '--epochs', '3', '--cooldown-epochs', '0', '--test-freq', '1',
    '--warmup-epochs', '1', '--lr', '4e-3', '--model-ema-decay', '0.9', '--drop-path', '0.2', '--save-every-steps', '3',
    '--resume', 'auto', '--device', 'cpu']
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}


def outcome(folder: Path) -> tuple[dict, list[dict]]:
    state = torch.load(folder / 'checkpoint_last.pth', weights_only=True)
    log = [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]
    for record in log:
        for key in ('train_images_per_s', 'epoch_seconds', 'memory_mb'):
            record.pop(key, None)
    return {key: state[key] for key in ('model', 'model_ema', 'optimizer', 'best')}, log


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """What the run ends with, and how long it takes."""
    folder = tmp_path_factory.mktemp('undisturbed')
    began = time.monotonic()
    subprocess.run([*RUN, '--num-workers', '0', '--output-dir', str(folder)], env=ENVIRONMENT, check=True)
    return outcome(folder), time.monotonic() - began


@pytest.mark.soak
@pytest.mark.parametrize('workers', [0, 1, 3])
def test_killed_at_twenty_points(undisturbed, workers, tmp_path):
    """SIGKILL at random moments of its work, in training, saving and evaluation: the bits of a run left alone."""
    expected, seconds = undisturbed
    draw = random.Random(workers)
    kills = 0
    while True:
        process = subprocess.Popen(
            [*RUN, '--num-workers', str(workers), '--output-dir', str(tmp_path)], env=ENVIRONMENT,
            stdout=subprocess.PIPE, text=True, start_new_session=True)
        line = ''
        while 'learning rate' not in line and process.poll() is None:  # start-up is not what is tried here
            line = process.stdout.readline()
        try:
            process.communicate(timeout=draw.uniform(0, 0.4 * seconds) if kills < 20 else 10 * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0
        if kills < 20:  # done before it could be killed as often: all over again, kills are counted on
            assert same(outcome(tmp_path), expected)
            shutil.rmtree(tmp_path)
            continue
        break
    assert same(outcome(tmp_path), expected)


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
