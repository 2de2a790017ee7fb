"""Fixtures of small real runs: a folder of images, their flags, and a run that nothing has disturbed.

To add a test: put it into the file of the room that it tests, and name it as a sentence that can be false. Run the real
code on small data: nano.train(flags) in this process, nano.start(flags, ranks=2) in processes that may be killed,
nano.small() for a model without a run. Break the code once and see the test fail. Mark minutes as `soak`.
"""
import logging
import os
import signal
import sys

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import nano  # noqa: E402

torch.set_num_threads(1)  # the processes that tests fork have one as well, so that bits can be compared


@pytest.fixture(autouse=True)
def _as_before():
    """main() installs signal handlers and loggers of its own."""
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
        said = capsys.readouterr()
        start = f'{script.__name__}.py: error: '
        assert stop.value.code == 2 and not said.out and files() == before
        assert said.err.startswith(start) and said.err.endswith('\n') and said.err.count('\n') == 1
        return said.err.removeprefix(start)
    return run


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """100 training and 27 validation images of 8 x 8 pixels, PNG and JPEG, in three classes."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for part, counts in (('train', (40, 24, 36)), ('val', (8, 9, 10))):
        for label, count in enumerate(counts):
            folder = root / part / f'class_{label}'
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (8, 8, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / f'{i:02d}.{"jpg" if i % 4 == 0 else "png"}', quality=95)
    return root


@pytest.fixture(scope='session')
def flags(images):
    """Three epochs of six updates with all that draws random numbers: about two seconds."""
    return [*nano.FLAGS, '--data-path', str(images)]


@pytest.fixture(scope='session')
def whole(flags, tmp_path_factory):
    """The folder of a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp('whole')
    nano.finish(nano.start([*flags, '--output-dir', str(folder)]))
    return folder
