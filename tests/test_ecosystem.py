"""An exported folder in other people's hands: transformers' pipeline and generate, peft, trl and lm-eval.

Both forms are tried: our own classes as remote code, and the stock Llama. The oracles are our own decoder and our own
sums of log-probabilities. Legend: B batch, T tokens, V vocabulary.
"""

import json
import math
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_convert_model import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, dynamic_module_utils, pipeline

from model.generation import Decoder, Sampling
from model.model_lora import load_lora
from model.weights import load_model, save_weights
from scripts import convert_model
from scripts.converting import checks

FORMS = pytest.mark.parametrize("form", ["own", "llama"])
CHAT = [{"role": "user", "content": "你好, who are you?"}]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Folders `own` and `llama` of one small model, beside `m.pth`. Remote code is cached there, not in the home."""
    folder = tmp_path_factory.mktemp("exports")
    save_weights(tiny(max_position_embeddings=512), folder / "m.pth", {"stage": "full_sft"})
    path, cache = list(sys.path), dynamic_module_utils.HF_MODULES_CACHE
    dynamic_module_utils.HF_MODULES_CACHE = str(folder / "modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "check_folder", lambda *_: [])  # test_convert_model.py does it: a process of its own
        for command, name in (("to-transformers", "own"), ("to-stock", "llama")):
            convert_model.main([command, "--model", str(folder / "m.pth"), "--to", str(folder / name)])
    yield folder
    dynamic_module_utils.HF_MODULES_CACHE = cache
    sys.path[:] = path


def load(folder: Path):
    """(model, tokenizer) as a stranger loads them, in float32; greedy unless told otherwise, and to full length."""
    trust = {"trust_remote_code": True} if folder.name == "own" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trust).eval()
    for name, value in {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}.items():
        setattr(model.generation_config, name, value)
    model.generation_config.eos_token_id = None
    assert type(model).__module__.startswith("transformers_modules." if trust else "transformers.models.llama")
    return model, AutoTokenizer.from_pretrained(folder, **trust)


def ours(folder: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    decoder = Decoder(load_model(folder.parent / "m.pth"), len(prompts), 300)
    requests = decoder.generate(prompts, Sampling(temperature=0, max_new_tokens=new_tokens))
    return [request.tokens for request in requests]


# transformers


@FORMS
def test_pipeline_chats(exports, form):
    model, tokenizer = load(exports / form)
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answer = ask(CHAT, max_new_tokens=12, return_full_text=True)[0]["generated_text"]
    assert answer[:1] == CHAT and answer[1]["role"] == "assistant"
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    (written,) = ours(exports / form, [prompt], 12)
    assert answer[1]["content"] == tokenizer.decode(written, skip_special_tokens=True)
    text = ask("三点 and 4", max_new_tokens=5, return_full_text=False)[0]["generated_text"]
    (written,) = ours(exports / form, [tokenizer.encode("三点 and 4")], 5)
    assert text == tokenizer.decode(written, skip_special_tokens=True)


def test_pipeline_by_name_alone(exports):
    """The folder's name is all that is given: settings of generation and template come from its files."""
    ask = pipeline("text-generation", model=str(exports / "llama"), dtype="float32")
    assert ask.model.generation_config.temperature == 0.85 and ask.model.generation_config.eos_token_id == 2
    assert ask(CHAT, max_new_tokens=4)[0]["generated_text"][1]["role"] == "assistant"


