"""LoRA: a frozen model learns through small added matrices (Hu et al. 2021, arXiv:2106.09685).

    y = W·x + (alpha / rank) · B·A·x        A (rank, in), B (out, rank), B = 0 at the start: nothing changes at first

An adapter is one A and one B for each linear layer it targets. A model can carry several and switch between them
(`set_adapter`); merged into the weights one costs nothing at inference. Files: `out/lora/NAME_512.pth`, a plain
half-precision state dict (`….q_proj.lora.A.weight`) with a JSON beside it, or a folder as the peft library writes it.

Dimension legend: r rank · in, out features of a linear layer.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.files import atomic_open
from model.weights import WeightsError, read_state_dict

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # all inside the blocks
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraConfig:
    """What fixes an adapter.  Raises: ValueError on an impossible value."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = TARGETS

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"a LoRA needs rank ≥ 1, alpha > 0 and dropout in [0, 1); got {self}")
        unknown = set(self.target_modules) - set(TARGETS)
        if unknown or not self.target_modules:
            raise ValueError(f"LoRA targets {sorted(unknown) or 'nothing'}; expected some of {', '.join(TARGETS)}")


class Adapter(nn.Module):
    """(alpha / rank) · B·A·x of one layer.  Shape: (…, in) → (…, out)."""

    def __init__(self, base: nn.Linear, config: LoraConfig):
        super().__init__()
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.A = nn.Linear(base.in_features, config.rank, bias=False, **like)  # torch's start: uniform to 1/√in
        self.B = nn.Linear(config.rank, base.out_features, bias=False, **like)
        nn.init.zeros_(self.B.weight)
        self.scale, self.dropout = config.alpha / config.rank, config.dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(F.dropout(x, self.dropout, self.training))) * self.scale

    def matrix(self) -> Tensor:
        """What it adds to the weight.  Shape: (out, in)."""
        return self.B.weight @ self.A.weight * self.scale


class LoraLinear(nn.Linear):
    """A linear layer with adapters. It shares the weight of the layer whose place it takes, name and all."""

    def __init__(self, base: nn.Linear):
        nn.Module.__init__(self)  # not nn.Linear's: it would make a weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.writes_to_residual = getattr(base, "writes_to_residual", False)
        self.adapters = nn.ModuleDict()
        self.active: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + self.adapters[self.active](x) if self.active else y

    def full_weight(self) -> Tensor:
        """The weight with the active adapter, for whoever takes matrices instead of calling the layer."""
        return self.weight + self.adapters[self.active].matrix() if self.active else self.weight


def key_of(name: str) -> str:
    """The name of an adapter as the name of a module.  Raises: ValueError on one that cannot be."""
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"LoRA name {name!r}; expected letters, digits, - and _")
    return f"lora_{name}"


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers that carry adapters, by their names in the model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def add_lora(model: nn.Module, config: LoraConfig, name: str = "default") -> None:
    """Gives the model a new adapter, active and trainable; all else is frozen. It computes what it did before."""
    key = key_of(name)
    for module in lora_layers(model).values():  # one of that name before it
        if key in module.adapters:
            del module.adapters[key]
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or path.rpartition(".")[2] not in config.target_modules:
            continue
        if not isinstance(module, LoraLinear):
            parent, _, child = path.rpartition(".")
            module = LoraLinear(module)
            setattr(model.get_submodule(parent), child, module)
        module.adapters[key] = Adapter(module, config)
    model.requires_grad_(False)
    for module in lora_layers(model).values():
        if key in module.adapters:
            module.adapters[key].requires_grad_(True)
    model.train(model.training)
    set_adapter(model, name)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Makes one adapter active, or none.  Raises: ValueError when the model has none of that name."""
    layers = lora_layers(model).values()
    key = key_of(name) if name is not None else None
    if key is not None and not any(key in module.adapters for module in layers):
        names = sorted({k.removeprefix("lora_") for module in layers for k in module.adapters})
        raise ValueError(f"the model has no LoRA {name!r}; it has {', '.join(names) or 'none'}")
    for module in layers:
        module.active = key if key in module.adapters else None


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Adds the active adapter to the weights and takes all adapters off: plain linear layers again."""
    for path, module in lora_layers(model).items():
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        linear.weight = nn.Parameter(module.full_weight().to(module.weight.dtype), module.weight.requires_grad)
        linear.bias = module.bias
        linear.writes_to_residual = module.writes_to_residual
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, linear.train(module.training))
    return model


