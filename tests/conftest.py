"""Fixtures of small real runs: a folder of images, their flags, and an undisturbed run.

To add a test, put it into the file of its subject and name it as a sentence that can be false. Run the real code on
small data: nano.train(flags) in this process, nano.start(flags, ranks=2) in processes that may be killed,
nano.small() for a model without a run. Break the code once and see the test fail. Mark minutes as `soak`.
"""
import logging
import os
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import nano

os.environ.setdefault('OMP_NUM_THREADS', '1')  # for subprocesses
torch.set_num_threads(1)  # for this process and its forks, so that bits can be compared
# autograd chooses its threads at the first backward pass. After a compilation it starts some, which break forks.
torch.ones(1, requires_grad=True).backward()


@pytest.fixture(autouse=True)
def _restore_process():
    """Undo what main() changes: signal handlers, loggers, sys.argv."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    argv = sys.argv
    yield
    sys.argv = argv
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logging.captureWarnings(False)
    logging.root.handlers = []
    logging.root.setLevel(logging.WARNING)


@pytest.fixture
def mistake(tmp_path, monkeypatch, capsys):
    """Return a function from a script and its flags to the line of its error; the script must write nothing else."""
    def files():
        return {path: path.is_file() and path.stat().st_mtime_ns for path in tmp_path.rglob('*')}

    def run(script, *argv):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', [f'{script.__name__}.py', *map(str, argv)])
        capsys.readouterr()
        before = files()
        with pytest.raises(SystemExit) as stop:
            script.main()
        printed = capsys.readouterr()
        prefix = f'{script.__name__}.py: error: '
        assert stop.value.code == 2 and not printed.out and files() == before
        assert printed.err.startswith(prefix) and printed.err.endswith('\n') and printed.err.count('\n') == 1
        return printed.err.removeprefix(prefix)
    return run


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """100 training and 27 validation images of 8 x 8 pixels, PNG and JPEG, in three classes."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, counts in (('train', (40, 24, 36)), ('val', (8, 9, 10))):
        for label, count in enumerate(counts):
            folder = root / split / f'class_{label}'
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (8, 8, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / f'{i:02d}.{"jpg" if i % 4 == 0 else "png"}', quality=95)
    return root


@pytest.fixture
def renamed(images, tmp_path):
    """Return a function that makes a data set of some classes under other names."""
    def make(**names):
        for split in ('train', 'val'):
            (tmp_path / 'data' / split).mkdir(parents=True, exist_ok=True)
            for new, old in names.items():
                (tmp_path / 'data' / split / new).symlink_to(images / split / old)
        return tmp_path / 'data'
    return make


@pytest.fixture(scope='session')
def flags(images):
    """Three epochs of six steps with everything that draws random numbers: about two seconds."""
    return [*nano.FLAGS, '--data-path', str(images)]


@pytest.fixture(scope='session')
def whole(flags, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp('whole')
    nano.finish(nano.start([*flags, '--output-dir', str(folder)]))
    return folder


@pytest.fixture(scope='session')
def pair(flags, tmp_path_factory):
    """The folder of an undisturbed run of two epochs on two ranks; ../out.txt has their output."""
    folder = tmp_path_factory.mktemp('pair')
    run = [*flags, '--epochs', 2, '--output-dir', folder / 'run']
    nano.finish(nano.start(run, ranks=2, output=folder / 'out.txt'))
    return folder / 'run'