@FORMS
def test_generate_in_a_batch_and_with_a_streamer(exports, form):
    model, tokenizer = load(exports / form)
    tokenizer.padding_side = "left"
    texts = ["The cat", "今天是星期三，明天是", "1 2 3 4 5 6 7"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert (batch["attention_mask"] == 0).any()
    out = model.generate(**batch, max_new_tokens=10)
    expected = ours(exports / form, [tokenizer.encode(text) for text in texts], 10)
    assert out[:, batch["input_ids"].shape[1] :].tolist() == expected

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    one = tokenizer(texts[1], return_tensors="pt")
    thread = threading.Thread(target=model.generate, kwargs={**one, "max_new_tokens": 10, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join(timeout=60)
    assert len(pieces) > 3 and "".join(pieces) == tokenizer.decode(expected[1])


@FORMS
def test_generate_by_beams(exports, form):
    """The winning beam is likelier than the greedy text by our own count, and is what our own sums say it is."""
    model, tokenizer = load(exports / form)
    prompt = tokenizer("今天", return_tensors="pt")
    T = prompt["input_ids"].shape[1]

    @torch.no_grad()
    def log_probability(row: torch.Tensor) -> float:
        logps = load_model(exports / "m.pth")(row[None]).logits[0].log_softmax(-1)
        return float(logps[T - 1 : -1].gather(1, row[T:, None]).sum())

    beams = model.generate(
        **prompt,
        max_new_tokens=6,
        num_beams=4,
        num_return_sequences=4,
        return_dict_in_generate=True,
        output_scores=True,
    )
    greedy = model.generate(**prompt, max_new_tokens=6)[0]
    sums = [log_probability(row) for row in beams.sequences]
    assert sums == sorted(sums, reverse=True) and len(set(map(tuple, beams.sequences.tolist()))) == 4
    assert sums[0] >= log_probability(greedy) - 1e-4
    torch.testing.assert_close(beams.sequences_scores * 6, torch.tensor(sums), rtol=1e-4, atol=1e-3)


@FORMS
def test_generate_with_an_assistant(exports, form):
    """Speculative decoding writes what greedy decoding writes, whoever guesses."""
    model, tokenizer = load(exports / form)
    assistant, _ = load(exports / form)
    with torch.no_grad():  # a worse one: some of its guesses are turned down
        assistant.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    prompt = tokenizer("3 + 4 =", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=16)
    assert not torch.equal(assistant.generate(**prompt, max_new_tokens=16), expected)
    for helper in (model, assistant):
        assert torch.equal(model.generate(**prompt, max_new_tokens=16, assistant_model=helper), expected)


# peft


@FORMS
def test_peft_trains_an_adapter_that_we_read(exports, form, tmp_path):
    import peft

    model, tokenizer = load(exports / form)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    ids = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    base = {name.replace(".base_layer", ""): p for name, p in adapted.get_base_model().named_parameters()}
    assert all(torch.equal(base[name], p) for name, p in before.items())  # the base is frozen
    adapted.save_pretrained(tmp_path / "adapter")
    mine = load_model(exports / "m.pth")
    load_lora(mine, tmp_path / "adapter")
    torch.testing.assert_close(mine(ids).logits, adapted.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


# trl


def trainer_settings(folder: Path, **more) -> dict:
    return {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 5e-3,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "bf16": False,
        "disable_tqdm": True, "lr_scheduler_type": "constant", **more,
    }  # fmt: skip


def moved(model, before: dict) -> int:
    return sum(not torch.equal(p.detach(), before[name]) for name, p in model.named_parameters())


@FORMS
def test_trl_fine_tunes(exports, form, tmp_path):
    """The loss that trl logs first is ours on the assistant's words alone, by our template's markers; then it falls."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, tokenizer = load(exports / form)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    turns = [*CHAT, {"role": "assistant", "content": "A small model. 小模型。"}]
    data = datasets.Dataset.from_list([{"messages": turns}] * 8)
    settings = trl.SFTConfig(**trainer_settings(tmp_path), assistant_only_loss=True, max_length=64)
    trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]
    assert moved(model, before) == len(before)

    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    logps = load_model(exports / "m.pth")(torch.tensor([ids])).logits[0].log_softmax(-1)
    end = len(ids) - 1  # the line break behind the last turn is not the assistant's
    own = [-float(logps[t - 1, ids[t]]) for t in range(len(prompt), end)]
    assert losses[0] == pytest.approx(sum(own) / len(own), rel=1e-3)


@FORMS
def test_trl_learns_preferences(exports, form, tmp_path):
    """At the start policy and reference are one: loss ln 2. Then the margin grows."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, tokenizer = load(exports / form)
    reference, _ = load(exports / form)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pair = {
        "prompt": CHAT,
        "chosen": [{"role": "assistant", "content": "I am small."}],
        "rejected": [{"role": "assistant", "content": "走开！"}],
    }
    data = datasets.Dataset.from_list([pair] * 8)
    settings = trl.DPOConfig(**trainer_settings(tmp_path, learning_rate=1e-3), beta=0.1, max_length=64)
    trainer = trl.DPOTrainer(
        model=model, ref_model=reference, args=settings, train_dataset=data, processing_class=tokenizer
    )  # fmt: skip
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3) and rows[-1]["loss"] < 0.5
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"] + 0.3
    assert moved(model, before) > 0.9 * len(before)


# lm-eval


QUESTIONS = [
    {"question": "2 + 2 =", "choices": ["3", "4", "5"], "answer": 1},
    {"question": "The sky is", "choices": ["blue", "a chair", "soup"], "answer": 0},
    {"question": "星期一的后一天是", "choices": ["星期二", "星期五", "一本书"], "answer": 0},
    {"question": "大的反义词是", "choices": ["小", "水", "跑"], "answer": 0},
]


@FORMS
def test_lm_eval_on_a_local_task(exports, form, tmp_path, monkeypatch):
    """A task of two files, offline. Its log-likelihoods are our own sums, and so is its accuracy."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(q, ensure_ascii=False) + "\n" for q in QUESTIONS), encoding="utf-8")
    (tmp_path / "local.yaml").write_text(
        "task: local_questions\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n  cache_dir: {tmp_path / 'cache'}\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n",
        encoding="utf-8",
    )
    model, tokenizer = load(exports / form)
    result = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=256),
        tasks=["local_questions"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    mine, right = load_model(exports / "m.pth"), 0
    samples = sorted(result["samples"]["local_questions"], key=lambda sample: sample["doc_id"])
    for question, sample in zip(QUESTIONS, samples, strict=True):
        start, sums = tokenizer.encode(question["question"]), []
        for choice in question["choices"]:
            ids = tokenizer.encode(question["question"] + " " + choice)
            logps = mine(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logps[t - 1, ids[t]]) for t in range(len(start), len(ids))))
        theirs = [float(response[0][0]) for response in sample["resps"]]
        assert theirs == pytest.approx(sums, rel=1e-4, abs=1e-3)
        right += max(range(3), key=sums.__getitem__) == question["answer"]
    assert result["results"]["local_questions"]["acc,none"] == right / 4
