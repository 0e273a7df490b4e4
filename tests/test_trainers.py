"""The two trainers as a user runs them: losses, precision, layouts, interruption, bad input.

Most runs call `main` inside the test process (`train`); where the point is a process, a real one is started, always
with a time limit. Sizes are tiny: hidden 32, one layer, rows of 64 tokens, one thread.

Dimension legend: B batch · T tokens · V vocabulary.
"""

import ast
import contextlib
import functools
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, unchanged_process

from dataset.lm_dataset import IGNORE, PretrainDataset, SFTDataset
from model.weights import load_model, load_tokenizer
from trainer import checkpoint, run_log, train_full_sft, train_lora, train_pretrain
from trainer import trainer_utils as utils
from trainer.command_line import run_script

SCRIPTS = {"pretrain": train_pretrain, "full_sft": train_full_sft}
LIMIT_SECONDS = 240  # of a started process
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


# ----------------------------------------------------------------------------------------------------------------- data


def write_records(path: Path, records: list[dict]) -> Path:
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return path


def sentence(rng: random.Random) -> str:
    who = rng.choice(["the cat", "a small dog", "my friend", "小猫", "老师"])
    where = rng.choice(["on the mat", "at home", "在家里", "在学校"])
    return f"{who} {rng.choice(['sat', 'slept', '看书'])} {where} {rng.randint(0, 99)}."


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    """Small files of both stages, and a folder for their token caches."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    chats = []
    for _ in range(120):
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        turns = [f"{a} + {b} = ?", f"{a} + {b} = {a + b}", "你好", sentence(rng)]  # without roles: they alternate
        chats.append([{"content": turn} for turn in turns[: rng.choice([2, 4])]])
    texts = [{"text": " ".join(sentence(rng) for _ in range(rng.randint(1, 5)))} for _ in range(150)]
    pretrain = write_records(folder / "pretrain.jsonl", texts)
    while len(PretrainDataset(pretrain, load_tokenizer(), 64, val_ratio=0.05, cache_dir=folder / "cache")) % 4 == 0:
        pretrain = write_records(pretrain, texts := texts[1:])  # an epoch is to end with a ragged update
    return SimpleNamespace(
        pretrain=pretrain,
        full_sft=write_records(folder / "sft.jsonl", [{"conversations": turns} for turns in chats]),
        cache=folder / "cache",
    )


# ----------------------------------------------------------------------------------------------------------------- runs


def words(flags: dict) -> list[str]:
    """Flags as a command line has them: True stands alone, None is left out."""
    given = {name: value for name, value in flags.items() if value is not None}
    return sum([[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in given.items()], [])


@pytest.fixture
def flags(files, tmp_path):
    """The flags of a tiny run; keyword arguments change or (None) remove one."""
    return lambda stage="pretrain", out_dir=tmp_path, **changes: tiny_flags(files, out_dir, stage, **changes)


def tiny_flags(files: SimpleNamespace, out_dir: Path, stage: str = "pretrain", **changes) -> list[str]:
    flags = dict(
        out_dir=out_dir, data_path=getattr(files, stage), cache_dir=files.cache, device="cpu", dtype="float32",
        max_seq_len=64, batch_size=4, accumulation_steps=1, learning_rate=5e-3, warmup_iters=3, log_interval=1,
        save_interval=5, val_interval=10, val_ratio=0.05, val_rows=8, num_workers=0,
    )  # fmt: skip
    if stage == "pretrain":
        flags |= dict(hidden_size=32, num_hidden_layers=1)
    return [*words(flags | changes), "--no-compile"]


class Result(NamedTuple):
    status: int
    out: str
    err: str


def train(script: ModuleType, arguments: list[str]) -> Result:
    """Runs a trainer's main as `python trainer/….py` would, in this process."""
    out, err, argv, status = io.StringIO(), io.StringIO(), sys.argv, 0
    with unchanged_process(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        torch.set_num_threads(1)
        sys.argv = [script.__file__, *arguments]
        try:
            run_script(script.main)
        except SystemExit as stop:
            status = stop.code
        finally:
            sys.argv = argv
    return Result(status, out.getvalue(), err.getvalue())


def start(arguments: list, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env={**ENVIRONMENT, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        errors="replace",
    )  # fmt: skip


def finish(process: subprocess.Popen, limit: float = LIMIT_SECONDS) -> Result:
    """Waits for the end of a process, at most `limit` seconds."""
    try:
        out, err = process.communicate(timeout=limit)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    return Result(process.returncode, out, err)


def torchrun(script: ModuleType | Path, arguments: list[str], limit: float = LIMIT_SECONDS) -> Result:
    """Two gloo ranks on this machine."""
    path = script.__file__ if isinstance(script, ModuleType) else script
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone", path]
    process = start([*launch, *arguments])
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun hands it on to its workers, kill would leave them behind
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=40)
        raise
    finally:
        if process.poll() is None:
            process.kill()
    return Result(process.returncode, out, err)


ONE_AFTER_ANOTHER = """
import importlib, json, sys
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
from trainer import run_log
from trainer.command_line import leave
from trainer.trainer_utils import Run

make_group, linear = dist.init_process_group, torch.nn.functional.linear
dist.init_process_group = lambda *args, **named: dist.is_initialized() or make_group(*args, **named)
def close(run, status=0):
    dist.barrier()
    if run.engine:
        run.engine.close()
    torch.nn.functional.linear = linear  # ZeRO 3 puts its own in the place, for good
Run.close = close
run_log.plot_loss = lambda *about: None
torch.set_num_threads(1)
for name, arguments in json.loads(sys.argv[1]):
    print("run", name, arguments, file=sys.stderr, flush=True)
    sys.argv = [name, *arguments]
    importlib.import_module("trainer.train_" + name).main()
leave(0)
"""


def torchrun_all(folder: Path, runs: list[tuple[str, list[str]]]) -> Result:
    """Several runs on two ranks in one launch, which takes longer than a tiny run: (script without "train_", flags)."""
    path = folder / "one_after_another.py"
    path.write_text(ONE_AFTER_ANOTHER.format(root=str(ROOT)), encoding="utf-8")
    return torchrun(path, [json.dumps(runs)], limit=540)


def run_folder(out_dir: Path, stage: str = "pretrain", size: str = "32") -> Path:
    return out_dir / "runs" / f"{stage}_{size}"


def metrics(out_dir: Path, stage: str = "pretrain", size: str = "32") -> list[dict]:
    text = (run_folder(out_dir, stage, size) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def curve(records: list[dict], name: str = "loss") -> list[float]:
    return [record[name] for record in records if name in record]


def final_state(out_dir: Path, stage: str = "pretrain", size: str = "32") -> tuple[dict, dict]:
    """(state, facts) of the newest whole state."""
    path, facts = checkpoint.newest_state(run_folder(out_dir, stage, size))
    return torch.load(path, weights_only=True), facts


def differences(a: object, b: object, path: str = "") -> list[str]:
    """Where two nested states differ, bit by bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) and a.dtype == b.dtype else [path]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return sum([differences(a[key], b[key], f"{path}.{key}") for key in a], [])
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        return sum([differences(x, y, f"{path}.{i}") for i, (x, y) in enumerate(zip(a, b, strict=True))], [])
    return [] if a == b else [path]


def assert_same_run(one: Path, other: Path, stage: str = "pretrain", size: str = "32") -> None:
    """Bitwise the same weights, optimiser, progress and history."""
    (state, facts), (other_state, other_facts) = final_state(one, stage, size), final_state(other, stage, size)
    assert differences(state, other_state) == []
    assert facts["progress"] == other_facts["progress"]
    weights = [torch.load(folder / f"{stage}_{size}.pth", weights_only=True) for folder in (one, other)]
    assert differences(*weights) == []
    for name in ("step", "loss", "lr", "grad_norm", "tokens", "val_loss", "val_bpb"):
        assert curve(metrics(one, stage, size), name) == curve(metrics(other, stage, size), name), name


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Watch:
    """Follows a run from inside: the model, its first weights, its weights after each update."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: dict | None = None):
        """at: step → function called right after that update, before it is logged or saved."""
        self.model, self.first, self.weights = None, {}, []
        start_model, count = checkpoint.start_model, run_log.RunLog.count

        def watched_start(*args):
            self.model = start_model(*args)
            self.first = self.copy()
            return self.model

        def watched_count(log, *args):
            self.weights.append(self.copy())
            count(log, *args)
            if at and len(self.weights) in at:
                at[len(self.weights)]()

        monkeypatch.setattr(checkpoint, "start_model", watched_start)
        monkeypatch.setattr(run_log.RunLog, "count", watched_count)

    def copy(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


EPOCHS = 2


def reference_flags(files: SimpleNamespace, out_dir: Path) -> list[str]:
    return tiny_flags(files, out_dir, epochs=EPOCHS)


@pytest.fixture(scope="module")
def reference(files, tmp_path_factory) -> SimpleNamespace:
    """An uninterrupted pretraining run over two epochs. Tests copy its folder, none writes into it."""
    out_dir = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        result = train(train_pretrain, reference_flags(files, out_dir))
    assert result.status == 0, result.err
    data = PretrainDataset(files.pretrain, load_tokenizer(), 64, val_ratio=0.05, cache_dir=files.cache)
    per_epoch = math.ceil(len(data) / 4)
    return SimpleNamespace(out_dir=out_dir, result=result, watch=watch, data=data, per_epoch=per_epoch)


# -------------------------------------------------------------------------------------------------- text of the scripts


def source_of(script: ModuleType, name: str) -> str:
    text = Path(script.__file__).read_text(encoding="utf-8")
    found = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name]
    return ast.get_source_segment(text, found[0])


def test_repeated_code_is_the_same_in_all_scripts():
    loops = [source_of(script, "train_epoch") for script in (train_pretrain, train_full_sft, train_lora)]
    assert loops[0] == loops[1] == loops[2] and "micro_nats = nll(" in loops[0]
    scripts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "trainer").glob("train_*.py"))]
    marked = r"^ +# \[shared: optimizer-step\].*?# \[end: optimizer-step\]$"
    steps = [re.findall(marked, text, flags=re.DOTALL | re.MULTILINE) for text in scripts]
    assert len(steps) > 8 and all(len(found) == 1 for found in steps)
    assert len({textwrap.dedent(found[0]) for found in steps}) == 1


