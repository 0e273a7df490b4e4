"""The two trainers as a user runs them: what is learned, logged and saved; and what the tests of all trainers share.

Most runs call `main` inside the test process (`train`); where the point is a process, a real one is started, always
with a time limit. Sizes are tiny: hidden 32, one layer, rows of 64 tokens, one thread.

Dimension legend: B batch · T tokens · V vocabulary.
"""

import ast
import contextlib
import io
import json
import math
import os
import random
import re
import shutil
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


def wait_for_step(process: subprocess.Popen, out_dir: Path, step: int) -> None:
    path = run_folder(out_dir) / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and path.read_text(encoding="utf-8").count('"loss"') >= step:
            return
        time.sleep(0.002)
    process.kill()
    pytest.fail(f"no update {step}: {process.communicate()[1]}")


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
ADAMW = dict(optimizer="adamw")


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


def one_error(result: Result) -> str:
    """The message of a run that ended with exactly one line of error and nothing else on stderr."""
    assert result.status == 2, result
    assert len(result.err.splitlines()) == 1 and result.err.startswith("error: "), result.err
    return result.err


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


# ---------------------------------------------------------------------------------------------------------------- wandb


@pytest.mark.slow
def test_wandb_offline(flags, tmp_path):
    """A resumed run goes on under the same id, so that `wandb sync` puts both parts into one curve."""
    pytest.importorskip("wandb")
    script, out_dir = ROOT / "trainer" / "train_pretrain.py", tmp_path / "out"
    own_folder = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    more = {"epochs": 9, "max_steps": 60, "save_interval": 1, "val_interval": 0}
    process = start([script, *flags(use_wandb=True, out_dir=out_dir, **more)], cwd=tmp_path, **own_folder)
    wait_for_step(process, out_dir, 2)
    process.kill()
    finish(process)
    (first,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    run_id = final_state(out_dir)[1]["wandb_id"]
    assert first.stem == f"run-{run_id}"
    result = finish(start([script, "--resume", "--out_dir", out_dir, "--device", "cpu"], cwd=tmp_path, **own_folder))
    assert result.status == 0 and "resumed at update" in result.out, result.err
    both = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(both) == 2 and {path.stem for path in both} == {first.stem}
    assert curve(metrics(out_dir), "step") == [*range(1, 61), 60]


def test_wandb_that_is_not_installed_is_one_line(flags, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = one_error(train(train_pretrain, flags(use_wandb=True)))
    assert "pip install wandb" in message
