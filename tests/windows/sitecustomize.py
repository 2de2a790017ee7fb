"""Make Python answer as on Windows, as far as Linux allows. Add this folder to PYTHONPATH.

The names that Windows lacks are gone, folders cannot be opened, files that are open in any process can be neither
renamed nor removed, text files are cp1252, and multiprocessing spawns. Separators of paths stay.
"""
import builtins
import errno
import io
import multiprocessing
import multiprocessing.resource_tracker
import os
import shutil
import signal
import sys

import torch.utils.data._utils.signal_handling  # before its names are gone

torch.utils.data._utils.signal_handling.IS_WINDOWS = True
multiprocessing.resource_tracker._HAVE_SIGMASK = False
os_open, text_open = os.open, io.open


def refuse(path):
    raise PermissionError(errno.EACCES, 'Permission denied', os.fspath(path))


def open_file(path, flags, *args, **kwargs):
    if not isinstance(path, int) and os.path.isdir(path):
        refuse(path)
    return os_open(path, flags, *args, **kwargs)


def open_text(file, mode='r', buffering=-1, encoding=None, *args, **kwargs):
    if 'b' not in mode and encoding in (None, 'locale'):
        encoding = 'cp1252'
    return text_open(file, mode, buffering, encoding, *args, **kwargs)


def is_open(path):
    """Return whether a process has a file open, or a file in a folder."""
    path = os.path.realpath(path)
    for process in filter(str.isdecimal, os.listdir('/proc')):
        try:
            files = [os.readlink(f'/proc/{process}/fd/{fd}') for fd in os.listdir(f'/proc/{process}/fd')]
        except OSError:
            continue
        if any(file == path or file.startswith(f'{path}/') for file in files):
            return True
    return False


def guarded(function):
    def call(*paths, **kwargs):
        caller = sys._getframe(1).f_code.co_filename
        # multiprocessing and tempfile unlink open files, which they do not on Windows.
        for path in paths if 'multiprocessing' not in caller and 'tempfile' not in caller else ():
            if isinstance(path, (str, os.PathLike)) and os.path.lexists(path) and is_open(path):
                refuse(path)
        return function(*paths, **kwargs)
    return call


for name in 'fcntl', 'resource', 'pwd', 'grp', 'termios', 'tty', 'pty':
    sys.modules[name] = None
for name in dir(signal):
    if name.startswith('SIG') and name not in ('SIGINT', 'SIGTERM', 'SIGABRT', 'SIGFPE', 'SIGILL', 'SIGSEGV', 'SIG_DFL',
                                               'SIG_IGN', 'SIGKILL') or name.startswith(('pthread_', 'sigwait')):
        delattr(signal, name)
for name in ('sigtimedwait', 'setitimer', 'alarm', 'pause', 'siginterrupt'):
    delattr(signal, name)
for name in ('fork', 'forkpty', 'register_at_fork', 'getuid', 'geteuid', 'getgid', 'sched_getaffinity',
             'O_NOFOLLOW', 'O_DIRECTORY', 'killpg', 'setsid', 'setpgid', 'mkfifo', 'uname', 'chown'):
    delattr(os, name)
os.open, builtins.open, io.open = open_file, open_text, open_text
for name in 'replace', 'rename', 'unlink', 'remove', 'rmdir':
    setattr(os, name, guarded(getattr(os, name)))
shutil._use_fd_functions = False
multiprocessing.set_start_method('spawn')
