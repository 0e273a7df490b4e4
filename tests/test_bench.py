"""The measuring scripts measure what they say: figures that agree with each other and with a count made here."""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dataset.lm_dataset import IGNORE, PretrainDataset
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_tokenizer
from scripts import (
    bench_data,
    bench_engines,
    bench_generate,
    bench_gpu,
    bench_recipe,
    bench_train,
    plot_recipes,
    plot_scaling,
)
from trainer import train_full_sft, train_pretrain
from trainer.command_line import UserError

SMALL = ["--compile", "0", "--dtypes", "float32", "--seq_lens", "16", "--updates", "3", "--warmup", "1"]


def run(script, monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["bench", *map(str, arguments)])
    script.main()


def test_training_speed_as_table_and_json(monkeypatch, capsys, tmp_path):
    target = tmp_path / "new" / "train.json"
    flags = ["--sizes", "64x1", "64x1moe", "--batch_sizes", "2", "--device", "cpu", "--json", target]
    run(bench_train, monkeypatch, *SMALL, *flags)
    report = json.loads(target.read_text(encoding="utf-8"))
    dense, moe = report["rows"]
    assert report["machine"]["torch"] and report["machine"]["threads"] >= 1
    for row, use_moe in ((dense, False), (moe, True)):
        model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=1, use_moe=use_moe))
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        assert row["tokens_per_second"] * row["seconds_per_update"] == pytest.approx(2 * 16)
        assert row["mfu"] is None  # no peak is known for a CPU
        assert row["dtype"] == "float32" and row["compile"] is False
    assert dense["memory_gib"] > 0.1
    printed = capsys.readouterr().out
    assert printed.count("| 64x1 | 0.") == 2 and "| 64x1moe |" in printed  # once while it runs, once in the table
    assert f"{dense['tokens_per_second']:,.0f}" in printed


def test_a_setting_that_fails_is_named_and_the_others_still_run(monkeypatch, capsys, tmp_path):
    run(bench_train, monkeypatch, *SMALL, "--sizes", "63x1", "64x1", "--batch_sizes", "1", "--device", "cpu")
    captured = capsys.readouterr()
    assert "63x1 float32 batch 1 × 16: failed" in captured.err
    assert "| 64x1 |" in captured.out
    with pytest.raises(UserError, match="no setting could be measured"):
        run(bench_train, monkeypatch, *SMALL, "--sizes", "63x1", "--batch_sizes", "1", "--device", "cpu")


def test_data_path_figures_agree_with_a_count(monkeypatch, tmp_path):
    source, target = tmp_path / "text.jsonl", tmp_path / "data.json"
    lines = [json.dumps({"text": f"Document {n}: " + "one two three " * (n % 7)}) for n in range(300)]
    source.write_text("\n".join(lines), encoding="utf-8")
    run(bench_data, monkeypatch, source, "--stage", "pretrain", "--max_seq_len", "64", "--json", target)
    (row,) = json.loads(target.read_text(encoding="utf-8"))["rows"]
    data = PretrainDataset(source, load_tokenizer(), 64, cache_dir=tmp_path / "cache", show_progress=False)
    real = sum(int((data[i]["documents"] >= 0).sum()) for i in range(len(data)))
    assert (row["rows"], row["real_tokens"]) == (len(data), real)
    assert row["fill"] == pytest.approx(real / (64 * len(data)))
    assert row["megabytes"] == pytest.approx(source.stat().st_size / 1e6)
    assert row["tokenise_mb_per_second"] > 0 and row["read_tokens_per_second"] > 0
    assert len(data) > bench_data.BATCH_SIZE
    assert row["null_model_tokens_per_second_0_workers"] > 0 and row["null_model_tokens_per_second_2_workers"] > 0


