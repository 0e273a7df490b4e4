# ruff: noqa: F811 - fixtures of another file are taken over by name
"""GGUF files: as files, under llama.cpp itself, and the Modelfile beside them.

What llama.cpp is needed for is skipped where llama-cpp-python is missing.
"""

import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_convert_model import (  # noqa: F401
    LINEAR,
    NTK,
    ODD_YARN,
    SMALL,
    YARN,
    V,
    altered,
    convert,
    ids,
    saved,
    small_tokenizer,
    text_file,
    tiny,
)
from tokenizers import Tokenizer

from model.generation import Decoder, Sampling
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, rope_frequencies
from model.weights import load_tokenizer
from scripts.converting import checks, folders, gguf_export, llama_cpp_check, ollama, verify
from scripts.converting.verify import BadExport
from trainer.command_line import UserError

needs_llama_cpp = pytest.mark.skipif(not llama_cpp_check.installed(), reason="needs the package llama-cpp-python")


# GGUF, as a file


def read_file(path: Path) -> tuple[dict, dict]:
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


def exported(tmp_path: Path, model: MiniMindForCausalLM, kind: str = "f32", tokenizer=None) -> Path:
    path = tmp_path / f"{kind}.gguf"
    gguf_export.write_gguf(path, model.config, model.state_dict(), tokenizer or load_tokenizer(), kind, "tiny")
    return path


def test_what_a_gguf_holds(small_tokenizer, tmp_path):
    model = tiny(vocab_size=SMALL)
    fields, tensors = read_file(exported(tmp_path, model, tokenizer=small_tokenizer))
    assert fields["general.architecture"] == "llama" and fields["general.name"] == "tiny"
    assert fields["llama.block_count"] == 2 and fields["llama.embedding_length"] == 64
    assert fields["llama.attention.head_count"] == 4 and fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.feed_forward_length"] == 96 and fields["llama.context_length"] == 32768
    assert fields["llama.rope.freq_base"] == 1e4 and fields["llama.rope.dimension_count"] == 16
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert fields["llama.rope.scaling.type"] == "none" and "output.weight" not in tensors  # tied
    # Row 2i and 2i + 1 of a head are channel i and i + C/2, counted out by hand.
    q = model.model.layers[1].self_attn.q_proj.weight.detach().numpy()
    its = tensors["blk.1.attn_q.weight"][1]
    for head in range(4):
        for i in range(8):
            np.testing.assert_array_equal(its[head * 16 + 2 * i], q[head * 16 + i])
            np.testing.assert_array_equal(its[head * 16 + 2 * i + 1], q[head * 16 + i + 8])
    np.testing.assert_array_equal(tensors["token_embd.weight"][1], model.model.embed_tokens.weight.detach().numpy())


def test_the_tokenizer_in_a_gguf(tmp_path):
    tokenizer = load_tokenizer()
    fields, _ = read_file(exported(tmp_path, tiny(vocab_size=V + 5)))
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "smollm"
    assert tokens[:V] == tokenizer.convert_ids_to_tokens(range(V)) and tokens[V:] == [
        f"[unused{V + i}]" for i in range(5)
    ]
    assert types[:3] == [3, 3, 3] and types[3:11] == [4] * 8 and set(types[11:V]) == {1} and types[V:] == [5] * 5
    assert [fields[f"tokenizer.ggml.{n}_token_id"] for n in ("bos", "eos", "unknown", "padding")] == [1, 2, 0, 0]
    assert fields["tokenizer.ggml.add_bos_token"] is False and fields["tokenizer.ggml.merges"][0].count(" ") == 1
    # Plain Jinja, which knows no `generation` tag, renders what transformers renders.
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = plain.from_string(fields["tokenizer.chat_template"])
    with pytest.raises(jinja2.TemplateSyntaxError, match="generation"):
        plain.from_string(tokenizer.chat_template)
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "A"},
    ]
    for think in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        for start in (False, True):
            ours = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=start, **think)
            assert template.render(messages=turns, add_generation_prompt=start, **think) == ours


