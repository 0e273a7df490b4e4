"""Weights on disk: what is written, what is read back, and what a user is told when a file is not what it should be."""

import builtins
import errno
import json
import math
import os
import pickle
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_model import BOTH, TINY, V, close, ids, same_model, tiny
from transformers import LlamaConfig, LlamaForCausalLM

from model import files
from model.files import as_typed, atomic_open, replace_file
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import (
    STAGES,
    WeightsError,
    find_weights,
    load_model,
    read_about,
    read_state_dict,
    save_weights,
    weight_path,
)


def test_windows_is_asked_again_while_somebody_reads_the_file(tmp_path, monkeypatch):
    """A reader that lets go after three tries, and one that never does."""
    source, target = tmp_path / "new", tmp_path / "old"
    source.write_text("new")
    tries, replace = [], os.replace

    def refused(*paths):
        tries.append(paths)
        if len(tries) < refusals:
            raise PermissionError(errno.EACCES, "in use")
        replace(*paths)

    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    monkeypatch.setattr(files, "os", SimpleNamespace(name="nt", replace=refused))
    refusals = 4
    replace_file(source, target)
    assert target.read_text() == "new" and len(tries) == 4
    refusals = math.inf
    with pytest.raises(PermissionError, match="in use"):
        replace_file(target, source)
    tries.clear()
    monkeypatch.setattr(files, "os", SimpleNamespace(name="posix", replace=refused))
    with pytest.raises(PermissionError):
        replace_file(target, source)
    assert len(tries) == 1  # elsewhere a refusal is one


def test_a_path_is_quoted_as_the_system_types_it(monkeypatch):
    monkeypatch.setattr(files, "os", SimpleNamespace(name="posix"))
    assert as_typed("a b/c.jsonl") == "'a b/c.jsonl'" and as_typed(Path("c.jsonl")) == "c.jsonl"
    monkeypatch.setattr(files, "os", SimpleNamespace(name="nt"))
    assert as_typed(r"C:\my data\c.jsonl") == r'"C:\my data\c.jsonl"' and as_typed(r"C:\c.jsonl") == r"C:\c.jsonl"


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def rounded(model: MiniMindForCausalLM) -> MiniMindForCausalLM:
    """The same model with its weights rounded to half precision, computing in float32."""
    return model.half().float()


# Round trip


def test_paths_of_the_contract():
    assert weight_path("out", "full_sft", MiniMindConfig()) == Path("out/full_sft_512.pth")
    moe = MiniMindConfig(hidden_size=640, use_moe=True)
    assert weight_path("out", "pretrain", moe) == Path("out/pretrain_640_moe.pth")
    assert STAGES == ("pretrain", "full_sft", "rlhf", "full_dist", "reason", "grpo", "ppo_actor")


