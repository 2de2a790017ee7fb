"""Processes, files and the terminal: distributed set-up, checkpoints on disk, logs, progress."""
import argparse
import contextlib
import datetime
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from timm.utils.distributed import is_distributed_env, world_info_from_env
from tqdm import tqdm

logger = logging.getLogger(__name__)

LAST, PREVIOUS = 'checkpoint_last.pth', 'checkpoint_prev.pth'


class UsageError(ValueError):
    """A user's mistake, known on every rank: shown as one line, exit status 2."""


# ---------------------------------------------------------------------------------------------------------------------
# distributed

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


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

def to_cpu(state: Any) -> Any:
    """A copy of nested dicts and lists whose tensors are on the CPU and nobody else's."""
    if isinstance(state, torch.Tensor):
        return state.detach().to('cpu', copy=True)
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(to_cpu(value) for value in state)
    return state


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _replacing(path: Path):
    """A temporary file beside `path` that takes its place once it is whole and on disk."""
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _keep_previous(path: Path) -> None:
    """Give the file at `path` a second name, checkpoint_prev.pth, that stays when it is replaced."""
    if not path.exists():
        return
    link = path.with_name(f'.{PREVIOUS}.tmp')
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links: for a moment there is the previous file alone
        os.replace(path, link)
    os.replace(link, path.with_name(PREVIOUS))


class CheckpointWriter:
    """Writes checkpoints to `folder` in the background; at any moment there is a whole one on disk.

    Args:
        folder: where they go.
        keep: epochs whose checkpoints stay as checkpoint_EEEE.pth.
    """

    def __init__(self, folder: str | Path, keep: int = 0):
        self.folder = Path(folder)
        self.keep = keep
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, state: dict[str, Any], copies: tuple[str, ...] = ()) -> None:
        """Copy `state` to host memory, then write it as checkpoint_last.pth, and under the names `copies` too.

        Raises:
            OSError: of the checkpoint before this one.
        """
        self.wait()
        state = to_cpu(state)
        self.thread = threading.Thread(target=self._write, args=(state, copies), name='checkpoint')
        self.thread.start()

    def _write(self, state: dict[str, Any], copies: tuple[str, ...]) -> None:
        try:
            last = self.folder / LAST
            with _replacing(last) as file:
                torch.save(state, file)
                _keep_previous(last)
            for name in copies:
                with open(last, 'rb') as source, _replacing(self.folder / name) as file:
                    shutil.copyfileobj(source, file, 1 << 20)
            if self.keep:
                for old in sorted(self.folder.glob('checkpoint_[0-9]*.pth'))[:-self.keep]:
                    old.unlink()
        except BaseException as error:
            self.error = error

    def wait(self) -> None:
        """Until the last checkpoint is on disk.

        Raises:
            OSError: it could not be written; the ones before it are as they were.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running anything that it might contain.

    Args:
        path: .pth or .safetensors file, or http(s) address of one.

    Returns:
        Tensors on the CPU, in the nesting of the file.

    Raises:
        ValueError: no such file, a damaged one, one that is no checkpoint, or one that would run code when loaded.
    """
    name = str(path)
    if not name.startswith(('http://', 'https://')) and not os.path.isfile(name):
        raise ValueError(f'no checkpoint at {name}')
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # released checkpoints hold their arguments
            if name.startswith(('http://', 'https://')):
                state = torch.hub.load_state_dict_from_url(name, map_location='cpu', weights_only=True)
            elif name.endswith('.safetensors'):
                state = safetensors.torch.load_file(name)
            else:
                if zipfile.is_zipfile(name):  # torch.load does not look at the checksums that torch.save wrote
                    with zipfile.ZipFile(name) as archive:
                        damaged = archive.testzip()
                    if damaged:
                        raise ValueError(f'checksum of {damaged} is wrong')
                state = torch.load(name, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the parsers
        wanted = re.search(r'GLOBAL ([\w.]+)', str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if wanted:
            raise ValueError(f'{name} was not loaded: it asks for {wanted[1]}, which a checkpoint has no use for') from None
        reason = str(error).strip().split('\n')[0][:120] or type(error).__name__
        raise ValueError(f'{name} is damaged or no checkpoint ({reason})') from None
    if not isinstance(state, dict):
        raise ValueError(f'{name} holds a {type(state).__name__}, not a checkpoint')
    return state


def newest_checkpoint(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest good one of checkpoint_last.pth, at `path`, and the files kept beside it; None where there is none.

    Raises:
        ValueError: there are files but none is good.
    """
    candidates = [path, path.with_name(PREVIOUS), *sorted(path.parent.glob('checkpoint_[0-9]*.pth'), reverse=True)]
    faults = []
    for candidate in candidates:
        if candidate.is_file():
            try:
                checkpoint = read_checkpoint(candidate)
            except ValueError as error:
                faults.append(str(error))
                logger.warning('%s: looking for the one before', error)
                continue
            return candidate, checkpoint
    if faults:
        raise ValueError(f'no good checkpoint in {path.parent}: {faults[0]}')
    return None


# ---------------------------------------------------------------------------------------------------------------------
# logs

def append_log(path: Path, record: dict[str, Any]) -> None:
    """Add one JSON object as a line, on disk when this returns."""
    with open(path, 'a') as file:
        file.write(json.dumps(record) + '\n')
        file.flush()
        os.fsync(file.fileno())


def trim_log(path: Path, epoch: int) -> None:
    """Drop the lines of `epoch` and later, which are about to be run again, and what a killed run left half-written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)['epoch'] < epoch:
                kept.append(line + '\n')
    with _replacing(path) as file:
        file.write(''.join(kept).encode())


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