def test_the_null_model_gets_every_row_of_an_epoch(monkeypatch, tmp_path):
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"Document {n}: " + "one two three " * (n % 7)}) for n in range(200)]
    path.write_text("\n".join(lines), encoding="utf-8")
    data = PretrainDataset(path, load_tokenizer(), 32, cache_dir=tmp_path / "cache", show_progress=False)
    seen, clock = [], itertools.count(10.0, 2.0)
    read = PretrainDataset.__getitem__
    monkeypatch.setattr(PretrainDataset, "__getitem__", lambda self, row: seen.append(row) or read(self, row))
    monkeypatch.setattr(bench_data, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    rate = bench_data.null_model_rate(data, 0, batch_size=4)
    assert sorted(row for row in seen if row >= 0) == list(range(len(data)))
    assert rate == pytest.approx((len(data) - 4) * data.stats["tokens"] / len(data) / 2)  # two seconds on that clock
    assert bench_data.null_model_rate(data, 0, batch_size=len(data)) is None


def test_repeated_file_has_the_size_asked_for_and_whole_lines(tmp_path):
    source = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"document {n}"}) for n in range(1000)]
    source.write_text("\n".join(lines), encoding="utf-8")  # no line end behind the last line
    big = bench_data.repeat(source, 1, tmp_path / "big.jsonl")
    assert 1e6 <= big.stat().st_size < 1e6 + 100
    written = big.read_text(encoding="utf-8").splitlines()
    assert written == (lines * (len(written) // 1000 + 1))[: len(written)]


def test_an_empty_file_is_one_clear_line(monkeypatch, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"empty\.jsonl: no such file, or an empty one"):
        run(bench_data, monkeypatch, tmp_path / "empty.jsonl", "--stage", "pretrain")


def text_file(folder):
    path = folder / "text.jsonl"
    lines = [json.dumps({"text": f"Document {n}: " + f"one two three {n % 5} " * 5}) for n in range(400)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


RECIPE = ["--hidden_size", "32", "--num_hidden_layers", "1", "--device", "cpu", "--max_seq_len", "64", "--checks", "2"]


def test_recipes_run_one_by_one_into_table_and_json(monkeypatch, capsys, tmp_path):
    target = tmp_path / "recipe.json"
    flags = ["--recipes", "reference", "ours", "--seconds", "0.01", "--cache_dir", tmp_path / "cache", "--json", target]
    run(bench_recipe, monkeypatch, text_file(tmp_path), *RECIPE, *flags)
    results = json.loads(target.read_text(encoding="utf-8"))["results"]
    assert [r["recipe"] for r in results] == ["reference", "ours"]
    for result in results:
        (point,) = result["curve"]  # one update takes longer than the time given
        assert result["updates"] == 1
        assert result["tokens_per_second"] * point["seconds"] == pytest.approx(result["tokens"])
    printed = capsys.readouterr().out
    assert printed.count("| ours | 0.01 |") == 2  # once as it ends, once in the table


def test_a_recipe_learns_to_its_schedule(monkeypatch, tmp_path):
    """The clock moves a second per update: ten updates, checked after five and ten, from the peak down to a tenth."""
    ticks, rates = itertools.count(), []
    monkeypatch.setattr(bench_recipe, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    make = bench_recipe.make_optimizer

    def watched(*given):
        optimizer = make(*given)
        step = optimizer.step
        monkeypatch.setattr(optimizer, "step", lambda: (rates.append(optimizer.param_groups[0]["lr"]), step()))
        return optimizer

    monkeypatch.setattr(bench_recipe, "make_optimizer", watched)
    recipe = dataclasses.replace(bench_recipe.REFERENCE, batch_size=4, max_seq_len=64, learning_rate=0.01)
    args = SimpleNamespace(
        device="cpu", tokenizer=None, cache_dir=tmp_path / "cache", stage="pretrain", file=text_file(tmp_path),
        max_seq_len=64, from_weight=None, hidden_size=32, num_hidden_layers=1, compile=0, checks=2, val_rows=8,
    )  # fmt: skip
    for packed in (False, True):
        rates.clear()
        result = bench_recipe.train(dataclasses.replace(recipe, packed=packed), args, 10.0, 0)
        assert result["updates"] == 10 and [point["updates"] for point in result["curve"]] == [5, 10]
        assert rates[0] == 0.01 and rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0.001, rel=0.3)
        first, last = (point["val_loss"] for point in result["curve"])
        assert last < first - 0.2


@pytest.mark.parametrize("stage, trainer", [("pretrain", train_pretrain), ("full_sft", train_full_sft)])
def test_our_recipe_takes_the_learning_rate_of_the_trainer(monkeypatch, stage, trainer):
    """Read off the trainer's own parser, which stops there."""

    class Stop(Exception):
        pass

    def flags(parser, **defaults):
        raise Stop(defaults)

    monkeypatch.setattr(trainer.utils, "add_shared_flags", flags)
    with pytest.raises(Stop) as stopped:
        trainer.main()
    ours = bench_recipe.for_stage(bench_recipe.OURS, stage)
    assert ours.learning_rate == stopped.value.args[0]["learning_rate"]
    assert bench_recipe.for_stage(bench_recipe.REFERENCE, stage).batch_size == {"pretrain": 32, "full_sft": 16}[stage]


def test_padded_rows_hold_each_training_record_once(tmp_path):
    source = tmp_path / "text.jsonl"
    words = [f"number {n} " * (1 + n % 40) for n in range(100)]  # the longer ones do not fit
    source.write_text("\n".join(json.dumps({"text": text}) for text in words), encoding="utf-8")
    tokenizer = load_tokenizer()
    data = PretrainDataset(source, tokenizer, 32, cache_dir=tmp_path / "cache", show_progress=False)
    rows = bench_recipe.PaddedRows(data)
    assert len(rows) == data.stats["used"] < 100
    texts = []
    for row in map(rows.__getitem__, range(len(rows))):
        ids, labels = row["input_ids"], row["labels"]
        real = int((labels >= 0).sum()) + 1
        assert labels[0] == IGNORE and (labels[1:real] == ids[1:real]).all() and (labels[real:] == IGNORE).all()
        assert (ids[real:] == tokenizer.pad_token_id).all()
        texts.append(tokenizer.decode(ids[1:real].tolist()).removesuffix("<|im_end|>"))
    assert len(set(texts)) > 60 and all(any(full.startswith(text) for full in words) for text in texts)


def recipe_report(path, recipes: dict[str, list[tuple[float, float]]], **changes) -> Path:
    """A report as bench_recipe.py writes it, of these curves of (seconds, bits per byte)."""
    results = [
        {
            "recipe": name, "budget_seconds": curve[-1][0], "seed": 0,
            "updates": 7, "tokens": 70, "tokens_per_second": 7.0,
            "curve": [{"seconds": seconds, "val_bpb": value} for seconds, value in curve],
        }
        for name, curve in recipes.items()
    ]  # fmt: skip
    report = {"device": "cpu", "threads": 2, "stage": "pretrain", "file": "a.jsonl", "results": results}
    path.write_text(json.dumps(report | changes), encoding="utf-8")
    return path


def test_recipes_as_table_picture_and_verdict(monkeypatch, capsys, tmp_path):
    slow = {"reference": [(50.0, 4.0), (100.0, 3.0)], "accumulation 8": [(100.0, 3.5)]}
    first = recipe_report(tmp_path / "a.json", slow)
    second = recipe_report(tmp_path / "b.json", {"ours": [(10.0, 3.5), (20.0, 2.5)], "packed": [(20.0, 3.2)]})
    picture = tmp_path / "new.png"
    run(plot_recipes, monkeypatch, first, second, "--png", picture)
    printed = capsys.readouterr().out
    assert "ours (seed 0) is where the better reference ends after 15 s: 6.7 × faster" in printed
    assert printed.count("better reference ends") == 1  # packed does not get there
    assert picture.read_bytes().startswith(b"\x89PNG")

    run(plot_recipes, monkeypatch, first, second, "--recipes", "packed")
    assert "ours" not in (printed := capsys.readouterr().out) and "| packed | 20 |" in printed
    for arguments, message in (
        ([first, second, "--recipes", "muon"], "hold no run of muon"),
        ([first, recipe_report(tmp_path / "c.json", slow, file="other.jsonl")], "mix stages, data or machines"),
        ([tmp_path / "none.json"], "there is no such file"),
        ([recipe_report(tmp_path / "d.json", slow, results=[{"recipe": "x"}])], "no report of bench_recipe.py"),
    ):
        with pytest.raises(UserError, match=message):
            run(plot_recipes, monkeypatch, *arguments)


def test_seconds_to_a_figure_lie_on_the_line_between_two_points():
    curve = [{"seconds": 10.0, "x": 4.0}, {"seconds": 20.0, "x": 2.0}]
    assert [bench_recipe.seconds_to(curve, "x", target) for target in (5.0, 3.0, 2.0, 1.0)] == [10.0, 15.0, 20.0, None]


def test_a_wide_model_has_the_weights_that_a_token_meets_in_the_experts():
    wide, moe = bench_train.read_size("64x2wide"), bench_train.read_size("64x2moe")
    parameters = [sum(p.numel() for p in MiniMindForCausalLM(config).parameters()) for config in (wide, moe)]
    idle = 2 * (moe.n_routed_experts - moe.num_experts_per_tok) * 3 * 64 * moe.intermediate_size
    assert parameters[0] == parameters[1] - idle - 2 * 4 * 64  # and no routers
    with pytest.raises(UserError, match="expected HIDDENxLAYERS"):
        bench_train.read_size("64")


def test_generation_speed_as_table_and_json(monkeypatch, capsys, tmp_path):
    target = tmp_path / "generate.json"
    small = ["--sizes", "64x1", "64x1moe", "--prompt_tokens", "5", "--new_tokens", "4", "--repeats", "3"]
    flags = ["--batch_sizes", "1", "3", "--compile", "0", "--device", "cpu", "--json", target]
    run(bench_generate, monkeypatch, *small, *flags)
    report = json.loads(target.read_text(encoding="utf-8"))
    assert report["machine"]["torch"]
    assert [row["batch_size"] for row in report["rows"]] == [1] * 3 + [3] * 3 + [1] * 3 + [3] * 3
    for first in range(0, 12, 3):
        for row in report["rows"][first : first + 3]:
            middle = sorted(row["seconds"])[1]
            assert row["tokens_per_second"] == pytest.approx(row["batch_size"] * 4 / middle)
            assert row["times_generate"] == pytest.approx(sorted(report["rows"][first]["seconds"])[1] / middle)
    assert capsys.readouterr().out.count("| decoder |") == 8  # once while it runs, once in the table


def test_what_generation_cannot_measure_is_one_clear_line(monkeypatch, tmp_path):
    flags = ["--new_tokens", "2", "--device", "cpu"]
    with pytest.raises(UserError, match="expected HIDDENxLAYERS"):
        run(bench_generate, monkeypatch, "--sizes", "64", *flags)
    with pytest.raises(UserError, match=r"--gguf .*none\.gguf does not exist"):
        run(bench_generate, monkeypatch, "--sizes", "64x1", "--compile", "0", "--gguf", tmp_path / "none.gguf", *flags)
    with pytest.raises(UserError, match="--repeats 0 is impossible"):
        run(bench_generate, monkeypatch, "--repeats", "0")


@pytest.mark.slow
def test_all_gpu_figures_in_one_call_tried_on_tiny_models(monkeypatch, capfd, tmp_path):
    flags = ["--small", "--device", "cpu", "--out_dir", tmp_path / "out", "--only", "moe", "recipe", "generate"]
    with pytest.raises(UserError, match="not measured: recipe: needs --pretrain$"):
        run(bench_gpu, monkeypatch, *flags)
    assert "measured 2 of 3 steps" in capfd.readouterr().out
    moe = json.loads((tmp_path / "out" / "gpu_moe.json").read_text(encoding="utf-8"))
    assert [row["size"] for row in moe["rows"]] == ["64x1moe", "64x1wide"]
    assert json.loads((tmp_path / "out" / "gpu_generate.json").read_text(encoding="utf-8"))["rows"]
    with pytest.raises(UserError, match="moe: takes about 50 s, 1 s were left"):
        run(bench_gpu, monkeypatch, "--limit", "1", "--only", "moe", "--out_dir", tmp_path / "out")
    assert sum(step.seconds for step in bench_gpu.STEPS.values()) < 700  # the last ones may not fit into 520


def test_every_gpu_step_is_a_command_that_its_script_takes(monkeypatch, tmp_path):
    """With the flags as they are: each script reads them, and would start."""

    class Read(Exception):
        pass

    def stop(parser, *given):
        original(parser, *given)  # exits with status 2 at a flag or value it does not know
        raise Read

    original = argparse.ArgumentParser.parse_args
    args = SimpleNamespace(small=False, out_dir=tmp_path, device="cuda", pretrain="a.jsonl", sft="b.jsonl")
    for name in bench_gpu.STEPS:
        _, script, *words = bench_gpu.arguments_of(name, args)
        module = {"bench_train": bench_train, "bench_recipe": bench_recipe, "bench_generate": bench_generate}
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Read):
            run(module[Path(script).stem], monkeypatch, *words)


# ------------------------------------------------------------------------------------------------------------- scaling

COSTS = np.array([2e-11, 5e-11, 3e-9, 4e-8])  # seconds per unit of the four terms of the fit


def scaling_report(path: Path, mfu: float | None = None, **fields) -> list[dict]:
    """A report as bench_train.py writes it, its times made up by a known formula."""
    rows = []
    settings = [("64x1", 100_000, 8, 64), ("128x2", 600_000, 8, 64), ("256x4", 4_000_000, 8, 64)]
    settings += [("64x1", 100_000, 8, T) for T in (128, 512, 2048)] + [("64x1", 100_000, B, 64) for B in (1, 2, 32)]
    for size, parameters, batch_size, seq_len in settings:
        width, layers = map(int, size.split("x"))
        n = batch_size * seq_len
        seconds = COSTS @ [6 * parameters * n, 6 * layers * width * seq_len * n, layers * width * n, parameters]
        row = {"size": size, "dtype": "float32", "compile": False, "batch_size": batch_size, "seq_len": seq_len,
               "optimizer": "muon", "parameters": parameters, "tokens_per_second": n / seconds,
               "seconds_per_update": seconds, "mfu": mfu, "memory_gib": 1.5}  # fmt: skip
        rows.append(row | fields)
    path.write_text(json.dumps({"machine": {"device": "NVIDIA Test"}, "rows": rows}), encoding="utf-8")
    return rows


def test_scaling_finds_the_terms_that_the_figures_were_made_of(monkeypatch, capsys, tmp_path):
    rows = scaling_report(tmp_path / "a.json")
    assert plot_scaling.fit(rows) == pytest.approx(COSTS, rel=1e-6)
    picture = tmp_path / "scaling.png"
    run(plot_scaling, monkeypatch, tmp_path / "a.json", "--png", picture, "--price", "2")
    out = capsys.readouterr().out
    assert out.count("| +0% |") + out.count("| -0% |") == 9 and "products 50 GFLOP/s, attention 20 GFLOP/s" in out
    hours = 1e9 / rows[0]["tokens_per_second"] / 3600
    assert f"| {hours:,.1f} | {2 * hours:,.2f} |" in out and "no estimate" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_short_rows_on_a_cpu_have_no_fused_attention():
    """Whether or not bench_train.py was told the device."""
    row = {"size": "64x1", "parameters": 1000, "batch_size": 1, "seq_len": 1024, "machine": "cpu (x86_64)"}
    assert plot_scaling.features(row)[1] == 0
    assert plot_scaling.features(row | {"seq_len": 2048})[1] == 6 * 64 * 2048**2
    assert plot_scaling.features(row | {"machine": "NVIDIA Test"})[1] == 6 * 64 * 1024**2


def test_a_term_that_would_be_negative_is_left_out():
    same = {"size": "64x1", "parameters": 1000, "batch_size": 1}
    rows = [{**same, "seq_len": T, "seconds_per_update": 1e-3 * T**0.5} for T in (64, 128, 256, 512, 1024)]
    found = plot_scaling.fit(rows)  # slower growth than any term but the last has: not a good fit, but a possible one
    assert (found >= 0).all() and found.any()


def test_paper_estimates_follow_from_the_measured_mfu(tmp_path):
    scaling_report(tmp_path / "b.json", mfu=0.4)
    text = plot_scaling.estimates(plot_scaling.read_rows([tmp_path / "b.json"]), 2e9)
    assert text.startswith("ESTIMATE, not measured: the MFU of NVIDIA Test")
    rate = 8 * 165e12 * 0.4 / (6 * 4_000_000 + 6 * 4 * 256 * 64)  # eight cards at 40 % of 165 TFLOP/s each
    assert f"| 256 × 4 | 8 × RTX 4090 | {rate:,.0f} | {2e9 / rate / 3600:,.2f} |" in text
    assert text.count("\n| ") == 1 + 3 * 4


@pytest.mark.parametrize("content, reason", [
    (None, "no such file"), ("[]", "no report"), ("{", "no report"), ('{"rows": [{"size": "9x"}]}', "no report"),
    ('{"machine": {"device": "x"}, "rows": []}', "no dense model"),
])  # fmt: skip
def test_scaling_refuses_other_files(monkeypatch, tmp_path, content, reason):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        run(plot_scaling, monkeypatch, path)


def test_scaling_refuses_to_mix_machines_or_to_fit_too_little(monkeypatch, tmp_path):
    scaling_report(tmp_path / "a.json")
    rows = scaling_report(tmp_path / "b.json", dtype="bfloat16")
    with pytest.raises(UserError, match="mix machines or settings"):
        run(plot_scaling, monkeypatch, tmp_path / "a.json", tmp_path / "b.json")
    other = {"machine": {"device": "another card"}, "rows": scaling_report(tmp_path / "b.json")}
    (tmp_path / "b.json").write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(UserError, match="mix machines or settings"):  # the same settings, measured elsewhere
        run(plot_scaling, monkeypatch, tmp_path / "a.json", tmp_path / "b.json")
    (tmp_path / "c.json").write_text(json.dumps({"machine": {"device": "x"}, "rows": rows[:4]}), encoding="utf-8")
    with pytest.raises(UserError, match="too few"):
        run(plot_scaling, monkeypatch, tmp_path / "c.json")


# --- several processes, and saving ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_engines_and_saving_are_measured(tmp_path, monkeypatch, capsys):
    small = "--engines one_process DDP --size 32x1 --seq_len 32 --updates 2 --save_size 64x1 --device cpu".split()
    words = [word.replace("_p", " p") if word == "one_process" else word for word in small]
    run(bench_engines, monkeypatch, *words, "--json", tmp_path / "engines.json")
    report = json.loads((tmp_path / "engines.json").read_text(encoding="utf-8"))
    assert list(report["engines"]) == ["one process", "DDP"] and min(report["engines"].values()) > 0
    saving = report["saving"]
    # float32 weights, Muon's mean for matrices, AdamW's two for the rest
    assert saving["state_bytes"] > 8 * 6400 * 64 and 0 < saving["save"] < 60 and 0 < saving["resume"] < 60
    assert "| DDP |" in capsys.readouterr().out


def test_rows_have_to_be_shared_evenly(monkeypatch):
    with pytest.raises(UserError, match="cannot be shared by 2 ranks"):
        run(bench_engines, monkeypatch, "--rows", "5", "--ranks", "2")
