"""The cache of tokens: used again, damaged, shared; bad files in one clear line, full disks, killed processes."""

import contextlib
import errno
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lm_dataset import (  # noqa: F401 (fixtures)
    chat,
    chat_file,
    data_rows,
    here,
    text_file,
    texts,
    tokenizer,
    write,
)

from dataset import json_lines
from dataset import lm_dataset as lm
from dataset import token_cache as tc
from dataset.cache_folder import build_folder, scratch_folder, write_meta
from dataset.lm_dataset import DataError, PretrainDataset, SFTDataset, encode_texts
from scripts import prepare_data

# ruff: noqa: F811 (fixtures as arguments)

ROOT = Path(__file__).resolve().parents[1]


# ---- the cache -----------------------------------------------------------------------------------


def refuse_to_tokenise(*_):
    raise AssertionError("tokenised again")


def test_cache_is_used_again(tokenizer, tmp_path, here, monkeypatch):
    path = chat_file(tmp_path / "a.jsonl")
    first = data_rows(SFTDataset(path, tokenizer, 64, **here))
    monkeypatch.setattr(tc, "_tokenise", refuse_to_tokenise)
    assert data_rows(SFTDataset(path, tokenizer, 64, **here)) == first
    SFTDataset(path, tokenizer, 32, **here)  # another packing needs no other tokens
    copy = tmp_path / "renamed.jsonl"
    copy.write_bytes(path.read_bytes())
    SFTDataset(copy, tokenizer, 64, **here)  # nor does another name
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(chat("one", "more")) + "\n")
    with pytest.raises(AssertionError, match="tokenised again"):
        SFTDataset(path, tokenizer, 64, **here)


def test_data_key_names_what_the_rows_depend_on(tokenizer, tmp_path, here):
    path = chat_file(tmp_path / "a.jsonl", 30)
    base = SFTDataset(path, tokenizer, 64, **here).data_key
    assert SFTDataset(path, tokenizer, 64, "val", **here).data_key == base, "both parts of one split"
    assert SFTDataset(path, tokenizer, 64, cache_dir=tmp_path / "other", show_progress=False).data_key == base
    other = chat_file(tmp_path / "b.jsonl", 31)
    template = pickle.loads(pickle.dumps(tokenizer))
    template.chat_template = template.chat_template + "{# changed #}"
    vocabulary = pickle.loads(pickle.dumps(tokenizer))
    vocabulary.add_tokens(["zzz"])
    keys = [
        SFTDataset(other, tokenizer, 64, **here).data_key,
        SFTDataset(path, template, 64, **here).data_key,
        SFTDataset(path, vocabulary, 64, **here).data_key,
        SFTDataset(path, tokenizer, 65, **here).data_key,
        SFTDataset(path, tokenizer, 64, seed=1, **here).data_key,
        SFTDataset(path, tokenizer, 64, val_ratio=0.2, **here).data_key,
        SFTDataset(path, tokenizer, 64, max_val_records=1, **here).data_key,
    ]
    assert len({base, *keys}) == 8


@pytest.mark.parametrize("harm", ["short", "changed", "no meta", "half a meta"])
@pytest.mark.parametrize("folder", ["tokens", "rows"])
def test_a_damaged_cache_is_noticed_and_built_again(harm, folder, tokenizer, tmp_path, here, caplog):
    path = chat_file(tmp_path / "a.jsonl")
    data = SFTDataset(path, tokenizer, 64, **here)
    first = data_rows(data)
    place = data.cache.folder if folder == "tokens" else data.cache.folder / f"rows-{data.data_key}"
    file = place / ("tokens.bin" if folder == "tokens" else "train_starts.npy")
    whole = file.read_bytes()
    del data
    if harm == "short":
        file.write_bytes(whole[:-8])
    elif harm == "changed":
        file.write_bytes(whole[:-8] + bytes(b ^ 1 for b in whole[-8:]))
    elif harm == "no meta":
        (place / "meta.json").unlink()
    else:
        (place / "meta.json").write_text('{"files": {"tokens', encoding="utf-8")
    assert data_rows(SFTDataset(path, tokenizer, 64, **here)) == first
    assert "damaged" in caplog.text
    assert file.read_bytes() == whole
    assert not list(here["cache_dir"].rglob("*.building-*"))


@given(st.lists(st.lists(st.booleans(), max_size=5), min_size=1, max_size=9))
def test_first_trained_token_of_each_record(masks):
    offsets = np.cumsum([0, *map(len, masks)])
    expected = [mask.index(True) if True in mask else len(mask) for mask in masks]
    assert tc._first_true(np.array(sum(masks, []), bool), offsets).tolist() == expected