# ------------------------------------------------------------------------------------------------------------- training


def test_a_run_learns_and_tells(reference):
    records = metrics(reference.out_dir)
    lines = [record for record in records if "loss" in record]
    steps = EPOCHS * reference.per_epoch
    assert curve(lines, "step") == list(range(1, steps + 1))
    assert lines[0]["loss"] == pytest.approx(math.log(6400), abs=0.4)
    assert lines[29]["loss"] < lines[0]["loss"] - 2 and lines[-1]["loss"] < lines[29]["loss"]

    promised = {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "memory_gib"}
    promised |= {"data_wait", "skipped_steps", "eta_seconds"}
    for line in lines:
        assert promised <= line.keys()
        assert line["lr"] == utils.cosine_lr(line["step"] - 1, steps, 3, 5e-3)
        assert line["epoch"] == 1 + (line["step"] > reference.per_epoch)
        assert line["tokens_per_second"] > 0 and 0 <= line["data_wait"] <= 1 and line["mfu"] is None
        assert line["skipped_steps"] == 0
    assert lines[-1]["tokens"] == EPOCHS * reference.data.stats["tokens"]  # real tokens, no padding, each row once
    assert lines[-1]["eta_seconds"] == 0 and lines[0]["eta_seconds"] > 0

    validations = [record for record in records if "val_loss" in record]
    assert curve(validations, "step") == [*range(10, steps, 10), steps]
    assert validations[-1]["val_loss"] < validations[0]["val_loss"]
    assert all(0 < record["val_bpb"] < 8 for record in validations)

    pattern = r"pretrain \| epoch 1/2 \| step 1/\d+ \| loss \d\.\d{4} \| lr \d\.\d\de-\d\d \| gnorm \d+\.\d\d \| "
    assert re.search(pattern + r"\d+\.\dk tok/s \| .*data \d+\.\d% \| eta \d+:\d\d:\d\d\n", reference.result.out)
    assert "learning rate 0.005 after 3 updates of warm-up" in reference.result.out
    picture = (run_folder(reference.out_dir) / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert reference.result.err == ""


def test_weights_know_their_configuration(reference):
    model = load_model(reference.out_dir / "pretrain_32.pth")
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size) == (32, 1, 6400)
    state, facts = final_state(reference.out_dir)
    for name, p in model.named_parameters():
        assert torch.equal(p, state["model"][name].half().float()), name  # the file holds half precision
        assert not torch.equal(p, reference.watch.first[name].half().float()), name  # and every weight moved
    assert facts["progress"]["finished"] and facts["progress"]["step"] == EPOCHS * reference.per_epoch


