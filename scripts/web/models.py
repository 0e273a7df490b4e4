"""Which models there are to choose from, and loading one.

A choice is known by its name in a list made here. What the page sends back is looked up in that list, never opened.

中文：列出可选的模型与适配器并加载；页面传回的名称只在列表中查找，不当作路径打开。
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval_model import load_all, stage_of
from model.model_lora import load_lora
from model.model_minimind import MiniMindForCausalLM
from model.weights import WeightsError, read_about
from scripts.web.backends import LocalBackend
from trainer.command_line import UserError
from trainer.trainer_utils import find_device

DEEPEST = 4  # folders below out/ that are looked into
MOST = 500  # files listed


@dataclass(frozen=True)
class Choice:
    """Something to load. name: as the page lists it; changed: of the file, in nanoseconds, so that a newer one is
    loaded anew; width, layers: of the model it is or fits to, None where not known."""

    name: str
    path: Path
    changed: int
    stage: str | None = None
    width: int | None = None
    layers: int | None = None


def walk(folder: Path) -> list[tuple[Path, list[str]]]:
    """(folder, its file names) of everything below, links not followed."""
    found = []
    for here, folders, files in os.walk(folder):
        depth = len(Path(here).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < DEEPEST else []
        found.append((Path(here), sorted(files)))
    return found


def choice_of(path: Path, name: str) -> Choice | None:
    """None when the file is damaged at first sight, no model to talk to, or gone by now."""
    try:
        about, changed = read_about(path), path.stat().st_mtime_ns
    except (WeightsError, OSError):
        about, changed = {}, path.stat().st_mtime_ns if path.exists() else 0
    stage = about.get("stage") or (stage_of(path) if not about else None)
    if not changed or stage == "reward" or path.name.startswith("reward_") or "lora" in about:
        return None
    config = about.get("config", {})
    return Choice(name, path, changed, stage, config.get("hidden_size"), config.get("num_hidden_layers"))


def is_model_folder(files: Sequence[str]) -> bool:
    weights = any(name.endswith((".safetensors", ".bin")) for name in files)
    return "config.json" in files and weights


def find_models(out_dir: Path, extra: Sequence[Path] = ()) -> list[Choice]:
    """Weight files and transformers folders below `out_dir`, newest first, behind those named on the command line."""
    found = []
    for folder, files in walk(out_dir):
        inside = folder.relative_to(out_dir)
        if "lora" in inside.parts:
            continue
        if is_model_folder(files):
            found.append(choice_of(folder, str(inside)))
            continue
        found += [choice_of(folder / file, str(inside / file)) for file in files if file.endswith(".pth")]
    named = [choice_of(path, path.name or str(path)) for path in extra]
    ranked = sorted((choice for choice in found if choice), key=lambda choice: -choice.changed)[:MOST]
    return [choice for choice in named if choice] + ranked


def find_adapters(out_dir: Path, model: Choice) -> list[Choice]:
    """LoRA adapters in `out_dir/lora` that may fit the model: files, or folders of the peft library."""
    found = []
    for folder, files in walk(out_dir / "lora"):
        inside = folder.relative_to(out_dir / "lora")
        if "adapter_config.json" in files:
            found.append(Choice(str(inside), folder, folder.stat().st_mtime_ns))
            continue
        for path in (folder / file for file in files if file.endswith(".pth")):
            try:
                config = read_about(path).get("config", {})
            except WeightsError:
                continue  # its JSON is damaged: loading would fail
            width, layers = config.get("hidden_size"), config.get("num_hidden_layers")
            if width in (None, model.width) and layers in (None, model.layers):
                found.append(Choice(str(inside / path.stem), path, path.stat().st_mtime_ns, None, width, layers))
    return sorted(found, key=lambda choice: -choice.changed)[:MOST]


def load(choice: Choice, adapter: Choice | None, device: str | None, max_seq_len: int) -> LocalBackend:
    """Raises: WeightsError, UserError when something is missing or does not fit."""
    args = argparse.Namespace(
        hidden_size=None, num_hidden_layers=None, use_moe=None, dtype="auto", tokenizer=None, lora_name=None
    )
    model, tokenizer = load_all(args, choice.path, find_device(device))
    if adapter:
        if not isinstance(model, MiniMindForCausalLM):
            raise UserError("An adapter works with MiniMind weights only: choose none.")
        load_lora(model, adapter.path)
    return LocalBackend(model, tokenizer, choice.stage, max_seq_len)
