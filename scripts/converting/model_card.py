"""The README.md of an export: what it is, how to run it, and the figures of its verification.

中文：导出文件夹的模型卡。
"""

import json

from model.model_minimind import MiniMindConfig
from scripts.converting.folders import Source

STAGE_WORDS = {
    "pretrain": "pretrained: it continues text",
    "full_sft": "fine-tuned on conversations",
    "rlhf": "fine-tuned on preferences (DPO)",
    "full_dist": "distilled from a larger model",
    "reason": "fine-tuned to reason before it answers",
    "grpo": "trained with GRPO",
    "ppo_actor": "trained with PPO",
}

LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust}, dtype="float32")
{rest}```
"""
CHAT = """ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0, ids["input_ids"].shape[1] :]))
"""
CONTINUE = """ids = tokenizer("<BOS>Once upon a time", return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0]))
"""
VLLM = """```bash
vllm serve FOLDER --served-model-name minimind
```
"""
LLAMA_CPP_CHAT = """```bash
llama-cli -m FILE -cnv                    # chat
llama-server -m FILE --port 8080          # an OpenAI-compatible server
ollama create minimind -f Modelfile && ollama run minimind
```
"""
LLAMA_CPP_CONTINUE = """```bash
llama-server -m FILE --port 8080
curl http://localhost:8080/completion -d '{"prompt": "<BOS>Once upon a time", "n_predict": 100}'
ollama create minimind -f Modelfile && ollama run minimind "Once upon a time"
```
"""


def parameters(config: MiniMindConfig) -> int:
    """How many numbers there are to learn, tied embedding counted once."""
    D, F, C = config.hidden_size, config.intermediate_size, config.head_dim
    attention = 2 * D * D + 2 * D * config.num_key_value_heads * C
    experts = config.n_routed_experts + config.n_shared_experts if config.use_moe else 1
    layer = attention + 3 * D * F * experts + 2 * D + (D * config.n_routed_experts if config.use_moe else 0)
    embeddings = config.vocab_size * D * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * layer + D


def model_card(source: Source, form: str, type_name: str, figures: list[str]) -> str:
    """Markdown with the header that the Hugging Face hub reads.

    Args: form, "minimind", an architecture of transformers, or the name of a GGUF file; figures, sentences.
    """
    config, is_file = source.config, form.endswith(".gguf")
    kind = "a dense decoder in the Llama layout"
    if config.use_moe:
        shared = f" and {config.n_shared_experts} shared" if config.n_shared_experts else ""
        kind = f"a mixture of {config.n_routed_experts} routed experts, {config.num_experts_per_tok} per token,{shared}"
    rows = [
        ("stage", STAGE_WORDS.get(source.stage, source.stage or "unknown")),
        ("parameters", f"{parameters(config):,}"),
        ("layers, hidden size", f"{config.num_hidden_layers}, {config.hidden_size}"),
        ("query / key-value heads", f"{config.num_attention_heads} / {config.num_key_value_heads}"),
        ("vocabulary", f"{config.vocab_size:,} (byte-level BPE)"),
        ("numbers stored as", type_name),
    ]
    if config.rope_scaling:
        rows.append(("rotary scaling", f"`{json.dumps(config.rope_scaling)}`"))
    lines = ["---", f"library_name: {'gguf' if is_file else 'transformers'}", "pipeline_tag: text-generation"]
    lines += ["language: [zh, en]", "tags: [minimind]", "---", "", f"# {source.name}", ""]
    lines += [f"A small language model of the MiniMind family, {kind}; here as `{form}`.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += ["", "## Run it", ""]
    chats, bos = source.stage != "pretrain", source.tokenizer.bos_token or ""
    if is_file:
        run = LLAMA_CPP_CHAT if chats else LLAMA_CPP_CONTINUE
        lines.append(run.replace("FILE", form).replace("<BOS>", bos))
    else:
        rest = CHAT if chats else CONTINUE.replace("<BOS>", bos)
        trust = ", trust_remote_code=True" if form == "minimind" else ""
        lines.append(LOAD.replace("{trust}", trust).replace("{rest}", rest))
        if form != "minimind":
            lines.append(VLLM)
    if chats:
        lines += ["Chats are ChatML; the template comes with the tokenizer.", ""]
    lines += ["## Checked when it was written", "", *(f"- {figure}" for figure in figures)]
    return "\n".join(lines) + "\n"