@BOTH
def test_round_trip(moe, tmp_path):
    scaling = {"type": "linear", "factor": 2.0}
    model = tiny(use_moe=moe, rope_scaling=scaling, norm_topk_prob=False, rms_norm_eps=1e-3, dropout=0.3)
    path = tmp_path / "sub" / "full_sft_32.pth"
    save_weights(model, path, {"stage": "full_sft", "step": 7, "note": "中文"})
    assert names(path.parent) == ["full_sft_32.json", "full_sft_32.pth"]

    state = torch.load(path, weights_only=True)
    assert type(state) is dict
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == torch.float16 and torch.equal(state[name], tensor.half()), name
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()

    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert about["stage"] == "full_sft" and about["step"] == 7 and about["note"] == "中文"
    assert "中文" in path.with_suffix(".json").read_text(encoding="utf-8")

    again = load_model(path)
    assert not again.training and again.dtype == torch.float32
    assert again.lm_head.weight is again.model.embed_tokens.weight
    for field in (*TINY, "rope_scaling", "norm_topk_prob", "rms_norm_eps", "dropout", "use_moe"):
        assert getattr(again.config, field) == getattr(model.config, field), field
    x = ids(2, 9)
    assert torch.equal(again(x).logits, rounded(model)(x).logits)
    assert load_model(path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_tied_tensors_are_stored_once(tmp_path):
    model = tiny(vocab_size=4000)
    save_weights(model, tmp_path / "m.pth")
    stored = sum(p.numel() for p in model.parameters()) * 2
    assert stored < (tmp_path / "m.pth").stat().st_size < stored + 4000 * 32


def test_saving_leaves_the_model_alone_and_replaces_the_old_file(tmp_path):
    model, path = tiny(), tmp_path / "m.pth"
    before = {name: t.clone() for name, t in model.state_dict().items()}
    save_weights(tiny(seed=1), path, {"step": 1})
    save_weights(model, path, {"step": 2})
    assert model.dtype == torch.float32
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert json.loads(path.with_suffix(".json").read_text())["step"] == 2
    close(load_model(path).lm_head.weight, model.lm_head.weight, 1e-3)


# Published weights: a state dict and nothing else


@pytest.mark.parametrize(
    "fields",
    [
        dict(hidden_size=64, num_hidden_layers=3, vocab_size=50),
        dict(hidden_size=128, num_hidden_layers=1, vocab_size=50, num_key_value_heads=4, intermediate_size=96),
        dict(hidden_size=64, num_hidden_layers=2, vocab_size=50, use_moe=True, n_routed_experts=6, n_shared_experts=2),
        dict(hidden_size=64, num_hidden_layers=2, vocab_size=50, use_moe=True, n_shared_experts=0),
    ],
    ids=["dense", "wide", "moe", "moe-unshared"],
)
@pytest.mark.parametrize("head", [True, False], ids=["with-head", "without-head"])
def test_sizes_are_read_off_published_weights(fields, head, tmp_path):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**fields, initializer_range=0.2)).eval()
    state = {name: t.half() for name, t in model.state_dict().items() if head or name != "lm_head.weight"}
    torch.save(state, tmp_path / "full_sft_64.pth")
    again = load_model(tmp_path / "full_sft_64.pth")
    for field in ("intermediate_size", "num_key_value_heads", "use_moe", *fields):
        assert getattr(again.config, field) == getattr(model.config, field), field
    x = ids(1, 6) % 50
    assert torch.equal(again(x).logits, rounded(model)(x).logits)


# What a caller insists on


def test_expected_values(tmp_path):
    path = tmp_path / "pretrain_32.pth"
    save_weights(tiny(), path)
    load_model(path, hidden_size=32, num_hidden_layers=None, use_moe=False)
    for given, words in (
        ({"hidden_size": 512}, "hidden_size 32, but 512 was asked for. Leave out --hidden_size"),
        ({"hidden_size": 32, "num_hidden_layers": 8}, "num_hidden_layers 2, but 8"),
        ({"use_moe": True}, "use_moe False, but True"),
    ):
        with pytest.raises(WeightsError, match=re.escape(words)) as caught:
            load_model(path, **given)
        assert str(path) in str(caught.value)


# Files that are not what they should be


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def one_line(error: pytest.ExceptionInfo, path: Path) -> str:
    text = str(error.value)
    assert "\n" not in text and str(path) in text and text.endswith(".")
    assert "weights_only" not in text  # torch's advice to switch the protection off must not reach a user
    return text


def whole_file(tmp_path: Path) -> bytes:
    save_weights(tiny(), tmp_path / "whole.pth")
    return (tmp_path / "whole.pth").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-10],
        lambda whole: whole[:900] + bytes(200) + whole[1100:],
        lambda whole: b"PK\x05\x06" + bytes(18),  # a valid archive of nothing
        lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        lambda whole: "不是权重".encode(),
        lambda whole: pickle.dumps({"a": 1}),
        lambda whole: bytes(range(256)) * 8,
    ],
    ids=["empty", "half", "tail", "hole", "no-entries", "lfs", "text", "pickle", "bytes"],
)
def test_unreadable_file(damage, tmp_path):
    path = tmp_path / "full_sft_32.pth"
    path.write_bytes(damage(whole_file(tmp_path)))
    with pytest.raises(WeightsError) as caught:
        load_model(path)
    assert "no weight file" in one_line(caught, path) and "again" in str(caught.value)


