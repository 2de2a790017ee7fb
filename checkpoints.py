"""Write, read and rewind the files of a run: checkpoints, whole whatever happens and safe to read, and the log."""
import argparse
import contextlib
import errno
import fcntl
import json
import logging
import os
import pickle
import re
import shutil
import threading
import urllib.error
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils import WANDB_ID

logger = logging.getLogger(__name__)

LAST, PREVIOUS, LOG = 'checkpoint_last.pth', 'checkpoint_prev.pth', 'log.txt'


def to_cpu(state: Any) -> Any:
    """Copy nested dicts and lists, with their tensors copied to the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to('cpu', copy=True)
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(to_cpu(value) for value in state)
    return state


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: Path, keep_previous: bool = False):
    """Open a temporary file beside `path`, which replaces `path` when the block ends and the file is on disk."""
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_previous:
            _keep_previous(path)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _keep_previous(path: Path) -> None:
    """Link the file at `path` as checkpoint_prev.pth too, so that it remains when `path` is replaced."""
    if not path.exists():
        return
    link = path.with_name(f'.{PREVIOUS}.tmp')
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # no hard links on this file system: for a moment only the previous file exists
        os.replace(path, link)
    os.replace(link, path.with_name(PREVIOUS))


def lock_file(path: Path) -> BinaryIO:
    """Lock `path` until this process exits, even by SIGKILL. Loader processes do not inherit the lock.

    Raises:
        ValueError: another process has locked it.
    """
    file = open(path, 'wb')
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(f'another run is writing to {path.parent}: end it first (kill -9 of torchrun leaves its '
                             f'processes running). If no process of it is left on any host, remove {path}') from None
    return file  # any other error: a file system without locks


class RunWriter:
    """Write a run's checkpoints in the background, and its log. At any moment a whole checkpoint is on disk.

    Args:
        folder: of the run.
        keep: number of last epochs whose checkpoints are kept as checkpoint_EEEE.pth.

    Raises:
        ValueError: another run is writing to `folder`.

    Attributes:
        error: the first error of the disk, after which nothing more is written; ranks agree to stop.
        trackers: functions that get each record of the log too.
    """

    def __init__(self, folder: str | Path, keep: int = 0):
        self.folder = Path(folder)
        self.lock = lock_file(self.folder / '.lock')  # kept open: closing the file would unlock it
        self.keep = keep
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.trackers: list[Callable] = []

    def save(self, state: dict[str, Any], copies: tuple[str, ...] = ()) -> None:
        """Copy `state` to host memory, then write it as checkpoint_last.pth and under the names `copies`."""
        self.wait()
        if self.error is None:
            self.thread = threading.Thread(target=self._write, args=(to_cpu(state), copies), name='checkpoint')
            self.thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Append one JSON object to log.txt as a line, synced to disk."""
        if self.error is None:
            try:
                with open(self.folder / LOG, 'a') as file:
                    file.write(json.dumps(record) + '\n')
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                self.error = error
        for tracker in list(self.trackers):
            try:
                tracker(record)
            except Exception as error:  # log.txt has the record
                logger.warning('a tracker failed and gets no more records: %s', str(error) or type(error).__name__)
                self.trackers.remove(tracker)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk, or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _write(self, state: dict[str, Any], copies: tuple[str, ...]) -> None:
        try:
            last = self.folder / LAST
            with atomic_write(last, keep_previous=True) as file:
                torch.save(state, file)
                file.flush()
                for name in copies:  # before checkpoint_last.pth: a run killed between them repeats the epoch
                    with open(file.name, 'rb') as source, atomic_write(self.folder / name) as copy:
                        shutil.copyfileobj(source, copy, 1 << 20)
            if self.keep:
                for old in sorted(self.folder.glob('checkpoint_[0-9]*.pth'))[:-self.keep]:
                    old.unlink()
        except Exception as error:  # torch.save raises a RuntimeError of its own on a full disk
            self.error = error.__context__ if isinstance(error.__context__, OSError) else error


