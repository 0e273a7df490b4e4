"""DeepSpeed behind the trainers' own loops: `--deepspeed CONFIG`.

ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) spreads over the ranks what data parallelism keeps on each of them:
stage 1 the optimiser's state, stage 2 the gradients too, stage 3 the weights as well. The loop stays the one of the
script; the engine does the backward pass, the exchange, clipping and the step.

What is saved is no different from any other run: weights and AdamW's means are put together on rank 0 and written as
one file, so a run goes on with another stage, another number of ranks or without DeepSpeed, and chat and export need
nothing of it. AdamW is the optimiser of stages 1 to 3, as they cut matrices into pieces and Muon needs them whole.

    deepspeed --num_gpus 2 trainer/train_pretrain.py --deepspeed trainer/deepspeed/zero2.json
    torchrun --nproc_per_node 2 trainer/train_pretrain.py --deepspeed trainer/deepspeed/zero3.json
    python trainer/train_pretrain.py --deepspeed trainer/deepspeed/zero2_offload.json

中文：DeepSpeed（ZeRO 0–3）接在各脚本自己的训练循环后面；保存的文件与普通训练完全相同。
"""

import argparse
import contextlib
import copy
import json
import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.command_line import UserError

MEANS = ("exp_avg", "exp_avg_sq")  # of AdamW


