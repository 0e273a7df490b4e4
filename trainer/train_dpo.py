"""Direct preference optimisation: of two answers the better one becomes likelier, without a reward model.

    r(y) = log π(y|x) − log π_ref(y|x)                      log-ratio of an answer, summed over its tokens     (1)
    DPO:  loss = − (1 − ε)·log σ(β·(r⁺ − r⁻)) − ε·log σ(−β·(r⁺ − r⁻))                                          (2)
    IPO:  loss = (r⁺/|y⁺| − r⁻/|y⁻| − 1/(2β))²              log-ratios per token                               (3)
    SFT:  loss + w · − log π(y⁺|x) / |y⁺|                   keeps the chosen answer likely in itself           (4)

π is the model being trained, π_ref the same model before training, frozen; y⁺ and y⁻ are the chosen and the rejected
answer, ε the share of labels taken to be wrong. The loss is the mean over the pairs of *all* micro-batches and ranks.
(2) Rafailov et al. 2023, arXiv:2305.18290; ε: Mitchell 2023, "A note on DPO with noisy preferences"; (3) Azar et al.
2023, arXiv:2310.12036, per token as its authors advise; (4) Pang et al. 2024, arXiv:2404.19733.

Logged: β·r of the chosen and of the rejected answer ("rewards"), their difference ("margin"), and the share of pairs
where it is positive ("accuracy"); the same on held-out pairs.

    python trainer/train_dpo.py                                            # newest SFT weights, demo data
    python trainer/train_dpo.py --data_path dataset/dpo.jsonl --max_seq_len 2048 --beta 0.2
    python trainer/train_dpo.py --loss ipo --sft_weight 0.1
    torchrun --nproc_per_node 2 trainer/train_dpo.py --precompute_reference
    python trainer/train_dpo.py --resume                                   # after Ctrl-C, kill -9, a power cut
    python eval_model.py --model_mode 2

中文：直接偏好优化（DPO）：不用奖励模型，让被选中的回答比被拒绝的更可能。

Dimension legend: B batch · T tokens · D hidden size · N answer tokens · P pairs.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.stage_datasets import PairDataset
from trainer import checkpoint, run_log
from trainer import trainer_utils as utils
from trainer.command_line import BoolFlag, number, run_script
from trainer.optimizer import make_optimizer, step_if
from trainer.token_logps import token_logps

STAGE = "rlhf"
DATA_NAMES = ("dpo.jsonl",)


def answer_logps(hidden: Tensor, head: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed log-probability of each answer, and its number of tokens.

    Shape: final hidden states (B, T, D), weight of the head (V, D) → (P, 2) chosen and rejected, (P, 2).
    """
    logps, _ = token_logps(hidden.flatten(0, 1)[batch["head_positions"]], head, batch["targets"])  # (N,)
    answers = torch.zeros(2 * len(batch["pairs"]), device=logps.device)
    lengths = torch.zeros_like(answers).index_add(0, batch["answers"], (batch["targets"] >= 0).float())
    return answers.index_add(0, batch["answers"], logps).view(-1, 2), lengths.clamp(min=1).view(-1, 2)


def preference_loss(
    logps: Tensor, reference_logps: Tensor, lengths: Tensor, kind: str, beta: float, smoothing: float, sft_weight: float
) -> tuple[Tensor, Tensor]:
    """Equations (2) to (4) for each pair, and the rewards β·r.  Shape: (P, 2) each → (P,), (P, 2)."""
    ratios = logps - reference_logps  # (1)
    if kind == "dpo":
        margin = beta * (ratios[:, 0] - ratios[:, 1])
        loss = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    else:
        per_token = ratios / lengths
        loss = (per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta)) ** 2
    if sft_weight:
        loss = loss - sft_weight * logps[:, 0] / lengths[:, 0]
    return loss, beta * ratios.detach()


def pair_figures(rewards: Tensor, real: Tensor) -> dict[str, Tensor]:
    """What is logged, summed over the pairs.  Shape: (P, 2), (P,) 1 for a pair and 0 for filler → () each."""
    margin = rewards[:, 0] - rewards[:, 1]
    return {
        "chosen_reward": (rewards[:, 0] * real).sum(),
        "rejected_reward": (rewards[:, 1] * real).sum(),
        "margin": (margin * real).sum(),
        "accuracy": ((margin > 0) * real).sum(),
    }


