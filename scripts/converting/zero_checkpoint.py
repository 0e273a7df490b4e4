"""A checkpoint of DeepSpeed's ZeRO, whose pieces lie with the ranks that owned them, as one state dict.

`engine.save_checkpoint(folder)` writes `folder/latest` and `folder/global_stepN/`. The pieces are joined by DeepSpeed's
own `zero_to_fp32`. That function reads its files with `torch.load(weights_only=False)`, which runs whatever a file
says; here torch is told to refuse that, and to accept, beside tensors, the few classes of DeepSpeed that a checkpoint
really holds.

中文：把 DeepSpeed ZeRO 的分片检查点合并为一个权重字典；不执行文件中的任何代码。
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.model_minimind import MiniMindConfig
from model.weights import WeightsError
from scripts.converting.folders import read_config_from
from trainer.command_line import UserError

# What its files hold beside tensors at stages 0 to 3; the last stands for float16, which needs a GPU and was not tried.
# They only keep numbers and names.
KNOWN_CLASSES = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)


def is_zero_checkpoint(folder: Path) -> bool:
    """Whether DeepSpeed wrote it: the folder with `latest`, or one `global_step…` of it."""
    return (folder / "latest").is_file() or any(folder.glob("*_model_states.pt"))


@contextlib.contextmanager
def nothing_is_run() -> Iterator[None]:
    """torch.load refuses everything but tensors, plain values and the known classes, whatever its caller asks for."""
    classes = []
    for path in KNOWN_CLASSES:
        module, _, name = path.rpartition(".")
        with contextlib.suppress(ImportError, AttributeError):  # another version of DeepSpeed: it is not in its files
            classes.append(getattr(importlib.import_module(module), name))
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(classes):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def read_zero_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Float32 tensors by our names.  Raises: UserError without DeepSpeed; WeightsError when the pieces do not join."""
    try:
        deepspeed = importlib.import_module("deepspeed.utils.zero_to_fp32")  # no requirement of the project
    except ImportError as error:
        raise UserError(f"{folder} is a ZeRO checkpoint, which needs DeepSpeed: pip install deepspeed") from error
    tag = None if (folder / "latest").is_file() else folder.name
    parent = folder if tag is None else folder.parent
    try:
        with nothing_is_run():
            state = read_whole(parent, tag)  # stage 0 leaves every rank a whole model
            state = state or deepspeed.get_fp32_state_dict_from_zero_checkpoint(str(parent), tag)
    except Exception as error:  # missing ranks, other stages and damaged files each surface as another type
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"{folder} could not be joined to one model: {reason}") from error
    return {name.removeprefix("module."): tensor.float() for name, tensor in state.items()}


def read_whole(parent: Path, tag: str | None) -> dict[str, Tensor] | None:
    """The model of a checkpoint without ZeRO (stage 0); None where the weights are in pieces."""
    tag = tag or (parent / "latest").read_text(encoding="utf-8").strip()
    folder, file = parent / tag, parent / tag / "mp_rank_00_model_states.pt"
    if any(folder.glob("*_optim_states.pt")) or not file.is_file():
        return None
    return torch.load(file, map_location="cpu", weights_only=True)["module"]


def run_config(folder: Path) -> MiniMindConfig:
    """The configuration that lies with a checkpoint: a JSON of ours in its folder or beside it.

    Raises: UserError when there is none.
    """
    for place in (folder, folder.parent):
        for file in sorted(place.glob("*.json"), reverse=True):  # step_….json: the newest first
            try:
                return read_config_from(file)
            except UserError:
                continue
    raise UserError(
        f"nothing in or beside {folder} says how large the model is: give --config_from FILE, a .pth file of the same "
        "size with its JSON, or a config.json."
    )
