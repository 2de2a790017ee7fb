"""Connect the processes of a launch, communicate between them, and exit with a status and a one-line error."""
import contextlib
import datetime
import gc
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.parse
import uuid
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from errors import TrainingFault, UnreadableImage, UsageError, first_line, mistake
from launch import Launch, read_launch, run_name, set_master_address
from system import handle, handlers_restored, resource

logger = logging.getLogger(__name__)


def init_distributed(device: str | None = None, dist_url: str = 'env://', timeout_s: float = 600) -> torch.device:
    """Join the processes that torchrun, srun or mpirun started, if any, and return the device of this process.

    `device` is 'cuda', 'mps', 'cpu', or None for CUDA if available. timm's init_distributed_device has no timeout, and
    leaves SLURM's master address to the user.

    Raises:
        UsageError: `device` is not available, or the address is unknown or in use.
        TrainingFault: the processes could not connect.
    """
    launch = read_launch()
    device = find_device(device, launch)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if launch.world_size > 1:
        # Log on one rank per node, and on rank 1 too, since rank 0 may be the missing one.
        wait = Wait(timeout_s, is_logged=launch.local_rank == 0 or launch.rank == 1)
        ranks = dict(rank=launch.rank, world_size=launch.world_size)
        timer = threading.Timer(timeout_s + 30, exit_frozen)
        timer.daemon = True
        timer.start()
        try:
            store = launch_store(open_store(dist_url, **ranks, wait=wait), **ranks, wait=wait)
        finally:
            timer.cancel()
        try:
            # Use gloo as well as NCCL, so that each step can all-reduce a CPU tensor without waiting for the device.
            dist.init_process_group(
                'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo', store=store, **ranks,
                timeout=datetime.timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise TrainingFault(
                f'processes found each other, but cannot connect ({first_line(error)}); if this happens at every '
                'launch, set GLOO_SOCKET_IFNAME to the network interface between the hosts') from None
    elif (tasks := int(os.environ.get('SLURM_NTASKS', 1))) > 1:
        logger.info('only one process was started, but the SLURM job has %d tasks: start one process per task with '
                    '`srun python train.py ...`', tasks)
    return device


class Wait:
    """Poll for conditions that depend on other processes, for `timeout_s` seconds in all; log once what is missing."""

    def __init__(self, timeout_s: float, is_logged: bool):
        self.timeout_s = timeout_s
        self.began = time.monotonic()
        self.is_logged = is_logged

    def until(self, condition: Callable[[], Any], absent: Callable[[], str]) -> Any:
        """Return the first true value of `condition`; after a timeout, raise TrainingFault that names `absent()`."""
        while True:
            try:
                if result := condition():
                    return result
            except dist.DistError as error:
                raise TrainingFault(f'lost the rendezvous store: {first_line(error)}') from None
            waited = time.monotonic() - self.began
            if waited > self.timeout_s:
                raise TrainingFault(f'{absent()} did not respond within the {self.timeout_s:g} s of --dist-timeout')
            if self.is_logged and waited > min(10, self.timeout_s / 10):
                logger.warning('waiting for %s; giving up in %.0f s, since --dist-timeout is %g', absent(),
                               self.timeout_s - waited, self.timeout_s)
                self.is_logged = False
            time.sleep(0.1)


def exit_frozen() -> None:
    """Exit, since a call to the TCPStore of a frozen host never returns."""
    print_error(os.path.basename(sys.argv[0]), 'the rendezvous store does not respond')
    os._exit(1)


def open_store(url: str, rank: int, world_size: int, wait: Wait) -> dist.Store:
    """Open the ranks' store; raise UsageError for a bad address or a used port, TrainingFault if no host responds."""
    try:
        parsed = urllib.parse.urlparse(url)
        address = parsed.hostname, parsed.port
    except ValueError as error:
        raise UsageError(f'--dist-url {url}: {error}') from None
    host, port = set_master_address() if url == 'env://' else address
    is_torchrun, problem = url == 'env://' and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True', ''
    server = f'{"the store of torchrun" if is_torchrun else "rank 0"} at {host}:{port}'

    def answers() -> bool:
        nonlocal problem
        try:
            if rank or is_torchrun:
                socket.create_connection((host, port), timeout=5).close()
            else:
                socket.getaddrinfo(host, port)
        except OSError as error:
            problem = error.strerror or str(error)
            return False
        return True

    # Wait here first: torch's own wait prints pages of C++ frames, and rank 0's TCPStore would wait without a message.
    if host:
        wait.until(answers, lambda: f'{server} ({problem})')
    try:
        timeout = datetime.timedelta(seconds=wait.timeout_s)
        store = next(rendezvous(url, rank, 1 if host else world_size, timeout=timeout))[0]
    except (ValueError, RuntimeError) as error:  # The address has no port or an unknown scheme.
        if not isinstance(error, dist.DistError):
            raise UsageError(f'--dist-url {url}: {first_line(error)}') from None
        if 'EADDRINUSE' in str(error):
            raise UsageError(f'another process is listening on {host}:{port}: set MASTER_PORT to a free port') from None
        raise TrainingFault(f'no connection to {server}: {first_line(error)}') from None
    return dist.PrefixStore(run_name(), store)  # The prefix separates runs that share a torchrun endpoint.


def launch_store(store: dist.Store, rank: int, world_size: int, wait: Wait) -> dist.Store:
    """Wait for all ranks, and return the namespace of `store` for this launch.

    torchrun's store outlives a launch, and then contains keys of dead ranks. The restart count does not identify a
    launch, since each torchrun counts its own restarts (pytorch issue 108158). Instead, rank 0 draws a random name.
    """
    key = uuid.uuid4().hex

    def launch_name() -> str | None:
        if not store.check(['first']):
            return None
        first = store.get('first').decode()  # It may be left over from an earlier launch.
        store.set(f'{first}/{world_size}/{rank}', key)
        is_complete = store.check([f'{first}/all']) and key.encode() in store.get(f'{first}/all').split()
        return first if is_complete else None

    def missing() -> str:
        ranks = [str(other) for other, key in enumerate(keys, 1) if not store.check([key])]
        return f'rank{"s" * (len(ranks) > 1)} {", ".join(ranks[:8])}{", ..." * (len(ranks) > 8)}'

    if rank:
        return dist.PrefixStore(wait.until(launch_name, lambda: 'rank 0'), store)
    # The keys contain the world size, so that a stale process of a previous launch cannot join.
    keys = [f'{key}/{world_size}/{other}' for other in range(1, world_size)]
    store.set('first', key)
    wait.until(lambda: store.check(keys), missing)
    store.set(f'{key}/all', b' '.join(store.get(other) for other in keys))
    return dist.PrefixStore(key, store)


def explain(error: BaseException) -> str | None:
    """Return a one-line explanation of an error that is not a bug, such as out of memory; None for other errors."""
    text = str(error)
    if isinstance(error, RuntimeError) and re.search(  # gloo and NCCL report these.
            'gloo.*(Connection (closed|reset) by peer|Timed out waiting)|ncclRemoteError|NCCL communicator was aborted|'
            'Watchdog caught collective operation timeout|NCCL.*closed by remote peer', text, re.DOTALL):
        return f'rank {get_rank()} lost another process ({first_line(error)})'
    if isinstance(error, torch.OutOfMemoryError):
        return f'{first_line(error)} Use a smaller --batch-size (with --accum-steps), or --grad-checkpointing.'
    if 'unable to allocate shared memory' in text or 'Bus error' in text:
        return ("no shared memory is left for the workers' batches: run docker with --shm-size=8g or "
                '--ipc=host, or use --num-workers 0, which needs none')
    if re.search('Too many open files(?! in system)', text) or 'received 0 items of ancdata' in text:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else 'unknown'
        return f'too many open files: raise the limit of {limit} (ulimit -n), or use fewer --num-workers'
    if 'DataLoader timed out' in text:
        return f'{first_line(error)}: a worker or the storage of --data-path hangs, or --dist-timeout is too short'
    if 'DataLoader worker' in text and ('killed by signal: Killed' in text or 'exited unexpectedly' in text):
        return (f'a worker was killed, most likely for lack of memory ({first_line(error)}): use fewer '
                '--num-workers, or more memory')
    if isinstance(error, MemoryError) or 'Cannot allocate memory' in text:
        return f'out of memory ({first_line(error)}): use fewer --num-workers or a smaller --batch-size'
    return None


def find_device(device: str | None, launch: Launch) -> torch.device:
    """Return the device of this process; see init_distributed for arguments and errors."""
    kind = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    has_mps = torch.backends.mps.is_available()
    if kind == 'mps' and (not has_mps or launch.world_size > 1):
        raise UsageError('--device mps: ' + ('torch supports only a single process on it' if has_mps else
                                             'no Apple GPU found; omit the flag to run on the CPU'))
    if device is None and kind == 'cpu' and has_mps:
        logger.info('using the CPU; --device mps would use the Apple GPU, but is untested')
    if kind != 'cuda':
        return torch.device(kind)
    if not torch.cuda.is_available():
        raise UsageError('--device cuda: no CUDA device found; omit the flag to run on the CPU')
    devices, local_rank = torch.cuda.device_count(), launch.local_rank
    if devices == 1 and launch.launcher == 'srun':
        local_rank = 0  # srun --gpus-per-task=1 shows each task only its own device.
    processes = launch.local_world_size or local_rank + 1
    if processes > devices:
        raise UsageError(f'{processes} processes on a machine with {devices} CUDA devices: start one per device')
    return torch.device('cuda', local_rank)


def get_rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_(tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """All-reduce `tensor` in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def all_reduce_max(value: int) -> int:
    """All-reduce `value` with MAX, on the CPU: ranks wait for each other, not for their devices."""
    return int(all_reduce_(torch.tensor([value]), dist.ReduceOp.MAX))


def gather_from_ranks(value: Any) -> list[Any]:
    """Gather `value` from all ranks."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def finish_output() -> None:
    """Wait for a checkpoint that is being written, and flush the output."""
    for thread in threading.enumerate():
        if thread.name == 'checkpoint':
            thread.join()
    for file in sys.stdout, sys.stderr:
        try:
            file.flush()
        except OSError:  # The terminal is gone. Otherwise, Python's exit would fail too and change the status.
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def exit_now(status: int) -> None:
    """Exit after an error on this rank only. A normal exit could wait for other ranks, or for a worker that hangs."""
    finish_output()
    handle('SIGCHLD', signal.SIG_DFL)  # torch's handler would raise here.
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


def print_error(prog: str, error: Any) -> None:
    with contextlib.suppress(OSError):  # The terminal may be gone.
        sys.stderr.write(f'{prog}: error: ' + str(error).replace('\n', '\\n') + '\n')


@handlers_restored()
def run_main(prog: str, main: Callable, args: Any, unreadable_status: int = 1, exits: bool = False) -> int:
    """Call `main` with `args`, and return the exit status of the process; report an error in one line.

    `main` raises UsageError and TrainingFault on all ranks, anything else on one rank. Statuses: 0 done, or stopped
    under --resume auto; 1 a fault or a bug; 2 a user's mistake; 128 + n stopped by signal n; `unreadable_status` for an
    image that cannot be read. After an error on one rank only, the process exits here if there are other ranks, or if
    `exits`. Otherwise, as in a notebook, it stops the workers, releases locks and restores signal handlers.
    """
    def failed_alone(status: int) -> int:
        if exits or dist.is_initialized():
            exit_now(status)
        return status

    try:
        try:
            main(args)
        except (ConnectionError, EOFError):
            time.sleep(5)  # A killed worker's pipe closes before SIGCHLD arrives. Wait until torch names the worker.
            raise
        status = 0
    except (UsageError, TrainingFault) as error:
        launch = read_launch()
        # Without a process group, print on one rank per node, and also on rank 1 if rank 0 may be the missing one.
        if launch.rank == 0 if dist.is_initialized() else launch.local_rank == 0 or (
                launch.rank == 1 and isinstance(error, TrainingFault)):
            print_error(prog, error)
        status = 2 if isinstance(error, UsageError) else 1
    except SystemExit as stopped:
        status = stopped.code
    except KeyboardInterrupt:
        status = failed_alone(130)
    except Exception as error:  # Only this rank failed; the others wait for it.
        unreadable = error.line if isinstance(error, UnreadableImage) else None
        line = unreadable or explain(error)
        if line is None or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            traceback.print_exc()
        if line is not None:
            print_error(prog, line)
        status = failed_alone(unreadable_status if unreadable else 1)
    finish_output()
    gc.collect()  # Freeing the loaders ends their workers, and freeing the writer unlocks the run folder.
    if dist.is_initialized():  # All ranks get here, so no rank waits for another.
        dist.destroy_process_group()
    return status


@contextlib.contextmanager
def usage_errors(kind: type[Exception] = UsageError):
    """Raise `kind` on all ranks if the block raises a UsageError, or an OSError about a file, on any rank.

    This way, no rank waits for one that failed. Any other exception is a bug, and ends this rank with its traceback.
    """
    line = None
    try:
        yield
    except (UsageError, OSError) as error:
        line = mistake(error)
        if line is None:
            raise
    for message in filter(None, gather_from_ranks(line)):
        raise kind(message)


class StopRequest:
    """Record signals, so that the run stops after the current step; a second Ctrl-C raises KeyboardInterrupt.

    SLURM's warning, SIGUSR1, is recorded from the start. Other signals end the run until record_all is called.
    """

    def __init__(self):
        self.signal = 0
        handle('SIGUSR1', self)

    def record_all(self) -> None:
        """Record SIGTERM, SIGHUP and Ctrl-C too."""
        for name in 'SIGTERM', 'SIGINT', 'SIGHUP':
            handle(name, self)

    def __call__(self, signum: int, frame) -> None:
        self.signal = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if get_rank() == 0:  # logging and print are not safe in a signal handler.
                with contextlib.suppress(OSError):  # The terminal may be gone.
                    os.write(2, b'\nstopping after this step; press Ctrl-C again to quit without saving\n')


@contextlib.contextmanager
def first_on_each_node():
    """Run the block, such as a download, in one process of each node first, then in the others."""
    first = read_launch().local_rank == 0
    if dist.is_initialized() and not first:
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and first:
            dist.barrier()