def test_first_update_against_a_naive_one(files, flags, tmp_path, monkeypatch):
    """Three micro-batches of unequal numbers of labels; the mean over all tokens, clipping and AdamW by formula."""
    watch = Watch(monkeypatch)
    arguments = flags("full_sft", from_weight="none", hidden_size=32, num_hidden_layers=2, accumulation_steps=3)
    more = ["--max_steps", "1", "--warmup_iters", "1", "--optimizer", "adamw"]
    assert train(train_full_sft, [*arguments, *more]).status == 0
    record = metrics(tmp_path, "full_sft")[0]

    data = SFTDataset(files.full_sft, load_tokenizer(), 64, val_ratio=0.05, cache_dir=files.cache)
    args = SimpleNamespace(batch_size=4, accumulation_steps=3)
    _, micros = next(utils.RowOrder(len(data), args, SimpleNamespace(rank=0, world_size=1, seed=42), 0).updates())
    model = watch.model
    model.load_state_dict(watch.first, strict=False)
    total, count = 0.0, 0
    for row in sum(micros, []):
        item = data[row]
        for document in range(int(item["documents"].max()) + 1):  # each conversation alone
            here = item["documents"] == document
            log_probs = model(item["input_ids"][here][None]).logits[0].double().log_softmax(-1)
            targets = item["labels"][here][1:]
            kept = targets != IGNORE
            total = total - log_probs[:-1][kept, targets[kept]].sum()
            count += int(kept.sum())
    loss = total / count
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    assert norm > 1  # so that clipping acts
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-3)  # float32 sums of torch: 1e-4 off on this size
    lr = 5e-3
    for name, p in model.named_parameters():
        g = p.grad.double() / norm
        decayed = watch.first[name].double() * (1 - lr * 0.1 if p.ndim >= 2 else 1)
        expected = decayed - lr * g / (g.abs() + 1e-8)  # the bias-corrected moments of a first step are g and g²
        solid = g.abs() > 1e-5  # below, rounding of the gradient decides the sign
        assert solid.float().mean() > 0.1
        close = torch.isclose(watch.weights[0][name].double(), expected, rtol=0, atol=0.01 * lr)
        assert close[solid].all(), name


def test_gradients_are_clipped(flags, tmp_path, monkeypatch):
    """Adam forgives any scale of the gradient but one far below its ε: then nothing moves."""
    watch = Watch(monkeypatch)
    changes = dict(grad_clip=1e-12, weight_decay=0, max_steps=3, warmup_iters=1, optimizer="adamw")
    assert train(train_pretrain, flags(**changes)).status == 0
    assert metrics(tmp_path)[0]["grad_norm"] > 1  # logged before clipping
    for name, p in watch.weights[-1].items():
        assert torch.allclose(p, watch.first[name], rtol=0, atol=0.01 * 5e-3), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stage", SCRIPTS)
def test_half_precision_learns(stage, dtype, reference, flags, tmp_path, monkeypatch):
    if stage == "full_sft":
        shutil.copy(reference.out_dir / "pretrain_32.pth", tmp_path)
        shutil.copy(reference.out_dir / "pretrain_32.json", tmp_path)
    watch = Watch(monkeypatch)
    result = train(SCRIPTS[stage], flags(stage, dtype=dtype, max_steps=14, val_interval=0))
    assert result.status == 0, result.err
    lines = metrics(tmp_path, stage)
    losses = [loss for loss in curve(lines) if loss is not None]
    assert len(losses) >= 10  # the first loss scale of float16 may overflow
    assert losses[-1] < losses[0] - (0.5 if stage == "pretrain" else 0.3)
    if stage == "pretrain":  # the same first update as the float32 run, rounded
        full = metrics(reference.out_dir)[0]
        for name, tolerance in [("loss", 1e-3), ("grad_norm", 0.02)]:
            assert lines[0][name] == pytest.approx(full[name], rel=tolerance)
            assert lines[0][name] != full[name]
    assert all(p.dtype is torch.float32 for p in watch.model.parameters())  # master weights
    assert all(not torch.equal(p, watch.first[name]) for name, p in watch.model.named_parameters())
    state, facts = final_state(tmp_path, stage)
    assert bool(state["scaler"]) == (dtype == "float16")
    assert f"machine cpu, {dtype}, compile off" in result.out


def test_a_loss_scale_that_overflows_is_lowered_until_it_fits(flags, tmp_path, monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**30)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    watch = Watch(monkeypatch)
    assert train(train_pretrain, flags(dtype="float16", epochs=2, max_steps=30, val_interval=0)).status == 0
    lines = metrics(tmp_path)
    skipped = lines[-1 if "loss" in lines[-1] else -2]["skipped_steps"]
    assert 0 < skipped < 20
    for name, p in watch.weights[0].items():
        assert torch.equal(p, watch.first[name])  # the first update overflowed and was left out
    state, _ = final_state(tmp_path)
    assert state["scaler"]["scale"] < 2.0**30
    losses = [loss for loss in curve(lines) if loss is not None]
    assert len(losses) == 30 - skipped and losses[-1] < losses[0] - 0.5


def test_sft_starts_from_pretrained_weights_without_being_told_a_size(reference, flags, tmp_path, monkeypatch):
    for name in ("pretrain_32.pth", "pretrain_32.json"):
        shutil.copy(reference.out_dir / name, tmp_path)
    watch = Watch(monkeypatch)
    result = train(train_full_sft, flags("full_sft"))
    assert result.status == 0, result.err
    assert f"starting from {tmp_path / 'pretrain_32.pth'}" in result.out
    pretrained = load_model(tmp_path / "pretrain_32.pth")
    for name, p in pretrained.named_parameters():
        assert torch.equal(watch.first[name], p)
        assert not torch.equal(watch.weights[-1][name], p)
    losses = curve(metrics(tmp_path, "full_sft"))
    assert losses[-1] < losses[0] - 0.3
    tuned = load_model(tmp_path / "full_sft_32.pth", hidden_size=32, num_hidden_layers=1)
    assert tuned.config.hidden_size == 32
    about = json.loads((tmp_path / "full_sft_32.json").read_text(encoding="utf-8"))
    assert about["stage"] == "full_sft" and about["step"] == len(losses)
    assert (run_folder(tmp_path, "full_sft") / "loss.png").is_file()
    # The mask: fewer labels than tokens, so the loss is over the assistant's words only.
    data = SFTDataset(flags("full_sft")[3], load_tokenizer(), 64, cache_dir=flags("full_sft")[5], val_ratio=0.05)
    assert data.stats["trained_tokens"] < 0.8 * data.stats["tokens"]


