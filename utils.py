"""Manage processes and the terminal: distributed set-up, stopping, logging, progress."""
import contextlib
import datetime
import importlib
import logging
import multiprocessing
import os
import platform
import re
import resource
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.parse
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

import options

logger = logging.getLogger(__name__)

WANDB_ID = 'wandb_id.txt'


class UsageError(ValueError):
    """Report a user's mistake, raised on every rank: one line, exit status 2."""


class TrainingFault(RuntimeError):
    """Report that training cannot continue; the last checkpoint is good.

    One line, exit status 1.
    """


def init_distributed(device: str | None = None, dist_url: str = 'env://', timeout_s: float = 600) -> torch.device:
    """Join the processes that torchrun, srun or mpirun started, if any.

    timm's init_distributed_device has no time-out, and leaves SLURM's master address to the user.

    Args:
        device: 'cuda', 'cpu', ...; None for CUDA if available, else the CPU.
        dist_url: address at which the processes meet.
        timeout_s: seconds that a rank waits for the others.

    Returns:
        The device of this process.

    Raises:
        ValueError: `device` is not available, or the address cannot be known or is taken.
        TrainingFault: the processes did not meet.
    """
    launch = options.read_launch()
    found = find_device(device, launch)
    if found.type == 'cuda':
        torch.cuda.set_device(found)
    if launch.world_size > 1:
        # each node logs once; rank 1 logs too, since rank 0 may be the missing one
        wait = Wait(timeout_s, is_logged=launch.local_rank == 0 or launch.rank == 1)
        ranks = dict(rank=launch.rank, world_size=launch.world_size)
        with ended_after(timeout_s + 30):
            store = part_of_this_start(open_store(dist_url, **ranks, wait=wait), **ranks, wait=wait)
        try:
            # gloo beside NCCL: an all-reduce of a CPU tensor, once a step, does not wait for the device
            dist.init_process_group(
                'cpu:gloo,cuda:nccl' if found.type == 'cuda' else 'gloo', store=store, **ranks,
                timeout=datetime.timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise TrainingFault(
                f'processes met, but cannot connect to each other ({first_line(error)}); if this happens at every '
                'start, set GLOO_SOCKET_IFNAME to the network interface by which the hosts reach each other') from None
    elif (tasks := options.tasks_without_srun()) > 1:
        logger.info('one process, though the SLURM job has %d tasks: `srun python train.py ...` starts one for each',
                    tasks)
    return found


class Wait:
    """Poll conditions that other processes bring about.

    Log once for whom this process waits, and until when.

    Args:
        timeout_s: seconds for all conditions together.
        is_logged: whether this process logs.
    """

    def __init__(self, timeout_s: float, is_logged: bool):
        self.timeout_s = timeout_s
        self.began = time.monotonic()
        self.is_logged = is_logged

    def until(self, condition: Callable[[], Any], absent: Callable[[], str]) -> Any:
        """Return what `condition` returns, once it is true.

        Raises:
            TrainingFault: the time is over, and `absent` names those who did not come; or the store is gone.
        """
        while True:
            try:
                if result := condition():
                    return result
            except dist.DistError as error:
                raise TrainingFault(f'lost the store by which processes meet: {first_line(error)}') from None
            waited = time.monotonic() - self.began
            if waited > self.timeout_s:
                raise TrainingFault(f'{absent()} did not answer within {self.timeout_s:g} s (--dist-timeout)')
            if self.is_logged and waited > min(10, self.timeout_s / 10):
                end = datetime.datetime.now() + datetime.timedelta(seconds=self.timeout_s - waited)
                logger.warning('waiting for %s until %s (--dist-timeout %g)', absent(), f'{end:%X}', self.timeout_s)
                self.is_logged = False
            time.sleep(0.1)


@contextlib.contextmanager
def ended_after(seconds: float):
    """End the process if the block takes longer: a TCPStore whose host freezes never answers."""
    def end() -> None:
        sys.stderr.write(f'train.py: error: the store by which processes meet does not answer ({seconds:g} s)\n')
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def open_store(url: str, rank: int, world_size: int, wait: Wait) -> dist.Store:
    """Open the store of all ranks, which rank 0, torchrun or a file system serves.

    Raises:
        ValueError: the port is taken.
        TrainingFault: nobody serves the store.
    """
    parsed = urllib.parse.urlparse(url)
    host, port = options.set_master_address() if url == 'env://' else (parsed.hostname, parsed.port)
    is_of_torchrun, problem = url == 'env://' and options.has_agent_store(), ''
    server = f'{"the store of torchrun" if is_of_torchrun else "rank 0"} at {host}:{port}'

    def answers() -> bool:
        nonlocal problem
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            problem = error.strerror or str(error)
            return False
        return True

    # torch's own waiting prints pages of C++ frames, and a TCPStore of rank 0 waits for the world size in silence
    if host and (rank or is_of_torchrun):
        wait.until(answers, lambda: f'{server} ({problem})')
    try:
        timeout = datetime.timedelta(seconds=wait.timeout_s)
        store = next(rendezvous(url, rank, 1 if host else world_size, timeout=timeout))[0]
    except dist.DistError as error:
        if 'EADDRINUSE' in str(error):
            raise ValueError(f'another process listens at {host}:{port}: set MASTER_PORT to another port') from None
        raise TrainingFault(f'no connection to {server}: {first_line(error)}') from None
    return dist.PrefixStore(options.run_name(), store)  # two runs may have one endpoint of torchrun


def part_of_this_start(store: dist.Store, rank: int, world_size: int, wait: Wait) -> dist.Store:
    """Wait for all ranks, and return the part of `store` that belongs to this start alone.

    torchrun's store outlives a start, and then contains keys of dead ranks. The restart count is no name for a start,
    since each torchrun counts its own restarts (pytorch issue 108158). Rank 0 draws a name instead.
    """
    own = uuid.uuid4().hex

    def name_of_start() -> str | None:
        if not store.check(['first']):
            return None
        first = store.get('first').decode()  # of an earlier start, until rank 0 is there
        store.set(f'{first}/{world_size}/{rank}', own)
        is_complete = store.check([f'{first}/all']) and own.encode() in store.get(f'{first}/all').split()
        return first if is_complete else None

    def missing() -> str:
        ranks = [str(other) for other, key in enumerate(keys, 1) if not store.check([key])]
        return f'rank{"s" * (len(ranks) > 1)} {", ".join(ranks[:8])}{", ..." * (len(ranks) > 8)}'

    if rank:
        return dist.PrefixStore(wait.until(name_of_start, lambda: 'rank 0'), store)
    # with the world size: a process of an earlier start may still wait, and must not join
    keys = [f'{own}/{world_size}/{other}' for other in range(1, world_size)]
    store.set('first', own)
    wait.until(lambda: store.check(keys), missing)
    store.set(f'{own}/all', b' '.join(store.get(key) for key in keys))
    return dist.PrefixStore(own, store)


def is_loss_of_process(error: Exception) -> bool:
    """Return whether gloo reports by `error` that another process or the network is gone."""
    return 'gloo' in str(error) and any(
        words in str(error) for words in ('Connection closed by peer', 'Connection reset by peer', 'Timed out waiting'))


def explain(error: BaseException) -> str | None:
    """Return one line about a fault that lies outside of the code, or None."""
    text = str(error)
    if is_loss_of_process(error):
        return f'rank {get_rank()} lost another process ({first_line(error)})'
    if isinstance(error, torch.OutOfMemoryError):
        return f'{first_line(error)} Use a smaller --batch-size (with --accum-steps), or --grad-checkpointing.'
    if 'unable to allocate shared memory' in text or 'Bus error' in text:
        return ('no shared memory is left for the batches of loader processes: give docker --shm-size=8g or '
                '--ipc=host, or use fewer --num-workers (0 needs none)')
    if re.search('Too many open files(?! in system)', text) or 'received 0 items of ancdata' in text:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f'too many open files, of {limit} allowed (ulimit -n): raise that limit, or use fewer --num-workers'
    if 'DataLoader timed out' in text:
        return f'{first_line(error)}: loader processes hang, or the file system of --data-path does (--dist-timeout)'
    if 'DataLoader worker' in text and ('killed by signal: Killed' in text or 'exited unexpectedly' in text):
        return (f'a loader process was killed, for lack of memory in most cases ({first_line(error)}): use fewer '
                '--num-workers, or more memory')
    if "can't start new thread" in text or 'Resource temporarily unavailable' in text:
        return f'no more processes may be started ({first_line(error)}): raise ulimit -u, or use fewer --num-workers'
    if isinstance(error, MemoryError) or 'Cannot allocate memory' in text:
        return f'no memory is left ({first_line(error)}): use fewer --num-workers or a smaller --batch-size'
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of a message; torch appends C++ frames."""
    return str(error).strip().split('\n', 1)[0] or type(error).__name__


def find_device(device: str | None, launch: options.Launch) -> torch.device:
    """Return the device of the process that was started by `launch`.

    Arguments and errors are those of init_distributed.
    """
    kind = (device or ('cuda' if torch.cuda.is_available() else 'cpu')).split(':')[0]
    if kind != 'cuda':
        return torch.device(kind)
    if not torch.cuda.is_available():
        raise ValueError('--device cuda: no CUDA device here; leave the flag out to run on the CPU')
    devices, local_rank = torch.cuda.device_count(), launch.local_rank
    if devices == 1 and launch.launcher == 'srun':
        local_rank = 0  # srun --gpus-per-task=1 shows each task only the task's own device
    processes = launch.local_world_size or local_rank + 1
    if processes > devices:
        raise ValueError(f'{processes} processes on a machine with {devices} CUDA devices: start one for each device')
    return torch.device('cuda', local_rank)


def get_rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def reduce_(tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """All-reduce `tensor` in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def all_reduce_max(number: int) -> int:
    """All-reduce `number` with MAX.

    The tensor is on the CPU: ranks wait for each other, not for their devices.
    """
    return int(reduce_(torch.tensor([number]), dist.ReduceOp.MAX))


def gather_from_ranks(value: Any) -> list[Any]:
    """Gather `value` from all ranks."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def exit_now(status: int) -> None:
    """Exit after a fault on this rank alone, without waiting for the other ranks.

    Destroying the process group could wait for the other ranks until --dist-timeout, and Python's own exit for a
    loader that hangs. A checkpoint that is being written is finished first.
    """
    for thread in threading.enumerate():
        if thread.name == 'checkpoint':
            thread.join()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise here
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_main(prog: str, main: Callable, args: Any, unreadable_status: int = 1) -> int:
    """Call `main` with `args`, and return the exit status of the process; report an error in one line.

    0 done or stopped under --resume auto, 1 a fault, 2 a mistake of the user, 128 + n stopped by signal n.

    Args:
        prog: name of the command.
        main: raises UsageError and TrainingFault on all ranks, and anything else on this rank alone.
        args: arguments of `main`.
        unreadable_status: status for an image that cannot be read (datasets.UnreadableImage).
    """
    def report(error: Any) -> None:
        line = str(error).replace('\n', '\\n')
        sys.stderr.write(f'{prog}: error: {line}\n')

    try:
        try:
            main(args)
        except (ConnectionError, EOFError):
            time.sleep(5)  # the pipes of a loader process close before its SIGCHLD, by which torch names it
            raise
        status = 0
    except (UsageError, TrainingFault) as error:
        launch = options.read_launch()
        # before the process group exists, a mistake is known on one node alone; rank 0 may be the one that is missing
        if launch.rank == 0 if dist.is_initialized() else launch.local_rank == 0 or (
                launch.rank == 1 and isinstance(error, TrainingFault)):
            report(error)
        status = 2 if isinstance(error, UsageError) else 1
    except SystemExit as stopped:
        status = stopped.code
    except KeyboardInterrupt:
        exit_now(130)
    except Exception as error:  # on this rank alone: the others wait for it
        line = getattr(error, 'line', None)  # of an unreadable image
        if line or explain(error):
            report(line or explain(error))
        else:
            traceback.print_exc()
        exit_now(unreadable_status if line else 1)
    if dist.is_initialized():  # all ranks come here
        dist.destroy_process_group()
    return status


@contextlib.contextmanager
def usage_errors():
    """Raise a UsageError on all ranks if the block fails on any rank.

    No rank then waits for the others. A failure is a ValueError, an OSError, or an AssertionError, by which timm
    checks settings.
    """
    error = None
    try:
        yield
    except (ValueError, OSError, AssertionError) as e:
        error = str(e)
    for message in gather_from_ranks(error):
        if message is not None:
            raise UsageError(message)


class StopRequest:
    """Record signals, for the run to stop after the step.

    A second Ctrl-C raises KeyboardInterrupt at once.

    SLURM's warning, SIGUSR1, is recorded from the start, while SIGTERM and Ctrl-C end a run that is being set up.
    """

    def __init__(self):
        self.signal = 0
        signal.signal(signal.SIGUSR1, self)

    def record_all(self) -> None:
        """Record SIGTERM and Ctrl-C too."""
        signal.signal(signal.SIGTERM, self)
        signal.signal(signal.SIGINT, self)

    def __call__(self, number: int, frame) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def first_on_each_node():
    """Run the block in one process of each node first (downloads, indices), then in the others."""
    first = options.read_launch().local_rank == 0
    if dist.is_initialized() and not first:
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and first:
            dist.barrier()


def setup_logging() -> None:
    """Print information from rank 0, and warnings from every rank with the rank's number."""
    rank = options.read_launch().rank
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format='%(message)s' if rank == 0 else f'rank {rank}: %(message)s',
        stream=sys.stdout, force=True)
    logging.captureWarnings(True)
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')  # names of files may be in no encoding