def test_several_processes_give_the_files_of_one(tokenizer, tmp_path, monkeypatch):
    records = [{"text": t} for t in texts(300)]
    records[250] = "\n\n"  # blank lines count in line numbers only
    path = write(tmp_path / "a.jsonl", records)
    one = tc.open_cache(path, tokenizer, lm.PRETRAIN, tmp_path / "one", show_progress=False)
    monkeypatch.setattr(tc, "processes_for", lambda n_bytes: 3)
    three = tc.open_cache(path, tokenizer, lm.PRETRAIN, tmp_path / "three", show_progress=False)
    assert one.meta == three.meta and one.meta["records"] == 299
    with open(path, "a", encoding="utf-8") as f:
        f.write('{"txt": "bad"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 302: key \"text\" is missing"):
        tc.open_cache(path, tokenizer, lm.PRETRAIN, tmp_path / "three", show_progress=False)


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.text("ab\n\r \u2028", max_size=9), max_size=30), n=st.integers(1, 7), block=st.integers(1, 9))
def test_shards_cover_the_file_and_know_their_lines(lines, n, block, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "shards.jsonl"
    path.write_bytes("\n".join(lines).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "SCAN_BYTES", block)
        digest, shards = json_lines.scan_jsonl(path, n)
    whole = path.read_bytes()
    expected = [(i, raw.strip()) for i, raw in enumerate(whole.split(b"\n"), 1) if raw.strip()]
    by_shard = [pair for s in shards for pair in json_lines.read_lines(path, s)]
    assert by_shard == expected == list(json_lines.read_lines(path))
    assert len(shards) <= n and sum(s.end - s.start for s in shards) == len(whole)


def test_a_vocabulary_beyond_16_bits(tokenizer, tmp_path, here):
    wide = pickle.loads(pickle.dumps(tokenizer))
    wide.add_tokens([f"<w{i}>" for i in range(1 << 16)])
    path = write(tmp_path / "a.jsonl", [{"text": "x <w65535> y"}])
    data = PretrainDataset(path, wide, 16, **here)
    assert data[0]["input_ids"].max().item() == len(wide) - 1 > 1 << 16


def test_dataset_pickles_small_and_reads_the_same(tokenizer, tmp_path, here):
    data = SFTDataset(chat_file(tmp_path / "a.jsonl"), tokenizer, 64, **here)
    rows = data_rows(data)
    packed = pickle.dumps(data)
    assert len(packed) < 4000
    assert data_rows(pickle.loads(packed)) == rows


@pytest.mark.slow
def test_spawned_loader_processes_read_the_rows(tokenizer, tmp_path, here):
    data = SFTDataset(chat_file(tmp_path / "a.jsonl", 40), tokenizer, 64, **here)
    how = {"num_workers": 1, "multiprocessing_context": "spawn", "timeout": 120}
    loader = torch.utils.data.DataLoader(data, batch_size=4, **how)
    got = torch.cat([batch["labels"] for batch in loader])
    assert torch.equal(got, torch.stack([data[i]["labels"] for i in range(len(data))]))


def test_reading_releases_pages_without_losing_data(tokenizer, tmp_path, here, monkeypatch):
    data = SFTDataset(chat_file(tmp_path / "a.jsonl"), tokenizer, 64, **here)
    rows = data_rows(data)
    monkeypatch.setattr(lm, "RELEASE_TOKENS", 100)
    assert data_rows(data) == rows


# ---- bad files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty", b"", "is empty; expected one JSON record per line"),
        ("blank", b"\xef\xbb\xbf\n \n\r\n", "is empty"),
        ("array", b'  [{"text": "a"}]', r"one JSON array; expected .*: `python scripts/prepare_data.py"),
        ("utf16", '{"text": "a"}'.encode("utf-16"), "is UTF-16; expected UTF-8"),
        ("gzip", b"\x1f\x8b\x08\x00aaaa", "compressed"),
        (
            "key",
            b'{"text": "a"}\n\n{"content": "b"}\n',
            r'line 3: key "text" is missing \(keys: content\); exp.*{"text"',
        ),
        ("type", b'{"text": ["a"]}\n', 'line 1: "text" is a list; expected a string'),
        ("no text", b'{"text": " "}\n', 'line 1: "text" is empty'),
        ("json", b'{"text": "a"}\n{"text": "b"\n', r"line 2: not JSON \("),
        ("number", b"3\n", "line 1: a JSON number"),
        ("latin", '{"text": "é"}\n'.encode("latin-1"), r"line 1: not UTF-8 \(byte 0xe9 at position 10\)"),
        ("surrogate", b'{"text": "\\ud83d"}\n', "line 1: half of a surrogate pair"),
        ("deep", b'{"text": ' + b"[" * 200_000 + b"\n", "line 1: (not JSON|JSON nested too deeply)"),
    ],
)
def test_bad_files_end_in_one_clear_line(name, content, message, tokenizer, tmp_path, here):
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as e:
        PretrainDataset(path, tokenizer, 32, **here)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    assert path.read_bytes() == content
    assert not list(here["cache_dir"].glob("pretrain-*")), "no cache of a bad file"


