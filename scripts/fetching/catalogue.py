"""What is published under which name: data files and weights of the MiniMind family, and where they are.

The sizes are those the publisher names; the hub is asked for the exact ones.

中文：已发布的数据文件与权重：名称、用途、所在仓库。
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OWNERS = {"huggingface": "jingyaogong", "modelscope": "gongjy"}

DATA = {  # name: (size, what for)
    "pretrain_hq.jsonl": ("1.6 GB", "pretraining"),
    "pretrain_t2t_mini.jsonl": ("1.2 GB", "pretraining, newer"),
    "pretrain_t2t.jsonl": ("10 GB", "pretraining, newer"),
    "sft_mini_512.jsonl": ("1.2 GB", "SFT, up to 512 characters"),
    "sft_512.jsonl": ("7.5 GB", "SFT, up to 512 characters"),
    "sft_1024.jsonl": ("5.6 GB", "SFT, up to 1024 characters"),
    "sft_2048.jsonl": ("9 GB", "SFT, up to 2048 characters"),
    "sft_t2t_mini.jsonl": ("1.6 GB", "SFT, newer"),
    "sft_t2t.jsonl": ("14 GB", "SFT, newer"),
    "lora_identity.jsonl": ("23 KB", "LoRA: a name"),
    "lora_medical.jsonl": ("34 MB", "LoRA: medicine"),
    "dpo.jsonl": ("55 MB", "DPO"),
    "r1_mix_1024.jsonl": ("340 MB", "reasoning"),
    "rlaif-mini.jsonl": ("1 MB", "GRPO, PPO"),
    "rlaif.jsonl": ("24 MB", "GRPO, PPO, newer"),
}
FOLDERS = {  # transformers folders
    "MiniMind2-Small": "26M, 512 × 8",
    "MiniMind2": "104M, 768 × 16",
    "MiniMind2-MoE": "145M mixture of experts, 640 × 8",
}
PTH_REPOSITORY = {"huggingface": "MiniMind2-Pytorch", "modelscope": "MiniMind2-PyTorch"}  # STAGE_512.pth …
# Of a folder: configuration, tokenizer, weights, text. Code is left where it is; our own classes read the weights.
WANTED = {".json", ".safetensors", ".bin", ".pth", ".model", ".txt", ".md", ".jinja", ".jsonl", ".parquet"}


@dataclass(frozen=True)
class Wish:
    """One thing to fetch. `path` is a file of the repository, None for all of it that is WANTED."""

    repo: str  # OWNER/NAME
    kind: str  # dataset, model
    path: str | None
    folder: Path  # where it goes


def find(name: str, source: str) -> Wish | None:
    """The wish behind a name on the command line, or None when no published thing is called so."""
    owner = OWNERS[source]
    if name in DATA:
        return Wish(f"{owner}/minimind_dataset", "dataset", name, ROOT / "dataset")
    if name in FOLDERS:
        return Wish(f"{owner}/{name}", "model", None, ROOT / name)
    if name.endswith(".pth") and "/" not in name:
        return Wish(f"{owner}/{PTH_REPOSITORY[source]}", "model", name, ROOT / "out")
    return None


def listing() -> str:
    """The names as a table for people."""
    lines = [f"{name:26}{size:>8}   {use}" for name, (size, use) in DATA.items()]
    lines += [f"{name:26}{'':8}   weights, {size}" for name, size in FOLDERS.items()]
    lines += [f"{'full_sft_512.pth …':26}{'':8}   weights of one stage: STAGE_512, STAGE_768, STAGE_640_moe"]
    return "\n".join(lines)