def lora_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The matrices of one adapter: `….q_proj.lora.A.weight` (r, in) and `….q_proj.lora.B.weight` (out, r)."""
    key, state = key_of(name), {}
    for path, module in lora_layers(model).items():
        if key in module.adapters:
            state[f"{path}.lora.A.weight"] = module.adapters[key].A.weight.detach()
            state[f"{path}.lora.B.weight"] = module.adapters[key].B.weight.detach()
    return state


def save_lora(model: nn.Module, path: str | Path, config: LoraConfig, name: str = "default", extra: dict | None = None):
    """Writes one adapter in half precision, and beside it a JSON with its configuration and the model's.

    Raises: OSError when the disk is full or the folder cannot be written; older files stay untouched.
    """
    path = Path(path)
    state = {k: v.to("cpu", torch.float16).contiguous() for k, v in lora_state_dict(model, name).items()}
    about = {"config": model.config.to_diff_dict(), "lora": asdict(config), **(extra or {})}
    # The JSON gets its name first: weights without their alpha would load at another scale.
    with atomic_open(path) as weights, atomic_open(path.with_suffix(".json"), "w") as f:
        torch.save(state, weights)
        json.dump(about, f, ensure_ascii=False, indent=2)


def load_lora(model: nn.Module, path: str | Path, name: str = "default") -> LoraConfig:
    """Puts the adapter of a `.pth` file or a peft folder onto the model and makes it active.

    A file without its JSON tells rank and targets by its shapes; its alpha is then the rank, a scale of 1.
    Raises: WeightsError when it is missing, damaged, or does not fit the model.
    """
    path = Path(path)
    state, config = read_peft(path) if path.is_dir() else read_lora(path)
    linears = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    for key, tensor in state.items():
        layer, _, part = key.removesuffix(".weight").rpartition(".lora.")
        if layer not in linears or part not in ("A", "B"):
            raise WeightsError(f"{path} adapts {layer or key}, which this model does not have: it is of another model.")
        linear = linears[layer]
        fits = (config.rank, linear.in_features) if part == "A" else (linear.out_features, config.rank)
        if tuple(tensor.shape) != fits:
            raise WeightsError(
                f"{path} does not fit: {key} is {tuple(tensor.shape)}, this model and rank {config.rank} need {fits}."
            )
    targets = [layer for layer in linears if layer.rpartition(".")[2] in config.target_modules]
    wanted = {f"{layer}.lora.{part}.weight" for layer in targets for part in "AB"}
    if missing := sorted(wanted - state.keys()):
        raise WeightsError(f"{path} lacks {missing[0]} ({len(missing)} tensors in all): it is of another model.")
    if beyond := sorted(state.keys() - wanted):
        raise WeightsError(f"{path} also holds {beyond[0]}, which is none of its targets: file and JSON do not belong.")
    add_lora(model, config, name)
    for key, tensor in lora_state_dict(model, name).items():
        tensor.copy_(state[key])  # the parameters themselves
    return config


def read_lora(path: Path) -> tuple[dict[str, Tensor], LoraConfig]:
    """The tensors and the configuration of a `.pth` adapter.  Raises: WeightsError."""
    state = read_state_dict(path)
    sidecar = path.with_suffix(".json")
    if sidecar.is_file():
        try:
            fields = json.loads(sidecar.read_text(encoding="utf-8"))["lora"]
            config = LoraConfig(**{**fields, "target_modules": tuple(fields["target_modules"])})
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{sidecar} is damaged or of no LoRA ({error}).") from error
        return state, config
    ranks = {tensor.shape[0] for key, tensor in state.items() if key.endswith(".lora.A.weight")}
    targets = {key.split(".lora.")[0].rpartition(".")[2] for key in state}
    try:
        (rank,) = ranks
        return state, LoraConfig(rank, float(rank), 0.0, tuple(sorted(targets)))
    except ValueError as error:
        raise WeightsError(f"{path} is no LoRA of one rank: {error}.") from error


def save_peft(model: nn.Module, folder: str | Path, config: LoraConfig, name: str = "default") -> None:
    """Writes one adapter as a folder that `peft.PeftModel.from_pretrained` reads.  Raises: OSError."""
    from safetensors.torch import save

    state = {
        PEFT_PREFIX + key.replace(".lora.A.", ".lora_A.").replace(".lora.B.", ".lora_B."): tensor.cpu().contiguous()
        for key, tensor in lora_state_dict(model, name).items()
    }
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with atomic_open(Path(folder) / "adapter_config.json", "w") as f:
        json.dump(about, f, indent=2)
    with atomic_open(Path(folder) / "adapter_model.safetensors") as f:
        f.write(save(state))


def read_peft(folder: Path) -> tuple[dict[str, Tensor], LoraConfig]:
    """The tensors, by our names, and the configuration of a peft folder.  Raises: WeightsError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        state = load((folder / "adapter_model.safetensors").read_bytes())
        if about["peft_type"] != "LORA" or about.get("bias", "none") != "none" or about.get("use_dora"):
            raise WeightsError(f"{folder} is no plain LoRA (peft_type LORA, bias none, no DoRA).")
        if about.get("use_rslora") or about.get("rank_pattern") or about.get("alpha_pattern"):
            raise WeightsError(f"{folder} scales its layers differently (rsLoRA or patterns), which is not read here.")
        layers = {key.split(".lora_")[0] for key in state}
        targets = sorted({layer.rpartition(".")[2] for layer in layers})
        config = LoraConfig(about["r"], float(about["lora_alpha"]), float(about["lora_dropout"]), tuple(targets))
    except WeightsError:
        raise
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{folder} holds no whole peft adapter: {error}.") from error
    named = {k.removeprefix(PEFT_PREFIX).replace(".lora_A.", ".lora.A."): tensor for k, tensor in state.items()}
    return {k.replace(".lora_B.", ".lora.B."): tensor for k, tensor in named.items()}, config
