"""One file over the network onto the disk: safe name, enough room, resumed where it stopped, checksum, then its name.

A file is written as NAME.part and renamed when it is whole and its checksum is the published one. What is left of an
interrupted download is gone on with, by the next run too.

中文：下载一个文件：检查文件名与磁盘空间，断点续传，核对校验和，最后才改成正式名字。
"""

import contextlib
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from filelock import FileLock, Timeout
from tqdm import tqdm

from model.files import replace_file
from scripts.fetching.hubs import Hub, RemoteFile, client
from trainer.command_line import UserError

SPARE_BYTES = 64 << 20  # left free beside what is downloaded
READ_BYTES = 1 << 20
TRIES, PAUSE_SECONDS = 5, 1.0  # failures in a row without a new byte; the pause after one doubles
DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # of Windows, with any ending


class Bar(tqdm):
    """A progress bar where somebody watches, nothing in a log file."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"disable": not sys.stderr.isatty()})


def place(folder: Path, path: str) -> Path:
    """Where a file of a repository goes. Its name comes from a server, and must not lead out of the folder.

    Raises: UserError for absolute paths, drives, "..", and what Windows takes for a device or a stream.
    """
    windows, parts = PureWindowsPath(path), PurePosixPath(path).parts
    bad = not parts or windows.drive or windows.root or "\\" in path or re.search(r'[\x00-\x1f<>:"|?*]', path)
    if bad or any(p == ".." or p != p.rstrip(". ") or DEVICE.match(p) for p in parts):
        raise UserError(f"the server names a file {path!r}; that is no plain path below a folder: nothing is written.")
    return folder.joinpath(*parts)


def checksum_of(path: Path, like: str) -> str:
    """The checksum of a file, of the kind that `like` is ("sha256:…", "git:…")."""
    kind = like.split(":")[0]
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as f, Bar(total=path.stat().st_size, unit="B", unit_scale=True, desc="checking") as bar:
        while block := f.read(READ_BYTES):
            digest.update(block)
            bar.update(len(block))
    return f"{kind}:{digest.hexdigest()}"


def is_whole(path: Path, file: RemoteFile) -> bool:
    """Whether this is the file: its size, and its checksum where one is known."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return not file.checksum or checksum_of(path, file.checksum) == file.checksum


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def check_room(folder: Path, files: list[tuple[RemoteFile, Path]]) -> None:
    """Raises: UserError when the disk has no room for what is still to come."""
    missing = sum(f.size - (part_of(t).stat().st_size if part_of(t).is_file() else 0) for f, t in files)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if missing + SPARE_BYTES > free:
        raise UserError(
            f"{folder}: {missing / 1e9:,.1f} GB are to come, {free / 1e9:,.1f} GB are free. Make room, or name a "
            "folder on another disk with --to."
        )


def receive(url: str, headers: dict[str, str], part: Path, size: int) -> None:
    """Appends to `part` what is missing of `size` bytes. A broken connection is taken up again, where it broke.

    Raises: httpx2.HTTPError after TRIES failures in a row without a new byte, UserError when the server refuses.
    """
    import httpx2

    # A compressed answer could not be gone on with: its positions are not those of the file.
    headers, failures = {**headers, "Accept-Encoding": "identity"}, 0
    with open(part, "ab") as f, Bar(total=size, initial=f.tell(), unit="B", unit_scale=True, desc=part.stem) as bar:
        while (at := f.tell()) < size:
            wanted = {**headers, "Range": f"bytes={at}-"} if at else headers
            error = httpx2.ReadError("the server sent nothing")
            try:
                with client().stream("GET", url, headers=wanted) as answer:
                    if answer.status_code not in (200, 206):
                        raise UserError(f"the server answered {answer.status_code} to {url}; try again later.")
                    resumed = answer.headers.get("Content-Range", "").startswith(f"bytes {at}-")
                    if at and not (answer.status_code == 206 and resumed):  # it begins anew
                        f.truncate(0)
                        bar.reset()
                    for block in answer.iter_bytes():
                        f.write(block)
                        bar.update(len(block))
                        if f.tell() > size:  # not what was announced, and perhaps without an end
                            break
            except httpx2.TransportError as broken:
                error = broken
            failures = 0 if f.tell() > at else failures + 1
            if failures == TRIES:
                raise error
            if f.tell() < size:
                time.sleep(PAUSE_SECONDS * 2**failures)
        f.flush()
        os.fsync(f.fileno())


@contextlib.contextmanager
def alone(part: Path, target: Path) -> Iterator[None]:
    """Nobody else downloads this file meanwhile.  Raises: UserError when somebody does already."""
    lock = FileLock(str(part) + ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{target} is being downloaded by another process; wait for it.") from None
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # Windows: somebody else looks at it
            Path(lock.lock_file).unlink(missing_ok=True)


def fetch(hub: Hub, repo: str, kind: str, file: RemoteFile, target: Path) -> None:
    """Downloads one file to `target`, going on where an earlier try stopped.

    Raises: UserError when the connection is lost for good (what came is kept), on a wrong checksum (the part is
    removed), on a refusal of the server, and when another process downloads the same file.
    """
    import httpx2

    part = part_of(target)
    part.parent.mkdir(parents=True, exist_ok=True)
    with alone(part, target):
        if part.is_file() and part.stat().st_size > file.size:  # of another version
            part.unlink()
        try:
            receive(hub.url(repo, kind, file.path), hub.headers(), part, file.size)
        except httpx2.HTTPError as error:
            cause = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(
                f"the connection to {hub.endpoint} broke ({cause}); {part.stat().st_size:,} of {file.size:,} bytes of "
                f"{target.name} are here. The same command goes on from there."
            ) from error
        came = checksum_of(part, file.checksum) if file.checksum else ""
        if came != file.checksum or part.stat().st_size != file.size:
            part.unlink()
            raise UserError(
                f"{file.path} has arrived with the checksum {came}, expected {file.checksum}: it is damaged or of "
                "another version and was thrown away. Run the command again, or name another --source."
            )
        replace_file(part, target)