@pytest.mark.parametrize("seed", range(20))
def test_flipped_bytes_never_end_in_another_error(seed, tmp_path):
    """Thirty bytes anywhere in the file: it loads (a weight changed) or it is a WeightsError."""
    whole = bytearray(whole_file(tmp_path))
    places = torch.randint(len(whole), (30,), generator=torch.Generator().manual_seed(seed))
    for place in places:
        whole[place] ^= 0x55
    path = tmp_path / "full_sft_32.pth"
    path.write_bytes(whole)
    try:
        load_model(path)
    except WeightsError as error:
        assert str(path) in str(error)


def test_code_in_a_file_is_not_run(tmp_path):
    path, sprung = tmp_path / "full_sft_32.pth", tmp_path / "sprung"
    torch.save({"model.embed_tokens.weight": Trap(sprung)}, path)
    with pytest.raises(WeightsError) as caught:
        load_model(path)
    one_line(caught, path)
    path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(WeightsError):
        load_model(path)
    assert not sprung.exists()
    pickle.loads(path.read_bytes())  # the trap does work
    assert sprung.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3}, "no plain state dict"),
        ([torch.zeros(2)], "no plain state dict"),
        ({}, "no plain state dict"),
        ({0: torch.zeros(2)}, "no plain state dict"),
        ({"model": {"embed": torch.zeros(2)}}, "no plain state dict"),
        ({"tok_embeddings.weight": torch.zeros(4, 8)}, "does not look like MiniMind weights"),
        ({"model.embed_tokens.weight": torch.zeros(4)}, "does not look like MiniMind weights"),
        ({"model.embed_tokens.weight": torch.zeros(4, 4)}, "does not look like MiniMind weights"),
    ],
)
def test_something_else_in_the_file(content, words, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError, match=words) as caught:
        load_model(path)
    one_line(caught, path)


def test_missing_file(tmp_path):
    with pytest.raises(WeightsError, match="does not exist") as caught:
        load_model(tmp_path / "nothing.pth")
    one_line(caught, tmp_path / "nothing.pth")


@pytest.mark.skipif(os.name == "nt" or getattr(os, "geteuid", lambda: 1)() == 0, reason="the superuser may read all")
def test_unreadable_by_permission_stays_an_oserror(tmp_path):
    path = tmp_path / "x.pth"
    save_weights(tiny(), path)
    path.chmod(0)
    with pytest.raises(PermissionError):
        load_model(path)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "{}", '{"config": null}', '{"config": []}', '{"config": {"hidden_size": "x"}}',
        '{"config": {"hidden_size": 32, "num_attention_heads": 0}}', '{"config": {"num_key_value_heads": 0}}',
        '{"config": {"rope_scaling": "yarn"}}', '{"config": {"hidden_size": 33}}',
    ],
)  # fmt: skip
def test_damaged_sidecar(text, tmp_path):
    path = tmp_path / "x.pth"
    save_weights(tiny(), path)
    path.with_suffix(".json").write_text(text, encoding="utf-8")
    with pytest.raises(WeightsError, match="Delete it") as caught:
        load_model(path)
    one_line(caught, path.with_suffix(".json"))


def test_sidecar_counts_whatever_the_file_is_called(tmp_path, monkeypatch):
    """Heads cannot be read off the weights: without the JSON they would silently be taken for eight."""
    save_weights(tiny(num_attention_heads=4, num_key_value_heads=2), tmp_path / "x.pt")
    assert load_model(tmp_path / "x.pt").config.num_attention_heads == 4
    monkeypatch.chdir(tmp_path)
    assert read_about(Path(".")) == {}  # a folder has none