def raise_file_limit(most: int = 65536) -> None:
    """Raise the limit of open files as far as this process may: a loader process needs five, a batch two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()  # macOS has none


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
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, no repository, one of another user
        # the ceiling: a copy of the project in another repository has not that repository's commit
        environment = {**os.environ, 'GIT_CEILING_DIRECTORIES': str(folder.parent)}
        commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10, env=environment).stdout
    versions = [f'{name} {metadata.version(name)}' for name in ('torch', 'torchvision', 'timm')]
    where = torch.cuda.get_device_name() if device.type == 'cuda' else \
        f'{processor()}, {cores()} cores, threads of a process: {torch.get_num_threads()}'
    return (f'commit {commit.strip()}, Python {platform.python_version()}, {", ".join(versions)}, {get_world_size()} '
            f'process{"es" if get_world_size() > 1 else ""} on {where}')


def memory_mb(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: allocated on a CUDA device, else resident."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def check_trackers(tensorboard: bool, wandb: bool) -> None:
    """Raise ValueError if the package of a requested tracker cannot be used."""
    used = {'tensorboard': ('torch.utils.tensorboard', 'SummaryWriter'), 'wandb': ('wandb', 'init')}
    for package in ['tensorboard'] * tensorboard + ['wandb'] * wandb:
        module, name = used[package]
        try:  # a folder called wandb can be imported too, as a package without attributes
            getattr(importlib.import_module(module), name)
        except Exception as error:  # broken packages raise anything
            raise ValueError(f'--log-{package} needs a package that is not installed, or broken: pip install {package} '
                             f'({first_line(error)})') from None


def tensorboard_tracker(folder: Path, epoch: int) -> Callable:
    """Return a function that sends a record of log.txt to TensorBoard.

    Args:
        folder: of the run, whose earlier curves are continued.
        epoch: first epoch to come; TensorBoard drops later records of an earlier run.

    Raises:
        ValueError: nothing can be written to `folder`.
    """
    from torch.utils.tensorboard import SummaryWriter
    try:
        writer = SummaryWriter(folder / 'tensorboard', purge_step=epoch)
    except Exception as error:
        raise ValueError(f'--log-tensorboard: {first_line(error)}') from None

    def track(record: dict[str, Any]) -> None:
        for key, value in record.items():
            writer.add_scalar(key, value, record['epoch'])
        writer.flush()
    return track


def wandb_tracker(folder: Path, settings: dict[str, Any], run_id: str) -> Callable:
    """Return a function that sends a record of log.txt to Weights & Biases.

    Args:
        folder: of the run, which gives the name.
        settings: flags of the run.
        run_id: of the run at Weights & Biases, which is continued if it exists there.

    Raises:
        ValueError: no run can be started (no key, no network).
    """
    import wandb
    try:
        run = wandb.init(
            project='cmt', name=folder.resolve().name, dir=folder, config=settings, resume='allow', id=run_id)
    except Exception as error:
        raise ValueError(f'--log-wandb: {" ".join(str(error).split())} '
                         '(WANDB_MODE=offline needs neither key nor network)') from None
    return lambda record: run.log(record, step=record['epoch'])


def read_wandb_id(folder: Path, is_new: bool) -> str:
    """Return the id of the folder's run at Weights & Biases, or a new one if there is none or `is_new`."""
    file = folder / WANDB_ID
    return file.read_text().strip() if file.exists() and not is_new else secrets.token_hex(4)