@pytest.mark.parametrize(("kind", "bits"), [("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0")])
def test_types_of_a_gguf(kind, bits, small_tokenizer, tmp_path):
    model = tiny(use_moe=True, intermediate_size=80, vocab_size=SMALL)  # 80 is no multiple of 32, a q8_0 block
    fields, tensors = read_file(exported(tmp_path, model, kind, small_tokenizer))
    assert fields["general.architecture"] == "granitemoe" and fields["granitemoe.expert_used_count"] == 2
    assert fields["granitemoe.attention.scale"] == 0.25 and fields["granitemoe.logit_scale"] == 1.0
    assert fields["granitemoe.expert_shared_feed_forward_length"] == 80
    assert tensors["blk.0.attn_q.weight"][0] == tensors["token_embd.weight"][0] == bits
    assert tensors["blk.0.ffn_gate_inp.weight"][0] == tensors["output_norm.weight"][0] == "F32"
    assert tensors["blk.0.ffn_up_exps.weight"][0] == bits and tensors["blk.0.ffn_up_exps.weight"][1].shape == (
        4,
        80,
        64,
    )
    assert tensors["blk.0.ffn_down_exps.weight"][0] == ("F16" if kind == "q8_0" else bits)
    assert gguf_export.read_gguf(tmp_path / f"{kind}.gguf", model.config)[1] == kind
    weight = model.model.layers[0].mlp.experts[2].up_proj.weight.detach()
    found = torch.from_numpy(np.array(tensors["blk.0.ffn_up_exps.weight"][1][2], dtype=np.float32))
    step = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}[kind]
    assert (found - weight).abs().max() <= step * weight.abs().max()


@pytest.mark.parametrize("scaling", [None, LINEAR, NTK, YARN, ODD_YARN, {**YARN, "attention_factor": 0.8}])
def test_rotary_settings_of_a_gguf(scaling, small_tokenizer, tmp_path):
    """By llama.cpp's formulas the file rotates as the model does; and a file of another model is noticed."""
    model = tiny(rope_scaling=scaling, hidden_size=128, vocab_size=SMALL)
    path = exported(tmp_path, model, tokenizer=small_tokenizer)
    fields, tensors = read_file(path)
    factors = tensors.get("rope_freqs.weight", (None, None))[1]
    frequencies, attention = gguf_export.file_frequencies(fields, factors, "llama", 32)
    expected, factor = rope_frequencies(model.config)
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=2e-6)
    assert attention == pytest.approx(factor, rel=1e-6)
    assert (factors is not None) == (scaling is ODD_YARN)
    other = MiniMindConfig(**{**model.config.to_diff_dict(), "rope_scaling": {"type": "linear", "factor": 1.5}})
    with pytest.raises(BadExport, match="rotates by"):
        gguf_export.read_gguf(path, other)