def test_sidecar_of_another_model(tmp_path):
    path = tmp_path / "x.pth"
    save_weights(tiny(num_hidden_layers=3), path)
    about = path.with_suffix(".json").read_text(encoding="utf-8")
    save_weights(tiny(), path)
    path.with_suffix(".json").write_text(about, encoding="utf-8")
    with pytest.raises(WeightsError, match="does not fit its configuration.*layers.2.*Delete") as caught:
        load_model(path)
    one_line(caught, path)


def test_strict_names(tmp_path):
    state = {name: t.half() for name, t in tiny().state_dict().items()}
    for name, broken in (
        ("missing", {k: v for k, v in state.items() if k != "model.norm.weight"}),
        ("extra", {**state, "model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
    ):
        path = tmp_path / f"{name}.pth"
        save_weights(tiny(), path)
        torch.save(broken, path)
        with pytest.raises(WeightsError, match="norm.weight"):
            load_model(path)


# A disk that is full, a folder that may not be written


class FullDisk:
    """A file on a disk with room for so many bytes. Text is buffered: it fails when flushed, bytes fail at once."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data) -> int:
        if isinstance(data, str):
            self.room -= len(data)
        else:
            self.room -= memoryview(data).nbytes
            self.flush()
        return self.file.write(data)

    def flush(self) -> None:
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.file.flush()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("room", [0, 100, 5000, 40_000])
@pytest.mark.parametrize("full", [".pth", ".json"])
def test_full_disk_leaves_the_old_files(full, room, tmp_path, monkeypatch):
    """The real torch.save onto a file that runs full: at once, in the header, among the tensors, near the end."""
    path = tmp_path / "full_sft_32.pth"
    save_weights(tiny(), path, {"step": 1})
    before = contents(tmp_path)
    assert len(before[path.name]) > 40_000

    def open_on_full_disk(file, *args, **kwargs):
        opened = builtins.open(file, *args, **kwargs)
        return FullDisk(opened, min(room, 50 if full == ".json" else room)) if full in str(file) else opened

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", open_on_full_disk, raising=False)
        with pytest.raises(OSError) as caught:
            save_weights(tiny(seed=1, num_hidden_layers=3), path, {"step": 2})
    assert caught.value.errno == errno.ENOSPC
    assert str(path.with_suffix("")) in str(caught.value)
    assert contents(tmp_path) == before
    save_weights(tiny(seed=1), path)  # and once there is room, it works
    load_model(path)


def test_failure_at_the_last_moment_leaves_the_old_files(tmp_path, monkeypatch):
    path = tmp_path / "full_sft_32.pth"
    save_weights(tiny(), path, {"step": 1})
    before = contents(tmp_path)

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=re.escape(str(path))):
        save_weights(tiny(seed=1), path, {"step": 2})
    assert contents(tmp_path) == before


def test_interrupt_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        with atomic_open(path, "w") as f:
            f.write("new")
            raise KeyboardInterrupt
    assert contents(tmp_path) == {"x.txt": b"old"}
    with pytest.raises(RuntimeError, match="mine"):
        with atomic_open(path, "w"):
            raise RuntimeError("mine")  # an error that is none of the disk's passes unchanged
    with atomic_open(path, "w") as f:
        f.write("中\n")
        assert path.read_text(encoding="utf-8") == "old"
    assert contents(tmp_path) == {"x.txt": "中\n".encode()}


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "out").write_text("a file where a folder should be", encoding="utf-8")
    with pytest.raises(OSError, match="out"):
        save_weights(tiny(), tmp_path / "out" / "pretrain_32.pth")


# Which weights


def put(folder: Path, name: str, age: float) -> Path:
    """An empty file of that name, last changed `age` seconds before a fixed moment."""
    path = folder / name
    path.touch()
    os.utime(path, (1_700_000_000 - age, 1_700_000_000 - age))
    return path


def test_find_weights(tmp_path):
    pretrain = put(tmp_path, "pretrain_512.pth", 50)
    sft = put(tmp_path, "full_sft_512.pth", 40)
    moe = put(tmp_path, "full_sft_640_moe.pth", 30)
    actor = put(tmp_path, "ppo_actor_512.pth", 35)
    put(tmp_path, "full_sft_512_resume.pth", 1)
    put(tmp_path, "full_sft_best.pth", 1)
    put(tmp_path, "lora_512.pth", 1)
    put(tmp_path, "full_sft_512.json", 1)
    assert find_weights(tmp_path) == moe
    assert find_weights(tmp_path, "pretrain") == pretrain
    assert find_weights(tmp_path, "full_sft") == moe
    assert find_weights(tmp_path, "full_sft", hidden_size=512) == sft
    assert find_weights(tmp_path, "full_sft", use_moe=False) == sft
    assert find_weights(tmp_path, use_moe=True) == moe
    assert find_weights(tmp_path, hidden_size=512) == actor
    assert find_weights(str(tmp_path), "ppo_actor") == actor
    os.utime(sft, (1_800_000_000, 1_800_000_000))
    assert find_weights(tmp_path) == sft
    os.utime(pretrain, (1_800_000_000, 1_800_000_000))
    assert find_weights(tmp_path) == sft  # equally new: the later stage


def test_find_weights_says_what_to_run(tmp_path):
    with pytest.raises(WeightsError, match=r"no weights in .*train_pretrain\.py.*quick_start\.py"):
        find_weights(tmp_path / "never made")
    put(tmp_path, "pretrain_512.pth", 1)
    missing = r"no full_sft weights of hidden_size 768 with experts in .*holds pretrain_512.*train_full_sft\.py"
    with pytest.raises(WeightsError, match=missing):
        find_weights(tmp_path, "full_sft", 768, True)


# transformers folders


def test_folder_of_ours(tmp_path):
    model = tiny(use_moe=True, rope_scaling={"type": "ntk", "factor": 2.0})
    model.save_pretrained(tmp_path)
    (tmp_path / "model_minimind.py").write_text("raise SystemExit('code in the folder was run')", encoding="utf-8")
    again = load_model(tmp_path, hidden_size=32)
    assert type(again) is MiniMindForCausalLM and not again.training
    assert again.lm_head.weight is again.model.embed_tokens.weight
    same_model(again, model)
    with pytest.raises(WeightsError, match="512 was asked for"):
        load_model(tmp_path, hidden_size=512)


def test_folder_of_llama(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=V, tie_word_embeddings=False,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).half()
    llama.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert type(again) is LlamaForCausalLM and again.dtype == torch.float32
    close(again(ids(1, 5)).logits, llama.float().eval()(ids(1, 5)).logits)


def test_folder_that_is_not_whole(tmp_path):
    with pytest.raises(WeightsError, match="no config.json") as caught:
        load_model(tmp_path)
    one_line(caught, tmp_path)
    tiny().save_pretrained(tmp_path)
    tensors = tmp_path / "model.safetensors"
    whole = tensors.read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        tensors.write_bytes(damaged)
        with pytest.raises(WeightsError, match="could not be loaded") as caught:
            load_model(tmp_path)
    tensors.unlink()
    with pytest.raises(WeightsError, match="could not be loaded"):
        load_model(tmp_path)
    tensors.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}), encoding="utf-8")
    with pytest.raises(WeightsError, match=r"lacks model\.layers\.2"):  # transformers would make the third layer up
        load_model(tmp_path)
    for text in ("{", "[]", '{"model_type": "nobody-knows"}'):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(WeightsError, match="could not be loaded"):
            load_model(tmp_path)


def test_foreign_code_in_a_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *prompt: "y")  # transformers asks on a terminal
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "stranger"}), encoding="utf-8")
    (tmp_path / "model_minimind.py").write_text("raise SystemExit('code in the folder was run')", encoding="utf-8")
    with pytest.raises(WeightsError, match="could not be loaded"):
        load_model(tmp_path)


def test_state_dict_of_a_whole_file_is_read(tmp_path):
    path = tmp_path / "x.pth"
    save_weights(tiny(), path)
    assert zipfile.is_zipfile(path)
    state = read_state_dict(path)
    assert math.prod(state["model.embed_tokens.weight"].shape) == V * 32
