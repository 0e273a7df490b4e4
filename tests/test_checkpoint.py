"""States on disk: only whole ones are resumed, earlier runs are kept aside, flags and signature must fit."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from test_trainer_utils import shared_parser

from trainer import checkpoint
from trainer.checkpoint import Progress
from trainer.command_line import UserError


def test_skipped_updates_are_counted_and_too_many_in_a_row_end_the_run():
    progress = Progress(step=7)
    for finite in (False, False, True, False, False):
        progress.step += 1
        progress.count_skip(torch.tensor(finite), 2)
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (3, 1)  # the last one is not read yet
    progress.read_skip()
    progress.read_skip()  # counted once
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (4, 2)
    assert not any(isinstance(value, (torch.Tensor, tuple)) for value in vars(progress).values())  # goes into JSON
    progress.step += 1
    progress.count_skip(torch.tensor(False), 2)
    with pytest.raises(UserError, match=r"NaN or infinite in 3 updates in a row, up to update 13\..*--learning_rate"):
        progress.read_skip()


def state(step: int) -> dict:
    return {"model": {"w": torch.arange(4000.0) + step}, "step": step}


def test_only_the_newest_states_are_kept(tmp_path):
    for step in (2, 4, 6, 10):
        checkpoint.save_state(tmp_path, state(step), {"progress": step}, step)
    names = [f"step_{step:08d}{kind}" for step in (6, 10) for kind in (".json", ".pt")]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    path, facts = checkpoint.newest_state(tmp_path)
    assert path.name == "step_00000010.pt" and facts["progress"] == 10
    assert torch.equal(torch.load(path, weights_only=True)["model"]["w"], state(10)["model"]["w"])


def flip_a_bit(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda pt, about: pt.write_bytes(pt.read_bytes()[:-100]),
        lambda pt, about: pt.write_bytes(b""),
        lambda pt, about: flip_a_bit(pt),
        lambda pt, about: about.unlink(),
        lambda pt, about: about.write_bytes(b""),
        lambda pt, about: about.write_bytes(about.read_bytes()[:-30]),
        lambda pt, about: about.write_text("{}"),
        lambda pt, about: about.write_text("null"),
    ],
    ids=["truncated", "empty", "bit flip", "no json", "empty json", "torn json", "json without sum", "other json"],
)
def test_a_damaged_newest_state_is_named_and_passed_over(damage, tmp_path, capsys):
    assert checkpoint.newest_state(tmp_path) is None
    checkpoint.save_state(tmp_path, state(2), {"progress": 2}, 2)
    checkpoint.save_state(tmp_path, state(4), {"progress": 4}, 4)
    damage(tmp_path / "step_00000004.pt", tmp_path / "step_00000004.json")
    path, facts = checkpoint.newest_state(tmp_path)
    assert path.name == "step_00000002.pt" and facts["progress"] == 2
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "warning" in warning and "step_00000004.pt" in warning
    flip_a_bit(tmp_path / "step_00000002.pt")
    assert checkpoint.newest_state(tmp_path) is None


def make_run(out_dir, name: str, age: float) -> None:
    folder = out_dir / "runs" / name
    checkpoint.save_state(folder, state(1), {}, 1)
    os.utime(folder / "step_00000001.pt", (1e9 - age, 1e9 - age))


def test_the_run_written_last_is_found(tmp_path):
    with pytest.raises(UserError, match="no saved state of pretrain.*start without --resume"):
        checkpoint.find_run(tmp_path, "pretrain")
    for name, age in [
        ("pretrain_512", 30), ("pretrain_64", 20), ("pretrain_64_moe", 40), ("full_sft_64", 0),
        ("pretrain_64.previous", 0), ("pretrain_64_old", 0), ("pretrain_x", 0),
    ]:  # fmt: skip
        make_run(tmp_path, name, age)
    (tmp_path / "runs" / "pretrain_128").mkdir()  # begun, nothing saved
    found = [
        checkpoint.find_run(tmp_path, "pretrain", *size).name for size in [(), (512,), (64,), (None, True), (64, False)]
    ]
    assert found == ["pretrain_64", "pretrain_512", "pretrain_64", "pretrain_64_moe", "pretrain_64"]
    assert checkpoint.find_run(str(tmp_path), "full_sft").name == "full_sft_64"
    for size in [(128,), (512, True)]:
        with pytest.raises(UserError, match="no saved state of pretrain"):
            checkpoint.find_run(tmp_path, "pretrain", *size)


def test_signature_names_what_differs():
    saved = {"seed": 1, "epochs": 2, "data": "abc"}
    checkpoint.check_signature(saved, dict(saved))
    with pytest.raises(UserError, match="epochs was 2, now it is 3") as error:
        checkpoint.check_signature(saved, {**saved, "epochs": 3})
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="extra was None, now it is 5"):
        checkpoint.check_signature(saved, {**saved, "extra": 5})


def test_an_earlier_run_is_kept_aside(tmp_path, capsys):
    folder, previous = tmp_path / "runs" / "pretrain_64", tmp_path / "runs" / "pretrain_64.previous"
    weights = tmp_path / "pretrain_64.pth"
    checkpoint.start_folder(folder, weights)
    assert folder.is_dir() and not previous.exists()
    checkpoint.start_folder(folder, weights)
    assert not previous.exists() and capsys.readouterr().out == ""  # an empty folder is no earlier run
    for step in (1, 2):
        checkpoint.save_state(folder, state(step), {"progress": {"step": step, "finished": True}}, step)
        weights.write_bytes(bytes([step]))
        checkpoint.start_folder(folder, weights)
        # Stopped before it saved anything, twice: what is kept stays the run that was worth it.
        for _ in range(2):
            (folder / "metrics.jsonl").write_text("{}")
            checkpoint.start_folder(folder, weights)
        assert weights.read_bytes() == (previous / "pretrain_64.pth").read_bytes() == bytes([step])
        assert list(folder.iterdir()) == []
        assert "an earlier run was here" in capsys.readouterr().out
        path, facts = checkpoint.newest_state(previous)
        assert (path.name, facts["progress"]["step"]) == (f"step_{step:08d}.pt", step)  # only the last one is kept


def test_false_starts_do_not_push_out_a_longer_run(tmp_path, capsys):
    """Ctrl-C saves, so a run stopped after two updates has a state; it is not worth the one of 300 kept aside."""
    folder, weights = tmp_path / "runs" / "pretrain_64", tmp_path / "pretrain_64.pth"
    for step, finished in ((300, True), (2, False), (1, False)):
        checkpoint.start_folder(folder, weights)
        checkpoint.save_state(folder, state(step), {"progress": {"step": step, "finished": finished}}, step)
        weights.write_bytes(b"good" if finished else b"bad")
    checkpoint.start_folder(folder, weights)
    previous = folder.with_name("pretrain_64.previous")
    assert checkpoint.newest_state(previous)[1]["progress"]["step"] == 300
    assert (previous / "pretrain_64.pth").read_bytes() == b"good" and list(folder.iterdir()) == []
    assert "the unfinished run of 1 updates is dropped; one of 300 is kept in" in capsys.readouterr().out
    # A longer one takes its place, and so does a finished one.
    checkpoint.save_state(folder, state(400), {"progress": {"step": 400, "finished": False}}, 400)
    checkpoint.start_folder(folder, weights)
    assert checkpoint.newest_state(previous)[1]["progress"]["step"] == 400
    with pytest.raises(UserError, match=r"an earlier run is kept in .*pretrain_64\.previous: rename it"):
        checkpoint.find_run(tmp_path, "pretrain")


def test_resumed_flags_are_those_of_the_run_unless_given_again(tmp_path):
    def parse(*words: str) -> argparse.Namespace:
        return checkpoint.parse_flags(shared_parser(), "pretrain", ["--out_dir", str(tmp_path), *words])

    first = parse("--hidden_size", "64", "--batch_size", "7", "--use_moe", "--device", "cpu", "--data_path", "a.jsonl")
    assert first.given["batch_size"] == 7
    facts = {"args": first.given, "config": {"hidden_size": 64}}
    checkpoint.save_state(tmp_path / "runs" / "pretrain_64_moe", state(1), facts, 1)
    again = parse("--resume", "--batch_size", "9")
    assert (again.hidden_size, again.use_moe, again.data_path) == (64, True, str(Path("a.jsonl").resolve()))
    assert again.batch_size == 9 and again.device is None and again.resume is True
    assert again.out_dir == str(tmp_path) and again.saved_config == {"hidden_size": 64}
