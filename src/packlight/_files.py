"""Files that are read and written whole: none is left half written, none read without end."""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from packlight.errors import InputError

# Methods of a thousand layers take a hundredth of it.
_MOST_BYTES = 2**24


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file. Raises `InputError` for what is no file of a sensible size in UTF-8."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} cannot be read: {_kind(found)}")
        if found.st_size > _MOST_BYTES:
            raise InputError(
                f"{path} cannot be read: it has {found.st_size} bytes, at most {_MOST_BYTES} are"
                " expected"
            )
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8, which is expected") from error
    except InputError:
        raise
    except ValueError as error:  # a null character
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file; an error leaves what was there before."""
    with replaced(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new path in the folder of `path`, whose file takes the place of `path` when all is well.

    Raises `InputError` where that cannot be, also from within.
    """
    beside: Path | None = None
    try:
        target = Path(os.path.realpath(path))
        mode = _mode(path, target)
        beside = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
        yield beside
        if mode is not None:
            beside.chmod(mode)
        with beside.open("rb") as file:
            os.fsync(file.fileno())  # a disk that is full may say so only now
        beside.replace(target)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{path} cannot be written: {error}") from error
    except ValueError as error:
        if isinstance(error, InputError) or "null" not in str(error):  # of whoever writes
            raise
        raise InputError(f"{str(path)!r} cannot be written: {error}") from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


def _mode(path: str | os.PathLike[str], target: Path) -> int | None:
    """The permissions of the file that is there; None where there is none."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} cannot be written: {_kind(found)}")
    if not os.access(target, os.W_OK):
        raise InputError(f"{path} cannot be written: Permission denied")
    return stat.S_IMODE(found.st_mode)


def _kind(found: os.stat_result) -> str:
    return "Is a directory" if stat.S_ISDIR(found.st_mode) else "Is a device or a pipe, not a file"