def test_mixture_of_experts_trains_and_logs_its_balance_loss(flags, tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    result = train(train_pretrain, flags(use_moe=True, max_steps=14, val_interval=0))
    assert result.status == 0, result.err
    records = metrics(tmp_path, size="32_moe")
    losses = curve(records)
    assert losses[-1] < losses[0] - 0.5
    assert all(0.09 < value < 0.4 for value in curve(records, "aux_loss"))  # 0.1 with an even load, 0.4 with one expert
    assert "aux 0." in result.out and "mixture of experts" in result.out and "| experts " in result.out
    for shares in curve(records, "expert_load"):  # one layer of four experts
        assert len(shares) == 1 and all(len(s) == 4 and sum(s) == pytest.approx(1, abs=1e-3) for s in shares)
    assert all(not torch.equal(p, watch.first[name]) for name, p in watch.model.named_parameters())
    assert load_model(tmp_path / "pretrain_32_moe.pth").config.use_moe


def test_a_first_update_without_a_label_changes_nothing_but_by_decay(flags, tmp_path, monkeypatch):
    read_updates = utils.read_updates

    def first_without_labels(*args):
        for i, (rows, counts, micros) in enumerate(read_updates(*args)):
            if i == 0:
                counts = (0, counts[1])
                micros = [{**micro, "labels": torch.full_like(micro["labels"], IGNORE)} for micro in micros]
            yield rows, counts, micros

    monkeypatch.setattr(utils, "read_updates", first_without_labels)
    watch = Watch(monkeypatch)
    assert train(train_pretrain, flags(max_steps=8, warmup_iters=1, val_interval=0)).status == 0
    for name, p in watch.weights[0].items():
        shrunk = 1 - 5e-3 * 0.1 if p.ndim >= 2 else 1
        assert torch.allclose(p, watch.first[name] * shrunk, rtol=1e-6, atol=0), name
    losses = curve(metrics(tmp_path))
    assert losses[0] is None and metrics(tmp_path)[0]["skipped_steps"] == 0
    assert losses[-1] < losses[1] and all(torch.isfinite(p).all() for p in watch.weights[-1].values())


def test_loader_processes_change_nothing(flags, tmp_path):
    for workers in (0, 2):
        result = train(train_pretrain, flags(out_dir=tmp_path / str(workers), max_steps=4, num_workers=workers))
        assert result.status == 0, result.err
    assert_same_run(tmp_path / "0", tmp_path / "2")


# --------------------------------------------------------------------------------------------- one update in any layout


LAYOUTS = {"1 x 32": (32, 1), "8 x 4": (4, 8), "2 ranks x 16": (16, 1)}
ADAMW = dict(optimizer="adamw")
MODELS = {"dense": ADAMW, "experts": ADAMW | dict(use_moe=True), "muon": dict(optimizer="muon")}


@pytest.fixture(scope="module")
def layout_run(files, tmp_path_factory):
    """Runs a layout of a global batch of 32 rows, once per kind of model."""

    @functools.cache
    def run(kind: str, layout: str) -> Path:
        out_dir = tmp_path_factory.mktemp("layout")
        batch, accumulation = LAYOUTS[layout]
        changes = dict(epochs=2, max_steps=6, warmup_iters=1, learning_rate=1e-3)
        changes |= dict(batch_size=batch, accumulation_steps=accumulation, **MODELS[kind])
        result = (torchrun if "ranks" in layout else train)(train_pretrain, tiny_flags(files, out_dir, **changes))
        assert result.status == 0, result.err
        return out_dir

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, layout",
    [
        ("dense", "8 x 4"),
        ("dense", "2 ranks x 16"),
        ("experts", "8 x 4"),
        ("experts", "2 ranks x 16"),
        ("muon", "8 x 4"),
        ("muon", "2 ranks x 16"),
    ],
)
def test_any_layout_of_the_batch_is_the_same_update(kind, layout, layout_run, reference):
    assert len(reference.data) % 4 and len(reference.data) < 5 * 32  # both epochs are reached, their ends are ragged
    size = "32_moe" if kind == "experts" else "32"
    one_dir, other_dir = layout_run(kind, "1 x 32"), layout_run(kind, layout)
    one, other = metrics(one_dir, size=size), metrics(other_dir, size=size)
    assert curve(one, "step") == curve(other, "step")
    assert curve(one, "tokens") == curve(other, "tokens") and len(curve(one, "tokens")) == 6
    # Rounding is amplified where a router's choice flips, and by Muon, which evens out large and small directions.
    close = functools.partial(pytest.approx, rel={"dense": 1e-6, "experts": 1e-5, "muon": 1e-4}[kind])
    assert curve(other) == close(curve(one))
    if kind != "muon":  # the optimisers do not see a wrong scale of the gradient, its norm does
        assert curve(other, "grad_norm") == close(curve(one, "grad_norm"))
    assert curve(other, "aux_loss") == close(curve(one, "aux_loss"))
    assert bool(curve(one, "aux_loss")) == (kind == "experts")
    for name in ("val_loss", "val_bpb"):
        assert curve(other, name) == close(curve(one, name)) and len(curve(one, name)) == 1
    (a, facts), (b, other_facts) = final_state(one_dir, size=size), final_state(other_dir, size=size)
    assert facts["progress"] == other_facts["progress"]
    worst = max(float((a["model"][name] - b["model"][name]).abs().max()) for name in a["model"])
    assert worst < {"dense": 2e-6, "experts": 2e-5, "muon": 5e-4}[kind], worst  # six updates of up to 1e-3 each


# --------------------------------------------------------------------------------------------------------------- resume


class PowerCut(BaseException):
    """Ends a run without any of its code noticing, but for the removal of half-written files."""


def cut() -> None:
    raise PowerCut


def resume(out_dir: Path, stage: str = "pretrain", *more: str) -> Result:
    return train(SCRIPTS[stage], ["--resume", "--out_dir", str(out_dir), *more])


@pytest.fixture(autouse=True)
def cpu_is_the_best_device(monkeypatch):
    """`--resume` alone picks the best device; bitwise equality is promised on the CPU."""
    monkeypatch.setattr(utils, "best_device", lambda: "cpu")


