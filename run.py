"""Manage the run folder of train.py and scripts/detection.py: find checkpoints, lock, save, log."""
import argparse
import contextlib
import json
import logging
import os
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

import checkpoints
import processes
import system
import utils
from checkpoints import BEST, LAST, PREVIOUS, epoch_files
from errors import TrainingFault, UsageError, printable
from processes import usage_errors
from system import atomic_write, write_file
from weights import best_of_run, read, read_file

logger = logging.getLogger(__name__)

LOG, CONFIG = 'log.txt', 'config.yaml'
# Keys of checkpoint_last.pth that the best checkpoints contain too.
DESCRIPTION = 'format', 'model_args', 'detector', 'args', 'classes', 'training_images', 'epoch'
# Flags that apply to one launch, so config.yaml omits them. The output folder is the one that contains config.yaml.
UNSAVED_FLAGS = 'config', 'eval', 'local_rank', 'output_dir', 'overwrite', 'resume', 'stopped_file', 'throughput'


def setup_process(args: argparse.Namespace) -> torch.device:
    """Join the other ranks, if any, and return the device of this rank."""
    utils.setup_logging()
    system.raise_file_limit()
    torch.set_num_threads(min(torch.get_num_threads(), system.cores()))  # torch ignores a container's CPU quota.
    with usage_errors():
        return processes.init_distributed(args.device, args.dist_url, args.dist_timeout)


# Resuming

def find_checkpoint(args: argparse.Namespace, is_training: bool) -> tuple[str, dict[str, Any]] | tuple[None, None]:
    """Check --output-dir, and return the file name and contents of the checkpoint to resume.

    --resume is a file, a URL or, for --eval, a run folder or model name; 'auto' for the newest readable checkpoint in
    --output-dir; or '' for none. In training, an older checkpoint replaces a damaged checkpoint_last.pth.
    """
    folder = Path(args.output_dir) if args.output_dir else None
    if is_training and folder:
        check_output_dir(folder, may_hold_run=args.overwrite or args.resume == 'auto'
                         or is_in_folder(args.resume, folder))
    file, checkpoint = None, None
    if args.resume == 'auto':
        file, checkpoint = checkpoints.newest_checkpoint(folder)
    elif is_training and Path(args.resume).name == LAST and Path(args.resume).is_file():
        file, checkpoint = checkpoints.newest_checkpoint(Path(args.resume).parent)
    elif args.resume:
        file = best_of_run(args.resume, use_ema=getattr(args, 'model_ema', True) and not is_training)
        checkpoint = read_file(file) if is_training and not os.path.isdir(file) else read(file)
    if args.eval and checkpoint is None:
        raise UsageError(f'no checkpoint in {folder}: --eval needs one')
    is_writer = is_training and processes.get_rank() == 0  # Only this rank uses the best scores.
    best = checkpoint.get('best') if checkpoint is not None and is_writer else None
    for name, prefix in BEST.items() if isinstance(best, dict) else ():
        epoch, place = best.get(f'{prefix}epoch'), Path(file).resolve().parent
        try:  # A run that was killed before it wrote checkpoint_last.pth may have left a later best checkpoint.
            exists = epoch is None or checkpoints.read_checkpoint(place / name).get('epoch') == epoch
        except UsageError:
            exists = False
        if not exists:
            logger.warning('%s of epoch %d is not in %s: the next score becomes the best one', name, epoch, place)
            for key in ('epoch', 'acc1', 'box_ap'):  # box_ap is detection.py's score.
                best.pop(f'{prefix}{key}', None)
    return file, checkpoint


def is_in_folder(path: str | Path | None, folder: str | Path) -> bool:
    """Return whether `path` names a file directly in `folder`."""
    return bool(path) and Path(path).resolve().parent == Path(folder).resolve()


