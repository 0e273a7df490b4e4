"""Tokenise a JSON Lines file once and read it back through memory maps.

    file.jsonl ── one pass: content hash, line-aligned shards
               ── datasets.Dataset.from_generator: parse, check, tokenise (several processes for a large file)
               ── <cache_dir>/<key>/   tokens.bin   every record's ids, one after the other (uint16 or uint32)
                                       trained.bin  uint8 per token, 1 = the loss counts it (conversations only)
                                       offsets.npy  int64, N + 1: record i is tokens[offsets[i]:offsets[i + 1]]
                                       hashes.npy   uint64 per record, a hash of its tokens
                                       first_trained.npy  int32 per record (conversations only)
                                       meta.json    settings, counts, the size and sha256 of every file above

The key is a hash of the file's content, of the tokenizer and of the record format: a changed file, tokenizer or chat
template never meets an old cache. The folder is written whole or not at all (cache_folder.py). How the records are
packed into rows is kept beside the tokens, in `<key>/rows-*` (lm_dataset.py).

中文：JSONL 只分词一次，结果写成内存映射的缓存；缓存名是“内容 + 分词器 + 格式”的哈希。
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dataset.cache_folder import (
    CacheError,
    MappedArray,
    build_folder,
    read_meta,
    scratch_folder,
    user_errors,
    write_meta,
)
from dataset.json_lines import DataError, Shard, check_file, parse_line, read_lines, scan_jsonl
from model.files import as_typed

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_CACHE_DIR = ROOT / "dataset" / ".cache"
FORMAT_VERSION = 1  # raise it when the same input would give other files
BATCH_BYTES = 1 << 18  # text handed to the tokenizer at once: enough to keep its threads busy, little memory
PROCESS_BYTES = 8 << 20  # a further process has to have this much text to be worth starting
BAD_KEPT = 20  # how many bad records are remembered word for word

# Encoding text switches the tokenizer's core, and rendering a conversation a tracker that all threads share: a server
# or a web page asks from several, so one thread at a time. Else a control token that one user types could be taken as
# one because another's prompt is being encoded.
encoding_lock = threading.RLock()

# scan_jsonl of the files this process has read already: the training and the validation part share one.
_scanned: dict[tuple, tuple[str, list[Shard]]] = {}


@dataclass(frozen=True)
class RecordFormat:
    """How one stage reads a record. The functions live at module level, so that a spawned process can import them.

    reader(tokenizer) -> read                    made once; read(record) -> item checks one parsed record and raises
                                                 ValueError(reason) when it is bad
    encode(items, tokenizer) -> (ids, trained)   lists of int and of bool or uint8 arrays, 1 where the loss counts the
                                                 token; trained is None for plain text
    whole                                        a record that is longer than a row is left out, never cut
    """

    name: str
    reader: Callable[[Any], Callable[[dict], Any]]
    encode: Callable[[list, Any], tuple[list[np.ndarray], list[np.ndarray] | None]]
    masked: bool
    whole: bool = False


@contextmanager
def plain_backend(tokenizer: Any, controls_as_text: bool = False) -> Iterator[Any]:
    """The fast tokenizer's core, for the time being without the truncation or padding an earlier call may have left on.

    controls_as_text: a control token written out in a text is encoded as the text it is, not as its id. The tokenizer's
    own core is used and put back as it was (a copy would start with a cold word cache, at half the speed), by one
    thread at a time.
    """
    backend = tokenizer.backend_tokenizer
    with encoding_lock:
        truncation, padding, as_text = backend.truncation, backend.padding, backend.encode_special_tokens
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = controls_as_text
        try:
            yield backend
        finally:
            backend.encode_special_tokens = as_text
            if truncation is not None:
                backend.enable_truncation(**truncation)
            if padding is not None:
                backend.enable_padding(**padding)


def has_markers(chat_template: str | None) -> bool:
    """Whether the chat template says what the assistant writes."""
    return re.search(r"{%-?\s*generation\b", chat_template or "") is not None


@lru_cache(maxsize=8)
def require_markers(chat_template: str | None) -> None:
    """Raises DataError when the chat template does not say what the assistant writes."""
    if not has_markers(chat_template):
        raise DataError(
            "the tokenizer's chat template has no {% generation %} markers, from which the mask of trained tokens is "
            "made; use the tokenizer in model/ or add the markers to your template"
        )


def cache_key(content_hash: str, tokenizer: Any, fmt: RecordFormat) -> str:
    """Name of the cache folder: changes with the data, the tokenizer, its chat template and the format."""
    with plain_backend(tokenizer) as backend:
        parts = [FORMAT_VERSION, content_hash, backend.to_str(), fmt.name, len(tokenizer)]
    parts += [tokenizer.bos_token_id, tokenizer.eos_token_id]
    if fmt.masked:
        require_markers(tokenizer.chat_template)
        parts.append(tokenizer.chat_template)
    return f"{fmt.name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]}"


def read_batches(
    path: Path, shard: Shard | None, fmt: RecordFormat, tokenizer: Any
) -> Iterator[tuple[list[int], list[Any], list[tuple[int, str]], int]]:
    """Batches of about `BATCH_BYTES`: (line numbers, items read, bad records as (line, reason), bytes read)."""
    read = fmt.reader(tokenizer)
    lines: list[int] = []
    items: list[Any] = []
    bad: list[tuple[int, str]] = []
    n_bytes = 0
    for number, raw in read_lines(path, shard):
        n_bytes += len(raw) + 1
        try:
            items.append(read(parse_line(raw)))
            lines.append(number)
        except ValueError as e:
            bad.append((number, str(e)))
        if n_bytes >= BATCH_BYTES:
            yield lines, items, bad, n_bytes
            lines, items, bad, n_bytes = [], [], [], 0
    if items or bad:
        yield lines, items, bad, n_bytes


def token_hash(ids: np.ndarray) -> int:
    """64 bits of the record's own tokens: equal records get the same side of the train / validation split."""
    return int.from_bytes(hashlib.blake2b(ids, digest_size=8).digest(), "little")


