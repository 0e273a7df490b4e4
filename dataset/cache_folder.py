"""A folder of files that is written whole or not at all, read back through memory maps. It knows nothing of tokens.

It is filled as `<name>.building-*` and renamed when whole, under a lock that the operating system frees when its
process dies: an interrupted run leaves nothing that is taken for a cache, and the next run removes what it left.
Processes that want the same folder at the same time (ranks) wait for the first one and read its result. meta.json holds
the size and the sum of every file, so that damage is noticed.

中文：缓存文件夹写完整后才改名，所以中断不会留下坏缓存；多个进程同时需要时只有一个在写。
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import mmap
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from dataset.json_lines import DataError
from model.files import replace_file

log = logging.getLogger(__name__)


class CacheError(OSError):
    """The token cache cannot be written or read. The message says what to type."""


@contextmanager
def user_errors(cache_dir: Path) -> Iterator[None]:
    """Turns a full disk and a missing permission, however deeply wrapped, into one clear line."""
    try:
        yield
    except (DataError, CacheError):
        raise
    except Exception as e:
        chain: list[BaseException] = []
        cause: BaseException | None = e
        while cause is not None and cause not in chain:
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__
        codes = {getattr(c, "errno", None) for c in chain}
        if {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)} & codes or any(
            "No space left" in str(c) or "Not enough disk space" in str(c) for c in chain
        ):
            free = shutil.disk_usage(_existing(cache_dir)).free / 1e9
            raise CacheError(
                f"the disk is full ({free:.2f} GB free) while writing the token cache in {cache_dir}; tokenising takes "
                "about 1.5 times the bytes of the data file: free some, or name another disk with --cache_dir FOLDER"
            ) from e
        if {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST} & codes:
            raise CacheError(
                f"the token cache folder {cache_dir} cannot be written ({e}); name one you may write to with "
                "--cache_dir FOLDER"
            ) from e
        raise


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def build_folder(final: Path, cache_dir: Path, waiting_for: str) -> Iterator[Path | None]:
    """Yields an empty folder to fill; renames it to `final` when the block ends without an exception.

    Yields None when another process finished `final` while this one waited for the lock. What dead runs left in the
    same place is removed first.
    """
    from filelock import FileLock, Timeout

    final.parent.mkdir(parents=True, exist_ok=True)
    locks = cache_dir / "locks"
    locks.mkdir(exist_ok=True)
    lock = FileLock(locks / f"{final.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("waiting for another process that is %s", waiting_for)
        lock.acquire()
    try:
        if (final / "meta.json").exists() and _damage(final) is None:
            yield None
            return
        for left in final.parent.glob("*.building-*"):
            name = left.name.split(".building-")[0]
            owner = lock if name == final.name else FileLock(locks / f"{name}.lock")
            try:
                with owner.acquire(timeout=0):
                    shutil.rmtree(left, ignore_errors=True)
            except Timeout:
                continue  # its process is alive
        tmp = final.with_name(f"{final.name}.building-{secrets.token_hex(4)}")
        tmp.mkdir()
        try:
            yield tmp
            for file in tmp.iterdir():
                _fsync(file)
            _fsync(tmp)
            damaged = final.with_name(f"{final.name}.building-{secrets.token_hex(4)}")
            if final.exists():
                replace_file(final, damaged)
            replace_file(tmp, final)
            _fsync(final.parent)
            shutil.rmtree(damaged, ignore_errors=True)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
    finally:
        lock.release()


@contextmanager
def scratch_folder(cache_dir: Path) -> Iterator[Path]:
    """An empty folder that is removed at the end, or by the next run where this one dies (see `build_folder`).

    Its name is short: `datasets` writes the path of a folder out once more in the name of a file in it, and Windows
    ends a path at 260 characters.
    """
    from filelock import FileLock

    name = secrets.token_hex(3)
    lock = FileLock(cache_dir / "locks" / f"{name}.lock")
    folder = cache_dir / f"{name}.building-a"
    try:
        with lock:
            folder.mkdir()
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            Path(lock.lock_file).unlink()


def _fsync(path: Path) -> None:
    """Makes a file, or on POSIX the entries of a folder, survive a power cut."""
    if path.is_dir():
        if os.name == "nt":
            return
        fd = os.open(path, os.O_RDONLY)
    else:
        fd = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_meta(folder: Path, meta: dict) -> None:
    """meta.json, written last: the given facts and the size and sha256 of every file in the folder."""
    files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir()) if p.is_file()}
    with open(folder / "meta.json", "w", encoding="utf-8", newline="\n") as f:
        json.dump(meta | {"files": files}, f, ensure_ascii=False, indent=1)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


_checked: set[tuple] = set()  # folders whose sums this process has found right already


def _damage(folder: Path) -> str | None:
    """What is wrong with a cache folder, None when it is whole."""
    try:
        files = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["files"]
        seen = (str(folder), *sorted((n, (folder / n).stat().st_size, (folder / n).stat().st_mtime_ns) for n in files))
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"{type(e).__name__}: {e}"
    if seen in _checked:
        return None
    for name, want in files.items():
        size = (folder / name).stat().st_size
        if size != want["bytes"]:
            return f"{name} has {size} bytes, {want['bytes']} were written"
        if _sha256(folder / name) != want["sha256"]:
            return f"{name} differs from what was written"
    _checked.add(seen)
    return None


def read_meta(folder: Path) -> dict | None:
    """meta.json of a whole cache folder; None when there is none or it is damaged (which is said)."""
    if not folder.is_dir():
        return None
    damage = _damage(folder)
    if damage:
        log.warning("the cache %s is damaged (%s): building it again", folder, damage)
        return None
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


class MappedArray:
    """A read-only array in a file, mapped on first use. Pickles as its path: a loading process opens its own map."""

    def __init__(self, path: Path, dtype: str | None = None):
        self.path, self.dtype = path, dtype
        self._array: np.ndarray | None = None
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict:
        return {"path": self.path, "dtype": self.dtype, "_array": None, "_map": None}

    @property
    def array(self) -> np.ndarray:
        if self._array is None:
            if self.dtype is None:
                mapped = np.load(self.path, mmap_mode="r")
            elif self.path.stat().st_size:
                mapped = np.memmap(self.path, dtype=self.dtype, mode="r")
            else:
                mapped = np.zeros(0, self.dtype)  # an empty file cannot be mapped
            self._map = getattr(mapped, "_mmap", None)
            self._array = mapped.view(np.ndarray)  # slicing a memmap object itself costs microseconds more
        return self._array

    def release(self) -> None:
        """Hands the pages read so far back to the system (they stay in its file cache): resident memory stays flat."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
