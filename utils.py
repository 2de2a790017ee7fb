"""Processes and the terminal: distributed set-up, stopping, logging, progress."""
import contextlib
import datetime
import importlib.util
import logging
import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.utils.distributed import is_distributed_env, world_info_from_env
from torch.distributed.nn.functional import all_reduce
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

logger = logging.getLogger(__name__)

WANDB_ID = 'wandb_id.txt'


class UsageError(ValueError):
    """A user's mistake, known on every rank: shown as one line, exit status 2."""


def init_distributed(device: str | None = None, dist_url: str = 'env://', timeout_s: float = 600) -> torch.device:
    """Join the processes that torchrun, torch.distributed.launch or SLURM started; alone where none did.

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
    if kind == 'cuda':
        devices = torch.cuda.device_count()
        if devices == 1 and 'LOCAL_RANK' not in os.environ:
            local_rank = 0  # srun --gpus-per-task=1 shows each task its own device alone
        processes = int(os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1))
        if processes > devices:
            raise ValueError(f'{processes} processes on a machine with {devices} CUDA devices: start one a device')
    found = torch.device(kind, local_rank) if kind == 'cuda' else torch.device(kind)
    if kind == 'cuda':
        torch.cuda.set_device(found)
    if is_distributed_env():
        if 'SLURM_JOB_NODELIST' in os.environ and 'MASTER_ADDR' not in os.environ:
            hosts = []
            with contextlib.suppress(FileNotFoundError):  # containers often have none
                hosts = subprocess.run(
                    ['scontrol', 'show', 'hostnames', os.environ['SLURM_JOB_NODELIST']],
                    capture_output=True, text=True).stdout.split()
            if not hosts:
                raise ValueError('scontrol does not tell the hosts of the job: set MASTER_ADDR')
            os.environ['MASTER_ADDR'] = hosts[0]
            os.environ.setdefault('MASTER_PORT', str(20000 + int(os.environ['SLURM_JOB_ID']) % 20000))
        timeout = datetime.timedelta(seconds=timeout_s)
        store, rank, world_size = next(rendezvous(dist_url, rank, world_size, timeout=timeout))
        # torchrun keeps its store over restarts, with the addresses of the ranks that died; torch 2.15 reads them again
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # gloo beside NCCL: what ranks agree on at a step's border lives on the CPU and does not wait for the device
        dist.init_process_group(
            'cpu:gloo,cuda:nccl' if kind == 'cuda' else 'gloo',
            store=store, rank=rank, world_size=world_size, timeout=timeout)
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


def of_all_ranks(value: Any) -> list[Any]:
    """What each rank has."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def leave_at_once(status: int) -> None:
    """End this process after a fault that the other ranks know nothing of, without waiting for them.

    Closing the process group could wait for the others until --dist-timeout, Python's exit for a loader that hangs.
    """
    for thread in threading.enumerate():
        if thread.name == 'checkpoint':
            thread.join()
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def usage_errors():
    """An error of any rank inside becomes a UsageError of all of them, so that none waits for the others.

    ValueError, what the system refuses, and the assertions by which timm checks settings.
    """
    error = None
    try:
        yield
    except (ValueError, OSError, AssertionError) as e:
        error = str(e)
    for message in of_all_ranks(error):
        if message is not None:
            raise UsageError(message)


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


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()  # macOS has none


def processor() -> str:
    """What the machine calls its processor."""
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def memory_mb(device: torch.device) -> float:
    """Peak memory of this process so far (MiB): of the device on CUDA, else resident."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def build_trackers(
        tensorboard: bool, wandb: bool, folder: Path, settings: dict[str, Any], epoch: int) -> list[Callable]:
    """Functions that show a record of log.txt elsewhere too.

    Args:
        tensorboard, wandb: where.
        folder: of the run; both go on with what it holds.
        settings: shown beside the curves.
        epoch: the first to come.
    """
    trackers = []
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder / 'tensorboard', purge_step=epoch)

        def to_tensorboard(record: dict[str, Any]) -> None:
            for key, value in record.items():
                writer.add_scalar(key, value, record['epoch'])
            writer.flush()
        trackers.append(to_tensorboard)
    if wandb:
        import wandb as package
        name = folder.resolve().name
        remembered = folder / WANDB_ID
        if not remembered.exists():
            remembered.write_text(package.util.generate_id())
        run = package.init(
            project='cmt', name=name, dir=folder, config=settings, resume='allow', id=remembered.read_text())
        trackers.append(lambda record: run.log(record, step=record['epoch']))
    return trackers


def check_trackers(tensorboard: bool, wandb: bool) -> None:
    """Raise ValueError where a package is missing."""
    for wanted, package in ((tensorboard, 'tensorboard'), (wandb, 'wandb')):
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f'--log-{package} needs a package that is not installed: pip install {package}')


def build_profiler(steps: int, path: Path) -> torch.profiler.profile:
    """A profiler that skips two steps, warms up in two and writes a Chrome trace of the next `steps` to `path`."""
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(skip_first=2, wait=0, warmup=2, active=steps, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)))


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all ranks, equal in size, on any device; torch's own runs on GPUs alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or get_world_size() == 1:
            return super().forward(x)
        n = x.numel() // x.shape[1] * get_world_size()
        wide = x if x.dtype == torch.float64 else x.float()
        mean = all_reduce(wide.sum((0, 2, 3))) / n
        centred = wide - mean[:, None, None]
        variance = all_reduce(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def convert_sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let every BatchNorm of `model` work on the batches of all ranks together."""
    if device.type == 'cuda':
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm
    return model


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
        self.waited = 0.  # seconds for data
        self.bar = None
        if enabled and sys.stdout.isatty():
            self.bar = tqdm(
                total=total, initial=start, desc=title, file=sys.stdout, dynamic_ncols=True, leave=False,
                bar_format='{desc} |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]')

    def wait_share(self) -> float:
        """Share of the time so far that went to waiting for data."""
        return self.waited / max(time.monotonic() - self.began, 1e-9)

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
