"""Conversions: every form against transformers' own implementation and the peft library, and back bitwise.

GGUF files have tests of their own (test_gguf_export.py). Legend: V vocabulary.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_weights import Trap
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from model.model_lora import LoraConfig, add_lora, load_lora, lora_state_dict, merge_lora, save_lora, save_peft
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import WeightsError, load_model, load_tokenizer, read_about, save_weights
from scripts import convert_model
from scripts.converting import checks, folders, llama_cpp_check, stock_architectures, verify
from scripts.converting.verify import BadExport
from trainer.command_line import UserError

V = 6400  # the shipped tokenizer
SMALL = 300  # 3 control tokens, 8 tags, 256 bytes, some merges
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ODD_YARN = {**YARN, "beta_fast": 3.0, "beta_slow": 0.5, "attention_factor": 1.3}
LINEAR, NTK = {"type": "linear", "factor": 3.0}, {"type": "ntk", "factor": 4.0}
LLAMA, GRANITE, MIXTRAL = "LlamaForCausalLM", "GraniteMoeSharedForCausalLM", "MixtralForCausalLM"


def tiny(seed: int = 0, **fields) -> MiniMindForCausalLM:
    """A small model whose every weight matters and is exact in half precision."""
    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config = MiniMindConfig(**{**sizes, "vocab_size": V, "initializer_range": 0.2, "rope_theta": 1e4, **fields})
    model = MiniMindForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.mul_(0.5)
            parameter.copy_(parameter.half())
    return model


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(1))


def altered(tokenizer_change, folder: Path):
    """The shipped tokenizer with a changed tokenizer.json."""
    folder.mkdir()
    backend = json.loads((ROOT / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer_change(backend)
    (folder / "tokenizer.json").write_text(json.dumps(backend), encoding="utf-8")
    shutil.copy(ROOT / "model" / "tokenizer_config.json", folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory):
    """One with few merges: gguf reads its lists 20 times faster."""

    def cut(backend):
        model = backend["model"]
        vocab = {token: i for token, i in model["vocab"].items() if i < SMALL}
        model.update(vocab=vocab, merges=[pair for pair in model["merges"] if "".join(pair) in vocab])

    tokenizer = altered(cut, tmp_path_factory.mktemp("x") / "small")
    assert len(tokenizer) == SMALL and tokenizer.decode(tokenizer.encode("你 a1")) == "你 a1"
    return tokenizer


@pytest.fixture
def text_file(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("The cat sat on the mat. 3 + 4 = 7.\n\n今天是星期三，明天呢？<think>x</think>", encoding="utf-8")
    return str(path)


@pytest.fixture
def convert(text_file, monkeypatch):
    monkeypatch.setattr(llama_cpp_check, "installed", lambda: False)  # its turn comes in test_gguf_export.py

    def run(command: str, *arguments: object) -> None:
        convert_model.main([command, *map(str, arguments), "--verify_text", text_file])

    return run


def saved(path: Path, about: dict | None = None, **fields) -> MiniMindForCausalLM:
    model = tiny(**fields)
    save_weights(model, path, {"stage": "full_sft", **(about or {})})
    return model


def left_over(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.name.endswith((".part", ".old"))]


@torch.no_grad()
def same_logits(model, other, tolerance: float = 1e-5) -> None:
    """As absolute as float32 allows: of the largest logit, where it is above 1."""
    x = ids(2, 90)
    mine, its = model(x).logits, other(x).logits.float()
    assert (mine - its).abs().max() <= tolerance * max(1.0, float(mine.abs().max()))
    assert mine.std() > 0.3  # logits that are all alike would hide everything


# Stock architectures


STOCK = [
    ("dense", {}, LLAMA),
    ("untied", {"tie_word_embeddings": False}, LLAMA),
    ("linear", {"rope_scaling": LINEAR}, LLAMA),
    ("ntk", {"rope_scaling": NTK}, LLAMA),
    ("yarn", {"rope_scaling": ODD_YARN}, LLAMA),
    ("gelu", {"hidden_act": "gelu", "rms_norm_eps": 1e-3}, LLAMA),
    ("moe", {"use_moe": True, "rope_scaling": YARN}, GRANITE),
    ("shared-2", {"use_moe": True, "n_shared_experts": 2, "num_experts_per_tok": 3}, GRANITE),
    ("unshared", {"use_moe": True, "n_shared_experts": 0, "rope_scaling": NTK}, MIXTRAL),
]


@pytest.mark.parametrize(("name", "fields", "architecture"), STOCK, ids=[case[0] for case in STOCK])
def test_stock_form_computes_the_same_and_comes_back_bitwise(name, fields, architecture, tmp_path, convert, capsys):
    model = saved(tmp_path / "full_sft_64.pth", **fields)
    convert("to-stock", "--model", tmp_path / "full_sft_64.pth", "--to", tmp_path / "stock")
    out = capsys.readouterr().out
    assert "transformers, float32: largest logit difference" in out and out.count(": good") == 1
    assert "rounding to float16 changes nothing" in out and "[4/4" in out
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32).eval()
    assert type(theirs).__name__ == architecture
    same_logits(model, theirs)
    if fields.get("rope_scaling"):  # guards against a scaling that is lost on both sides
        plain = tiny(**{**fields, "rope_scaling": None})
        assert (plain(ids(1, 90)).logits - model(ids(1, 90)).logits).abs().max() > 0.1

    convert("to-pth", "--model", tmp_path / "stock", "--to", tmp_path / "back_64.pth")
    first, second = (torch.load(tmp_path / f"{n}_64.pth", weights_only=True) for n in ("full_sft", "back"))
    assert first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())
    back = load_model(tmp_path / "back_64.pth")
    for field in "intermediate_size num_key_value_heads use_moe tie_word_embeddings hidden_act rms_norm_eps".split():
        assert getattr(back.config, field) == getattr(model.config, field), field
    same_logits(model, back, 1e-6)
    assert not left_over(tmp_path)


def test_what_a_stock_folder_carries(tmp_path, convert):
    model = saved(tmp_path / "full_sft_64.pth", rope_scaling=YARN)
    convert("to-stock", "--model", tmp_path / "full_sft_64.pth", "--to", tmp_path / "llama", "--dtype", "bfloat16")
    names = {p.name for p in (tmp_path / "llama").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "README.md",
    }  # fmt: skip
    config = json.loads((tmp_path / "llama" / "config.json").read_text(encoding="utf-8"))
    # transformers 4 reads these two and knows no rope_parameters
    assert config["rope_theta"] == 1e4
    assert config["rope_scaling"]["rope_type"] == "yarn" and config["rope_scaling"]["factor"] == 4.0
    assert config["dtype"] == "bfloat16" and config["tie_word_embeddings"] is True and "auto_map" not in config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    # Trained positions times the factor: some releases of transformers 4 compute the factor from it.
    assert loaded.dtype == torch.bfloat16 and loaded.config.max_position_embeddings == 4 * 32
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())
    assert loaded.generation_config.eos_token_id == 2 and loaded.generation_config.temperature == 0.85
    tokenizer, ours = AutoTokenizer.from_pretrained(tmp_path / "llama"), load_tokenizer()
    for text in ("Hello  world 12.5\n", "你好，<think>世界</think>🙂", " lead", "<|im_start|>user\nx<|im_end|>"):
        assert tokenizer.encode(text) == ours.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    turns = [{"role": "user", "content": "你好"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == ours.apply_chat_template(turns, tokenize=False)
    card = (tmp_path / "llama" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n") and f"{model.num_parameters():,}" in card
    assert "largest logit difference" in card and "vllm serve" in card and "trust_remote_code" not in card


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_moe": True, "norm_topk_prob": False}, "norm_topk_prob False cannot be exported exactly"),
        ({"use_moe": True, "num_experts_per_tok": 1}, "num_experts_per_tok 1 cannot be exported exactly"),
    ],
)
@pytest.mark.parametrize("command", ["to-stock", "to-gguf"])
def test_what_stock_forms_cannot_express_is_refused(command, fields, reason, tmp_path, convert):
    saved(tmp_path / "full_sft_64_moe.pth", **fields)
    with pytest.raises(UserError, match=reason):
        convert(command, "--model", tmp_path / "full_sft_64_moe.pth", "--to", tmp_path / "new")
    assert not (tmp_path / "new").exists() and not left_over(tmp_path)


def test_top_1_really_differs():
    """The refusal above is no superstition: a stock model gives the one chosen expert the weight 1."""
    moe = tiny(use_moe=True, num_experts_per_tok=1).model.layers[0].mlp
    _, weights, _ = moe.gate(torch.randn(1, 5, 64), None)
    assert weights.max() < 0.999


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"head_dim": 32}, "head_dim 32"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mscale": 1.0}}, "'mscale'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "a part"),
    ],
)
def test_llamas_that_cannot_be_ours(changes, reason):
    model = tiny()
    config = LlamaConfig(**{**stock_architectures.stock_config(model.config).to_dict(), **changes})
    with pytest.raises(WeightsError, match=reason):
        stock_architectures.from_stock(config, stock_architectures.to_stock(model.config, model.state_dict()))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"residual_multiplier": 0.5}, "residual_multiplier 0.5"),
        ({"logits_scaling": 2.0}, "logits_scaling 2.0"),
        ({"attention_multiplier": 1.0}, "attention_multiplier 1.0"),
        ({"shared_intermediate_size": 100}, "no multiple"),
        ({"num_experts_per_tok": 1}, "one expert per token"),
    ],
)
def test_granites_that_cannot_be_ours(changes, reason):
    model = tiny(use_moe=True)
    config, state = stock_architectures.stock_config(model.config), model.state_dict()
    state = stock_architectures.to_stock(model.config, state)
    stock_architectures.from_stock(config, state)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(WeightsError, match=reason):
        stock_architectures.from_stock(config, state)


def test_tensors_too_many_or_too_few_are_refused(tmp_path):
    model = tiny()
    config, state = stock_architectures.stock_config(model.config), model.state_dict()
    extra = {**state, "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    with pytest.raises(WeightsError, match="biases"):
        stock_architectures.from_stock(config, extra)
    strange = {**state, "model.layers.0.block_sparse_moe.gate.weight": torch.zeros(4, 64)}
    with pytest.raises(WeightsError, match="has no place"):
        stock_architectures.from_stock(config, strange)
    with pytest.raises(WeightsError, match="lm_head and embedding differ"):
        folders.build_model(model.config, {**state, "lm_head.weight": torch.zeros(V, 64)}, tmp_path)
    short = {name: t for name, t in state.items() if "layers.1" not in name}
    with pytest.raises(WeightsError, match="does not fit"):
        folders.build_model(model.config, short, tmp_path)


# Our own classes as remote code


@pytest.mark.slow
def test_remote_code_folder_loads_in_a_clean_process(tmp_path, convert, capsys, monkeypatch):
    """A mixture of experts that no stock architecture can express."""
    model, found = saved(tmp_path / "m.pth", use_moe=True, norm_topk_prob=False, rope_scaling=YARN), {}
    own = f"""
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
assert not any(m == "model" or m.startswith(("model.", "scripts", "trainer")) for m in sys.modules)
assert not any(p.startswith({str(ROOT)!r}) and "site-packages" not in p for p in sys.path if ".venv" not in p), sys.path
"""
    monkeypatch.setattr(verify, "CLEAN_CODE", verify.CLEAN_CODE + own)  # in the process that checks the export anyway
    run = verify.run_clean

    def kept(folder, rows, texts):
        found.update(rows=rows, texts=texts, answer=run(folder, rows, texts))
        return found["answer"]

    monkeypatch.setattr(verify, "run_clean", kept)
    convert("to-transformers", "--model", tmp_path / "m.pth", "--to", tmp_path / "own")
    assert capsys.readouterr().out.count(": good") == 1
    logits, tokens = found["answer"]
    for row, its in zip(found["rows"], logits, strict=True):
        torch.testing.assert_close(its, model(torch.tensor([row])).logits[0], rtol=1e-5, atol=1e-5)
    tokenizer = load_tokenizer()
    expected = [tokenizer.encode(text) for text in (*found["texts"], verify.ODD_TEXT)]
    assert tokens[:-1] == expected and tokenizer.decode(tokens[-1]).endswith("你好<|im_end|>\n<|im_start|>assistant\n")

    convert("to-pth", "--model", tmp_path / "own", "--to", tmp_path / "back.pth")
    first, second = (torch.load(tmp_path / f"{n}.pth", weights_only=True) for n in ("m", "back"))
    assert first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())
    kept = read_about(tmp_path / "back.pth")["config"]
    assert kept["rope_scaling"] == YARN and kept["norm_topk_prob"] is False


# Other sources


def test_published_weights(tmp_path, convert):
    """A bare state dict: eight heads are assumed, or --config_from tells."""
    torch.save({name: t.half() for name, t in tiny().state_dict().items()}, tmp_path / "bare.pth")
    saved(tmp_path / "sized.pth")
    convert("to-pth", "--model", tmp_path / "bare.pth", "--to", tmp_path / "guessed.pth")
    bare = ("--model", tmp_path / "bare.pth")
    convert("to-pth", *bare, "--to", tmp_path / "told.pth", "--config_from", tmp_path / "sized.pth")
    assert load_model(tmp_path / "guessed.pth").config.num_attention_heads == 8
    told = load_model(tmp_path / "told.pth")
    assert told.config.num_attention_heads == 4 and told.config.rope_theta == 1e4
    same_logits(tiny(), told, 1e-6)
    for wrong, reason in (
        (tmp_path / "none.json", "cannot be read"),
        (tmp_path / "odd.json", "hidden_size is missing"),
    ):
        (tmp_path / "odd.json").write_text('{"train_batch_size": 4}', encoding="utf-8")
        with pytest.raises(UserError, match=reason):
            convert("to-pth", "--model", tmp_path / "bare.pth", "--to", tmp_path / "x.pth", "--config_from", wrong)


def test_folders_in_other_files(tmp_path, convert):
    """Shards, and the older pickled form: read, and not run."""
    model = tiny()
    llama = LlamaForCausalLM(stock_architectures.stock_config(model.config))
    llama.load_state_dict(model.state_dict())
    llama.save_pretrained(tmp_path / "shards", max_shard_size="400KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "pickled").mkdir()
    shutil.copy(tmp_path / "shards" / "config.json", tmp_path / "pickled")
    old = {**model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    torch.save(old, tmp_path / "pickled" / "pytorch_model.bin")
    for name in ("shards", "pickled"):
        convert("to-pth", "--model", tmp_path / name, "--to", tmp_path / f"{name}.pth")
        same_logits(model, load_model(tmp_path / f"{name}.pth"), 1e-6)
        assert folders.open_source(tmp_path / name).dtype == torch.float32
    torch.save({"model.norm.weight": Trap(tmp_path / "sprung")}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(WeightsError):
        convert("to-pth", "--model", tmp_path / "pickled", "--to", tmp_path / "x.pth")
    assert not (tmp_path / "sprung").exists()


def test_weights_that_do_not_fit_half_precision(tmp_path, convert):
    model = tiny()
    state = stock_architectures.to_stock(model.config, model.state_dict())
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = 70_000.0
    (tmp_path / "big").mkdir()
    source = folders.Source(model, load_tokenizer(), torch.float32, "big", None)
    fields = stock_architectures.config_json(stock_architectures.stock_config(model.config))
    folders.write_folder(tmp_path / "big", fields, state, torch.float32, source, remote_code=False)
    with pytest.raises(UserError, match="do not fit float16"):
        convert("to-pth", "--model", tmp_path / "big", "--to", tmp_path / "x.pth")
    with pytest.raises(UserError, match="do not fit f16"):
        convert("to-gguf", "--model", tmp_path / "big", "--to", tmp_path / "x")
    big = folders.open_source(tmp_path / "big").model
    assert folders.rounded(big, torch.bfloat16).model.layers[0].mlp.up_proj.weight[0, 0] > 69_000


@pytest.fixture(scope="module")
def zero_checkpoints(tmp_path_factory) -> Path:
    """A folder with `sized.pth` and, after one step at each stage of ZeRO, `runN/zero` and what it holds, `nowN.pt`."""
    pytest.importorskip("deepspeed", reason="needs the package deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    saved(folder / "sized.pth")
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import deepspeed, torch
from model.weights import load_model
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an extension that is built for minutes
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
for stage in (0, 2, 3):
    model = load_model("sized.pth").train()
    settings = {{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {{"stage": stage}}}}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    ids = torch.arange(1, 25)[None]
    engine.backward(engine(ids, labels=ids).loss); engine.step()
    engine.save_checkpoint(f"run{{stage}}/zero")
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        torch.save({{k: v.detach().clone() for k, v in model.state_dict().items()}}, f"now{{stage}}.pt")
import os; os._exit(0)
"""
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )  # fmt: skip
    assert (folder / "now3.pt").is_file(), done.stderr[-2000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zero_checkpoint(stage, zero_checkpoints, tmp_path, convert):
    model, zero = load_model(zero_checkpoints / "sized.pth"), zero_checkpoints / f"run{stage}" / "zero"
    with pytest.raises(UserError, match="says how large the model is"):
        convert("to-pth", "--model", zero, "--to", tmp_path / "x.pth")
    (zero / "step_00000001.json").write_text(
        json.dumps({"config": model.config.to_diff_dict(), "progress": {}}), encoding="utf-8"
    )
    convert("to-pth", "--model", zero, "--to", tmp_path / "joined.pth")
    joined = load_model(tmp_path / "joined.pth")
    expected = torch.load(zero_checkpoints / f"now{stage}.pt", weights_only=True)
    moved = 0
    for name, tensor in joined.state_dict().items():
        assert torch.equal(tensor, expected[name].half().float()), name
        moved += not torch.equal(tensor, model.state_dict()[name])
    assert moved > 10  # the update is in it

    torch.save({"module": Trap(tmp_path / "sprung")}, next(zero.rglob("*_model_states.pt")))
    with pytest.raises(WeightsError, match="could not be joined"):
        convert("to-pth", "--model", zero, "--to", tmp_path / "x.pth")
    assert not (tmp_path / "sprung").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


# LoRA


def adapter(path: Path, model: MiniMindForCausalLM, **fields) -> LoraConfig:
    """An adapter that does something, exact in half precision, on disk and on the model."""
    config = LoraConfig(**{"rank": 3, "alpha": 6.0, **fields})
    add_lora(model, config)
    generator = torch.Generator().manual_seed(1)
    for tensor in lora_state_dict(model).values():
        tensor.copy_((torch.randn(tensor.shape, generator=generator) * 0.1).half())
    save_lora(model, path, config)
    return config


def test_lora_is_merged(tmp_path, convert, monkeypatch, capsys):
    model = saved(tmp_path / "m.pth", {"tokenizer": None})
    adapter(tmp_path / "tea.pth", model)
    merge_command = ("merge-lora", "--model", tmp_path / "m.pth", "--lora", tmp_path / "tea.pth", "--to")
    convert(*merge_command, tmp_path / "merged.pth")
    out = capsys.readouterr().out
    assert "merged, float32: largest logit difference" in out and out.count(": good") == 2
    state = torch.load(tmp_path / "merged.pth", weights_only=True)
    q = load_model(tmp_path / "m.pth").model.layers[1].self_attn.q_proj.weight
    A, B = (lora_state_dict(model)[f"model.layers.1.self_attn.q_proj.lora.{part}.weight"] for part in "AB")
    expected = (q + 6.0 / 3 * B @ A).half()
    torch.testing.assert_close(state["model.layers.1.self_attn.q_proj.weight"], expected, rtol=1e-3, atol=1e-4)
    assert not any("lora" in name for name in state) and read_about(tmp_path / "merged.pth")["stage"] == "full_sft"
    same_logits(model, load_model(tmp_path / "merged.pth"), 1e-2)  # half precision between them

    monkeypatch.setattr(convert_model, "merge_lora", lambda model: merge_lora(load_model(tmp_path / "m.pth")))
    with pytest.raises(BadExport, match="merged, float32 differs"):
        convert(*merge_command, tmp_path / "bad.pth")
    assert not (tmp_path / "bad.pth").exists()


def test_lora_to_peft_and_back_bitwise(tmp_path, convert, capsys, monkeypatch):
    import peft

    model = saved(tmp_path / "m.pth")
    adapter(tmp_path / "tea.pth", model, target_modules=("q_proj", "v_proj", "down_proj"))
    base = ("--model", tmp_path / "m.pth")
    convert("lora-to-peft", *base, "--lora", tmp_path / "tea.pth", "--to", tmp_path / "peft")
    assert "peft, float32: largest logit difference" in capsys.readouterr().out
    find = checks.importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(checks.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
        convert("lora-to-peft", *base, "--lora", tmp_path / "tea.pth", "--to", tmp_path / "peft", "--overwrite")
    out = capsys.readouterr().out
    assert "peft itself was not run" in out and "read back, float32: largest logit difference" in out
    theirs = peft.PeftModel.from_pretrained(load_model(tmp_path / "m.pth"), tmp_path / "peft").eval()
    same_logits(model, theirs)
    convert("lora-from-peft", *base, "--lora", tmp_path / "peft", "--to", tmp_path / "back.pth")
    first, second = (torch.load(tmp_path / f"{n}.pth", weights_only=True) for n in ("tea", "back"))
    assert first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())
    again = load_model(tmp_path / "m.pth")
    assert load_lora(again, tmp_path / "back.pth").alpha == 6.0

    def spoil(model, folder, config):
        save_peft(model, folder, LoraConfig(config.rank, 2 * config.alpha, 0.0, config.target_modules))

    monkeypatch.setattr(convert_model, "save_peft", spoil)
    with pytest.raises(BadExport, match="peft, float32 differs"):
        convert("lora-to-peft", *base, "--lora", tmp_path / "tea.pth", "--to", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    with pytest.raises(UserError, match="a folder is written here"):
        convert("lora-to-peft", *base, "--lora", tmp_path / "tea.pth", "--to", tmp_path / "x.pth")
    with pytest.raises(UserError, match="a file that ends in .pth"):
        convert("lora-from-peft", *base, "--lora", tmp_path / "peft", "--to", tmp_path / "x")


def test_adapter_of_peft_on_the_stock_folder(tmp_path, convert):
    """Trained by peft on the Llama that was exported, it works on our own model: the names are the same."""
    import peft

    saved(tmp_path / "m.pth")
    convert("to-stock", "--model", tmp_path / "m.pth", "--to", tmp_path / "llama")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    theirs = peft.get_peft_model(
        llama, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["k_proj", "gate_proj"])
    ).eval()
    torch.manual_seed(0)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data.copy_((torch.randn(p.shape) * 0.1).half())
    theirs.save_pretrained(tmp_path / "adapter")
    convert(
        "lora-from-peft", "--model", tmp_path / "m.pth", "--lora", tmp_path / "adapter", "--to", tmp_path / "ours.pth"
    )  # fmt: skip
    model = load_model(tmp_path / "m.pth")
    load_lora(model, tmp_path / "ours.pth")
    same_logits(model, theirs)
