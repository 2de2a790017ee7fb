"""Write checkpoint files atomically, and read untrusted checkpoint files safely."""
import argparse
import errno
import hashlib
import logging
import os
import re
import shutil
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.models._hub import download_cached_file
from torch.utils._pytree import tree_map_only

from errors import UsageError, one_line
from system import atomic_write

logger = logging.getLogger(__name__)

LAST, PREVIOUS = 'checkpoint_last.pth', 'checkpoint_prev.pth'
BEST = {'checkpoint_best.pth': '', 'checkpoint_ema_best.pth': 'ema_'}  # file name: prefix of its score keys
FORMAT = 1  # stored under 'format' in every checkpoint of this project


def is_own(checkpoint: dict[str, Any]) -> bool:
    """Return whether this project wrote a checkpoint. If so, its model arguments need not be inferred from shapes."""
    return checkpoint.get('format') == FORMAT and isinstance(checkpoint.get('model_args'), dict)


def class_names(checkpoint: dict[str, Any]) -> list[str] | None:
    """Return the class names in a checkpoint; None if 'classes' is not a list of names, as in other tools' files."""
    names = checkpoint.get('classes')
    is_list = isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names)
    return list(names) if is_list else None


def epoch_files(folder: Path) -> list[Path]:
    """List a run's checkpoint_EEEE.pth files by epoch. Ignore similar names, which the user may have chosen."""
    matches = [re.fullmatch(r'checkpoint_([0-9]{4}|[1-9][0-9]{4,})\.pth', path.name) for path in folder.glob('*.pth')]
    return [folder / match[0] for match in sorted(filter(None, matches), key=lambda match: int(match[1]))]


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], file: str) -> None:
    """Load a state dict; raise UsageError if its keys or shapes do not match `module`."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(f'{file} does not match the model: {textwrap.shorten(one_line(error), 800)}') from None


def to_cpu(state: Any) -> Any:
    """Copy nested dicts and lists, and copy the tensors in them to the CPU."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to('cpu', copy=True), state)


def copy(source: Path, target: Path) -> None:
    """Copy a file atomically: `target` is never half-written."""
    with open(source, 'rb') as original, atomic_write(target) as file:
        shutil.copyfileobj(original, file, 1 << 20)


def check_output(output: Path, source: str, overwrite: bool) -> None:
    """Raise UsageError if `output` is `source`, or if it exists without `overwrite`; empty folders are allowed."""
    exists = any(output.iterdir()) if output.is_dir() else output.exists()
    if exists and output.resolve() == Path(source).resolve():
        raise UsageError(f'{output} is also the input: choose another output name')
    if exists and not overwrite:
        raise UsageError(f'{output} already exists: use --overwrite to replace it')


def no_checkpoint(name: str) -> str:
    """Return the error message for a missing checkpoint `name`, a file or its folder. List the folder's checkpoints."""
    folder = Path(name) if os.path.isdir(name) else Path(name).parent
    others = ', '.join(sorted(file.name for file in folder.glob('checkpoint_*.pth'))[:8])
    return f'no checkpoint at {name}' + (f' ({folder} contains {others})' if others else '')


def download(url: str) -> Path:
    """Download `url` unless it is cached, and return the file."""
    # timm names a cached file after the end of its URL, so one run's checkpoint would replace another run's.
    name = f'{hashlib.sha256(url.encode()).hexdigest()}.pth'
    try:
        file = Path(download_cached_file((url, name), progress=True))
    except Exception as error:  # urllib can raise exceptions of any type.
        raise UsageError(f'{url} could not be downloaded ({one_line(error)})') from None
    logger.info('using the cached download %s of %s; delete it to download again', file, url)
    return file


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a torch.save file without running any code in it.

    Args:
        path: a file, or an http(s) URL.

    Returns:
        The contents of the file, with tensors on the CPU.

    Raises:
        UsageError: the file is missing, damaged, not a checkpoint, or would run code when loaded.
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
    # Released checkpoints contain an argparse.Namespace, which torch.load rejects by default. Unpickling it runs no
    # code, so allow the type. Do so on every call, since timm's load_checkpoint clears the list of allowed types.
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        if zipfile.is_zipfile(name):  # Verify checksums here, since torch.load does not.
            with zipfile.ZipFile(name) as archive:
                if archive.testzip():
                    raise zipfile.BadZipFile
        state = torch.load(name, map_location='cpu', weights_only=True)
    except Exception as error:  # A damaged file can raise exceptions of any type.
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE):
            # Only reading failed. The file may be intact, so stop instead of resuming from an older checkpoint.
            raise OSError(error.errno, error.strerror, error.filename or name) from None
        code = re.search(r'GLOBAL ([\w.]+)', str(error))
        reason = f'would run {code[1]} when loaded: save only its state dict' if code else \
            'is truncated, damaged, or not a checkpoint'
        raise UsageError(f'{name} {reason}') from None
    if not isinstance(state, dict):
        raise UsageError(f'{name} contains a {type(state).__name__}, not a checkpoint')
    return state


def newest_checkpoint(folder: Path) -> tuple[str, dict[str, Any]] | tuple[None, None]:
    """Return the name and contents of the newest intact checkpoint in a folder, or (None, None) if it has none.

    Raises:
        UsageError: every checkpoint is damaged, or the folder has only checkpoints that cannot be resumed.
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
        raise UsageError(f'no readable checkpoint in {folder}: {faults[0]}')
    others, log = {path.name for path in folder.glob('checkpoint_*.pth')}, folder / 'log.txt'
    # A run that is killed during its first save leaves only best checkpoints and one log line. Let that run start over.
    is_first_save = others <= set(BEST) and log.is_file() and log.read_text('utf-8', 'replace').count('\n') == 1
    if others and not is_first_save:
        raise UsageError(f'{folder} contains {min(others)} but no {LAST}: name a file with --resume, or choose another '
                         '--output-dir')
    return None, None