def test_a_gguf_of_another_model_is_noticed(small_tokenizer, tmp_path):
    model = tiny(vocab_size=SMALL)
    path = exported(tmp_path, model, tokenizer=small_tokenizer)
    for change, words in (({"num_hidden_layers": 3}, "block_count"), ({"num_attention_heads": 8}, "head_count")):
        config = MiniMindConfig(**{**model.config.to_diff_dict(), **change})
        with pytest.raises(BadExport, match=words):
            gguf_export.read_gguf(path, config)
    assert gguf_export.read_gguf(path, model.config, small_tokenizer)[1] == "f32"
    small_tokenizer.chat_template, kept = "{{ messages }}", small_tokenizer.chat_template
    with pytest.raises(BadExport, match="another tokenizer than the model's: chat_template differ"):
        gguf_export.read_gguf(path, model.config, small_tokenizer)
    small_tokenizer.chat_template = kept
    there = {name: torch.zeros(1) for name in ("token_embd.weight", "output_norm.weight")}
    with pytest.raises(BadExport, match="lacks the tensor 'blk.0.attn_q"):
        gguf_export.our_names(model.config, there, path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.update(normalizer={"type": "NFC"}), "normalises"),
        (lambda b: b["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False), "no name in llama.cpp"),
        (lambda b: b["added_tokens"][3].update(lstrip=True), "normalises, adds"),
    ],
    ids=["normalizer", "digits", "strip"],
)
def test_tokenizers_that_llama_cpp_does_not_know(change, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        gguf_export.pre_type(altered(change, tmp_path / "t"))


def test_a_byte_level_tokenizer_without_digits_is_gpt_2(tmp_path):
    def plain(backend):
        backend["pre_tokenizer"] = backend["pre_tokenizer"]["pretokenizers"][1]

    assert gguf_export.pre_type(altered(plain, tmp_path / "t")) == "gpt-2"


def test_other_activations_are_refused(tmp_path):
    with pytest.raises(UserError, match="hidden_act 'gelu'"):
        exported(tmp_path, tiny(hidden_act="gelu"))


# GGUF under llama.cpp


SCALED = [
    ("dense", {}), ("untied", {"tie_word_embeddings": False}), ("linear", {"rope_scaling": LINEAR}),
    ("ntk", {"rope_scaling": NTK}), ("yarn", {"rope_scaling": {**YARN, "attention_factor": 1.2}}),
    ("odd-yarn", {"rope_scaling": ODD_YARN}), ("moe", {"use_moe": True, "n_shared_experts": 2}),
    ("unshared", {"use_moe": True, "n_shared_experts": 0}),
    ("moe-odd-yarn", {"use_moe": True, "rope_scaling": ODD_YARN}),
]  # fmt: skip


@needs_llama_cpp
@pytest.mark.parametrize(("name", "fields"), SCALED, ids=[case[0] for case in SCALED])
def test_llama_cpp_computes_the_same_and_writes_the_same(name, fields, small_tokenizer, tmp_path):
    model = tiny(**fields, vocab_size=SMALL)
    rows = [(ids(1, n)[0] % SMALL).tolist() for n in (90, 12)]
    found = llama_cpp_check.run_llama_cpp(exported(tmp_path, model, tokenizer=small_tokenizer), rows, (), 16)
    expected = verify.logits_of(model, rows)
    d = verify.difference(expected, found.logits)
    assert d.largest < 1e-4 * max(1.0, d.scale) and d.agreement == 1.0
    decoder = Decoder(model, 2, 110)
    ours = decoder.generate(rows, Sampling(temperature=0, max_new_tokens=16))
    assert [request.tokens for request in ours] == found.greedy


@needs_llama_cpp
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_llama_cpp_is_close_on_smaller_types(moe, small_tokenizer, tmp_path):
    model = tiny(use_moe=moe, vocab_size=SMALL)
    rows = [(ids(1, 60)[0] % SMALL).tolist()]
    original = verify.logits_of(model, rows)
    worst = []
    for kind in ("f16", "bf16", "q8_0"):
        reference = folders.build_model(model.config, gguf_export.round_as_gguf(model.state_dict(), kind), tmp_path)
        found = llama_cpp_check.run_llama_cpp(exported(tmp_path, model, kind, small_tokenizer), rows).logits
        d = verify.difference(verify.logits_of(reference, rows), found)
        assert d.of_tokens.median() < checks.LLAMA_CPP_SHARE[kind] * d.spread, kind
        assert verify.difference(original, found).agreement > {"f16": 0.95, "bf16": 0.8, "q8_0": 0.8}[kind]
        worst.append(float(d.of_tokens.median()))
    assert worst[0] < min(worst[1:])  # f16 keeps most


@needs_llama_cpp
def test_llama_cpp_tokenises_identically(tmp_path):
    """Thousands of strings of many scripts, with control tokens read as tokens and as text."""
    random_source = random.Random(0)
    ranges = [
        (32, 127), (32, 127), (0x4E00, 0x9FFF), (0x400, 0x4FF), (0x3040, 0x30FF), (0x1F300, 0x1FAFF), (0xAC00, 0xD7A3),
        (0x600, 0x6FF), (0x900, 0x97F), (0x2000, 0x206F), (0x2150, 0x218F), (0xFF10, 0xFF19), (0x20000, 0x2A6DF),
        (0xA0, 0x24F), (0x300, 0x36F), (0xE00, 0xE7F),
    ]  # fmt: skip
    marks = ["<think>", "</think>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "<|im_", "<thi"]
    blanks = [" ", "  ", "\n", "\n\n", "\t", " \n ", "\r\n", "\u3000", "\u00a0", "'s", "'ll", "'RE", "   "]

    def piece() -> str:
        kind = random_source.random()
        if kind < 0.3:
            return random_source.choice(marks if kind < 0.12 else blanks)
        if kind < 0.4:
            return str(random_source.randrange(10 ** random_source.randint(1, 9)))
        low, high = random_source.choice(ranges)
        return "".join(chr(random_source.randint(low, high)) for _ in range(random_source.randint(1, 6)))

    texts = ["".join(piece() for _ in range(random_source.randint(1, 12))) for _ in range(4000)]
    found = llama_cpp_check.run_llama_cpp(exported(tmp_path, tiny()), [[1]], texts)
    tokenizer, plain = load_tokenizer(), Tokenizer.from_file(str(ROOT / "model" / "tokenizer.json"))
    plain.encode_special_tokens = True  # control tokens are text
    assert len(found.special) == len(found.plain) == 4000
    for text, special, as_text in zip(texts, found.special, found.plain, strict=True):
        assert special == tokenizer.encode(text), text
        assert as_text == plain.encode(text).ids, text


@needs_llama_cpp
def test_what_llama_cpp_refuses_or_reads_otherwise_is_no_good_export(tmp_path, convert, monkeypatch):
    saved(tmp_path / "m.pth")
    monkeypatch.setattr(llama_cpp_check, "installed", lambda: True)
    command = ("to-gguf", "--model", tmp_path / "m.pth", "--to", tmp_path / "x", "--dtype", "f32")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_export, "pre_type", lambda tokenizer: "nobody-knows")
        with pytest.raises(BadExport, match="does not load"):
            convert(*command)
    vocabulary = gguf_export.vocabulary

    def merged_otherwise(tokenizer, vocab_size):
        tokens, types, merges = vocabulary(tokenizer, vocab_size)
        return tokens, types, merges[::-1]

    monkeypatch.setattr(gguf_export, "vocabulary", merged_otherwise)
    with pytest.raises(BadExport, match="llama.cpp reads .* as other tokens"):
        convert(*command)
    assert not (tmp_path / "x").exists()


def test_gguf_command_writes_a_folder(tmp_path, convert, capsys):
    saved(tmp_path / "full_sft_64.pth", rope_scaling=YARN)
    convert("to-gguf", "--model", tmp_path / "full_sft_64.pth", "--to", tmp_path / "g", "--dtype", "f16")
    out = capsys.readouterr().out
    assert "read back, float32: largest logit difference" in out and "llama.cpp itself was not run" in out
    assert {p.name for p in (tmp_path / "g").iterdir()} == {"full_sft_64-f16.gguf", "Modelfile", "README.md"}
    assert (tmp_path / "g" / "Modelfile").read_text(encoding="utf-8").startswith("FROM ./full_sft_64-f16.gguf\n")
    card = (tmp_path / "g" / "README.md").read_text(encoding="utf-8")
    assert "llama.cpp itself was not run" in card and "llama-cli -m full_sft_64-f16.gguf" in card and '"yarn"' in card


@needs_llama_cpp
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_gguf_command_under_llama_cpp(moe, tmp_path, convert, capsys, monkeypatch):
    saved(tmp_path / "m.pth", use_moe=moe)
    monkeypatch.setattr(llama_cpp_check, "installed", lambda: True)
    convert("to-gguf", "--model", tmp_path / "m.pth", "--to", tmp_path / "g", "--dtype", "f32")
    out = capsys.readouterr().out
    assert "llama.cpp, f32: largest logit difference" in out and out.count(": good") == 2
    assert "llama.cpp, greedy: the same 24 tokens after 6 of 6 beginnings" in out
    assert "llama.cpp, greedy: the same" in (tmp_path / "g" / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(checks, "Decoder", lambda model, *sizes: Decoder(tiny(use_moe=moe, seed=1), *sizes))
    with pytest.raises(BadExport, match="llama.cpp continues .* with "):
        convert("to-gguf", "--model", tmp_path / "m.pth", "--to", tmp_path / "other", "--dtype", "f32")
    assert not (tmp_path / "other").exists()


# Ollama


MODELFILE = '''FROM ./m.gguf

TEMPLATE """{{- if or .System .Tools }}<|im_start|>system
{{ .System }}{{ if .Tools }}{{ if .System }}

{{ end }}Functions you can call, one JSON signature per line:
<tools>
{{ range .Tools }}{{ . }}
{{ end }}</tools>
To call one, give its name and arguments as JSON:
<tool_call>
{"name": "...", "arguments": {...}}
</tool_call>{{ end }}<|im_end|>
{{ end }}{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}<|im_start|>user
{{ $m.Content }}<|im_end|>
{{ else if eq $m.Role "assistant" }}<|im_start|>assistant
{{ $m.Content }}{{ if .ToolCalls }}{{ range $j, $c := .ToolCalls }}{{ if or $m.Content $j }}
<tool_call>
{"name": "{{ else }}<tool_call>
{"name": "{{ end }}{{ $c.Function.Name }}", "arguments": {{ $c.Function.Arguments }}}
</tool_call>{{ end }}{{ end }}<|im_end|>
{{ else if eq $m.Role "tool" }}<|im_start|>tool
<tool_response>
{{ $m.Content }}
</tool_response><|im_end|>
{{ end }}{{ end }}<|im_start|>assistant
"""

PARAMETER stop "<|im_end|>"
PARAMETER stop "<|im_start|>"
PARAMETER temperature 0.85
PARAMETER top_p 0.85
PARAMETER repeat_penalty 1
'''


def test_ollama_finds_the_word_that_begins_a_call():
    """As its parser does (`parseTag` of its tools/template.go): the first text in `if .ToolCalls`, up to a brace.

    Actions before that text, and a bare line break, would make it look for JSON without a tag.
    """
    parts = re.split(r"(\{\{.*?\}\})", ollama.go_template(ollama.read_pieces(load_tokenizer())))
    inside = parts[parts.index("{{ if .ToolCalls }}") + 1 :]
    at = next(i for i, part in enumerate(inside) if part and not part.startswith("{{"))
    assert all(not part or part.startswith(("{{ if ", "{{ range ")) for part in inside[:at])
    assert inside[at].partition("{")[0].strip() == "<tool_call>"


def test_modelfile_of_the_shipped_tokenizer():
    assert ollama.modelfile("m.gguf", load_tokenizer(), continues_text=False) == MODELFILE
    assert 'TEMPLATE """<|im_start|>{{ .Prompt }}"""' in ollama.modelfile("m.gguf", load_tokenizer(), True)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}"
            "{% if add_generation_prompt %}[assistant: {% endif %}",
            '{{- if .System }}[system: {{ .System }}]{{ end }}{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}'
            '[user: {{ $m.Content }}]{{ else if eq $m.Role "assistant" }}[assistant: {{ $m.Content }}]{{ end }}'
            "{{ end }}[assistant: ",
        ),
        ("{{ messages[-1].content }}", "# No TEMPLATE: the template "),  # no memory
        ("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}", "# No TEMPLATE: the template "),
        ("{{ raise_exception('no') }}", "# No TEMPLATE: no."),
        (None, "# No TEMPLATE: "),
    ],
    ids=["brackets", "last-only", "counted", "refuses", "none"],
)
def test_modelfile_of_other_templates(template, expected):
    tokenizer = load_tokenizer()
    tokenizer.chat_template = template
    assert expected in ollama.modelfile("m.gguf", tokenizer, continues_text=False)