def test_a_missing_file_says_what_is_there(tokenizer, tmp_path, here):
    text_file(tmp_path / "there.jsonl", 1)
    with pytest.raises(DataError, match=r"no such file.*there\.jsonl.*make_demo_data"):
        PretrainDataset(tmp_path / "gone.jsonl", tokenizer, 32, **here)
    with pytest.raises(DataError, match="is a folder"):
        PretrainDataset(tmp_path, tokenizer, 32, **here)


@pytest.mark.skipif(sys.platform == "win32", reason="quoted for another shell")
def test_the_advice_for_an_array_works(tokenizer, tmp_path, here, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "你好"}, {"text": "b"}], ensure_ascii=False), encoding="utf-8")
    with pytest.raises(DataError) as e:
        PretrainDataset(path, tokenizer, 32, **here)
    words = shlex.split(str(e.value).split("`python scripts/")[1].split("`")[0])
    assert words[0] == "prepare_data.py"
    prepare_data.main(words[1:])
    assert PretrainDataset(tmp_path / "a.jsonl", tokenizer, 32, **here).stats["records"] == 2


def test_odd_but_good_files_are_read(tokenizer, tmp_path, here):
    path = tmp_path / "a.jsonl"
    line_separator = '{"text": "one\u2028still one\x85and \u2029on"}'
    long = json.dumps({"text": "word 词 " * 150_000}, ensure_ascii=False)
    assert len(long.encode()) > 1 << 20
    path.write_bytes("\ufeff".encode() + f'{line_separator}\r\n\r\n{long}\r\n{{"text": "last"}}'.encode())
    data = PretrainDataset(path, tokenizer, 512, "all", **here)
    assert data.stats["records"] == 3 and data.stats["split"] == 1
    docs = ["one\u2028still one\x85and \u2029on", json.loads(long)["text"], "last"]
    assert data.cache.meta["tokens"] == sum(map(len, encode_texts(docs, tokenizer)))


def test_bad_records_are_skipped_and_counted_on_demand(tokenizer, tmp_path, here):
    path = write(tmp_path / "a.jsonl", [chat("a", "b"), "{\n", chat("c", "d"), {"text": "x"}, chat("e", "f")])
    data = SFTDataset(path, tokenizer, 64, "all", skip_bad_records=True, **here)
    assert data.stats["records"] == 3 and data.stats["skipped"] == 2 and data.stats["used"] == 3
    with pytest.raises(DataError, match=r"line 2: not JSON.*2 bad of 5 records.*--skip_bad_records"):
        SFTDataset(path, tokenizer, 64, "all", **here)  # the cache of the skipping run is no excuse


def test_nothing_usable_is_an_error_even_when_skipping(tokenizer, tmp_path, here):
    path = text_file(tmp_path / "a.jsonl", 3)
    with pytest.raises(DataError, match="another stage"):
        SFTDataset(path, tokenizer, 64, skip_bad_records=True, **here)


@pytest.mark.parametrize("arguments", [{"max_seq_len": 1}, {"split": "test"}, {"val_ratio": 1.5}])
def test_bad_arguments(arguments, tokenizer, tmp_path, here):
    with pytest.raises(DataError, match="expected"):
        PretrainDataset(text_file(tmp_path / "a.jsonl", 3), tokenizer, **({"max_seq_len": 32} | arguments), **here)


# ---- bad luck ------------------------------------------------------------------------------------


