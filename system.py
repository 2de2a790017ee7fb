"""Handle what differs between operating systems: signals, locks, files, limits, cores. Nothing here imports torch."""
import contextlib
import errno
import multiprocessing
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

from errors import UsageError

# These signals ask a run to stop. A closing terminal sends SIGHUP, and SLURM sends SIGUSR1 before the time limit.
STOP_SIGNALS = {name: getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1')
                if hasattr(signal, name)}  # Windows has only the first two.


# Signals

def handle(name: str, handler: Callable | int) -> None:
    """Set a signal's handler if the signal exists and this is the main thread. Keep ignoring SIGHUP under nohup."""
    number = getattr(signal, name, None)
    if number is None or threading.current_thread() is not threading.main_thread():
        return
    if name != 'SIGHUP' or signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, handler)


@contextlib.contextmanager
def handlers_restored():
    """Restore the handlers of the stop signals after the block, for notebooks."""
    before = {name: signal.getsignal(number) for name, number in STOP_SIGNALS.items()}
    try:
        yield
    finally:
        for name, handler in before.items():
            if handler is not None:  # None means that Python did not set the handler.
                handle(name, handler)


@contextlib.contextmanager
def signals_blocked():
    """Block the stop signals in this thread, and in processes that it starts."""
    if not hasattr(signal, 'pthread_sigmask'):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS.values())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_the_run(worker: int) -> None:
    """Ignore stop signals in a worker, except SIGTERM from the run."""
    run = multiprocessing.parent_process()  # Under forkserver, os.getppid() would be the server.
    if not run.is_alive():  # The run died before torch's own check started.
        os._exit(1)
    if not hasattr(signal, 'sigtimedwait'):  # macOS does not tell who sent a signal: obey only SIGTERM.
        for name in STOP_SIGNALS.keys() - {'SIGTERM'}:
            handle(name, signal.SIG_IGN)
        if hasattr(signal, 'pthread_sigmask'):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS.values())
        return
    numbers = STOP_SIGNALS.values()
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # A forkserver's processes do not inherit the run's mask.

    def wait() -> None:
        while True:
            received = signal.sigtimedwait(numbers, 2)
            if received is None:
                if not run.is_alive():  # torch checks too, but then blocks on a pipe that nobody reads.
                    os._exit(1)
            elif received.si_signo == signal.SIGTERM and received.si_pid == run.pid:
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


# Files

def lock_file(path: Path) -> contextlib.ExitStack:
    """Lock `path` until this process exits, even by SIGKILL, or until the returned stack is closed."""
    stack, is_locked = contextlib.ExitStack(), False
    if fcntl is not None:  # Unlike filelock's, this lock is not inherited by workers, which may outlive the run.
        file = stack.enter_context(open(path, 'ab'))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # Other errors mean that the file system has no locks: run without one.
            is_locked = error.errno in (errno.EACCES, errno.EAGAIN)
    else:
        import filelock  # torch requires it.
        try:
            stack.enter_context(filelock.FileLock(path).acquire(blocking=False))
        except filelock.Timeout:
            is_locked = True
    if is_locked:
        raise UsageError(f'another run is writing to {path.parent}: stop it first. After kill -9 of torchrun, its '
                         f'processes may still run. If none of them is left on any host, remove {path}')
    return stack


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, where possible: Windows and many network file systems cannot."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, getattr(errno, 'EDQUOT', None)):
            raise


@contextlib.contextmanager
def atomic_write(path: Path, previous: Path | None = None):
    """Open a temporary file next to `path`, which replaces `path` when the block ends and the file is on disk.

    If given, `previous` keeps the replaced file. At any moment, one of the two names is a complete file. An OSError,
    such as on a full disk, names `path`.
    """
    temporary = path.parent / f'.cmt-{secrets.token_hex(8)}.tmp'
    try:
        with open(temporary, 'xb') as file:  # Mode 'x' refuses to follow links.
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            if previous.exists():
                patiently(os.unlink, previous)
            try:
                os.link(path, previous)
            except OSError:  # This file system has no hard links.
                patiently(os.replace, path, previous)
        patiently(os.replace, temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if type(error) is RuntimeError else error  # torch.save wraps the error.
        if isinstance(cause, OSError) and cause.errno and cause.filename in (None, str(temporary)):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def write_file(path: Path, content: bytes) -> None:
    """Write a file with atomic_write."""
    with atomic_write(path) as file:
        file.write(content)


def remove_temporary_files(folder: Path) -> None:
    """Remove temporary files that killed processes left in `folder`. The caller must hold the folder's lock."""
    for path in folder.glob('.cmt-????????????????.tmp'):
        path.unlink(missing_ok=True)


def patiently(function: Callable, *paths: Path) -> None:
    """Call `function` with `paths`. Retry for up to a minute, since Windows protects files that a program has open."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return function(*paths)
        except PermissionError:
            if time.monotonic() > deadline or not os.access(paths[-1].parent, os.W_OK):
                raise
            time.sleep(0.1)


# Limits

def raise_file_limit(limit: int = 65536) -> None:
    """Raise the limit on open files as far as this process may: a worker needs five, a batch two."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = limit if hard == resource.RLIM_INFINITY else min(hard, limit)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def cores() -> int:
    """Count the cores that affinity and a container's CPU quota let this process use."""
    from joblib.externals.loky import cpu_count  # Import joblib late, since joblib imports NumPy.
    return cpu_count()