@pytest.mark.parametrize("where", ["between saves", "at the end of an epoch", "right after it", "before the last save"])
def test_a_cut_run_goes_on_bit_for_bit(where, files, reference, tmp_path, monkeypatch):
    epoch = reference.per_epoch
    step, interval = {
        "between saves": (8, 5),
        "at the end of an epoch": (epoch + 1, epoch),  # the newest state has no row of its epoch left
        "right after it": (epoch + 3, epoch + 1),
        "before the last save": (2 * epoch, 5),
    }[where]
    with monkeypatch.context() as patch:
        Watch(patch, at={step: cut})
        with pytest.raises(PowerCut):
            train(train_pretrain, [*reference_flags(files, tmp_path), "--save_interval", str(interval)])
    saved = final_state(tmp_path)[1]["progress"]["step"]
    assert saved == (step - 1) // interval * interval
    result = resume(tmp_path)
    assert result.status == 0, result.err
    assert f"resumed at update {saved}, epoch {1 if saved <= epoch else 2}" in result.out
    assert_same_run(tmp_path, reference.out_dir)


@pytest.mark.parametrize("moment", ["in the state", "between state and its sum", "between weights and state"])
def test_a_cut_while_saving_leaves_a_whole_state(moment, files, reference, tmp_path, monkeypatch):
    """The second save, at update 10, is cut; a killed process does not remove its half file either."""
    real = {"save": torch.save, "unlink": Path.unlink, "sum": checkpoint.sha256_of, "state": checkpoint.save_state}

    def half_a_save(state, f, *args):
        if "step_00000010" in str(f.name):
            whole = io.BytesIO()
            real["save"](state, whole)
            f.write(whole.getvalue()[: whole.tell() // 2])
            cut()
        real["save"](state, f, *args)

    with monkeypatch.context() as patch:
        if moment == "in the state":
            patch.setattr(torch, "save", half_a_save)
            patch.setattr(Path, "unlink", lambda path, **kw: path.suffix == ".part" or real["unlink"](path, **kw))
        elif moment == "between state and its sum":
            patch.setattr(checkpoint, "sha256_of", lambda path: cut() if "10.pt" in path.name else real["sum"](path))
        else:
            patch.setattr(checkpoint, "save_state", lambda *args: cut() if args[3] == 10 else real["state"](*args))
        with pytest.raises(PowerCut):
            train(train_pretrain, reference_flags(files, tmp_path))
    if moment == "in the state":
        (tmp_path / "pretrain_32.pth.99999.part").write_bytes(b"half of the weights")
        assert len(list(tmp_path.rglob("*.part"))) == 2
    load_model(tmp_path / "pretrain_32.pth")  # the weights of update 5 or 10, whole
    assert final_state(tmp_path)[1]["progress"]["step"] == 5
    result = resume(tmp_path)
    assert result.status == 0, result.err
    assert "resumed at update 5," in result.out
    assert list(tmp_path.rglob("*.part")) == []
    assert ("warning" in result.err) == (moment == "between state and its sum")
    assert_same_run(tmp_path, reference.out_dir)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(name, files, reference, tmp_path, monkeypatch):
    number = getattr(signal, name)
    with monkeypatch.context() as patch:
        Watch(patch, at={7: lambda: signal.raise_signal(number)})
        result = train(train_pretrain, reference_flags(files, tmp_path))
    assert result.status == 128 + number
    assert "stopping after this update" in result.err and "Traceback" not in result.err
    saved = final_state(tmp_path)[1]["progress"]["step"]
    assert saved == 8  # the signal came after update 7 had asked; update 8 was finished
    assert resume(tmp_path).status == 0
    assert_same_run(tmp_path, reference.out_dir)


def test_a_second_interrupt_leaves_at_once(files, tmp_path, monkeypatch):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    Watch(monkeypatch, at={7: twice})
    result = train(train_pretrain, reference_flags(files, tmp_path))
    assert result.status == 130
    assert final_state(tmp_path)[1]["progress"]["step"] == 5


def wait_for_step(process: subprocess.Popen, out_dir: Path, step: int) -> None:
    path = run_folder(out_dir) / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and path.read_text(encoding="utf-8").count('"loss"') >= step:
            return
        time.sleep(0.002)
    process.kill()
    pytest.fail(f"no update {step}: {process.communicate()[1]}")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no kill -9")
def test_a_killed_process_goes_on_bit_for_bit(files, reference, tmp_path):
    """A real process, started in trainer/ as people do, and killed from outside between two saves."""
    process = start(["train_pretrain.py", *reference_flags(files, tmp_path)], cwd=ROOT / "trainer")
    wait_for_step(process, tmp_path, 7)
    os.kill(process.pid, signal.SIGKILL)
    assert finish(process).status == -signal.SIGKILL
    assert 5 <= final_state(tmp_path)[1]["progress"]["step"] < EPOCHS * reference.per_epoch
    assert resume(tmp_path).status == 0
    assert_same_run(tmp_path, reference.out_dir)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking it")
def test_a_terminated_process_saves_and_goes_on_bit_for_bit(files, reference, tmp_path):
    """SIGTERM to a real process that was started from a foreign folder; resumed by a real process too."""
    script = ROOT / "trainer" / "train_pretrain.py"
    process = start([script, *reference_flags(files, tmp_path / "out")], cwd=tmp_path)
    wait_for_step(process, tmp_path / "out", 7)
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.status == 128 + signal.SIGTERM, result.err
    done = curve(metrics(tmp_path / "out"), "step")[-1]
    assert final_state(tmp_path / "out")[1]["progress"]["step"] == done < EPOCHS * reference.per_epoch
    result = finish(start([script, "--resume", "--out_dir", "out", "--device", "cpu"], cwd=tmp_path))
    assert result.status == 0, result.err
    assert_same_run(tmp_path / "out", reference.out_dir)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking it")
def test_two_ranks_stop_on_a_signal_and_go_on_in_one_process(files, reference, tmp_path):
    """torchrun hands the signal on; another number of ranks with the same rows per update continues the run."""
    script = ROOT / "trainer" / "train_pretrain.py"
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone", script]
    two, one = tmp_path / "two", tmp_path / "one"
    process = start([*launch, *tiny_flags(files, two, batch_size=2, **ADAMW)])
    wait_for_step(process, two, 7)
    process.send_signal(signal.SIGTERM)
    assert finish(process).status != 0
    progress = final_state(two)[1]["progress"]
    assert progress["step"] == curve(metrics(two), "step")[-1] and not progress["finished"]
    result = resume(two)  # 2 rows × 2 ranks before, 2 rows × 2 micro-batches now
    assert "note: an update of this run holds 4 rows" in result.out
    assert result.status == 0 and f"resumed at update {progress['step']}," in result.out, result.err
    assert train(train_pretrain, tiny_flags(files, one, **ADAMW)).status == 0
    for name in ("step", "tokens", "lr"):
        assert curve(metrics(two), name) == curve(metrics(one), name)
    for name in ("loss", "val_loss"):
        assert curve(metrics(two), name) == pytest.approx(curve(metrics(one), name), rel=1e-4)


@pytest.mark.parametrize("kind", ["float16", "experts", "dropout"])
def test_whatever_a_run_carries_comes_back(kind, files, reference, flags, tmp_path, monkeypatch):
    """The loss scale, experts, dropout; and the pretrained weights that SFT began from are gone or others by then."""
    stage, size = ("full_sft", "32") if kind == "dropout" else ("pretrain", "32_moe" if kind == "experts" else "32")
    changes = {"float16": {"dtype": "float16"}, "experts": {"use_moe": True}, "dropout": {}}[kind]
    changes |= {"max_steps": 9, "val_interval": 0, "save_interval": 3}
    out_dirs = [tmp_path / "whole", tmp_path / "cut"]
    for out_dir in out_dirs:
        out_dir.mkdir()
        if kind == "dropout":
            shutil.copy(reference.out_dir / "pretrain_32.pth", out_dir)
            about = json.loads((reference.out_dir / "pretrain_32.json").read_text(encoding="utf-8"))
            about["config"]["dropout"] = 0.2
            (out_dir / "pretrain_32.json").write_text(json.dumps(about), encoding="utf-8")
    assert train(SCRIPTS[stage], flags(stage, out_dir=out_dirs[0], **changes)).status == 0
    with monkeypatch.context() as patch:
        Watch(patch, at={8: cut})
        with pytest.raises(PowerCut):
            train(SCRIPTS[stage], flags(stage, out_dir=out_dirs[1], **changes))
    if kind == "dropout":
        assert final_state(out_dirs[1], stage)[1]["config"]["dropout"] == 0.2
        for name in ("pretrain_32.pth", "pretrain_32.json"):
            (out_dirs[1] / name).unlink()
    result = resume(out_dirs[1], stage)
    assert result.status == 0, result.err
    assert_same_run(*out_dirs, stage, size)


@pytest.fixture
def stopped(files, tmp_path, monkeypatch) -> Path:
    """A run of eight updates that was cut after its save at update 5."""
    with monkeypatch.context() as patch:
        Watch(patch, at={6: cut})
        with pytest.raises(PowerCut):
            train(train_pretrain, tiny_flags(files, tmp_path / "out", max_steps=8, val_interval=0))
    return tmp_path / "out"


def one_error(result: Result) -> str:
    """The message of a run that ended with exactly one line of error and nothing else on stderr."""
    assert result.status == 2, result
    assert len(result.err.splitlines()) == 1 and result.err.startswith("error: "), result.err
    return result.err


def test_a_run_that_would_differ_is_refused(files, stopped, tmp_path):
    before = tree(stopped)
    other = write_records(tmp_path / "other.jsonl", [{"text": sentence(random.Random(i))} for i in range(300)])
    for more, what in [
        (["--batch_size", "8"], "rows per update was 4, now it is 8"),
        (["--data_path", str(other)], "data (content, tokenizer, settings) was"),
        (["--learning_rate", "0.1"], "learning_rate was 0.005, now it is 0.1"),
        (["--seed", "7"], "seed was 42, now it is 7"),
        (["--max_seq_len", "32"], "max_seq_len was 64, now it is 32"),
        (["--val_ratio", "0"], "val_ratio was 0.05, now it is 0.0"),
        (["--max_steps", "7"], "total_steps was 8, now it is 7"),
        (["--num_hidden_layers", "2"], "num_hidden_layers was 1, now it is 2"),
        (["--hidden_size", "64"], "no saved state of pretrain"),
    ]:
        assert what in one_error(resume(stopped, "pretrain", *more))
    assert tree(stopped) == before


def test_data_that_changed_meanwhile_is_refused(files, stopped, tmp_path):
    arguments = ["--data_path", str(files.pretrain)]
    assert "full_sft" in one_error(resume(stopped, "full_sft", *arguments))  # no run of that stage
    records = files.pretrain.read_text(encoding="utf-8")
    changed = tmp_path / "pretrain.jsonl"
    changed.write_text(records.replace("cat", "cow"), encoding="utf-8")
    assert "--resume cannot go on: data (content" in one_error(resume(stopped, "pretrain", "--data_path", str(changed)))


def test_accumulation_may_be_traded_for_batch_size(stopped):
    result = resume(stopped, "pretrain", "--batch_size", "2", "--accumulation_steps", "2")
    assert result.status == 0, result.err
    assert final_state(stopped)[1]["progress"]["finished"]


def test_a_damaged_newest_state_is_passed_over(stopped, tmp_path):
    assert resume(stopped).status == 0
    whole = tree(stopped)
    newest = run_folder(stopped) / "step_00000008.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    result = resume(stopped)
    assert result.status == 0 and "step_00000008.pt is incomplete or damaged" in result.err
    assert "resumed at update 5" in result.out
    again = tree(stopped)
    assert again[str(newest.relative_to(stopped))] == whole[str(newest.relative_to(stopped))]


def test_nothing_to_resume(tmp_path):
    error = one_error(resume(tmp_path / "nowhere"))
    assert "start without --resume" in error and not (tmp_path / "nowhere").exists()


def test_a_finished_run_says_so_and_changes_nothing(reference, tmp_path):
    shutil.copytree(reference.out_dir, tmp_path / "out")
    before = tree(tmp_path / "out")
    result = resume(tmp_path / "out")
    assert result.status == 0 and "this run is finished" in result.out
    assert tree(tmp_path / "out") == before


def test_a_second_run_keeps_the_first_one_aside(reference, files, tmp_path):
    shutil.copytree(reference.out_dir, tmp_path / "out")
    result = train(train_pretrain, tiny_flags(files, tmp_path / "out", max_steps=2, val_interval=0))
    assert result.status == 0 and "an earlier run was here" in result.out
    assert curve(metrics(tmp_path / "out"), "step") == [1, 2, 2]
    kept, _ = final_state(tmp_path / "out", size="32.previous")
    assert differences(kept, final_state(reference.out_dir)[0]) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "full_sft"])