def no_checkpoint(name: str) -> str:
    """Return an error message about a missing file, with the checkpoints in its folder; `name` may be the folder."""
    folder = Path(name) if os.path.isdir(name) else Path(name).parent
    found = ', '.join(sorted(file.name for file in folder.glob('checkpoint_*.pth'))[:8])
    return f'no checkpoint at {name}' + (f' ({folder} contains {found})' if found else '')


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file of torch.save without running code that it might contain.

    Args:
        path: a file, or an http(s) address.

    Returns:
        Tensors on the CPU, in the nesting of the file.

    Raises:
        ValueError: no such file, a damaged file, no checkpoint, or one that would run code when loaded.
    """
    name = str(path)
    if not name.startswith(('http://', 'https://')) and not os.path.isfile(name):
        raise ValueError(no_checkpoint(name))
    # Released checkpoints contain their training arguments; unpickling a Namespace runs nothing. Each time, since
    # timm's load_checkpoint forbids the type when it returns.
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        if name.startswith(('http://', 'https://')):
            state = torch.hub.load_state_dict_from_url(name, map_location='cpu', weights_only=True)
        else:
            if zipfile.is_zipfile(name):  # torch.load does not verify the checksums that torch.save wrote
                with zipfile.ZipFile(name) as archive:
                    damaged = archive.testzip()
                if damaged:
                    raise ValueError(f'{name} is damaged: the checksum of {damaged} is wrong')
            state = torch.load(name, map_location='cpu', weights_only=True)
    except Exception as error:  # parsers fail anywhere on a damaged file
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE):
            raise  # the file may be good: no reason to go back to an older one
        wanted = re.search(r'GLOBAL ([\w.]+)', str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if wanted:
            reason = f'{name} was not loaded: it asks for {wanted[1]}, which a checkpoint has no use for'
        elif isinstance(error, urllib.error.URLError):
            reason = f'{name} could not be downloaded ({error})'
        elif 'checksum' in str(error):
            reason = str(error)
        else:
            reason = f'{name} is cut short, damaged or no checkpoint'
        raise ValueError(reason) from None
    if not isinstance(state, dict):
        raise ValueError(f'{name} holds a {type(state).__name__}, not a checkpoint')
    return state


def newest_checkpoint(folder: Path) -> tuple[str, dict[str, Any]] | tuple[None, None]:
    """Return the name and the contents of the newest good checkpoint in a folder; None if it has none at all.

    Raises:
        ValueError: every checkpoint is damaged, or none is named checkpoint_last.pth.
    """
    kept = sorted(folder.glob('checkpoint_[0-9]*.pth'), reverse=True)
    faults = []
    for path in (folder / LAST, folder / PREVIOUS, *kept):
        if path.is_file():
            try:
                return str(path), read_checkpoint(path)
            except ValueError as error:
                faults.append(str(error))
                logger.warning('%s: trying the next older checkpoint', error)
    if faults:
        raise ValueError(f'no good checkpoint in {folder}: {faults[0]}')
    others = list(folder.glob('checkpoint_*.pth'))
    if others:
        raise ValueError(f'{folder} holds {others[0].name} but no {LAST}: name a file with --resume, or choose another '
                         '--output-dir')
    return None, None


def make_last(path: Path, last: Path) -> None:
    """Copy the checkpoint that a run resumes to its checkpoint_last.pth, unless it is that file.

    A damaged checkpoint_last.pth would otherwise become the previous file at the next save, and a run that goes on in
    another folder could not be resumed there before its first save.
    """
    if path.resolve() != last.resolve():
        with open(path, 'rb') as source, atomic_write(last) as file:
            shutil.copyfileobj(source, file, 1 << 20)


def is_in_folder(path: str | Path | None, folder: str | Path) -> bool:
    """Return whether the file `path`, if any, lies directly in `folder`."""
    return bool(path) and Path(path).resolve().parent == Path(folder).resolve()


def check_output_dir(folder: Path, may_hold_run: bool) -> None:
    """Raise ValueError if `folder` cannot be written to or contains a run that would be lost; write nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f'--output-dir {folder}: {there} is no folder that can be written to')
    names = LOG, WANDB_ID, 'config.yaml'
    for path in [*(folder / name for name in names), *folder.glob('*.pth'), *folder.glob('.*.tmp')]:
        if path.is_dir():
            raise ValueError(f'--output-dir {folder}: {path} is a folder')
    if not may_hold_run and run_files(folder):
        raise ValueError(f'{folder} holds a run: --resume auto resumes it, --overwrite replaces it')