def generate_rows(
    shards: Sequence[dict], path: str, fmt: RecordFormat, tokenizer: Any, dtype: str, skip_bad: bool, tmp: str
) -> Iterator[dict]:
    """Runs in the tokenising processes: one row of flat arrays per batch of records.

    A bad record is written to `error-<shard>.json` before the run is ended: an exception loses its type on the way.
    """
    folder = Path(tmp)
    done = np.memmap(folder / "progress.bin", dtype=np.int64, mode="r+")
    for shard in (Shard(**s) for s in shards):
        n_seen = n_bad = 0
        for _, items, bad, n_bytes in read_batches(Path(path), shard, fmt, tokenizer):
            n_seen, n_bad = n_seen + len(items) + len(bad), n_bad + len(bad)
            if bad and not skip_bad:
                error = {"line": bad[0][0], "reason": bad[0][1], "seen": n_seen, "bad": n_bad}
                (folder / f"error-{shard.index}.json").write_text(json.dumps(error), encoding="utf-8")
                raise DataError(bad[0][1])
            _stop_without_parent()
            ids, trained = fmt.encode(items, tokenizer) if items else ([], [])
            tokens = np.concatenate([np.zeros(0, dtype), *ids], dtype=dtype, casting="unsafe")
            offsets = np.cumsum([0, *map(len, ids)])
            row = {
                "tokens": tokens,
                "lengths": np.diff(offsets),
                "hashes": np.array([token_hash(tokens[a:z]) for a, z in pairwise(offsets.tolist())], np.uint64),
            }
            if fmt.masked:
                row["trained"] = np.concatenate([np.zeros(0, np.uint8), *trained], dtype=np.uint8, casting="unsafe")
                row["first_trained"] = _first_true(row["trained"], offsets)
            # As bytes: `datasets` would turn an array into a list of Python numbers on its way into Arrow.
            row = {name: array.tobytes() for name, array in row.items()}
            row |= {"n_bad": len(bad), "bad": json.dumps(bad[:BAD_KEPT])}
            yield row
            done[shard.index] += n_bytes


