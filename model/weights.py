"""Weights on disk: `out/{stage}_{hidden_size}[_moe].pth`, and beside each a small JSON file with its configuration.

The `.pth` is a plain half-precision state dict (`torch.load(weights_only=True)` reads it anywhere). Published weights
that come without the JSON load too: their configuration is read off the tensor shapes.
"""

import json
import zipfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from model.files import atomic_open
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

ROOT = Path(__file__).resolve().parents[1]
# In the order of the pipeline; the newest file decides, the later stage where two are equally new.
TRAINERS = {
    "pretrain": "train_pretrain.py", "full_sft": "train_full_sft.py", "rlhf": "train_dpo.py",
    "full_dist": "train_distillation.py", "reason": "train_distill_reason.py", "grpo": "train_grpo.py",
    "ppo_actor": "train_ppo.py",
}  # fmt: skip
STAGES = ("pretrain", "full_sft", "rlhf", "full_dist", "reason", "grpo", "ppo_actor")


class WeightsError(ValueError):
    """A weight file is missing, unreadable or of another shape. The message is a full sentence for the user."""


def weight_path(out_dir: str | Path, stage: str, config: MiniMindConfig) -> Path:
    """`out_dir/stage_512.pth`, or `out_dir/stage_640_moe.pth` for a mixture of experts."""
    return Path(out_dir) / f"{stage}_{config.hidden_size}{'_moe' if config.use_moe else ''}.pth"


