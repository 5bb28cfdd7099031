"""Shared by all examples: one-line errors, and atomic replacement of files."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

DISK_FULL_CODES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")


class UserError(Exception):
    """Invalid arguments or data, to be corrected before running again."""

    exit_code = 2


class RunError(Exception):
    """A failure during the run that is not caused by the arguments."""

    exit_code = 1


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` reports a full disk.

    HDF5 and TensorFlow wrap the system's error in their own types, so the text is checked as well.
    """
    if isinstance(error, OSError) and error.errno in DISK_FULL_CODES:
        return True
    return any(text in str(error) for text in DISK_FULL_TEXTS)


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank, or the name of its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def run(program: str, main: Callable[[], None], debug: bool) -> int:
    """Call `main` and return the exit code; an error becomes one line on stderr unless `debug`."""
    try:
        main()
        return 0
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"{program}: error: {_describe(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


def _describe(error: Exception) -> str:
    if isinstance(error, UserError | RunError):
        return str(error)
    if is_disk_full(error):
        return f"disk full: {first_line(error)}"
    return f"{type(error).__name__}: {first_line(error)} (run again with --debug for the traceback)"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside the file `path`, which is moved over `path` on success.

    Readers never see an incomplete file, and a failed write keeps the previous file.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming_full_disk(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        remove(temporary)


@contextlib.contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn a full disk into an error that names `path`, which is written completely or not at all."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        kept = "the previous one is kept" if path.exists() else "nothing was written"
        raise RunError(f"disk full while writing {path}; {kept}") from error


def reserve(folder: Path, size: int) -> None:
    """Raise the system's error if `size` bytes cannot be written to `folder`.

    For writers that do not fail cleanly: HDF5 can crash the process on a full disk.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS, Windows
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size))


def remove(path: Path) -> None:
    """Delete a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
