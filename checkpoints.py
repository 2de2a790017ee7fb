"""Files of a run: checkpoints that are whole whatever happens, safe to read, and the log.

Apart from utils.py because nothing here knows of processes or devices: it is what every script reads weights with.
"""
import argparse
import contextlib
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
from typing import Any

import safetensors.torch
import torch

logger = logging.getLogger(__name__)

# released checkpoints hold their training arguments; a Namespace only carries attributes
torch.serialization.add_safe_globals([argparse.Namespace])

LAST, PREVIOUS, LOG = 'checkpoint_last.pth', 'checkpoint_prev.pth', 'log.txt'


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
def replacing(path: Path, keep_previous: bool = False):
    """A temporary file beside `path` that takes its place once it is whole and on disk."""
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_previous:
            _keep_previous(path)
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


class RunWriter:
    """Writes a run's checkpoints in the background, and its log; at any moment there is a whole checkpoint on disk.

    What goes wrong on disk is kept in `error`, for the ranks to agree on stopping; after that nothing more is written.

    Args:
        folder: where they go.
        keep: epochs whose checkpoints stay as checkpoint_EEEE.pth.

    Attributes:
        trackers: functions that are given each record too.
    """

    def __init__(self, folder: str | Path, keep: int = 0):
        self.folder = Path(folder)
        self.keep = keep
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.trackers: list[Callable] = []

    def save(self, state: dict[str, Any], copies: tuple[str, ...] = ()) -> None:
        """Copy `state` to host memory, then write it as checkpoint_last.pth, and under the names `copies` too."""
        self.wait()
        if self.error is None:
            self.thread = threading.Thread(target=self._write, args=(to_cpu(state), copies), name='checkpoint')
            self.thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Add one JSON object as a line of log.txt, on disk when this returns."""
        if self.error is None:
            try:
                with open(self.folder / LOG, 'a') as file:
                    file.write(json.dumps(record) + '\n')
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                self.error = error
        for tracker in self.trackers:
            tracker(record)

    def wait(self) -> None:
        """Until the last checkpoint is on disk, or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _write(self, state: dict[str, Any], copies: tuple[str, ...]) -> None:
        try:
            last = self.folder / LAST
            with replacing(last, keep_previous=True) as file:
                torch.save(state, file)
            for name in copies:
                with open(last, 'rb') as source, replacing(self.folder / name) as file:
                    shutil.copyfileobj(source, file, 1 << 20)
            if self.keep:
                for old in sorted(self.folder.glob('checkpoint_[0-9]*.pth'))[:-self.keep]:
                    old.unlink()
        except Exception as error:  # torch.save covers a full disk with a RuntimeError of its own
            self.error = error.__context__ if isinstance(error.__context__, OSError) else error


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
        if name.startswith(('http://', 'https://')):
            state = torch.hub.load_state_dict_from_url(name, map_location='cpu', weights_only=True)
        elif name.endswith('.safetensors'):
            state = safetensors.torch.load_file(name)
        else:
            if zipfile.is_zipfile(name):  # torch.load does not look at the checksums that torch.save wrote
                with zipfile.ZipFile(name) as archive:
                    damaged = archive.testzip()
                if damaged:
                    raise ValueError(f'{name} is damaged: the checksum of {damaged} is wrong')
            state = torch.load(name, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the parsers
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
    """The newest good checkpoint of a folder, and its contents; None where it holds none at all.

    Raises:
        ValueError: there are some but none is good.
    """
    kept = sorted(folder.glob('checkpoint_[0-9]*.pth'), reverse=True)
    faults = []
    for path in (folder / LAST, folder / PREVIOUS, *kept):
        if path.is_file():
            try:
                return str(path), read_checkpoint(path)
            except ValueError as error:
                faults.append(str(error))
                logger.warning('%s: looking for the one before', error)
    if faults:
        raise ValueError(f'no good checkpoint in {folder}: {faults[0]}')
    others = list(folder.glob('checkpoint_*.pth'))
    if others:
        raise ValueError(f'{folder} holds {others[0].name} but no {LAST}: name a file with --resume, or choose another '
                         '--output-dir')
    return None, None


def make_last(path: Path) -> None:
    """Let the checkpoint that a run goes on from be checkpoint_last.pth of its folder, in place of a damaged one.

    Else the next save would keep that one as the previous, and for a moment there would be no good one.
    """
    if path.name != LAST:
        with open(path, 'rb') as source, replacing(path.with_name(LAST)) as file:
            shutil.copyfileobj(source, file, 1 << 20)


def find_checkpoint(
        resume: str, output_dir: Path | None, fall_back: bool) -> tuple[str, dict[str, Any]] | tuple[None, None]:
    """What --resume names, and its contents.

    Args:
        resume: a file or address; 'auto' for the newest good one in `output_dir`; '' for none.
        output_dir: of the run.
        fall_back: take the one before where checkpoint_last.pth is damaged.

    Raises:
        ValueError: there is no good one.
    """
    if not resume:
        return None, None
    if resume == 'auto':
        return newest_checkpoint(output_dir)
    if fall_back and Path(resume).name == LAST and Path(resume).is_file():
        return newest_checkpoint(Path(resume).parent)
    return resume, read_checkpoint(resume)


def check_output_dir(folder: Path, may_hold_run: bool) -> None:
    """Raise ValueError where a run can't be written to `folder`, or would be lost; writes nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f'--output-dir {folder}: {there} is no folder that can be written to')
    if not may_hold_run and run_files(folder):
        raise ValueError(f'{folder} holds a run: --resume auto goes on with it, --overwrite replaces it')


def run_files(folder: Path) -> list[Path]:
    """What a run leaves in its folder, without the settings."""
    return [*folder.glob('checkpoint_*.pth'), *folder.glob(LOG), *folder.glob('wandb_id.txt')]


def remove_run(folder: Path) -> None:
    """Clear `folder` of the run that it holds."""
    for path in run_files(folder):
        path.unlink()


def trim_log(path: Path, epoch: int) -> None:
    """Drop the lines of `epoch` and later, which are about to be run again, and what a killed run left half-written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors='replace').splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)['epoch'] < epoch:
                kept.append(line + '\n')
    with replacing(path) as file:
        file.write(''.join(kept).encode())
