"""Processes and the terminal: distributed set-up, stopping, logging, progress."""
import contextlib
import datetime
import logging
import os
import resource
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from timm.utils.distributed import is_distributed_env, world_info_from_env
from tqdm import tqdm

logger = logging.getLogger(__name__)


class UsageError(ValueError):
    """A user's mistake, known on every rank: shown as one line, exit status 2."""


def init_distributed(device: str | None = None, dist_url: str = 'env://', timeout_s: float = 600) -> torch.device:
    """Join the processes that torchrun, torch.distributed.launch, SLURM or MPI started; alone where none did.

    timm's init_distributed_device takes no time-out, and leaves SLURM's address to the user.

    Args:
        device: 'cuda', 'cpu', ...; CUDA where there is one, else the CPU, where None.
        dist_url: where the processes meet.
        timeout_s: seconds that a rank waits for the others before it gives up.

    Returns:
        The device of this process.

    Raises:
        ValueError: a device that is not there.
    """
    kind = (device or ('cuda' if torch.cuda.is_available() else 'cpu')).split(':')[0]
    if kind == 'cuda' and not torch.cuda.is_available():
        raise ValueError('--device cuda: no CUDA device here; leave the flag out to run on the CPU')
    local_rank, rank, world_size = world_info_from_env()
    if kind == 'cuda' and local_rank >= torch.cuda.device_count():
        raise ValueError(f'{local_rank + 1} processes on a machine with {torch.cuda.device_count()} CUDA devices: '
                         'start at most one process a device')
    found = torch.device(kind, local_rank) if kind == 'cuda' else torch.device(device or kind)
    if kind == 'cuda':
        torch.cuda.set_device(found)
    if is_distributed_env():
        if 'SLURM_JOB_NODELIST' in os.environ and 'MASTER_ADDR' not in os.environ:
            hosts = subprocess.run(
                ['scontrol', 'show', 'hostnames', os.environ['SLURM_JOB_NODELIST']],
                capture_output=True, text=True, check=True).stdout.split()
            os.environ['MASTER_ADDR'] = hosts[0]
            os.environ.setdefault('MASTER_PORT', str(20000 + int(os.environ['SLURM_JOB_ID']) % 20000))
        # gloo beside NCCL: what ranks agree on at a step's border lives on the CPU and does not wait for the device
        dist.init_process_group(
            'cpu:gloo,cuda:nccl' if kind == 'cuda' else 'gloo',
            init_method=dist_url, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=timeout_s))
    return found


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def reduce_(tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduce over all ranks in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def largest(number: int) -> int:
    """The largest of all ranks' numbers. On the CPU: it waits for the other ranks, not for the device."""
    return int(reduce_(torch.tensor([number]), dist.ReduceOp.MAX))


def of_this_rank(values: list[list[float]]) -> list[float] | None:
    """What each rank saved, or the sum of it on the first rank where their number has changed."""
    if len(values) == get_world_size():
        return values[get_rank()]
    return [sum(of_ranks) for of_ranks in zip(*values, strict=True)] if get_rank() == 0 else None


@contextlib.contextmanager
def usage_errors():
    """A ValueError of any rank inside becomes a UsageError of all of them, so that none waits for the others."""
    error = None
    try:
        yield
    except ValueError as e:
        error = str(e)
    errors = [error]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            raise UsageError(error)


class StopRequest:
    """SIGTERM, SIGUSR1 (SLURM's warning) or Ctrl-C: stop at the next step's border. A second Ctrl-C stops at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self)

    def __call__(self, number: int, frame) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def first_on_each_node():
    """One process of each machine goes first (downloads, unpacks), the others follow."""
    first = world_info_from_env()[0] == 0
    if dist.is_initialized() and not first:
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and first:
            dist.barrier()


def setup_logging(level: int = logging.INFO) -> None:
    """Plain lines of information from the first rank; warnings of every rank, with its number."""
    rank = world_info_from_env()[1]
    logging.basicConfig(
        level=level if rank == 0 else logging.WARNING,
        format='%(message)s' if rank == 0 else f'rank {rank}: %(message)s',
        stream=sys.stdout, force=True)
    logging.captureWarnings(True)


def memory_mb(device: torch.device) -> float:
    """Peak memory of this process so far (MiB): of the device on CUDA, else resident."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Progress:
    """What a person sees of an epoch: a live bar on a terminal, a line every `every` steps elsewhere.

    Args:
        title: 'epoch 3/10'.
        total: steps of the epoch.
        start: steps done before.
        every: steps between two lines.
        enabled: False on all ranks but the first.
    """

    def __init__(self, title: str, total: int, start: int = 0, every: int = 10, enabled: bool = True):
        self.title = title
        self.total = total
        self.start = self.done = start
        self.every = every
        self.enabled = enabled
        self.began = time.monotonic()
        self.bar = None
        if enabled and sys.stdout.isatty():
            self.bar = tqdm(
                total=total, initial=start, desc=title, file=sys.stdout, dynamic_ncols=True, leave=False,
                bar_format='{desc} |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {postfix}')

    def due(self) -> bool:
        """Whether the step now done is one to show figures at."""
        return (self.done + 1) % self.every == 0 or self.done + 1 == self.total

    def step(self, figures: dict[str, str] | None = None) -> None:
        """Count a step; show `figures` where there are some."""
        self.done += 1
        if self.bar is not None:
            if figures:
                self.bar.set_postfix_str('  '.join(f'{key} {value}' for key, value in figures.items()), refresh=False)
            self.bar.update()
        elif self.enabled and figures:
            seconds = (time.monotonic() - self.began) / (self.done - self.start) * (self.total - self.done)
            eta = datetime.timedelta(seconds=round(seconds))
            shown = '  '.join(f'{key} {value}' for key, value in figures.items())
            logger.info('%s  step %d/%d  %s  eta %s', self.title, self.done, self.total, shown, eta)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