def build_profiler(steps: int, path: Path) -> torch.profiler.profile:
    """Build a profiler that writes a Chrome trace of `steps` steps to `path`.

    Two steps are skipped before the trace, and two more warm the profiler up.
    """
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(skip_first=2, wait=0, warmup=2, active=steps, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)))


class Progress:
    """Show the progress of an epoch: a live bar on a terminal, else a line every `every` steps.

    Args:
        title: such as 'epoch 3/10'.
        total: steps of the epoch.
        start: steps done before a resume.
        every: steps between two lines.
        enabled: False on all ranks but rank 0.
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
            seconds = (time.monotonic() - self.began) / (self.done - self.start) * (self.total - self.done)
            eta = datetime.timedelta(seconds=round(seconds))
            logger.info('%s  step %d/%d  %s  eta %s', self.title, self.done, self.total, shown, eta)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


def waiting_advice(share: float, loader: str, num_workers: int) -> str:
    """Return a line for a run that spends `share` of its time waiting for data."""
    processes, changes = options.read_launch().local_world_size or 1, []
    if loader == 'reference':
        changes.append('--loader fast')
    if num_workers * processes < cores():
        changes.append(f'more --num-workers ({num_workers} now, {cores()} cores for {processes} '
                       f'process{"es" if processes > 1 else ""})')
    advice = ', '.join(changes or ['prepared images (docs/data.md), more cores, or a larger --model'])
    return f'{share:.0%} of the time went to waiting for data: {advice} (scripts/benchmark_data.py measures)'
