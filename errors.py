"""Errors that reach the user as one line instead of a traceback, and how an exception becomes one line."""


class UsageError(ValueError):
    """Report a mistake in flags, data or files, found by a check; processes.usage_errors brings it to all ranks.

    One line, exit status 2.
    """


def mistake(error: BaseException) -> str | None:
    """Return the line about a mistake of the user: a UsageError, or an OSError that names a file. None for a bug."""
    is_mistake = isinstance(error, UsageError) or isinstance(error, OSError) and error.filename is not None
    return (str(error) or type(error).__name__) if is_mistake else None


class TrainingFault(RuntimeError):
    """Report on all ranks that training cannot continue. The last checkpoint is good. One line, exit status 1."""


class UnreadableImage(RuntimeError):
    """Report an image that the run cannot continue without."""

    @property
    def line(self) -> str:
        """Return the message alone; a DataLoader worker prepends its traceback."""
        return str(self).strip().splitlines()[-1].removeprefix('errors.UnreadableImage: ')


def first_line(error: BaseException) -> str:
    """Return the first line of a message; torch appends C++ frames."""
    return str(error).strip().split('\n', 1)[0] or type(error).__name__


def one_line(error: BaseException) -> str:
    """Return the whole message on one line."""
    if type(error).__name__ == 'UnidentifiedImageError':  # Pillow's own message names an object in memory
        return 'not an image'
    return ' '.join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """Escape characters of a file name that would break a line or that no encoding has."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape', 'surrogatepass').decode() for c in text)