def save_weights(
    model: PreTrainedModel, path: str | Path, extra: dict | None = None, leave_out: str | None = None
) -> None:
    """Writes the half-precision state dict and, beside it, a JSON file with the configuration and `extra`.

    Args: leave_out, first letters of names that do not belong into the file.
    Raises: OSError when the disk is full or the folder cannot be written; older files stay untouched.
    """
    path = Path(path)
    halves: dict[int, torch.Tensor] = {}  # tied tensors stay one tensor, so the file holds them once
    state = {
        name: halves.setdefault(tensor.data_ptr(), tensor.detach().to("cpu", torch.float16).contiguous())
        for name, tensor in model.state_dict().items()
        if leave_out is None or not name.startswith(leave_out)
    }
    # Both are written in full before either gets its name; only a kill between the two renames can part them, and then
    # loading says so.
    with atomic_open(path.with_suffix(".json"), "w") as about, atomic_open(path) as weights:
        json.dump({"config": model.config.to_diff_dict(), **(extra or {})}, about, ensure_ascii=False, indent=2)
        about.flush()
        torch.save(state, weights)


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.pth` file. Nothing in the file is executed.

    Raises: WeightsError when the file is missing, cut off, or holds something else than named tensors.
    """
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; expected a .pth file, or a stage: {', '.join(STAGES)}.")
    try:
        with open(path, "rb") as f:  # an empty, cut off or foreign file has no archive directory at its end
            if not zipfile.is_zipfile(f):
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # damaged bytes surface as any type, and torch's own text advises to run the file's code
        raise WeightsError(
            f"{path} is empty, cut off, damaged or no weight file. Copy it again or train it again."
        ) from error
    tensors = isinstance(state, dict) and all(isinstance(v, torch.Tensor) for v in state.values())
    if not tensors or not state or not all(isinstance(name, str) for name in state):
        raise WeightsError(f"{path} holds no plain state dict; expected names and tensors as written by the trainers.")
    return state


def read_about(path: Path) -> dict:
    """What the JSON beside a weight file says: config, stage, tokenizer …; empty where there is none (or for a folder).

    Raises: WeightsError when it is damaged.
    """
    if path.is_dir() or not (sidecar := path.with_suffix(".json")).is_file():
        return {}
    try:
        about = json.loads(sidecar.read_text(encoding="utf-8"))
        MiniMindConfig(**about["config"])
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise WeightsError(
            f"{sidecar} is damaged ({error}). Delete it to read the sizes off the weights instead."
        ) from error
    return about


def read_config(path: Path, state: dict[str, torch.Tensor]) -> MiniMindConfig:
    """The configuration from the JSON beside the weights, else from the tensor shapes (8 query heads assumed)."""
    if about := read_about(path):
        return MiniMindConfig(**about["config"])
    try:
        vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
        heads = MiniMindConfig().num_attention_heads
        layers = {name.split(".")[2] for name in state if name.startswith("model.layers.")}
        router = state.get("model.layers.0.mlp.gate.weight")
        prefix = "model.layers.0.mlp." + ("experts.0." if router is not None else "")
        moe = {}
        if router is not None:
            shared = {name.split(".")[5] for name in state if name.startswith("model.layers.0.mlp.shared_experts.")}
            moe = {"use_moe": True, "n_routed_experts": len(router), "n_shared_experts": len(shared)}
        return MiniMindConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=len(layers),
            num_attention_heads=heads,
            num_key_value_heads=state["model.layers.0.self_attn.k_proj.weight"].shape[0] // (hidden_size // heads),
            intermediate_size=state[prefix + "gate_proj.weight"].shape[0],
            **moe,
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise WeightsError(f"{path} does not look like MiniMind weights: {error}.") from error


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **expected: object
) -> PreTrainedModel:
    """The model of a `.pth` file (strict: every name must match) or of a transformers folder, in eval mode.

    Args: expected: configuration values the caller insists on, for example hidden_size=512; None means "as saved".
    Raises: WeightsError on a missing or damaged file, and when an expected value differs.
    """
    path = Path(path)
    if path.is_dir():
        model = load_folder(path)
        config = model.config
    else:
        state = read_state_dict(path)
        if any(".lora." in name for name in state):
            raise WeightsError(f"{path} is a LoRA adapter, no model: name its base, and the adapter with --lora_name.")
        config = read_config(path, state)
        model = None
    for name, value in expected.items():
        if value is not None and getattr(config, name, None) != value:
            raise WeightsError(
                f"{path} has {name} {getattr(config, name, None)}, but {value} was asked for. Leave out --{name}: "
                "the file knows its own sizes."
            )
    if model is None:
        model = MiniMindForCausalLM(config)
        if "score.weight" in state:  # a reward model (trainer/train_reward.py)
            model.score = nn.Linear(config.hidden_size, 1, bias=False)
        if "lm_head.weight" not in state and "model.embed_tokens.weight" in state:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        try:
            model.load_state_dict(state, strict=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            sidecar = path.with_suffix(".json")
            advice = f" Delete {sidecar} to read the sizes off the weights." if sidecar.is_file() else ""
            raise WeightsError(f"{path} does not fit its configuration: {reason}.{advice}") from error
    return model.to(device=device, dtype=dtype).eval()


def load_folder(path: Path) -> PreTrainedModel:
    """A transformers folder: ours through our own class, others through transformers; code in the folder is not run.

    Raises: WeightsError when something is missing: transformers itself would fill a gap with random weights.
    """
    config_file = path / "config.json"
    if not config_file.is_file():
        raise WeightsError(f"{path} holds no config.json; expected a transformers model folder or a .pth file.")
    try:
        ours = json.loads(config_file.read_text(encoding="utf-8")).get("model_type") == MiniMindConfig.model_type
        model, report = (MiniMindForCausalLM if ours else AutoModelForCausalLM).from_pretrained(
            path, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # the file formats of transformers each bring their own types
        raise WeightsError(f"{path} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    if report["missing_keys"]:
        raise WeightsError(f"{path} lacks {', '.join(sorted(report['missing_keys']))[:300]}. Copy it again.")
    return model


def find_weights(
    out_dir: str | Path, stage: str | None = None, hidden_size: int | None = None, use_moe: bool | None = None
) -> Path:
    """The newest weight file in a folder, among those that agree with what is given.

    Raises: WeightsError that says what to run when there is none.
    """
    found = []
    for rank, name in enumerate(STAGES):
        for path in Path(out_dir).glob(f"{name}_*.pth"):
            size, _, moe = path.stem.removeprefix(f"{name}_").partition("_")
            if (
                stage in (None, name)
                and size.isdigit()
                and moe in ("", "moe")
                and hidden_size in (None, int(size))
                and use_moe in (None, moe == "moe")
            ):
                found.append((path.stat().st_mtime, rank, path))
    if not found:
        wanted = f"{stage} weights" if stage else "weights"
        wanted += f" of hidden_size {hidden_size}" if hidden_size else ""
        wanted += "" if use_moe is None else " with experts" if use_moe else " without experts"
        there = sorted(path.stem for name in STAGES for path in Path(out_dir).glob(f"{name}_*.pth"))
        script = TRAINERS.get(stage or "pretrain")
        size = f" --hidden_size {hidden_size}" if hidden_size and script == TRAINERS["pretrain"] else ""
        advice = f"Train some with `python trainer/{script}{size}`" if script else "No script here makes them yet"
        raise WeightsError(
            f"There are no {wanted} in {out_dir}{' (it holds ' + ', '.join(there) + ')' if there else ''}. {advice}"
            f"{'' if there else ', or everything at once with `python scripts/quick_start.py`'}."
        )
    return max(found)[2]


def load_tokenizer(path: str | Path | None = None) -> PreTrainedTokenizerFast:
    """The shipped tokenizer, or the one in a folder.  Raises: WeightsError when there is none."""
    folder = Path(path) if path else ROOT / "model"
    if not (folder / "tokenizer.json").is_file():
        raise WeightsError(f"{folder} holds no tokenizer.json; train one with `python scripts/train_tokenizer.py`.")
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
