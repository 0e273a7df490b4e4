"""Files that appear whole or not at all. Standard library only: scripts that need no torch start at once.

中文：原子写入：文件要么完整出现，要么保持原样。
"""

import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PATIENCE = 5.0  # seconds


def replace_file(source: Path, target: Path) -> None:
    """Renames a file or folder over what stands there, in one go.

    Windows refuses while anybody has one of the two open, a page that shows a run or a virus scanner for example: there
    it is tried again for a few seconds.  Raises: OSError.
    """
    end = time.monotonic() + (PATIENCE if os.name == "nt" else 0.0)
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def atomic_open(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A file that appears under its name whole or not at all: written beside it, flushed to disk, then renamed.

    On any error (disk full, interrupt) the part is removed and what stood under the name before stays as it was.
    Raises: OSError with the file's name when it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else "\n") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        replace_file(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # Windows: somebody has it open; the error worth reporting is the first one
            part.unlink(missing_ok=True)
        # torch.save hides the OSError of a full disk behind a RuntimeError, and a failed write does not say where.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError) and cause.errno and cause.filename is None:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


def as_typed(path: str | Path) -> str:
    """A path as it is typed in a command line of this system, quoted where that is needed."""
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))