GO = """package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Any map[string]any

func (a Any) String() string { b, _ := json.Marshal(a); return string(b) }

type Function struct { Name string; Arguments Any }
type Call struct { Function Function }
type Message struct { Role, Content string; ToolCalls []Call }
type Chat struct { System string; Messages []Message; Tools []Any }

func main() {
	text, _ := os.ReadFile(os.Args[1])
	var chats []Chat
	if err := json.NewDecoder(os.Stdin).Decode(&chats); err != nil { panic(err) }
	t, out := template.Must(template.New("").Parse(string(text))), []string{}
	for _, c := range chats {
		var b strings.Builder
		if err := t.Execute(&b, c); err != nil { panic(err) }
		out = append(out, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(out)
}
"""


CALL = {"function": {"name": "look", "arguments": {"city": "Rome"}}}
TOOLS = [{"function": {"name": "look"}, "type": "function"}]  # in the order in which Go writes a map
CHATS = [
    ([{"role": "user", "content": "hi {{ x }}"}], None),
    ([{"role": "system", "content": "S"}, {"role": "user", "content": "你\n"},
      {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], None),
    ([{"role": "user", "content": "w"}, {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
      {"role": "tool", "content": "dry"}, {"role": "assistant", "content": "so", "tool_calls": [CALL]},
      {"role": "user", "content": "w"}], TOOLS),
    ([{"role": "system", "content": "S"}, {"role": "user", "content": "w"}], TOOLS * 2),
]  # fmt: skip


def as_ollama_gives_them() -> list[dict]:
    """The chats with the names that its templates know."""
    given = []
    for messages, listed in CHATS:
        turns = []
        for m in messages:
            functions = [c["function"] for c in m.get("tool_calls", ())]
            calls = [{"Function": {"Name": f["name"], "Arguments": f["arguments"]}} for f in functions]
            turns.append({"Role": m["role"], "Content": m["content"], "ToolCalls": calls})
        system = next((m["content"] for m in messages if m["role"] == "system"), "")
        given.append({"System": system, "Messages": turns, "Tools": listed or []})
    return given


def compare_with_ours(rendered: list[str]) -> None:
    for (messages, listed), got in zip(CHATS, rendered, strict=True):
        ours = load_tokenizer().apply_chat_template(messages, tools=listed, tokenize=False, add_generation_prompt=True)
        if listed:  # Go writes JSON without blanks
            ours, got = (text.replace(": ", ":").replace(", ", ",") for text in (ours, got))
        assert got == ours


class GoTemplate:
    """As much of Go's text/template as ours uses, for machines without Go: if, else, range, or, eq, fields."""

    def __init__(self, text: str):
        self.parts = iter(re.split(r"(\{\{.*?\}\})", text.replace("{{-", "{{", 1)))
        self.nodes, end = self.read()
        assert end is None

    def read(self) -> tuple[list, str | None]:
        """The nodes up to an `end` or `else`, and which it was."""
        nodes = []
        for part in self.parts:
            word, _, rest = part[2:-2].strip().partition(" ")
            if not part.startswith("{{"):
                nodes.append(part)
            elif word in ("end", "else"):
                return nodes, f"{word} {rest}".strip()
            elif word == "if":
                nodes.append(self.read_if(rest))
            elif word == "range":
                body, end = self.read()
                assert end == "end"
                nodes.append(("range", rest, body, []))
            else:
                nodes.append(("write", part[2:-2].strip(), [], []))
        return nodes, None

    def read_if(self, condition: str) -> tuple:
        body, end = self.read()
        other = []
        if end == "else":
            other, end = self.read()
        elif end != "end":
            other, end = [self.read_if(end.removeprefix("else if "))], "end"
        assert end == "end"
        return "if", condition, body, other

    def value(self, word: str, scope: dict):
        if word.startswith('"'):
            return json.loads(word)
        name, *path = word.split(".")
        found = scope[name]
        for key in filter(None, path):
            found = found[key]
        return found

    def evaluate(self, words: str, scope: dict):
        first, *rest = words.split(" ")
        if not rest:
            return self.value(first, scope)
        left, right = (self.value(word, scope) for word in rest)
        return {"or": left or right, "eq": left == right}[first]

    def render(self, nodes: list, scope: dict) -> str:
        text = ""
        for node in nodes:
            if isinstance(node, str):
                text += node
                continue
            kind, words, body, other = node
            if kind == "range":
                names, _, words = words.rpartition(":= ")
                names = [name.strip() for name in names.split(",") if name.strip()]
                for pair in enumerate(self.evaluate(words, scope)):
                    text += self.render(body, {**scope, **dict(zip(names, pair, strict=False)), "": pair[1]})
                continue
            found = self.evaluate(words, scope)
            if kind == "if":
                text += self.render(body if found else other, scope)
            else:
                text += found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
        return text


def test_the_template_of_the_modelfile_renders_what_ours_renders():
    template = GoTemplate(ollama.go_template(ollama.read_pieces(load_tokenizer())))
    compare_with_ours([template.render(template.nodes, {"": chat}) for chat in as_ollama_gives_them()])


@pytest.mark.skipif(shutil.which("go") is None, reason="needs the Go toolchain, whose templates Ollama uses")
def test_go_renders_what_our_template_renders(tmp_path):
    (tmp_path / "main.go").write_text(GO, encoding="utf-8")
    (tmp_path / "t.txt").write_text(ollama.go_template(ollama.read_pieces(load_tokenizer())), encoding="utf-8")
    environment = {**os.environ, "GOCACHE": str(tmp_path / "cache"), "GO111MODULE": "off", "GOFLAGS": ""}
    done = subprocess.run(
        ["go", "run", str(tmp_path / "main.go"), str(tmp_path / "t.txt")], input=json.dumps(as_ollama_gives_them()),
        text=True, capture_output=True, env=environment, timeout=240, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    compare_with_ours(json.loads(done.stdout))
