"""Write checkpoint files atomically, and read untrusted checkpoint files safely."""
import argparse
import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import pickle
import re
import secrets
import shutil
import textwrap
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn as nn

from errors import UsageError, one_line

logger = logging.getLogger(__name__)

LAST, PREVIOUS = 'checkpoint_last.pth', 'checkpoint_prev.pth'
BEST = {'checkpoint_best.pth': '', 'checkpoint_ema_best.pth': 'ema_'}  # prefixes of their scores
FORMAT = 1  # marks the files of this project


def is_own(checkpoint: dict[str, Any]) -> bool:
    """Return whether this project wrote a checkpoint, so that nothing in it needs to be inferred."""
    has_parts = all(isinstance(checkpoint.get(key), dict) for key in ('model', 'model_args', 'args'))
    return has_parts and type(checkpoint.get('format')) is int and checkpoint['format'] == FORMAT


def epoch_files(folder: Path) -> list[Path]:
    """List a run's checkpoint_EEEE.pth by epoch. Files of similar names are the user's."""
    matches = [re.fullmatch(r'checkpoint_([0-9]{4}|[1-9][0-9]{4,})\.pth', path.name) for path in folder.glob('*.pth')]
    return [folder / match[0] for match in sorted(filter(None, matches), key=lambda match: int(match[1]))]


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], file: str) -> None:
    """Load a state dict; raise UsageError if its names or shapes differ from those of `module`."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(f'{file} does not fit the model: {textwrap.shorten(one_line(error), 800)}') from None


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


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed processes left in `folder`; call this under a lock."""
    for path in folder.glob('.cmt-????????????????.tmp'):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: Path, keep_previous: bool = False):
    """Open a temporary file next to `path`, which replaces `path` when the block ends and the file is on disk.

    Raises:
        OSError: the file cannot be written, such as on a full disk; the error names `path`.
    """
    temporary = path.parent / f'.cmt-{secrets.token_hex(8)}.tmp'
    try:
        with open(temporary, 'xb') as file:  # 'x' does not follow links.
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_previous:
            _keep_previous(path)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if type(error) is RuntimeError else error  # torch.save wraps the error.
        if isinstance(cause, OSError) and cause.errno and cause.filename in (None, str(temporary)):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def copy(source: Path, target: Path) -> None:
    """Copy a file. At any moment `target` is whole."""
    with open(source, 'rb') as original, atomic_write(target) as file:
        shutil.copyfileobj(original, file, 1 << 20)


def _keep_previous(path: Path) -> None:
    """Keep the file at `path` as checkpoint_prev.pth. At any moment one of the two names is a whole file."""
    if not path.exists():
        return
    previous = path.with_name(PREVIOUS)
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # This file system has no hard links.
        os.replace(path, previous)


def check_output(output: Path, source: str, overwrite: bool) -> None:
    """Raise UsageError if a file or folder made from `source` must not replace `output`."""
    exists = any(output.iterdir()) if output.is_dir() else output.exists()
    if exists and output.resolve() == Path(source).resolve():
        raise UsageError(f'{output} is the file to read: give another name')
    if exists and not overwrite:
        raise UsageError(f'{output} exists: --overwrite replaces it')


