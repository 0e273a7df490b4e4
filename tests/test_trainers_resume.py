"""The two trainers interrupted: resumed bit for bit, or refused in one line; bad input and full disks, too."""

import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_trainers import (  # noqa: F401 (fixtures)
    ADAMW,
    EPOCHS,
    LIMIT_SECONDS,
    SCRIPTS,
    PowerCut,
    Watch,
    assert_same_run,
    cpu_is_the_best_device,
    curve,
    cut,
    differences,
    files,
    final_state,
    finish,
    flags,
    metrics,
    one_error,
    reference,
    reference_flags,
    resume,
    run_folder,
    sentence,
    start,
    tiny_flags,
    train,
    tree,
    wait_for_step,
    write_records,
)

from dataset.lm_dataset import PretrainDataset
from model.weights import load_model, load_tokenizer
from trainer import checkpoint, train_pretrain

# ruff: noqa: F811 (fixtures as arguments)


# --------------------------------------------------------------------------------------------------------------- resume


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


# Started in the place of train_pretrain.py: writes down, for each rank, the tokens of each row that is trained on.
COUNTING_TRAINER = """
import json, os, sys
from pathlib import Path

sys.path.insert(0, {root!r})
from trainer import train_pretrain, trainer_utils
from trainer.command_line import run_script

read_updates = trainer_utils.read_updates

def counted(*arguments):
    with open(Path({folder!r}) / ("rows_of_rank_" + os.environ.get("RANK", "0")), "a", encoding="utf-8") as f:
        for update in read_updates(*arguments):
            for micro in update[2]:
                rows = zip(micro["input_ids"].tolist(), micro["documents"][:, 0].tolist())
                f.writelines(json.dumps(row) + "\\n" for row, document in rows if document >= 0)
            f.flush()
            yield update

trainer_utils.read_updates = counted
run_script(train_pretrain.main)
"""


@pytest.fixture(scope="module")
def whole_epoch(files, tmp_path_factory):
    """A run of one process over one epoch."""
    out_dir = tmp_path_factory.mktemp("whole")
    assert train(train_pretrain, tiny_flags(files, out_dir, epochs=1, **ADAMW)).status == 0
    return metrics(out_dir)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking it")
@pytest.mark.parametrize("then", [1, 4])
def test_two_ranks_stop_on_a_signal_and_others_go_on(then, files, whole_epoch, tmp_path):
    """torchrun hands the signal on; on one and on four ranks the run continues with the same rows per update. Every row
    of the epoch is trained on once, and the curves are those of one process."""
    out_dir, script = tmp_path / "out", tmp_path / "train_pretrain.py"
    script.write_text(COUNTING_TRAINER.format(root=str(ROOT), folder=str(tmp_path)), encoding="utf-8")

    def on_ranks(ranks: int, *arguments: object) -> subprocess.Popen:
        return start(["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--standalone", script, *arguments])

    process = on_ranks(2, *tiny_flags(files, out_dir, batch_size=2, epochs=1, **ADAMW))
    wait_for_step(process, out_dir, 7)
    process.send_signal(signal.SIGTERM)
    assert finish(process).status != 0
    progress = final_state(out_dir)[1]["progress"]
    assert progress["step"] == curve(metrics(out_dir), "step")[-1] and not progress["finished"]
    result = finish(on_ranks(then, "--resume", "--out_dir", out_dir, "--device", "cpu"))
    assert result.status == 0 and f"resumed at update {progress['step']}," in result.out, result.err
    assert "note: an update of this run holds 4 rows" in result.out

    rows = [json.loads(row) for path in tmp_path.glob("rows_of_rank_*") for row in path.read_text().splitlines()]
    data = PretrainDataset(files.pretrain, load_tokenizer(), 64, val_ratio=0.05, cache_dir=files.cache)
    assert len(list(tmp_path.glob("rows_of_rank_*"))) == max(2, then)
    assert sorted(rows) == sorted(data[i]["input_ids"].tolist() for i in range(len(data)))

    done = metrics(out_dir)
    for name in ("step", "tokens", "lr"):
        assert curve(done, name) == curve(whole_epoch, name)
    for name in ("loss", "val_loss"):
        assert curve(done, name) == pytest.approx(curve(whole_epoch, name), rel=1e-4)


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
