"""What small real runs share: a folder of images, main() in this process, and processes that it can kill."""
import logging
import os
import signal
import sys

os.environ.setdefault('OMP_NUM_THREADS', '1')
if not os.path.exists('/dev/nvidiactl'):  # CUDA is asked too late: Triton wants to know when it is imported
    os.environ.setdefault('TRITON_INTERPRET', '1')

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