def check_output_dir(folder: Path, may_hold_run: bool) -> None:
    """Raise UsageError if `folder` cannot be written to or contains a run that would be lost; write nothing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f'--output-dir {folder}: {existing} is not a writable folder')
    if not may_hold_run and (run_files(folder) or any(folder.glob('checkpoint_*.pth'))):
        raise UsageError(f'{folder} contains a run: --resume auto resumes it, --overwrite replaces it')


# Opening

@usage_errors()
def open_run(
        args: argparse.Namespace, prog: str, device: torch.device, epoch: int, resumed: str | None,
        best: dict[str, Any]) -> 'RunWriter | None':
    """Lock --output-dir, write config.yaml, and remove what the run replaces or trains again.

    `epoch` is the first epoch to train, `resumed` the file to resume, and `best` the best scores so far. Return the
    folder's writer on rank 0; None on other ranks and without --output-dir.
    """
    if not args.output_dir and processes.get_rank() == 0:
        logger.warning('no --output-dir: nothing will be saved')
    if args.output_dir:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if not args.output_dir or processes.get_rank() != 0:
        return None
    folder, flags = Path(args.output_dir), vars(args)
    replace = (resumed is None or args.overwrite) and not is_in_folder(resumed, folder)
    settings = {key.replace('_', '-'): value for key, value in flags.items()
                if key not in UNSAVED_FLAGS and value is not None}
    writer = RunWriter(folder, flags.get('keep_checkpoints', 0))
    wandb_id, wandb_file = None, folder / utils.WANDB_ID
    if flags.get('log_wandb'):
        continues = wandb_file.exists() and not replace
        wandb_id = wandb_file.read_text('utf-8').strip() if continues else secrets.token_hex(4)
        writer.trackers.append(utils.wandb_tracker(folder, settings, wandb_id))
    if flags.get('log_tensorboard'):
        writer.trackers.append(utils.tensorboard_tracker(folder, epoch))
    header = '\n# '.join(map(printable, (  # A line break in a flag would end the comment.
        f'{prog} {shlex.join(sys.argv[1:])}', utils.describe_system(device), f'started {time.strftime("%Y-%m-%d")}')))
    with atomic_write(folder / CONFIG) as file:
        file.write(f'# {header}\n{yaml.safe_dump(settings, sort_keys=False)}'.encode())
        file.flush()
        os.fsync(file.fileno())  # On a full disk the run ends here, before anything is removed.
        # Remove the old run before its config.yaml is replaced, so that a kill cannot mix the two runs.
        for path in run_files(folder) if replace else ():
            path.unlink()
    source = Path(resumed or '')
    if source.suffix == '.pth' and source.is_file() and source.resolve() != (folder / LAST).resolve():
        # Otherwise a damaged checkpoint_last.pth would become the previous file at the next save, and a run that
        # moves to a new folder could not be resumed there before its first save.
        checkpoints.copy(source, folder / LAST)
    rewind(folder, epoch)
    if wandb_id is not None:
        write_file(wandb_file, wandb_id.encode())
    for name, prefix in BEST.items() if not is_in_folder(source, folder) else ():
        if f'{prefix}epoch' in best:
            checkpoints.copy(source.resolve().parent / name, folder / name)
    return writer


def run_files(folder: Path) -> list[Path]:
    """List the run's files in its folder, except config.yaml and the user's copies of checkpoints."""
    paths = [folder / name for name in (LAST, PREVIOUS, *BEST, LOG, utils.WANDB_ID)]
    return [*filter(Path.exists, paths), *epoch_files(folder)]


def rewind(folder: Path, epoch: int) -> None:
    """Remove the checkpoints and log lines of `epoch` and later, which are trained again, and half-written lines."""
    for path in epoch_files(folder):
        if int(path.stem.split('_')[1]) >= epoch:
            path.unlink()
    path = folder / LOG
    if not path.exists():
        return
    lines = []
    for line in path.read_text('utf-8', 'replace').splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            if json.loads(line)['epoch'] < epoch:
                lines.append(line + '\n')
    write_file(path, ''.join(lines).encode())


# Writing

class RunWriter:
    """Write a run's log, and its checkpoints in the background. A complete checkpoint is on disk at all times.

    The checkpoints of the last `keep` epochs are kept as checkpoint_EEEE.pth.

    Raises:
        UsageError: another run is writing to `folder`.

    Attributes:
        error: the first disk error; nothing is written after it, and ranks agree to stop.
        trackers: functions that also get each record of the log.
    """

    def __init__(self, folder: str | Path, keep: int = 0):
        self.folder = Path(folder)
        self.lock = system.lock_file(self.folder / '.lock')  # Keep the lock: closing its file would unlock the folder.
        system.remove_temporary_files(self.folder)
        self.keep = keep
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.trackers: list[Callable] = []

    def save(self, state: dict[str, Any], best: dict[str, float] | None = None) -> None:
        """Copy `state` to host memory, then write it as checkpoint_last.pth.

        Args:
            state: contents of the checkpoint.
            best: at the end of an epoch, the scores that set a new best: 'acc1' or 'box_ap' of the weights in 'model',
                'ema_acc1' of those in 'model_ema'. These weights are written to the best checkpoints.
        """
        self.wait()
        if self.error is None:
            self.thread = threading.Thread(
                target=self._write, args=(checkpoints.to_cpu(state), best), name='checkpoint')
            self.thread.start()

    @contextlib.contextmanager
    def defer_disk_errors(self):
        """Catch an OSError of the block and store it in `error`; check_written raises it."""
        try:
            yield
        except OSError as error:
            self.error = self.error or error

    def log(self, record: dict[str, Any]) -> None:
        """Append one JSON object to log.txt as a line, synced to disk."""
        if self.error is None:
            with self.defer_disk_errors(), open(self.folder / LOG, 'ab') as file:
                file.write(f'{json.dumps(record)}\n'.encode())
                file.flush()
                os.fsync(file.fileno())
        for tracker in list(self.trackers):
            try:
                tracker(record)
            except Exception as error:  # Continue: log.txt has the record.
                logger.warning('a tracker failed and gets no more records: %s', str(error) or type(error).__name__)
                self.trackers.remove(tracker)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk, or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _write(self, state: dict[str, Any], best: dict[str, float] | None) -> None:
        try:
            files = {}
            for metric, score in (best or {}).items():
                is_ema = metric.startswith('ema_')
                key, name = 'model_ema' if is_ema else 'model', f'checkpoint_{"ema_" * is_ema}best.pth'
                files[name] = {key: state[key] for key in DESCRIPTION if key in state} | {
                    'model': state[key], metric.removeprefix('ema_'): score}
            if self.keep and best is not None:
                files[f'checkpoint_{state["epoch"]:04d}.pth'] = state
            for name, content in {**files, LAST: state}.items():  # If killed in between, the run repeats the epoch.
                with atomic_write(self.folder / name, self.folder / PREVIOUS if name == LAST else None) as file:
                    torch.save(content, file)
            for old in epoch_files(self.folder)[:-self.keep] if self.keep else ():
                with contextlib.suppress(PermissionError):  # Windows cannot remove an open file.
                    old.unlink()
        except Exception as error:
            self.error = error
            if not isinstance(error, OSError):
                raise  # This is a bug, so keep its traceback.


def check_written(writer: RunWriter | None) -> None:
    """Wait for the last checkpoint; raise TrainingFault on all ranks if it could not be written."""
    error = None
    if writer is not None:
        writer.wait()
        error = writer.error and f'{writer.folder} cannot be written to ({writer.error}); earlier files are intact'
    errors = [error for error in processes.gather_from_ranks(error) if error]
    if errors:
        raise TrainingFault(errors[0])