class Reference:
    """Log-probabilities of the answers under the frozen model; with `precompute` all of them once, before training."""

    def __init__(self, model: nn.Module, run: utils.Run):
        self.model, self.run = model.eval().requires_grad_(False), run
        self.table: Tensor | None = None  # (rows of the data, most answers in a row)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Shape: → (P, 2)."""
        if self.table is not None:
            row, place = batch["places"].unbind(-1)
            return self.table[row, place].view(-1, 2)
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "documents")}
        with self.run.autocast():
            hidden = self.model(**inputs, need_logits=False).hidden_states
            return answer_logps(hidden, self.model.lm_head.weight, batch)[0]

    def precompute(self, data: PairDataset, batch_size: int) -> None:
        """Fills the table and lets go of the model."""
        rows = []
        for start in run_log.progress_bar(range(0, len(data), batch_size), "reference", self.run):
            numbers = range(start, min(start + batch_size, len(data)))
            batch = data.collate([data[row] for row in numbers])
            logps = self({name: tensor.to(self.run.device) for name, tensor in batch.items()}).flatten()
            rows += logps.split(torch.bincount(batch["places"][:, 0] - start, minlength=len(numbers)).tolist())
        self.table = nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0)
        self.model = None


def train_epoch(model, raw_model, reference, optimizer, updates, run, args, keeper, log, stop, check) -> bool:
    """Trains on the given updates (see `read_updates`). True when the run was asked to stop.

    `model` is the wrapped module, whose forward gets the gradient; `raw_model` holds the same weights unwrapped.
    """
    progress = keeper.progress
    asked_at = time.perf_counter()
    for rows, counts, micros in updates:
        waited = time.perf_counter() - asked_at
        run.seed_step(progress.step)
        lr = utils.cosine_lr(progress.step, args.total_steps, args.warmup_iters, args.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Over all ranks: pairs, real tokens, and whether any rank was asked to stop.
        pairs, tokens, stopping = run.sum_ranks(torch.tensor([*counts, stop.signal is not None])).tolist()
        losses = torch.zeros((), device=run.device)
        balance = torch.zeros((), device=run.device)
        figures: dict[str, Tensor] = {}

        for i, micro in enumerate(micros):
            reference_logps = reference(micro)
            with run.sync_only_if(model, last=i == len(micros) - 1), run.autocast():
                inputs = {name: micro[name] for name in ("input_ids", "position_ids", "documents")}
                out = model(**inputs, need_logits=False)
                logps, lengths = answer_logps(out.hidden_states, utils.head_weight(raw_model), micro)
                pair_loss, rewards = preference_loss(
                    logps, reference_logps, lengths, args.loss, args.beta, args.label_smoothing, args.sft_weight
                )
                micro_loss = (pair_loss * micro["pairs"]).sum()
                micro_balance = out.aux_loss * (micro["documents"][:, 0] >= 0).sum() / rows
                # DDP averages gradients over ranks, the sum is wanted: hence × world_size.
                loss = (micro_loss / max(pairs, 1) + micro_balance) * run.world_size
                run.backward(loss)
            losses += micro_loss.detach()
            balance += micro_balance.detach()
            for name, value in pair_figures(rewards, micro["pairs"]).items():
                figures[name] = figures.get(name, 0) + value
            log.count_experts(out.expert_load)

        # [shared: optimizer-step] clip → non-finite guard → step → zero
        if run.zero_stage:  # DeepSpeed does the four by itself
            grad_norm, finite = run.engine.step()
        else:
            run.scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), args.grad_clip)
            finite = torch.isfinite(grad_norm)  # stays on the device, which the host does not wait for
            if run.scaler.is_enabled():
                run.scaler.step(optimizer)  # leaves it out itself, and lowers its scale
                run.scaler.update()
            else:
                step_if(finite, optimizer)
            optimizer.zero_grad(set_to_none=True)
        # [end: optimizer-step]

        progress.advance(rows, tokens)
        progress.count_skip(finite, run.skips_allowed)
        figures = {name: torch.where(finite, total, 0.0) for name, total in figures.items()}
        log.count(torch.where(finite, losses, 0.0), finite * pairs, tokens, waited, **figures)
        if progress.step % args.log_interval == 0 or progress.step == args.total_steps:
            log.line(progress, lr, grad_norm, run.sum_ranks(balance).item() if raw_model.config.use_moe else None)
        if progress.step == args.total_steps:
            return False
        if args.val_interval and progress.step % args.val_interval == 0:
            check()
        if progress.step % args.save_interval == 0 or stopping:
            with log.pause():
                keeper.save()
        if stopping:
            return True
        asked_at = time.perf_counter()
    return False


