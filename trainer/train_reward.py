"""A reward model: of two answers the better one gets the higher score.

    loss = − log σ(s(x, y⁺) − s(x, y⁻)),     s(x, y) = w · h(last token of y)                                  (1)

A language model with one row of weights w beside its head: h is the final hidden state at the `<|im_end|>` that closes
the answer (Bradley & Terry 1952; Ouyang et al. 2022, arXiv:2203.02155). The loss is the mean over the pairs of *all*
micro-batches and ranks. Only differences of scores mean something.

Logged: mean score of the chosen and of the rejected answers, their difference ("margin"), and the share of pairs where
it is positive ("accuracy"); the same on held-out pairs.

    python trainer/train_reward.py                                         # newest SFT weights, demo data
    python trainer/train_reward.py --data_path dataset/dpo.jsonl --max_seq_len 2048
    torchrun --nproc_per_node 2 trainer/train_reward.py
    python trainer/train_reward.py --resume                                # after Ctrl-C, kill -9, a power cut
    python trainer/train_grpo.py --rewards answer model:out/reward_512.pth:0.5

中文：奖励模型：在主干上加一行权重，用成对的偏好数据（Bradley–Terry）训练打分。

Dimension legend: B batch · T tokens · D hidden size · P pairs.
"""

import argparse
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
from trainer.command_line import run_script
from trainer.optimizer import make_optimizer, step_if
from trainer.train_dpo import DATA_NAMES

STAGE = "reward"


def answer_scores(hidden: Tensor, score: nn.Linear, batch: dict[str, Tensor]) -> Tensor:
    """The score of each answer, from the hidden state of its last token.  Shape: (B, T, D) → (P, 2) float32."""
    return score(hidden.flatten(0, 1)[batch["last"]]).float().view(-1, 2)


def pair_figures(scores: Tensor, real: Tensor) -> dict[str, Tensor]:
    """What is logged, summed over the pairs.  Shape: (P, 2), (P,) 1 for a pair and 0 for filler → () each."""
    margin = scores[:, 0] - scores[:, 1]
    return {
        "chosen_score": (scores[:, 0] * real).sum(),
        "rejected_score": (scores[:, 1] * real).sum(),
        "margin": (margin * real).sum(),
        "accuracy": ((margin > 0) * real).sum(),
    }


def train_epoch(model, raw_model, optimizer, updates, run, args, keeper, log, stop, check) -> bool:
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
            with run.sync_only_if(model, last=i == len(micros) - 1), run.autocast():
                inputs = {name: micro[name] for name in ("input_ids", "position_ids", "documents")}
                out = model(**inputs, need_logits=False)
                scores = answer_scores(out.hidden_states, raw_model.score, micro)
                pair_loss = -F.logsigmoid(scores[:, 0] - scores[:, 1])  # (1)
                micro_loss = (pair_loss * micro["pairs"]).sum()
                micro_balance = out.aux_loss * (micro["documents"][:, 0] >= 0).sum() / rows
                # DDP averages gradients over ranks, the sum is wanted: hence × world_size.
                loss = (micro_loss / max(pairs, 1) + micro_balance) * run.world_size
                run.backward(loss)
            losses += micro_loss.detach()
            balance += micro_balance.detach()
            for name, value in pair_figures(scores.detach(), micro["pairs"]).items():
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
def validate(model, dataset, run, args) -> dict[str, float] | None:
    """Loss (1), margin and accuracy on held-out pairs; None without any."""
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
            scores = answer_scores(hidden, model.score, batch)
        loss = -F.logsigmoid(scores[:, 0] - scores[:, 1])
        real = batch["pairs"]
        for name, value in {"loss": (loss * real).sum(), **pair_figures(scores, real), "pairs": real.sum()}.items():
            sums[name] = sums.get(name, 0) + value
    model.train()
    names = ("loss", "margin", "accuracy", "pairs")
    totals = run.sum_ranks(torch.stack([sums[name] if sums else torch.zeros(()) for name in names]).to(run.device))
    *values, pairs = totals.tolist()
    return {f"val_{name}": value / max(pairs, 1) for name, value in zip(names, values, strict=False)}


def main() -> None:
    # 1. Flags
    parser = argparse.ArgumentParser(
        description="Train a reward model from pairs of answers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    utils.add_shared_flags(parser, epochs=1, learning_rate=1e-4, max_seq_len=1024, optimizer="adamw")
    parser.add_argument("--from_weight", default="full_sft", help="the backbone: a stage or a file")
    args = checkpoint.parse_flags(parser, STAGE)

    # 2. Process and seed
    run = utils.Run(args.device, args.dtype, args.seed, args.rank_timeout)

    # 3. Model: a trained backbone and one new row of weights, which begins at 0: every score is the same
    tokenizer = checkpoint.start_tokenizer(args)
    raw_model = checkpoint.start_model(args, tokenizer, run, keep_score=True)
    if not hasattr(raw_model, "score"):
        raw_model.score = nn.Linear(raw_model.config.hidden_size, 1, bias=False, device=run.device)
        nn.init.zeros_(raw_model.score.weight)

    # 4. Data: tokenised once, whole pairs packed into rows
    args.data_path = str(utils.find_data(args.data_path, DATA_NAMES, "dpo", run))
    data, held_out = utils.load_splits(PairDataset, args, tokenizer, run)
    utils.plan_updates(args, len(data), run)

    # 5. Optimiser, and the state of an interrupted run
    optimizer = make_optimizer(raw_model, args.weight_decay, run.device, args.optimizer, run.dtype)
    keeper = checkpoint.Keeper(run, STAGE, args, raw_model, optimizer)
    progress = keeper.restore_or_start(data.data_key)

    # 6. Compile and wrap
    model, _ = utils.compile_and_wrap(raw_model, optimizer, None, run, args)
    log = run_log.RunLog(run, STAGE, keeper, args, raw_model, data, unit="per pair")

    def check() -> None:
        with log.pause():
            log.validation(progress, validate(raw_model, held_out, run, args))

    # 7. Epochs
    stop = utils.StopRequest()
    stopped = False
    while not stopped and progress.step < args.total_steps:
        order = utils.RowOrder(len(data), args, run, progress.epoch, progress.rows_done)
        updates = utils.read_updates(data, order, run.device, args.num_workers)
        stopped = train_epoch(model, raw_model, optimizer, updates, run, args, keeper, log, stop, check)
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