def test_compiled_equals_eager_and_goes_on_bit_for_bit(stage, flags, tmp_path):
    changes = dict(max_steps=6, save_interval=3, val_interval=0, max_seq_len=32)
    if stage == "full_sft":
        changes |= dict(from_weight="none", hidden_size=32, num_hidden_layers=1)
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        result = train(SCRIPTS[stage], [*flags(stage, tmp_path / name, **changes), *more])
        assert result.status == 0 and f"compile {'on' if more else 'off'}" in result.out, result.err
    eager, compiled = (metrics(tmp_path / name, stage) for name in ("eager", "compiled"))
    assert len(curve(eager)) == 6 and curve(compiled) == pytest.approx(curve(eager), rel=1e-3)
    shutil.copytree(tmp_path / "compiled", tmp_path / "cut")
    for path in (tmp_path / "cut").rglob("step_00000006.*"):
        path.unlink()
    result = resume(tmp_path / "cut", stage)
    assert result.status == 0 and "resumed at update 3" in result.out, result.err
    assert_same_run(tmp_path / "compiled", tmp_path / "cut", stage)


def test_a_run_goes_on_in_another_precision(flags, tmp_path):
    """Begun where the hardware has bfloat16, continued where a loss scaler is needed."""
    assert train(train_pretrain, flags(max_steps=6, save_interval=3, val_interval=0)).status == 0
    for path in (tmp_path / "runs").rglob("step_00000006.*"):
        path.unlink()
    result = resume(tmp_path, "pretrain", "--dtype", "float16")
    assert result.status == 0, result.err
    assert "began in torch.float32 and goes on in torch.float16" in result.out
    assert len(curve(metrics(tmp_path))) == 6 and all(math.isfinite(loss) for loss in curve(metrics(tmp_path)))


