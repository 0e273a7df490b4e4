"""The measuring scripts measure what they say: figures that agree with each other and with a count made here."""

import json

import pytest

from dataset.lm_dataset import PretrainDataset
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_tokenizer
from scripts import bench_data, bench_train
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
