"""Describe the machine, show progress on the terminal, and log to trackers."""
import contextlib
import datetime
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from errors import UsageError, first_line
from launch import read_launch
from processes import get_world_size
from system import cores, resource

logger = logging.getLogger(__name__)

WANDB_ID = 'wandb_id.txt'


def setup_logging() -> None:
    """Print all messages of rank 0. Print only warnings of other ranks, prefixed with the rank."""
    rank = read_launch().rank
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format='%(message)s' if rank == 0 else f'rank {rank}: %(message)s',
        stream=sys.stdout, force=True)
    for client in ('httpx', 'httpx2'):  # The Hub's clients log each request at level INFO.
        logging.getLogger(client).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')  # File names may contain invalid UTF-8.


def processor() -> str:
    """Return the name of the processor."""
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def describe_system(device: torch.device) -> str:
    """Return versions, the commit of this project, processes and devices, in one line."""
    folder = Path(__file__).resolve().parent
    git = ['git', '-C', str(folder), 'describe', '--always', '--dirty']
    commit = 'unknown'
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, or another user's repository
        # The ceiling keeps git from describing a repository that encloses a copy of this project.
        environment = {**os.environ, 'GIT_CEILING_DIRECTORIES': str(folder.parent)}
        commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10, env=environment).stdout
    versions = [f'{name} {metadata.version(name)}' for name in ('torch', 'torchvision', 'timm')]
    where = torch.cuda.get_device_name() if device.type == 'cuda' else \
        f'{processor()} ({device.type}), {cores()} cores, threads per process: {torch.get_num_threads()}'
    return (f'commit {commit.strip()}, Python {platform.python_version()}, {", ".join(versions)}, {get_world_size()} '
            f'process{"es" if get_world_size() > 1 else ""} on {where}')


def memory_mb(device: torch.device) -> dict[str, float]:
    """Return the peak memory of this process in MiB, for log.txt: on its CUDA device, or resident where available."""
    if device.type == 'cuda':
        return {'memory_mb': torch.cuda.max_memory_allocated(device) / 2 ** 20}
    unit = 2 ** 20 if sys.platform == 'darwin' else 2 ** 10  # macOS reports bytes, Linux KiB.
    return {'memory_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit} if resource else {}


def check_compiler(device: torch.device) -> None:
    """Raise UsageError if torch.compile cannot compile here, such as on a CPU without a C++ compiler."""
    logger.info('trying torch.compile')
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:  # Backends can raise exceptions of any type.
        reason = first_line(getattr(error, 'inner_exception', error))
        raise UsageError(f'--compile: {reason}; install what is missing, or omit the flag') from None


def tensorboard_tracker(folder: Path, epoch: int) -> Callable:
    """Drop TensorBoard's records from `epoch` on, and return a function that sends it a record of log.txt.

    Raise UsageError if TensorBoard is missing or broken, or if nothing can be written to `folder`.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder / 'tensorboard', purge_step=epoch)
    except Exception as error:
        raise UsageError(f'--log-tensorboard: {first_line(error)}; if needed, pip install tensorboard') from None

    def track(record: dict[str, Any]) -> None:
        for key, value in record.items():
            writer.add_scalar(key, value, record['epoch'])
        writer.flush()
    return track


def wandb_tracker(folder: Path, settings: dict[str, Any], run_id: str) -> Callable:
    """Return a function that sends a log.txt record to Weights & Biases, continuing the run `run_id`.

    Raise UsageError if no run can be started (no package, no key, no network).
    """
    try:
        import wandb
        run = wandb.init(
            project='cmt', name=folder.resolve().name, dir=folder, config=settings, resume='allow', id=run_id)
    except Exception as error:
        raise UsageError(f'--log-wandb: {" ".join(str(error).split())}; '
                         'if needed, pip install wandb, or set WANDB_MODE=offline to log offline') from None
    return lambda record: run.log(record, step=record['epoch'])


class Progress:
    """Show the progress of an epoch: a live bar on a terminal, else a line every `every` steps.

    Args:
        title: title, such as 'epoch 3/10'.
        total: steps of the epoch.
        first_step: steps that were done before a resume.
        every: steps between two lines. A bar updates its figures at least ten times per epoch.
        enabled: False on all ranks but rank 0.
    """

    def __init__(self, title: str, total: int, first_step: int = 0, every: int = 10, enabled: bool = True):
        self.title = title
        self.total = total
        self.first_step = self.done = first_step
        self.every = every
        self.enabled = enabled
        self.began = time.monotonic()
        self.waited = 0.  # seconds spent waiting for data
        self.bar = None
        if enabled and sys.stdout.isatty():
            self.every = min(every, max(total // 10, 1))
            self.bar = tqdm(
                total=total, initial=first_step, desc=title, file=sys.stdout, dynamic_ncols=True, leave=False,
                bar_format='{desc} |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]')

    def wait_share(self) -> float:
        """Return the share of the elapsed time that was spent waiting for data."""
        return self.waited / max(time.monotonic() - self.began, 1e-9)

    def due(self) -> bool:
        """Return whether the current step shows figures."""
        return (self.done + 1) % self.every == 0 or self.done + 1 == self.total

    def step(self, figures: dict[str, str] | None = None) -> None:
        """Count a step, and show `figures` if any."""
        self.done += 1
        shown = '  '.join(f'{key} {value}' for key, value in (figures or {}).items())
        if self.bar is not None:
            if shown:
                self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update()
        elif self.enabled and shown:
            seconds = (time.monotonic() - self.began) / (self.done - self.first_step) * (self.total - self.done)
            eta = datetime.timedelta(seconds=round(seconds))
            logger.info('%s  step %d/%d  %s  eta %s', self.title, self.done, self.total, shown, eta)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