def test_a_cache_folder_that_cannot_be_written(tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(tc.CacheError, match="--cache_dir") as e:
            PretrainDataset(text_file(tmp_path / "a.jsonl", 3), tokenizer, 32, cache_dir=folder, show_progress=False)
        assert "\n" not in str(e.value)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "in the way"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_no_write_permission(tokenizer, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    with pytest.raises(tc.CacheError, match="--cache_dir"):
        PretrainDataset(text_file(tmp_path / "a.jsonl", 3), tokenizer, 32, cache_dir=folder, show_progress=False)


@pytest.mark.parametrize("where", ["_export", "write_meta"])
def test_a_full_disk_leaves_nothing_behind(where, tokenizer, tmp_path, here, monkeypatch):
    path = text_file(tmp_path / "a.jsonl", 30)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tc, where, full)
        with pytest.raises(tc.CacheError, match="disk is full.*--cache_dir"):
            PretrainDataset(path, tokenizer, 32, **here)
    assert [p.name for p in here["cache_dir"].iterdir()] == ["locks"]
    assert PretrainDataset(path, tokenizer, 32, **here).stats["records"] == 30


@pytest.mark.skipif(sys.platform != "linux", reason="needs a tmpfs")
@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_really_full_disk(n_processes, tokenizer, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", small], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        monkeypatch.setattr(tc, "processes_for", lambda n_bytes: n_processes)
        path = text_file(tmp_path / "a.jsonl", 9000)
        with pytest.raises(tc.CacheError, match="disk is full.*--cache_dir") as e:
            PretrainDataset(path, tokenizer, 32, cache_dir=small, show_progress=False)
        assert "\n" not in str(e.value)
        assert [p.name for p in small.iterdir()] == ["locks"], "what was written is gone again"
    finally:
        subprocess.run(["umount", "-l", small], check=True)


BUILD = """
import sys, time
sys.path.insert(0, {root!r})
from dataset import lm_dataset as lm, token_cache as tc
from model.weights import load_tokenizer
encode = lm.encode_texts
def slow(texts, tokenizer):
    time.sleep({pause})
    return encode(texts, tokenizer)
lm.encode_texts = slow
tc.BATCH_BYTES = 2000
tc.processes_for = lambda n: {n}
if __name__ == "__main__":
    data = lm.PretrainDataset({path!r}, load_tokenizer(), 32, cache_dir={cache!r})
    print(len(data))
"""


def build_command(path, cache, pause, n):
    return [sys.executable, "-c", BUILD.format(root=str(ROOT), path=str(path), cache=str(cache), pause=pause, n=n)]


def alive_in_group(group: int) -> list[int]:
    """Processes of a group, from Linux's /proc; those that only wait to be collected do not count."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = stat.read_text().rsplit(") ", 1)[1].split()[:3]
            if int(pgrp) == group and state != "Z":
                alive.append(int(stat.parent.name))
    return alive


def test_scratch_has_a_short_name_and_leaves_nothing(tmp_path):
    """`datasets` doubles its path, and Windows ends paths at 260 characters."""
    (tmp_path / "locks").mkdir()
    with pytest.raises(KeyError), scratch_folder(tmp_path) as scratch:
        assert scratch.is_dir() and len(scratch.name) <= 17
        with build_folder(tmp_path / "other", tmp_path, "testing") as folder:  # clears up, but not what is in use
            write_meta(folder, {})
        assert scratch.is_dir()
        raise KeyError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["locks", "other"]
    assert [p.name for p in (tmp_path / "locks").iterdir()] == ["other.lock"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_killed_tokenisation_harms_nothing(n_processes, tokenizer, tmp_path, here):
    path, cache = text_file(tmp_path / "a.jsonl", 400), here["cache_dir"]
    process = subprocess.Popen(build_command(path, cache, 0.5, n_processes), start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:  # until it is in the middle of the work
            counters = list(cache.glob("*.building-*/progress.bin"))
            if counters and counters[0].stat().st_size and np.fromfile(counters[0], np.int64).sum() > 0:
                break
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        if sys.platform == "linux":  # its helpers, and the manager that `datasets` starts, go with it
            deadline = time.monotonic() + 10
            while alive_in_group(process.pid):
                assert time.monotonic() < deadline, alive_in_group(process.pid)
                time.sleep(0.05)
        assert [p.name.split("-")[0] for p in cache.iterdir() if "building" not in p.name] == ["locks"]
        data = PretrainDataset(path, tokenizer, 32, **here)  # waits for orphans to end, then clears up
        assert data.stats["records"] == 400
        assert not list(cache.rglob("*.building-*"))
    finally:
        process.kill()


@pytest.mark.slow
def test_processes_that_want_the_same_cache_share_it(tokenizer, tmp_path):
    path, cache = text_file(tmp_path / "a.jsonl", 60), tmp_path / "cache"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen(build_command(path, cache, 0.3, 1), **pipes) for _ in "ab"]
    outputs = [p.communicate(timeout=180) for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] and int(outputs[0][0]) > 0
    assert sum(b"waiting for another process" in err for _, err in outputs) <= 1
    assert len(list(cache.glob("pretrain-*"))) == 1


def test_works_without_datasets_once_the_cache_is_there(tokenizer, tmp_path, here, monkeypatch):
    path = text_file(tmp_path / "a.jsonl", 20)
    PretrainDataset(path, tokenizer, 32, **here)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(PretrainDataset(path, tokenizer, 32, **here)) > 0
    with pytest.raises(tc.CacheError, match="pip install datasets"):
        PretrainDataset(text_file(tmp_path / "b.jsonl", 21), tokenizer, 32, **here)


def test_importing_needs_neither_datasets_nor_transformers():
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import dataset.lm_dataset
assert not {{"datasets", "transformers", "pyarrow"}} & set(sys.modules), "imported at the top"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