# ----------------------------------------------------------------------------------------------------------- tokenizer


def test_later_stages_inherit_the_tokenizer(flags, tmp_path):
    folder = tmp_path / "my tokenizer"
    load_tokenizer().save_pretrained(folder)
    short = dict(max_steps=2, val_interval=0)
    assert train(train_pretrain, flags(tokenizer=folder, **short)).status == 0
    assert train(train_full_sft, flags("full_sft", **short)).status == 0
    for stage in SCRIPTS:
        about = json.loads((tmp_path / f"{stage}_32.json").read_text(encoding="utf-8"))
        assert about["tokenizer"] == str(folder)
    shutil.rmtree(folder)
    result = train(train_full_sft, flags("full_sft", **short))
    assert result.status == 2 and "my tokenizer holds no tokenizer.json" in result.err and result.err.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------- non-finite


def spoil(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Makes the loss NaN at the given calls (one per micro-batch and validation batch)."""
    seen, summed_nll = [0], train_pretrain.summed_nll

    def spoiled(*args, **kwargs):
        seen[0] += 1
        return summed_nll(*args, **kwargs) * (math.nan if seen[0] in calls else 1.0)

    monkeypatch.setattr(train_pretrain, "summed_nll", spoiled)


def test_a_non_finite_loss_costs_one_update(flags, tmp_path, monkeypatch):
    spoil(monkeypatch, {6})  # the second micro-batch of the third update
    watch = Watch(monkeypatch)
    result = train(train_pretrain, flags(epochs=2, max_steps=12, accumulation_steps=2, val_interval=0))
    assert result.status == 0, result.err
    for name, p in watch.weights[2].items():
        assert torch.equal(p, watch.weights[1][name]), name
        assert not torch.equal(watch.weights[3][name], p) and torch.isfinite(watch.weights[-1][name]).all()
    records = [record for record in metrics(tmp_path) if "loss" in record]
    assert [record["skipped_steps"] for record in records] == [0, 0] + [1] * 10
    assert records[2]["loss"] is None and records[2]["grad_norm"] is None
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert "| skipped 1 |" in result.out
    assert run_log.plot_loss(run_folder(tmp_path), "with a gap") is not None


def test_non_finite_losses_without_end_stop_the_run_with_advice(flags, tmp_path, monkeypatch):
    spoil(monkeypatch, set(range(4, 100)))
    watch = Watch(monkeypatch)
    result = train(train_pretrain, flags(save_interval=2, val_interval=0))
    message = one_error(result)
    assert "6 updates in a row, up to update 9" in message and "smaller --learning_rate" in message
    state, facts = final_state(tmp_path)
    assert facts["progress"]["step"] == 8
    assert all(torch.equal(state["model"][name], p) for name, p in watch.weights[2].items())


# ---------------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job(files, tmp_path):
    """Rank 1 fails while rank 0 waits for it in a collective."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from trainer import command_line, run_log, train_pretrain
count = run_log.RunLog.count
def failing(log, *args):
    count(log, *args)
    if os.environ["RANK"] == "1" and log.steps == 2:
        print("failing at", time.time(), flush=True)
        raise command_line.UserError("the plug was pulled.")
run_log.RunLog.count = failing
command_line.run_script(train_pretrain.main)
""",
        encoding="utf-8",
    )
    result = torchrun(driver, tiny_flags(files, tmp_path / "out", log_interval=100))
    ended = time.time()
    assert result.status != 0
    assert result.err.count("error (rank 1): the plug was pulled.") == 1
    assert ended - float(re.search(r"failing at ([\d.]+)", result.out)[1]) < 45


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "stage, content, what",
    [
        ("pretrain", "", "is empty"),
        ("pretrain", '[{"text": "one"}, {"text": "two"}]', "one JSON array"),
        ("pretrain", '{"text": "one"}\n{"txt": "two"}\n', 'line 2: key "text" is missing'),
        ("pretrain", '{"text": "one"}\n{"text": "tw\n', "line 2: not JSON"),
        ("pretrain", None, "there is no such file"),
        ("full_sft", '{"conversations": [{"role": "robot", "content": "beep"}]}\n', 'turn 1: the role is "robot"'),
        ("full_sft", '{"text": "one"}\n', 'key "conversations" is missing'),
    ],
    ids=["empty", "array", "missing key", "torn line", "no file", "wrong role", "file of another stage"],
)  # fmt: skip
def test_bad_data_is_one_line_and_destroys_nothing(stage, content, what, reference, flags, tmp_path):
    out_dir, path = tmp_path / "out", tmp_path / "bad.jsonl"
    shutil.copytree(reference.out_dir, out_dir)
    before = tree(out_dir)
    if content is not None:
        path.write_text(content, encoding="utf-8")
    message = one_error(train(SCRIPTS[stage], flags(stage, out_dir=out_dir, data_path=path)))
    assert what in message and path.name in message
    assert tree(out_dir) == before


def test_bad_records_are_left_out_on_request(flags, tmp_path):
    path = tmp_path / "some_bad.jsonl"
    records = [json.dumps({"text": sentence(random.Random(i))}) for i in range(20)]
    path.write_text("\n".join([*records, '{"txt": 1}', "nonsense"]) + "\n", encoding="utf-8")
    assert "line 21" in one_error(train(train_pretrain, flags(data_path=path, max_steps=1)))
    assert train(train_pretrain, flags(data_path=path, max_steps=1, skip_bad_records=True)).status == 0


@pytest.mark.parametrize(
    "stage, changes, what",
    [
        ("full_sft", {"from_weight": "nowhere/x.pth"}, "x.pth does not exist"),
        ("full_sft", {"from_weight": "rlhf"}, "no rlhf weights"),
        ("full_sft", {"hidden_size": 64}, "no pretrain weights of hidden_size 64"),
        ("full_sft", {"from_weight": "FILE", "hidden_size": 64}, "hidden_size 32, but 64 was asked for"),
        ("full_sft", {"num_hidden_layers": 3}, "num_hidden_layers 1, but 3 was asked for"),
        ("full_sft", {"from_weight": "CUT"}, "cut off"),
        ("pretrain", {"hidden_size": 36}, "hidden_size 36"),
        ("pretrain", {"val_ratio": 1.5}, "val_ratio is 1.5"),
        ("pretrain", {"max_seq_len": 1}, "max_seq_len is 1"),
        ("pretrain", {"device": "toaster"}, "toaster"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value.split()[0],
)
def test_a_wrong_flag_is_one_line_and_destroys_nothing(stage, changes, what, reference, flags, tmp_path):
    out_dir = tmp_path / "out"
    shutil.copytree(reference.out_dir, out_dir)
    whole = out_dir / "pretrain_32.pth"
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:-5000])
    weights = {"FILE": whole, "CUT": tmp_path / "cut.pth"}
    changes = {name: weights.get(value, value) for name, value in changes.items()}
    before = tree(out_dir)
    assert what in one_error(train(SCRIPTS[stage], flags(stage, out_dir=out_dir, **changes)))
    assert tree(out_dir) == before


def test_an_output_folder_that_cannot_be_made(flags, tmp_path):
    blocked = tmp_path / "a_file"
    blocked.write_text("mine", encoding="utf-8")
    for out_dir in (blocked, blocked / "deeper"):
        message = one_error(train(train_pretrain, flags(out_dir=out_dir)))
        assert "a_file" in message and "--out_dir" in message
    assert blocked.read_text(encoding="utf-8") == "mine"


@pytest.mark.skipif(
    getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write anywhere, Windows has no such bits"
)
def test_an_output_folder_without_permission(flags, tmp_path):
    out_dir = tmp_path / "out"
    out_dir.mkdir(mode=0o500)
    assert "Permission denied" in one_error(train(train_pretrain, flags(out_dir=out_dir)))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB: room for one state of about 3 MB, not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def test_a_read_only_output_folder_is_one_line_at_once(flags, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, capture_output=True)
    message = one_error(train(train_pretrain, flags(out_dir=small_disk)))
    assert "--out_dir" in message and "name a folder you may write to" in message


def test_a_finished_run_has_its_weights(flags, tmp_path, monkeypatch):
    """The disk is full at the last save: the state must not say "finished" while older weights stand there."""
    save, saves = checkpoint.save_weights, []

    def fails_at_the_end(model, path, about):
        saves.append(about["step"])
        if about["step"] == 4:
            raise OSError(28, "No space left on device", str(path))
        save(model, path, about)

    monkeypatch.setattr(checkpoint, "save_weights", fails_at_the_end)
    message = one_error(train(train_pretrain, flags(max_steps=4, save_interval=2, val_interval=0)))
    assert "No space left" in message and "--resume" in message and saves == [2, 4]
    monkeypatch.setattr(checkpoint, "save_weights", save)
    assert "resumed at update 2" in resume(tmp_path).out
    state, weights = final_state(tmp_path)[0], torch.load(tmp_path / "pretrain_32.pth", weights_only=True)
    for name, tensor in weights.items():
        assert torch.equal(tensor, state["model"][name].half()), name


def test_resume_from_another_folder_finds_the_data(flags, files, tmp_path, monkeypatch):
    monkeypatch.chdir(files.pretrain.parent)
    assert train(train_pretrain, flags(data_path=files.pretrain.name, max_steps=4, save_interval=2)).status == 0
    for path in (tmp_path / "runs").rglob("step_00000004.*"):
        path.unlink()
    monkeypatch.chdir(tmp_path)
    result = resume(tmp_path)
    assert result.status == 0 and "resumed at update 2" in result.out, result.err


def test_a_full_disk_is_one_line_and_leaves_the_older_state(files, small_disk, reference, tmp_path):
    result = train(train_pretrain, reference_flags(files, small_disk))
    message = one_error(result)
    assert "No space left" in message or "full" in message
    assert [path for path in tree(small_disk) if path.endswith(".part")] == []
    assert final_state(small_disk)[1]["progress"]["step"] == 5
    load_model(small_disk / "pretrain_32.pth")
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True, capture_output=True)
    assert resume(small_disk).status == 0  # with room again it goes on, to the same end
    assert_same_run(small_disk, reference.out_dir)


# ---------------------------------------------------------------------------------------------------------------- wandb


@pytest.mark.slow
def test_wandb_offline(flags, tmp_path):
    pytest.importorskip("wandb")
    arguments = [ROOT / "trainer" / "train_pretrain.py", *flags(max_steps=2, use_wandb=True, out_dir=tmp_path / "out")]
    result = finish(start(arguments, cwd=tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path)))
    assert result.status == 0, result.err
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert final_state(tmp_path / "out")[1]["wandb_id"]
    assert curve(metrics(tmp_path / "out"), "step") == [1, 2, 2]


def test_wandb_that_is_not_installed_is_one_line(flags, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = one_error(train(train_pretrain, flags(use_wandb=True)))
    assert "pip install wandb" in message
