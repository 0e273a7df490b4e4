"""What keeps a run from harm around its edges: lock, forced resume, restart by itself, layouts, memory, other logs."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_trainers import (
    ROOT,
    curve,
    files,  # noqa: F401 (a fixture)
    final_state,
    finish,
    metrics,
    one_error,
    start,
    tiny_flags,
    train,
)

from scripts.plot_runs import find_runs, points, smoothed
from trainer import train_pretrain
from trainer import trainer_utils as utils
from trainer.command_line import UserError

# ruff: noqa: F811 (fixtures as arguments)


@pytest.fixture
def short(files, tmp_path):
    """Flags of a run of 8 updates that saves after 4."""
    return lambda **changes: tiny_flags(
        files, tmp_path, **(dict(max_steps=8, save_interval=4, val_interval=0) | changes)
    )


@pytest.mark.parametrize("use_moe", [None, True])
def test_activations_computed_again_change_nothing(use_moe, files, tmp_path):
    curves = []
    for flag in (None, True):
        out_dir = tmp_path / str(flag)
        changes = dict(max_steps=5, val_interval=0, num_hidden_layers=2, use_moe=use_moe, checkpoint_activations=flag)
        assert train(train_pretrain, tiny_flags(files, out_dir, **changes)).status == 0
        curves.append(metrics(out_dir, size="32_moe" if use_moe else "32"))
    assert curve(curves[0]) == curve(curves[1]) and len(curve(curves[0])) == 5
    assert curve(curves[0], "grad_norm") == curve(curves[1], "grad_norm")


def test_activations_computed_again_are_not_kept():
    """Bytes that autograd holds for the way back, counted by its own hook."""
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4)).train()
    ids = torch.randint(0, 6400, (2, 64))
    kept = []
    for again in (False, True):
        if again:
            utils.checkpoint_activations(model)
        held: dict[int, int] = {}

        def note(tensor, held=held):
            if not isinstance(tensor, torch.nn.Parameter):
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(ids, need_logits=False).hidden_states.sum().backward()
        kept.append(sum(held.values()))
    assert kept[1] < kept[0] / 3, kept


@pytest.mark.skipif(os.name == "nt", reason="another kind of lock")
def test_a_second_run_in_a_folder_is_refused(short, tmp_path):
    assert train(train_pretrain, short()).status == 0
    before = final_state(tmp_path)[0]["model"]["model.norm.weight"]
    lock = tmp_path / "runs" / "pretrain_32.lock"
    hold = f"import filelock, time\nlock = filelock.FileLock({str(lock)!r})\nlock.acquire()\nprint('held', flush=True)"
    hold += "\ntime.sleep(100)"
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, encoding="utf-8")
    try:
        assert other.stdout.readline() == "held\n"
        for more in ([], ["--resume"]):
            assert "another run is writing to" in one_error(train(train_pretrain, [*short(), *more]))
    finally:
        other.kill()
        other.communicate()
    assert torch.equal(final_state(tmp_path)[0]["model"]["model.norm.weight"], before)
    assert train(train_pretrain, short()).status == 0  # the lock went with its process


def test_a_changed_setting_is_refused_unless_forced(short, tmp_path):
    assert train(train_pretrain, short(max_steps=4)).status == 0
    again = ["--resume", "--out_dir", str(tmp_path), "--max_steps", "8"]
    assert "total_steps was 4, now it is 8" in one_error(train(train_pretrain, again))
    result = train(train_pretrain, [*again, "--force"])
    assert result.status == 0 and "warning: total_steps was 4, now it is 8; --force goes on" in result.err
    assert "force" not in final_state(tmp_path)[1]["signature"]


@pytest.mark.parametrize("same_launch", [True, False])
def test_what_torchrun_starts_again_goes_on_by_itself(same_launch, short, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert train(train_pretrain, short()).status == 0
    folder = tmp_path / "runs" / "pretrain_32"  # as if it had been cut off after the first save
    for suffix in (".pt", ".json"):
        (folder / f"step_00000008{suffix}").unlink()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one" if same_launch else "two")
    result = train(train_pretrain, short())
    assert result.status == 0
    assert ("resumed at update 4" in result.out) == same_launch
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")  # a finished run is not gone on with
    assert "resumed" not in train(train_pretrain, short()).out or not same_launch


@pytest.mark.parametrize(
    "saved, world, batch, expected", [(32, 1, 8, (8, 4)), (32, 4, 8, (8, 1)), (12, 2, 4, (3, 2)), (6, 1, 4, (3, 2))]
)
def test_rows_of_an_update_are_spread_over_other_ranks(saved, world, batch, expected, capsys):
    args = SimpleNamespace(saved_rows=saved, batch_size=batch, accumulation_steps=1)
    utils.fit_layout(args, SimpleNamespace(world_size=world, is_main=True))
    assert (args.batch_size, args.accumulation_steps) == expected
    assert f"holds {saved} rows" in capsys.readouterr().out


def test_ranks_that_cannot_share_an_update_are_refused():
    args = SimpleNamespace(saved_rows=8, batch_size=4, accumulation_steps=1)
    with pytest.raises(UserError, match="8 rows, which 3 ranks cannot share"):
        utils.fit_layout(args, SimpleNamespace(world_size=3, is_main=True))


@pytest.mark.parametrize("rows, world", [(7, 2), (8, 2), (1, 4), (5, 1)])
def test_every_rank_reads_as_many_held_out_rows(rows, world):
    parts = [utils.rows_of_rank(rows, SimpleNamespace(rank=rank, world_size=world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(row for part in parts for row in part if row >= 0) == list(range(rows))


def test_tensorboard_holds_what_the_log_holds(short, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(train_pretrain, short(use_tensorboard=True)).status == 0
    events = EventAccumulator(str(tmp_path / "runs" / "pretrain_32"))
    events.Reload()
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    assert told == [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in metrics(tmp_path) if "loss" in r]
    assert len(told) == 8


# ------------------------------------------------------------------------------------------------------------- pictures


def test_points_of_a_curve():
    records = [
        {"step": 1, "loss": 4.0, "tokens": 100, "time": 1000.0},
        {"step": 2, "loss": None, "tokens": 200, "time": 4600.0},
        {"step": 2, "val_loss": 3.5},
        {"step": 3, "loss": 2.0, "tokens": 300, "time": 8200.0},
    ]
    assert points(records, "loss", "step") == [(1, 4.0), (3, 2.0)]
    assert points(records, "loss", "tokens") == [(100, 4.0), (300, 2.0)]
    assert points(records, "val_loss", "tokens") == [(200, 3.5)]
    assert points(records, "val_loss", "hours") == [(1.0, 3.5)]


def test_smoothing_by_hand():
    assert smoothed([1.0, 3.0, 3.0], 0.0) == [1.0, 3.0, 3.0]
    # weights ½ and ¼ of 3 and 1, over their sum ¾; then ½, ¼, ⅛ over ⅞
    assert smoothed([1.0, 3.0, 3.0], 0.5) == pytest.approx([1.0, 7 / 3, 19 / 7])


def test_runs_get_names_that_tell_them_apart(tmp_path):
    for place in ("a", "b"):
        folder = tmp_path / place / "runs" / "pretrain_32"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "loss": 1.0, "time": 0.0}) + "\n", encoding="utf-8"
        )
    runs = find_runs([tmp_path / place / "runs" / "pretrain_32" for place in ("a", "b")], tmp_path)
    assert list(runs) == [os.path.join(place, "runs", "pretrain_32") for place in ("a", "b")]
    assert list(find_runs([], tmp_path / "a")) == ["pretrain_32"]
    with pytest.raises(UserError, match="no run below"):
        find_runs([], tmp_path / "c")

    picture = tmp_path / "two.png"
    script = [ROOT / "scripts" / "plot_runs.py", "--png", picture]
    both = [tmp_path / place / "runs" / "pretrain_32" for place in ("a", "b")]
    result = finish(start([*script, *both, "--figures", "loss"]))
    assert result.status == 0 and "2 curves of 2 runs" in result.out, result.err
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "none of these runs has kl" in one_error(finish(start([*script, *both, "--figures", "kl"])))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no kill -9")
def test_the_fault_script_finds_nothing_lost():
    faults = ["kill", "truncated", "two_runs"]
    result = finish(start([ROOT / "scripts" / "fault_tests.py", "--kills", "2", "--only", *faults]), limit=540)
    assert result.status == 0, result.out + result.err
    assert result.out.count("| yes |") == len(faults)
    assert "2 kills, 1 of them while writing; weights at the end of 1 runs equal" in result.out