def add_flags(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("DeepSpeed")
    engine.add_argument("--deepspeed", metavar="CONFIG", help="JSON file, for example trainer/deepspeed/zero2.json")
    engine.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # which the deepspeed command adds


def read_config(path: str) -> dict:
    """The user's configuration.  Raises: UserError when it is no JSON object, or asks for what the flags decide."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--deepspeed {path}: {error}; expected a JSON file like trainer/deepspeed/zero2.json."
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed {path}: expected a JSON object, found {type(config).__name__}.")
    stage = zero_stage(config)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"--deepspeed {path}: zero_optimization.stage is {stage!r}; expected 0, 1, 2 or 3.")
    instead = {
        "optimizer": "--optimizer, --learning_rate and --weight_decay",
        "scheduler": "--learning_rate and --warmup_iters",
        "bf16": "--dtype bfloat16",
        "fp16": "--dtype float16",
        "torch_autocast": "--dtype",
        "gradient_clipping": "--grad_clip",
        "train_batch_size": "--batch_size and --accumulation_steps",
        "train_micro_batch_size_per_gpu": "--batch_size",
        "gradient_accumulation_steps": "--accumulation_steps",
    }
    for name, flags in instead.items():
        if name in config and not is_auto(config[name]):
            raise UserError(
                f'--deepspeed {path}: {name} is decided by {flags}; take it out of the file, or set it to "auto".'
            )
    return {name: value for name, value in config.items() if name not in instead}


def settle(args: argparse.Namespace) -> None:
    """What `--deepspeed` means for the other flags.  Raises: UserError when it cannot be used."""
    if args.deepspeed == "none":  # for a run that began with it and goes on without
        args.deepspeed = None
    if args.deepspeed is None:
        return
    import_deepspeed()
    stage = zero_stage(read_config(args.deepspeed))
    if stage and args.optimizer == "muon":
        args.optimizer = "adamw"
        if os.environ.get("RANK", "0") == "0":
            print(
                f"note: AdamW is the optimiser, as ZeRO {stage} cuts weights into pieces and Muon needs matrices whole"
            )


def is_auto(value: object) -> bool:
    """Whether a value of a configuration leaves the choice to us, as files written for transformers do."""
    return value == "auto" or isinstance(value, dict) and set(value.values()) == {"auto"}


def zero_stage(config: dict) -> object:
    section = config.get("zero_optimization", {})
    return section.get("stage", 0) if isinstance(section, dict) else section


def import_deepspeed():
    """The package.  Raises: UserError when it is missing."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            "--deepspeed needs the deepspeed package: pip install deepspeed, or leave the flag out."
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On CPU ranks it would compile an extension at the first start, for minutes, and wait for ever when that was cut
    # off once. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def stand_alone(device: torch.device) -> None:
    """A group of one, for a process started with `python`: DeepSpeed wants to be launched."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        store = dist.HashStore()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)


class ZeroEngine:
    """DeepSpeed's engine as the loop uses it. In stage 0 it exchanges gradients and the loop does all the rest.

    Args: raw_model: holds the weights to begin with, or to go on with; model: the same, maybe compiled; optimizer: with
    the state to go on with. The loop keeps setting the learning rates of its groups.
    """

    def __init__(self, model: nn.Module, raw_model: nn.Module, optimizer: Optimizer, run, args: argparse.Namespace):
        deepspeed = import_deepspeed()
        config = read_config(args.deepspeed)
        self.stage, self.raw_model, self.run = zero_stage(config), raw_model, run
        self.copy = copy.deepcopy(raw_model).cpu() if run.is_main and self.stage else None  # in which weights are saved
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        begin_with = [p.detach().float().cpu() for p in self.parameters] if self.stage else []
        saved = optimizer.state_dict()
        self.groups = saved["param_groups"]
        if self.stage:
            optimizer.state.clear()  # keyed by weights that the engine replaces
            half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(run.dtype)
            if half == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
                raise UserError("DeepSpeed has no float16 on this device: give --dtype bfloat16 or float32.")
            if half:
                config[half] = {"enabled": True, **({"check_grad_overflow": True} if half == "bf16" else {})}
            run.scaler = torch.amp.GradScaler(run.device.type, enabled=False)  # the engine has its own
        config |= {
            "train_micro_batch_size_per_gpu": args.batch_size,
            "gradient_accumulation_steps": args.accumulation_steps,
            "gradient_clipping": args.grad_clip if self.stage else 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW serves in main memory too
            "steps_per_print": 2**31,
        }
        stand_alone(run.device)
        self.engine, self.optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.gathered = deepspeed.zero.GatheredParameters
        if self.stage:
            self._fill(begin_with, saved)

    def _flat_weights(self) -> list[Tensor]:
        """This rank's pieces of the float32 weights, which AdamW steps on."""
        if self.stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups

    def _fill(self, weights: list[Tensor], saved: dict) -> None:
        """Puts float32 weights and AdamW's state into the pieces of the ranks.

        The engine begins with weights rounded to half precision, and counts a step while it sets itself up.
        """
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        states = saved["state"]
        steps = {float(state["step"]) for state in states.values()} or {0.0}
        for flat in self._flat_weights():
            state = self.optimizer.optimizer.state[flat]
            state["step"] = torch.full((), max(steps), dtype=torch.float32, device=flat.device)
            for name in MEANS:
                state[name] = torch.zeros_like(flat)
        if self.stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()  # ties the means just made to their weights
        for i, (p, weight) in enumerate(zip(self.parameters, weights, strict=True)):
            values = {None: weight} | {name: states[i][name] for name in MEANS if i in states}
            for name, value in values.items():
                value = value.to(self.run.device)
                if self.stage < 3 and name is None:
                    safe_set_full_fp32_param(p, value)
                elif self.stage < 3:
                    safe_set_full_optimizer_state(p, value, name)
                else:  # cut by hand: the function for whole tensors fails where their size is no multiple of the ranks
                    size = p.ds_tensor.ds_numel
                    piece = nn.functional.pad(value.flatten(), (0, size * self.run.world_size - value.numel()))
                    piece = piece[size * self.run.rank : size * (self.run.rank + 1)]
                    if name is None:
                        safe_set_local_fp32_param(p, piece)
                    else:
                        safe_set_local_optimizer_state(p, piece, name)

    # ------------------------------------------------------------------------------------------------------- training

    def exchange_only_if(self, last: bool) -> None:
        """Gradients are exchanged in the last micro-batch of an update."""
        self.engine.set_gradient_accumulation_boundary(last)

    def step(self) -> tuple[Tensor, Tensor]:
        """Clips, steps unless a gradient is not finite, zeroes.  Returns: gradient norm () and if it stepped ()."""
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.run.device)
        return norm, torch.as_tensor(self.engine.was_step_applied(), device=self.run.device)

    def whole(self) -> contextlib.AbstractContextManager:
        """Within it the weights can be read from outside of the engine, in one piece on every rank."""
        return self.gathered(list(self.raw_model.parameters()), enabled=self.stage == 3)

    def close(self) -> None:
        self.engine.destroy()

    # --------------------------------------------------------------------------------------------------------- saving

    def collect(self) -> tuple[nn.Module | None, dict | None]:
        """The whole model in float32 and AdamW's state, as a run without the engine has them; None but on rank 0.

        Every rank has to call it.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        copied = dict(self.copy.named_parameters()) if self.copy else {}
        names = {id(p): name for name, p in self.raw_model.named_parameters()}
        flat = self._flat_weights()[0]
        step = self.optimizer.optimizer.state[flat]["step"]
        states: dict[int, dict[str, Tensor]] = {}
        for i, p in enumerate(self.parameters):
            weight = safe_get_full_fp32_param(p)
            means = {name: safe_get_full_optimizer_state(p, name) for name in MEANS}
            if self.copy is not None:
                copied[names[id(p)]].data.copy_(weight)
                states[i] = {"step": step.cpu().clone(), **{name: mean.cpu() for name, mean in means.items()}}
        if self.copy is None:
            return None, None
        return self.copy, {"state": states, "param_groups": self.groups}