@torch.no_grad()
def validate(model, reference, dataset, run, args) -> dict[str, float] | None:
    """Loss (2) or (3), margin and accuracy on held-out pairs; None without any."""
    rows = min(len(dataset), args.val_rows)
    if rows == 0:
        return None
    model.eval()
    sums: dict[str, Tensor] = {}
    mine = utils.rows_of_rank(rows, run)
    for start in range(0, len(mine), args.batch_size):
        batch = dataset.collate([dataset[row] for row in mine[start : start + args.batch_size]])
        batch = {name: tensor.to(run.device) for name, tensor in batch.items()}
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "documents")}
        with run.autocast():
            hidden = model(**inputs, need_logits=False).hidden_states
            logps, lengths = answer_logps(hidden, utils.head_weight(model), batch)
        loss, rewards = preference_loss(
            logps, reference(batch), lengths, args.loss, args.beta, args.label_smoothing, sft_weight=0.0
        )
        real = batch["pairs"]
        for name, value in {"loss": (loss * real).sum(), **pair_figures(rewards, real), "pairs": real.sum()}.items():
            sums[name] = sums.get(name, 0) + value
    model.train()
    names = ("loss", "margin", "accuracy", "pairs")
    totals = run.sum_ranks(torch.stack([sums[name] if sums else torch.zeros(()) for name in names]).to(run.device))
    *values, pairs = totals.tolist()
    return {f"val_{name}": value / max(pairs, 1) for name, value in zip(names, values, strict=False)}


def main() -> None:
    # 1. Flags
    parser = argparse.ArgumentParser(
        description="Direct preference optimisation (DPO, IPO).", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    utils.add_shared_flags(parser, epochs=1, learning_rate=1e-4, max_seq_len=1024, optimizer="adamw")
    parser.add_argument("--from_weight", default="full_sft", help="what to start from and compare with: stage or file")
    dpo = parser.add_argument_group("preferences")
    dpo.add_argument("--loss", choices=["dpo", "ipo"], default="dpo", help="equation (2) or (3)")
    dpo.add_argument(
        "--beta", type=number(float, 0, excluded=True), default=0.1, help="the higher, the nearer to the reference"
    )
    smoothing = number(float, 0, high=0.5)
    dpo.add_argument("--label_smoothing", type=smoothing, default=0.0, help="share of wrong labels, for example 0.1")
    dpo.add_argument("--sft_weight", type=number(float, 0), default=0.0, help="weight of equation (4), for example 1")
    dpo.add_argument(
        "--precompute_reference", action=BoolFlag, default=False, help="ask the reference once, then free its memory"
    )
    args = checkpoint.parse_flags(parser, STAGE)

    # 2. Process and seed
    run = utils.Run(args.device, args.dtype, args.seed, args.rank_timeout)

    # 3. Model: the reference, frozen, and a copy that learns
    tokenizer = checkpoint.start_tokenizer(args)
    base = checkpoint.start_base(args, tokenizer, run)
    raw_model, reference, held_out_reference = copy.deepcopy(base), Reference(base, run), Reference(base, run)
    del base

    # 4. Data: tokenised once, whole pairs packed into rows
    args.data_path = str(utils.find_data(args.data_path, DATA_NAMES, "dpo", run))
    data, held_out = utils.load_splits(PairDataset, args, tokenizer, run)
    utils.plan_updates(args, len(data), run)

    # 5. Optimiser, and the state of an interrupted run
    optimizer = make_optimizer(raw_model, args.weight_decay, run.device, args.optimizer, run.dtype)
    keeper = checkpoint.Keeper(run, STAGE, args, raw_model, optimizer)
    keeper.depends_on("reference", Path(args.from_weight))
    keeper.also_same |= {name: getattr(args, name) for name in ("loss", "beta", "label_smoothing", "sft_weight")}
    progress = keeper.restore_or_start(data.data_key)

    # 6. Compile and wrap
    model, _ = utils.compile_and_wrap(raw_model, optimizer, None, run, args)
    log = run_log.RunLog(run, STAGE, keeper, args, raw_model, data, unit="per pair")

    if args.precompute_reference and not progress.finished:
        with log.pause():
            reference.precompute(data, args.batch_size)
            held_out_reference.precompute(held_out, args.batch_size)

    def check() -> None:
        with log.pause():
            log.validation(progress, validate(raw_model, held_out_reference, held_out, run, args))

    # 7. Epochs
    stop = utils.StopRequest()
    stopped = False
    while not stopped and progress.step < args.total_steps:
        order = utils.RowOrder(len(data), args, run, progress.epoch, progress.rows_done)
        updates = utils.read_updates(data, order, run.device, args.num_workers)
        stopped = train_epoch(model, raw_model, reference, optimizer, updates, run, args, keeper, log, stop, check)
        if not stopped and progress.step < args.total_steps:
            progress.next_epoch()

    # 8. End
    if not stopped and not progress.finished:
        check()
        progress.finished = True
        keeper.save()
    log.close()
    run.close(128 + (stop.signal or 0) if stopped else 0)


if __name__ == "__main__":
    run_script(main)