def no_follow(path: str, flags: int) -> int:
    """Open a file unless it is a symbolic link; an opener for open()."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def lock_file(path: Path) -> BinaryIO:
    """Lock `path` until this process exits, even by SIGKILL. Workers do not inherit the lock.

    Raises:
        UsageError: another process has locked it.
    """
    file = open(path, 'ab', opener=no_follow)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UsageError(f'another run is writing to {path.parent}: end it first (kill -9 of torchrun leaves its '
                             f'processes running). If none of them runs on any host, remove {path}') from None
    return file  # Any other error: this file system has no locks.


def no_checkpoint(name: str) -> str:
    """Return an error message about a missing file, with the checkpoints in its folder; `name` may be the folder."""
    folder = Path(name) if os.path.isdir(name) else Path(name).parent
    others = ', '.join(sorted(file.name for file in folder.glob('checkpoint_*.pth'))[:8])
    return f'no checkpoint at {name}' + (f' ({folder} contains {others})' if others else '')


def download(url: str) -> Path:
    """Download `url` unless it is cached, and return the file.

    torch.hub names its files by the last part of the URL, so the checkpoints of two runs would collide.
    """
    file = Path(torch.hub.get_dir(), 'checkpoints', f'{hashlib.sha256(url.encode()).hexdigest()}.pth')
    if file.exists():
        logger.info('using the cached download %s of %s; delete it to download again', file, url)
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(file))
    except Exception as error:  # urllib raises many types.
        raise UsageError(f'{url} could not be downloaded ({one_line(error)})') from None
    return file


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file of torch.save without running code that it might contain.

    Args:
        path: a file, or an http(s) address.

    Returns:
        Tensors on the CPU, in the nesting of the file.

    Raises:
        UsageError: no such file, a damaged file, not a checkpoint, or one that would run code when loaded.
    """
    name = str(path)
    if name.startswith(('http://', 'https://')):
        file = download(name)
        try:
            return read_checkpoint(file)
        except UsageError as error:
            file.unlink(missing_ok=True)
            raise UsageError(f'{name}: {error} (the cached copy was removed)') from None
    if not os.path.isfile(name):
        raise UsageError(no_checkpoint(name))
    # Released checkpoints contain their training arguments; unpickling a Namespace runs nothing. Repeat this at each
    # call, since timm's load_checkpoint removes the type.
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        damaged = None
        if zipfile.is_zipfile(name):  # torch.load does not verify the checksums.
            with zipfile.ZipFile(name) as archive:
                damaged = archive.testzip()
        state = None if damaged else torch.load(name, map_location='cpu', weights_only=True)
    except Exception as error:  # Parsers fail anywhere on a damaged file.
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE):
            # The file may be good, so do not fall back to an older one.
            raise OSError(error.errno, error.strerror, error.filename or name) from None
        code = re.search(r'GLOBAL ([\w.]+)', str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code:
            reason = f'{name} was not loaded: it would run {code[1]}'
        elif name.endswith(('.onnx', '.pt2', '.ts', '.torchscript')) or 'TorchScript' in str(error):
            reason = f'{name} is an exported model: give the checkpoint it was exported from'
        else:
            reason = f'{name} is truncated, damaged, or not a checkpoint'
        raise UsageError(reason) from None
    if damaged:
        raise UsageError(f'{name} is damaged: the checksum of {damaged} is wrong')
    if not isinstance(state, dict):
        raise UsageError(f'{name} contains a {type(state).__name__}, not a checkpoint')
    return state


def newest_checkpoint(folder: Path) -> tuple[str, dict[str, Any]] | tuple[None, None]:
    """Return the name and the contents of the newest good checkpoint in a folder, or None if it has no checkpoint.

    Raises:
        UsageError: every checkpoint is damaged, or none is named checkpoint_last.pth.
    """
    faults = []
    for path in (folder / LAST, folder / PREVIOUS, *reversed(epoch_files(folder))):
        if path.is_file():
            try:
                return str(path), read_checkpoint(path)
            except UsageError as error:
                faults.append(str(error))
                logger.warning('%s: trying the next older checkpoint', error)
    if faults:
        raise UsageError(f'no good checkpoint in {folder}: {faults[0]}')
    others, log = {path.name for path in folder.glob('checkpoint_*.pth')}, folder / 'log.txt'
    # A run that is killed in its first save leaves best checkpoints and one line in its log. It starts over.
    is_first_save = others <= set(BEST) and log.is_file() and log.read_text(errors='replace').count('\n') == 1
    if others and not is_first_save:
        raise UsageError(f'{folder} contains {min(others)} but no {LAST}: name a file with --resume, or choose another '
                         '--output-dir')
    return None, None
