"""Define errors that the user sees as one line instead of a traceback, and format exceptions as one line."""


class UsageError(ValueError):
    """Report a mistake in flags, data or files. Inside processes.usage_errors, every rank raises the error.

    The user sees one line, and the exit status is 2.
    """


def mistake(error: BaseException) -> str | None:
    """Return the message of a user's mistake (a UsageError, or an OSError that names a file), or None for a bug."""
    is_mistake = isinstance(error, UsageError) or isinstance(error, OSError) and error.filename is not None
    return (str(error) or type(error).__name__) if is_mistake else None


class TrainingFault(RuntimeError):
    """Report on all ranks that training cannot continue. The last checkpoint is intact, and the exit status is 1."""


class UnreadableImage(RuntimeError):
    """Report an unreadable image that the run cannot skip."""

    @property
    def line(self) -> str:
        """Return the message without the traceback that a DataLoader worker prepends."""
        return str(self).strip().splitlines()[-1].removeprefix('errors.UnreadableImage: ')


def first_line(error: BaseException) -> str:
    """Return the first line of a message, without the C++ frames that torch appends."""
    return str(error).strip().split('\n', 1)[0] or type(error).__name__


def one_line(error: BaseException) -> str:
    """Return the whole message on one line."""
    if type(error).__name__ == 'UnidentifiedImageError':  # Pillow's message would show a memory address.
        return 'not an image'
    return ' '.join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """Escape characters in a file name that would break a line or cannot be encoded."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape', 'surrogatepass').decode() for c in text)