def claim_folder(
        folder: Path, epoch: int, resumed: str | None, replace: bool, config: str, wandb_id: str | None) -> None:
    """Write config.yaml, and remove what the run replaces or trains again.

    Args:
        folder: of the run, locked by its RunWriter.
        epoch: first epoch to train.
        resumed: file that the run resumes, or None.
        replace: remove the run in `folder`, unless `resumed` belongs to it.
        config: contents of config.yaml.
        wandb_id: id of the run at Weights & Biases, or None.
    """
    with atomic_write(folder / 'config.yaml') as file:
        file.write(config.encode())
        file.flush()
        os.fsync(file.fileno())  # a full disk ends the run here, before anything is removed
        if replace and not is_in_folder(resumed, folder):
            remove_run(folder)
        if resumed is not None and Path(resumed).is_file():
            make_last(Path(resumed), folder / LAST)
        rewind(folder, epoch)
    if wandb_id is not None:
        (folder / WANDB_ID).write_text(wandb_id)


def copy_best(resumed: Path, folder: Path, best: dict[str, Any]) -> dict[str, Any]:
    """Copy the best checkpoints of a run that is resumed in another folder.

    Args:
        resumed: file that the run resumes.
        folder: folder of the run from now on.
        best: its best scores.

    Returns:
        `best` without scores whose checkpoint is not beside `resumed`.
    """
    kept, source = dict(best), resumed.resolve().parent
    is_here = is_in_folder(resumed, folder)
    for prefix in ('', 'ema_'):
        name, epoch = f'checkpoint_{prefix}best.pth', best.get(f'{prefix}epoch')
        try:
            if is_here and resumed.name in (LAST, PREVIOUS):  # they were written with it
                is_there = epoch is not None and (source / name).is_file()
            else:
                is_there = epoch is not None and read_checkpoint(source / name).get('epoch') == epoch
        except ValueError:
            is_there = False
        if is_there and not is_here:
            with open(source / name, 'rb') as read, atomic_write(folder / name) as file:
                shutil.copyfileobj(read, file, 1 << 20)
        elif epoch is not None and not is_there:
            logger.warning('%s of epoch %d is not in %s: the best score is searched anew', name, epoch, source)
            del kept[f'{prefix}acc1'], kept[f'{prefix}epoch']
    return kept


def run_files(folder: Path) -> list[Path]:
    """List the files of a run in its folder, without config.yaml."""
    return [*folder.glob('checkpoint_*.pth'), *folder.glob(LOG), *folder.glob(WANDB_ID)]


def remove_run(folder: Path) -> None:
    """Remove the run in `folder`, or raise OSError and leave all of it there."""
    moved = []
    try:
        for path in run_files(folder):
            moved.append((path.rename(path.with_name(f'.{path.name}.tmp')), path))
    except OSError:
        for aside, path in moved:
            aside.rename(path)
        raise
    for aside, _ in moved:
        aside.unlink()


def rewind(folder: Path, epoch: int) -> None:
    """Remove what `folder` contains of `epoch` and later epochs, which are about to be trained again.

    These are kept checkpoints and lines of the log, also a half-written last line.
    """
    for path in folder.glob('checkpoint_[0-9]*.pth'):
        if int(path.stem.split('_')[1]) >= epoch:
            path.unlink()
    path = folder / LOG
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors='replace').splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)['epoch'] < epoch:
                kept.append(line + '\n')
    with atomic_write(path) as file:
        file.write(''.join(kept).encode())