def _first_true(mask: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Per record, mask[offsets[i]:offsets[i + 1]], where its first True stands; its length when it has none. int32."""
    places = np.append(np.flatnonzero(mask), len(mask))
    first = places[np.searchsorted(places, offsets[:-1])]
    return (np.minimum(first, offsets[1:]) - offsets[:-1]).astype(np.int32)


def _stop_without_parent() -> None:
    """Ends an orphan: after kill -9 of the main process its helpers would go on writing and keep its lock."""
    module = sys.modules.get("multiprocess.process")
    parent = module.parent_process() if module else None
    if parent is not None and not parent.is_alive():
        os._exit(1)


def processes_for(n_bytes: int) -> int:
    """Tokenising processes for a file of this size: 1 for a small one, where the tokenizer's own threads do as well."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(max(1, min(cores, 32, n_bytes // PROCESS_BYTES)))


def open_cache(
    path: str | os.PathLike,
    tokenizer: Any,
    fmt: RecordFormat,
    cache_dir: str | os.PathLike | None = None,
    skip_bad_records: bool = False,
    show_progress: bool = True,
) -> TokenCache:
    """The token cache of a file, built when there is none. It holds at least one record.

    Raises:
        DataError: the file is not in the format, with file, line and reason (unless `skip_bad_records`).
        CacheError: the cache folder cannot be written, the disk is full.
    """
    cache = load_or_build(path, tokenizer, fmt, cache_dir, skip_bad_records, show_progress)
    n_bad = cache.meta["skipped"]
    if n_bad and not (skip_bad_records and len(cache)):
        raise _bad_record_error(Path(path), *cache.meta["bad"][0], n_bad, len(cache) + n_bad)
    return cache


def load_or_build(
    path: str | os.PathLike,
    tokenizer: Any,
    fmt: RecordFormat,
    cache_dir: str | os.PathLike | None,
    skip_bad_records: bool,
    show_progress: bool,
) -> TokenCache:
    """As open_cache, but bad records of an earlier, skipping run are no error, nor is a cache without any record."""
    path = check_file(path)
    cache_dir = Path(cache_dir) if cache_dir is not None else DEFAULT_CACHE_DIR
    before = path.stat()
    n_processes = processes_for(before.st_size)
    state = (str(path.resolve()), before.st_size, before.st_mtime_ns, n_processes)
    if state not in _scanned:
        _scanned[state] = scan_jsonl(path, n_processes)
    content_hash, shards = _scanned[state]
    folder = cache_dir / cache_key(content_hash, tokenizer, fmt)
    meta = read_meta(folder)
    if meta is None:
        with user_errors(cache_dir), build_folder(folder, cache_dir, f"tokenising {path}") as tmp:
            if tmp is not None:
                with scratch_folder(cache_dir) as scratch:
                    _tokenise(path, shards, content_hash, tokenizer, fmt, tmp, scratch, skip_bad_records, show_progress)
                if (path.stat().st_size, path.stat().st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                    raise DataError(f"{path} was changed while it was read; start again when it is complete")
        meta = read_meta(folder)
        if meta is None:
            raise CacheError(
                f"the token cache {folder} cannot be read back; name another folder with --cache_dir FOLDER"
            )
    return TokenCache(folder, meta)


def _bad_record_error(path: Path, line: int, reason: str, n_bad: int, n_seen: int) -> DataError:
    advice = f"`python dataset/check_data.py {as_typed(path)}` shows more"
    if n_bad < n_seen:
        advice += ", --skip_bad_records leaves them out"
    elif reason.startswith('key "'):  # of the record itself, not of a turn
        advice += "; is it a file for another stage?"
    return DataError(f"{path}, line {line}: {reason} ({n_bad} bad of {n_seen} records read; {advice})")


def _tokenise(
    path: Path,
    shards: list[Shard],
    content_hash: str,
    tokenizer: Any,
    fmt: RecordFormat,
    tmp: Path,
    scratch: Path,
    skip_bad: bool,
    show: bool,
) -> None:
    """Fills `tmp` with the files of a cache; `scratch` holds what is needed on the way."""
    try:
        import datasets
    except ImportError:
        raise CacheError(
            "tokenising needs the package `datasets`, which is not installed; type: pip install datasets"
        ) from None
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    columns = ["tokens", "lengths", "hashes", *(["trained", "first_trained"] if fmt.masked else [])]
    features = {name: datasets.Value("binary") for name in columns}
    features = datasets.Features(features | {"n_bad": datasets.Value("int64"), "bad": datasets.Value("string")})

    np.zeros(len(shards), np.int64).tofile(tmp / "progress.bin")
    bars = datasets.are_progress_bars_disabled()
    level = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with _for_helpers(len(shards)), _progress(tmp / "progress.bin", path, show):
            arrow = datasets.Dataset.from_generator(
                generate_rows,
                features=features,
                cache_dir=str(scratch),
                gen_kwargs={
                    "shards": [asdict(s) for s in shards],
                    "path": str(path),
                    "fmt": fmt,
                    "tokenizer": tokenizer,
                    "dtype": dtype,
                    "skip_bad": skip_bad,
                    "tmp": str(tmp),
                },
                num_proc=len(shards) if len(shards) > 1 else None,
                fingerprint="tokens",  # hashing the arguments takes time, and the folder is ours alone
                writer_batch_size=32,
            )
        files = [f["filename"] for f in arrow.cache_files]
        del arrow  # its map would keep the file from being removed on Windows
        gc.collect()
    except Exception as e:  # datasets wraps a worker's error in types of its own; what was wrong lies in files
        cause: BaseException | None = e
        while cause is not None:  # after Ctrl-C datasets asks its helpers for results, and their silence hides it
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            cause = cause.__cause__ or cause.__context__
        errors = [json.loads(p.read_text(encoding="utf-8")) for p in tmp.glob("error-*.json")]
        if errors:
            first = min(errors, key=lambda e: e["line"])
            n_bad, n_seen = (sum(e[k] for e in errors) for k in ("bad", "seen"))
            raise _bad_record_error(path, first["line"], first["reason"], n_bad, n_seen) from None
        raise
    finally:
        if not bars:
            datasets.enable_progress_bars()
        datasets.logging.set_verbosity(level)
    counts = _export(files, tmp, fmt)
    (tmp / "progress.bin").unlink()
    write_meta(
        tmp,
        {
            "format_version": FORMAT_VERSION,
            "format": fmt.name,
            "source": path.name,
            "content_sha256": content_hash,
            "dtype": dtype,
            "vocab_size": len(tokenizer),
            **counts,
        },
    )


_starting: set[int] = set()  # this process, while it starts helpers


def _end_with_parent() -> None:
    """In a helper just forked: Linux ends it when its parent dies (prctl's PR_SET_PDEATHSIG), datasets' manager too."""
    if not _starting:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its helpers
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() not in _starting:  # it died before we could ask
            os._exit(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_end_with_parent)


@contextmanager
def _for_helpers(n_processes: int) -> Iterator[None]:
    """What several processes need: one tokenizer thread each (together they fill the cores), and shared memory.

    A garbage collection in a forked process writes to every object it looks at and so copies the pages of all that the
    parent has imported, some 200 MB; frozen objects are not looked at.
    """
    if n_processes == 1:
        yield
        return
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    gc.collect()
    gc.freeze()
    _starting.add(os.getpid())
    try:
        yield
    finally:
        _starting.clear()
        gc.unfreeze()
        if before is not None:
            os.environ[name] = before
        else:
            del os.environ[name]


def _export(files: list[str], tmp: Path, fmt: RecordFormat) -> dict:
    """Arrow to flat files, one record batch in memory at a time (a mapped Arrow file would count as resident)."""
    import pyarrow as pa

    arrays: dict[str, list[np.ndarray]] = {"lengths": [], "hashes": [], "first_trained": []}
    kinds = {"lengths": np.int64, "hashes": np.uint64, "first_trained": np.int32}
    bad, n_bad = [], 0
    with open(tmp / "tokens.bin", "wb") as tokens, open(tmp / "trained.bin", "wb") as trained:
        for file in files:
            with pa.OSFile(file, "rb") as source, pa.ipc.open_stream(source) as reader:
                for batch in reader:
                    for row in batch.to_pylist():
                        tokens.write(row["tokens"])
                        if fmt.masked:
                            trained.write(row["trained"])
                        for name in arrays.keys() & row.keys():
                            arrays[name].append(np.frombuffer(row[name], kinds[name]))
                        n_bad += row["n_bad"]
                        bad += json.loads(row["bad"])[: BAD_KEPT - len(bad)]
    lengths = np.concatenate(arrays["lengths"])
    np.save(tmp / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(tmp / "hashes.npy", np.concatenate(arrays["hashes"]))
    if fmt.masked:
        np.save(tmp / "first_trained.npy", np.concatenate(arrays["first_trained"]))
    else:
        (tmp / "trained.bin").unlink()
    return {"records": len(lengths), "tokens": int(lengths.sum()), "skipped": n_bad, "bad": bad}


@contextmanager
def _progress(counter: Path, path: Path, show: bool) -> Iterator[None]:
    """A bar over the bytes of the file, fed by the counter the processes write; only on a terminal.

    The bar is made when the first batch is done: then all processes have been started, and none can have inherited
    a lock of the bar in a locked state.
    """
    if not (show and sys.stderr.isatty()):
        yield
        return
    from tqdm import tqdm

    stop = threading.Event()

    def follow() -> None:
        bar = None
        while True:
            ended = stop.wait(0.2)
            done = int(np.fromfile(counter, np.int64).sum()) if counter.exists() else 0
            if bar is None and done:
                bar = tqdm(
                    total=path.stat().st_size, desc=f"tokenising {path.name}", unit="B", unit_scale=True, leave=False
                )
            if bar is not None:
                bar.update(min(done, bar.total) - bar.n)
            if ended:
                if bar is not None:
                    bar.close()
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class TokenCache:
    """The tokens of one file. Record i: `tokens[offsets[i]:offsets[i + 1]]`, and the same slice of `trained`."""

    def __init__(self, folder: Path, meta: dict):
        self.folder, self.meta = folder, meta
        self.tokens = MappedArray(folder / "tokens.bin", meta["dtype"])
        masked = (folder / "trained.bin").exists()
        self.trained = MappedArray(folder / "trained.bin", "uint8") if masked else None
        self.first_trained = MappedArray(folder / "first_trained.npy") if masked else None
        self.offsets = MappedArray(folder / "offsets.npy")
        self.hashes = MappedArray(folder / "hashes.npy")

    def __len__(self) -> int:
        return self.meta["records"]
