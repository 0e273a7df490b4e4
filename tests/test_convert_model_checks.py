"""Conversions that must not pass: bad exports are refused, places are whole or untouched; model card, command line."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from test_convert_model import (  # noqa: F401 (fixtures)
    LLAMA,
    SMALL,
    V,
    convert,
    ids,
    left_over,
    saved,
    small_tokenizer,
    text_file,
    tiny,
)
from test_trainers import one_error, train
from transformers import AutoConfig

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import WeightsError, load_model, load_tokenizer, save_weights
from scripts import convert_model
from scripts.converting import checks, folders, gguf_export, verify
from scripts.converting.model_card import model_card, parameters
from scripts.converting.verify import BadExport
from trainer.command_line import UserError

# ruff: noqa: F811 (fixtures as arguments)


def saved_small(path: Path, tokenizer, **fields) -> MiniMindForCausalLM:
    return saved(path, {"tokenizer": tokenizer.name_or_path}, vocab_size=SMALL, **fields)


# A bad export is not called good


def test_one_changed_tensor_is_seen_wherever_it_is():
    model = tiny(use_moe=True)
    rows = verify.token_rows(load_tokenizer(), verify.TEXTS[:1], 64, ())
    expected = verify.logits_of(model, rows)
    verify.check("x", expected, verify.logits_of(model, rows))
    changed = 0
    for name, p in model.named_parameters():
        before = p.detach().clone()
        with torch.no_grad():
            p[..., 0] *= 1.01  # one channel by one per cent
            changed += 1
            with pytest.raises(BadExport, match="not the same model"):
                verify.check(name, expected, verify.logits_of(model, rows))
            p.copy_(before)
    assert changed == len(list(model.named_parameters())) > 30


def test_judgement_by_hand(capsys):
    original = [torch.tensor([[1.0, 4.0], [0.0, -2.0]])]
    d = verify.difference(original, [torch.tensor([[1.0, 4.5], [3.0, -2.0]])])
    assert (d.largest, d.row, d.token, d.scale, d.tokens) == (3.0, 0, 1, 4.0, 2)
    assert d.agreement == 1.0 and d.of_tokens.tolist() == [0.5, 3.0]
    assert d.spread == pytest.approx(torch.tensor([1.0, 4, 0, -2]).std().item())
    assert verify.difference(original, [torch.full((2, 2), math.nan)]).largest == math.inf
    with pytest.raises(BadExport, match="text 1, token 1"):
        verify.check("nan", original, [torch.tensor([[math.nan, 4.0], [0.0, -2.0]])])
    verify.check("just", original, [original[0] + 3.9e-5])  # 1e-5 of the largest logit, 4
    with pytest.raises(BadExport):
        verify.check("too much", original, [original[0] + 4.2e-5])
    one_off = [torch.tensor([[1.0, 4.0], [1.0, -2.0]])]
    verify.check("a router", original, one_off, beyond=0.5)
    with pytest.raises(BadExport):
        verify.check("a router", original, one_off, beyond=0.49)
    verify.check("noisy", original, one_off, noise=lambda: 1.1)
    with pytest.raises(BadExport, match="where 9.0e-01 is allowed"):
        verify.check("not so noisy", original, one_off, noise=lambda: 0.9)
    verify.check("good at once", original, original, noise=lambda: pytest.fail("asked in vain"))
    assert capsys.readouterr().out.count("NOT GOOD") == 4


def test_noise_of_float32_is_small_and_no_excuse():
    """Deep and large weights amplify the last bits; a changed channel still stands out by far."""
    model = tiny(num_hidden_layers=8)
    rows = [ids(1, 60)[0].tolist()]
    expected = verify.logits_of(model, rows)
    noise = verify.float32_noise(model, rows, expected)
    assert 0 < noise < 1e-3 and model.dtype == torch.float32
    with torch.no_grad():
        model.model.layers[7].mlp.up_proj.weight[0] *= 1.5
    assert verify.difference(expected, verify.logits_of(model, rows)).largest > 20 * checks.NOISE * noise


def corrupt_safetensors(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state["model.layers.1.self_attn.k_proj.weight"][3] *= 1.5
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def swap_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    backend = json.loads(file.read_text(encoding="utf-8"))
    vocab = backend["model"]["vocab"]
    vocab["3"], vocab["4"] = vocab["4"], vocab["3"]
    file.write_text(json.dumps(backend), encoding="utf-8")


def drop_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(corrupt_safetensors, "not the same model"), (swap_tokens, "other tokens"), (drop_tensor, "lacks")],
    ids=["tensor", "tokenizer", "gap"],
)
def test_a_bad_folder_is_refused_and_the_old_one_stays(damage, reason, tmp_path, convert, monkeypatch):
    saved(tmp_path / "m.pth")
    convert("to-stock", "--model", tmp_path / "m.pth", "--to", tmp_path / "llama")
    before = {p.name: p.read_bytes() for p in (tmp_path / "llama").iterdir()}
    write = convert_model.write_folder

    def write_badly(folder, *rest, **options):
        write(folder, *rest, **options)
        damage(folder)

    monkeypatch.setattr(convert_model, "write_folder", write_badly)
    with pytest.raises(BadExport, match=f"{reason}.*Nothing was written"):
        convert("to-stock", "--model", tmp_path / "m.pth", "--to", tmp_path / "llama", "--overwrite")
    assert {p.name: p.read_bytes() for p in (tmp_path / "llama").iterdir()} == before
    with pytest.raises(BadExport, match=reason):
        convert("to-stock", "--model", tmp_path / "m.pth", "--to", tmp_path / "second")
    assert not (tmp_path / "second").exists() and not left_over(tmp_path)


def test_a_bad_weight_file_and_a_bad_gguf_are_refused(tmp_path, convert, monkeypatch, small_tokenizer):
    saved_small(tmp_path / "m.pth", small_tokenizer)
    save, write = convert_model.save_weights, gguf_export.write_gguf

    def save_badly(model, path, about):
        model = load_model(tmp_path / "m.pth")
        model.model.layers[0].mlp.up_proj.weight.data[0] += 0.5
        save(model, path, about)

    def write_badly(path, config, state, *rest):
        rotated = state["model.layers.0.self_attn.q_proj.weight"].roll(1, 0)
        write(path, config, {**state, "model.layers.0.self_attn.q_proj.weight": rotated}, *rest)

    monkeypatch.setattr(convert_model, "save_weights", save_badly)
    monkeypatch.setattr(gguf_export, "write_gguf", write_badly)
    for command, name in (("to-pth", "new.pth"), ("to-gguf", "new")):
        with pytest.raises(BadExport, match="read back, float32 differs"):
            convert(command, "--model", tmp_path / "m.pth", "--to", tmp_path / name)
        assert not (tmp_path / name).exists() and not left_over(tmp_path)


def test_a_remote_code_folder_that_does_not_load_is_refused(tmp_path, convert, monkeypatch):
    saved(tmp_path / "m.pth")
    monkeypatch.setattr(verify, "CLEAN_CODE", "raise SystemError('broken on purpose')")
    with pytest.raises(BadExport, match="does not load .*broken on purpose"):
        convert("to-transformers", "--model", tmp_path / "m.pth", "--to", tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_verify_judges_what_is_there(tmp_path, convert, capsys, small_tokenizer):
    saved_small(tmp_path / "m.pth", small_tokenizer)
    convert("to-stock", "--model", tmp_path / "m.pth", "--to", tmp_path / "llama", "--dtype", "bfloat16")
    convert("to-gguf", "--model", tmp_path / "m.pth", "--to", tmp_path / "gguf", "--dtype", "q8_0")
    capsys.readouterr()
    for export in ("llama", "gguf", "m.pth"):
        convert("verify", "--model", tmp_path / "m.pth", "--export", tmp_path / export)
    out = capsys.readouterr().out
    assert out.count(": good") == 3 and "rounding to bfloat16 moves" in out and "rounding to q8_0 moves" in out
    corrupt_safetensors(tmp_path / "llama")
    with pytest.raises(BadExport, match="not the same model"):
        convert("verify", "--model", tmp_path / "m.pth", "--export", tmp_path / "llama")
    saved_small(tmp_path / "other.pth", small_tokenizer, seed=1)
    with pytest.raises(BadExport, match="not the same model"):
        convert("verify", "--model", tmp_path / "other.pth", "--export", tmp_path / "gguf" / "m-q8_0.gguf")
    with pytest.raises(UserError, match="does not exist"):
        convert("verify", "--model", tmp_path / "m.pth", "--export", tmp_path / "nowhere")
    (tmp_path / "half.gguf").write_bytes((tmp_path / "gguf" / "m-q8_0.gguf").read_bytes()[:5000])
    (tmp_path / "text.gguf").write_text("no GGUF", encoding="utf-8")
    for name in ("half.gguf", "text.gguf"):
        with pytest.raises(UserError, match="cut off, damaged or no GGUF"):
            convert("verify", "--model", tmp_path / "m.pth", "--export", tmp_path / name)


def test_verify_judges_the_tokenizer_too(tmp_path, convert, capsys, small_tokenizer):
    """The same weights with another tokenizer are another model, whatever the form; nothing is said to be written."""
    model = saved_small(tmp_path / "m.pth", small_tokenizer)
    base = ("--model", tmp_path / "m.pth")
    convert("to-stock", *base, "--to", tmp_path / "llama")
    convert("to-gguf", *base, "--to", tmp_path / "gguf", "--dtype", "f32")
    (tmp_path / "own").mkdir()
    fields = {**model.config.to_diff_dict(), "model_type": "minimind"}
    state = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    source = folders.open_source(tmp_path / "m.pth")
    folders.write_folder(tmp_path / "own", fields, state, torch.float16, source, remote_code=True)
    broken = "raise SystemError('nothing of it is run')\n"
    (tmp_path / "own" / "model_minimind.py").write_text(broken, encoding="utf-8")
    convert("verify", *base, "--export", tmp_path / "own")
    assert "tokenizer and chat template: the same tokens" in capsys.readouterr().out
    shutil.copytree(small_tokenizer.name_or_path, tmp_path / "swapped")
    swap_tokens(tmp_path / "swapped")
    swap_tokens(tmp_path / "llama")
    swap_tokens(tmp_path / "own")
    for export, more, reason in (
        ("llama", (), "reads .* as other tokens"),
        ("own", (), "reads .* as other tokens"),
        ("gguf", ("--tokenizer", tmp_path / "swapped"), "another tokenizer than the model's: ggml.tokens differ"),
    ):
        with pytest.raises(BadExport, match=reason) as caught:
            convert("verify", *base, "--export", tmp_path / export, *more)
        assert "Nothing was written" not in str(caught.value)


# Where it is written


def test_new_place_is_whole_or_not_there(tmp_path):
    target = tmp_path / "a" / "new"
    with folders.new_place(target, False) as folder:
        (folder / "config.json").write_text("1")
        assert not target.exists()
    assert (target / "config.json").read_text() == "1"
    with pytest.raises(UserError, match="exists already.*--overwrite"):
        with folders.new_place(target, False):
            pass
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error):
            with folders.new_place(target, True) as folder:
                (folder / "config.json").write_text("2")
                raise error
    assert (target / "config.json").read_text() == "1" and not left_over(tmp_path)
    with folders.new_place(target, True) as folder:
        (folder / "other.gguf").write_text("3")
    assert [p.name for p in target.iterdir()] == ["other.gguf"] and not left_over(tmp_path)
    (tmp_path / "empty").mkdir()
    with folders.new_place(tmp_path / "empty", False) as folder:
        (folder / "x").write_text("4")
    assert (tmp_path / "empty" / "x").read_text() == "4"


def test_only_conversions_are_replaced_and_never_a_source(tmp_path):
    home = tmp_path / "home"
    (home / "model").mkdir(parents=True)
    (home / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="no conversion wrote letter.txt"):
        with folders.new_place(home, True):
            pass
    (home / "config.json").write_text("{}")
    for source in (home, home / "model"):
        with pytest.raises(UserError, match="is or holds the source"):
            with folders.new_place(home, True, (source,)):
                pass
    for there in ("letter.txt", "model"):  # a config.json alone makes no export of it
        with pytest.raises(UserError, match=f"no conversion wrote {there}"):
            with folders.new_place(home, True):
                pass
        (home / there).rename(tmp_path / there)
    with folders.new_place(home / "x" / "..", True) as folder:
        (folder / "config.json").write_text("new")
    assert (home / "config.json").read_text() == "new" and not left_over(tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "dear"
    file = tmp_path / "x.pth"
    file.write_text("old")
    with pytest.raises(UserError, match="exists already"):
        with folders.new_place(file, False):
            pass
    with folders.new_place(file, True) as folder:
        (folder / "x.pth").write_text("new")
        (folder / "x.json").write_text("{}")
    assert file.read_text() == "new" and (tmp_path / "x.json").is_file() and not left_over(tmp_path)


# Model card, command line


@pytest.mark.parametrize(
    "fields", [{}, {"tie_word_embeddings": False}, {"use_moe": True}, {"use_moe": True, "n_shared_experts": 0}]
)
def test_parameters_on_the_card_are_the_parameters(fields):
    model = tiny(**fields)
    assert parameters(model.config) == sum(p.numel() for p in model.parameters())
    assert parameters(MiniMindConfig()) == 25_829_888


def test_stage_of_a_stranger_cannot_write_into_the_card(tmp_path, convert):
    saved(tmp_path / "m.pth", {"stage": "<script>alert(1)</script>\n# x"})
    convert("to-stock", "--model", tmp_path / "m.pth", "--to", tmp_path / "s")
    assert "script" not in (tmp_path / "s" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("stage", ["pretrain", "full_sft"])
def test_the_card_of_a_pretrained_model_promises_no_chat(stage, tmp_path):
    save_weights(tiny(vocab_size=V), tmp_path / "m.pth", {"stage": stage})
    source, chats = folders.open_source(tmp_path / "m.pth"), stage == "full_sft"
    for form in ("m-f16.gguf", LLAMA, "minimind"):
        card = model_card(source, form, "float16", [])
        assert ("ChatML" in card) is chats and ("<|im_start|>Once upon" in card) is not chats
        assert ("-cnv" in card or "apply_chat_template" in card) is chats and "<BOS>" not in card


def test_newest_weights_and_stages_are_found(tmp_path, convert, capsys, monkeypatch):
    saved(tmp_path / "full_sft_64.pth")
    for model in ((), ("--model", "full_sft")):
        convert("to-pth", *model, "--out_dir", tmp_path, "--to", tmp_path / "x" / "new.pth", "--overwrite")
        assert f"reading {tmp_path / 'full_sft_64.pth'}" in capsys.readouterr().out
    monkeypatch.setattr(convert_model, "ROOT", tmp_path)
    convert("to-stock", "--out_dir", tmp_path)
    assert (tmp_path / "out" / "export" / "full_sft_64-llama" / "config.json").is_file()


def test_errors_of_the_command_line(tmp_path, convert, capsys):
    saved(tmp_path / "m.pth")
    bad_tokenizer = tmp_path / "wide"
    saved(tmp_path / "narrow.pth", vocab_size=100)
    reward = tiny()
    reward.score = torch.nn.Linear(64, 1, bias=False)
    save_weights(reward, tmp_path / "reward.pth")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    torch.save({"x": torch.zeros(1)}, tmp_path / "gpt" / "pytorch_model.bin")
    (tmp_path / "none").mkdir()
    here, target = ("--model", tmp_path / "m.pth"), ("--to", tmp_path / "new")
    cases = [
        (("to-stock", "--model", "nothing.pth", *target), "nothing.pth does not exist; expected a path or a stage"),
        (("to-stock", "--out_dir", tmp_path / "empty", *target), "no weights in"),
        (("to-stock", "--model", tmp_path / "narrow.pth", *target), "trained with 100"),
        (("to-stock", "--model", tmp_path / "reward.pth", *target), "reward model"),
        (("to-stock", "--model", tmp_path / "gpt", *target), "type 'gpt2'; read here"),
        (("to-stock", "--model", tmp_path / "none", *target), "no config.json"),
        (("to-stock", *here, "--to", tmp_path / "new.pth"), "a folder is written here"),
        (("to-pth", *here, "--to", tmp_path / "new"), "ends in .pth"),
        (("to-pth", *here, "--to", tmp_path / "m.pth"), "exists already"),
        (("to-pth", *here, "--to", tmp_path / "m.pth", "--overwrite"), "is or holds the source"),
        (("to-stock", *here, *target, "--tokenizer", bad_tokenizer), "no tokenizer.json"),
        (("merge-lora", *here, "--lora", tmp_path / "no.pth", "--to", tmp_path / "y.pth"), "does not exist"),
    ]
    for arguments, words in cases:
        with pytest.raises((UserError, WeightsError), match=words) as caught:
            convert(*arguments)
        assert "\n" not in str(caught.value)
    for text, words in (("", "is empty"), (None, "cannot be read")):
        if text is not None:
            (tmp_path / "t.txt").write_text(text)
        with pytest.raises(UserError, match=words):
            verify.read_texts(tmp_path / ("t.txt" if text is not None else "u.txt"))
    for wrong in (["to-gguf", "--dtype", "q4"], ["to-pth"], ["fly"]):
        with pytest.raises(SystemExit) as stop:
            convert_model.main(wrong)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        convert_model.main([])
    assert stop.value.code == 0 and "to-gguf" in capsys.readouterr().out
    assert not left_over(tmp_path)


def test_a_mistake_is_one_line():
    result = train(convert_model, ["to-stock", "--model", "nothing"])
    assert one_error(result).startswith("error: --model nothing does not exist")


def test_gguf_without_its_package(monkeypatch, tmp_path, convert):
    find = convert_model.importlib.util.find_spec
    monkeypatch.setattr(convert_model.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(UserError, match="pip install gguf"):
        convert("to-gguf", "--to", tmp_path / "x")


def test_the_stock_configuration_is_one_that_transformers_knows(tmp_path, convert):
    saved(tmp_path / "m.pth", use_moe=True)
    convert("to-stock", "--model", tmp_path / "m.pth", "--to", tmp_path / "granite")
    config = AutoConfig.from_pretrained(tmp_path / "granite")
    assert config.attention_multiplier == 0.25 and config.logits_scaling == 1.0 and config.num_local_experts == 4
