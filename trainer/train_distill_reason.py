"""Reasoning: the model learns to think before it answers, and forgets nothing.

    loss = − 1/N · Σ w_t · log p(token_t | tokens before it),  t over what the assistant wrote                (1)

SFT on answers of the form `<think>…</think><answer>…</answer>`, w_t being `--tag_weight` for the four tags and 1
elsewhere: four tokens among hundreds would else be learnt last, and a lost tag spoils the whole answer. Ordinary
conversations are mixed in (`--mix_path`); in half of them the answer follows an empty thought, which is how a chat
switches thinking off. N counts the trained tokens over *all* micro-batches and ranks.

Logged: as in SFT; held-out loss (unweighted) of the reasoning, and of the ordinary conversations ("mix loss").

    python trainer/train_distill_reason.py                                 # newest SFT weights, demo data
    python trainer/train_distill_reason.py --data_path dataset/r1_mix_1024.jsonl --max_seq_len 1024 \\
        --mix_path dataset/sft_512.jsonl --mix_ratio 0.3
    torchrun --nproc_per_node 2 trainer/train_distill_reason.py
    python trainer/train_distill_reason.py --resume                        # after Ctrl-C, kill -9, a power cut
    python eval_model.py --model_mode 3

中文：推理微调：学习先思考再回答，标签词元加权；混入普通对话以免遗忘，并可在聊天时关闭思考。

Dimension legend: B batch · T tokens · V vocabulary · N trained positions · n those of a piece · D hidden size.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.lm_dataset import token_bytes
from dataset.stage_datasets import DialogueDataset, ReasonDataset
from model.model_minimind import IGNORE
from trainer import checkpoint, run_log
from trainer import trainer_utils as utils
from trainer.chunked_nll import summed_through_head
from trainer.command_line import UserError, number, run_script
from trainer.optimizer import make_optimizer, step_if
from trainer.train_full_sft import summed_nll

STAGE = "reason"
DATA_NAMES = ("r1_mix_1024.jsonl",)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def weighted_piece(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Equation (1) before the division, and its gradient w·(p − onehot).  Shape: (n, V), (n,), (n,) → (), (n, V)."""
    place = targets.clamp(min=0)[:, None]
    weights = (weights * (targets != IGNORE))[:, None]
    log_probs = logits.float().log_softmax(-1)
    gradient = log_probs.exp().scatter_add_(-1, place, torch.full_like(weights, -1.0))
    return -(log_probs.gather(-1, place) * weights).sum(), (gradient * weights).to(logits.dtype)


def weighted_nll(hidden: Tensor, head: Tensor, batch: dict[str, Tensor], tags: Tensor, tag_weight: float) -> Tensor:
    """Equation (1) before the division.  Shape: final hidden states (B, T, D), head (V, D), tags (4,) → ()."""
    targets = batch["targets"]
    weights = torch.where(torch.isin(targets, tags), tag_weight, 1.0)
    hidden = hidden.flatten(0, 1)[batch["head_positions"]]
    return summed_through_head(hidden, head, (targets, weights), weighted_piece)


def train_epoch(model, raw_model, nll, optimizer, updates, run, args, keeper, log, stop, check) -> bool:
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

        # Over all ranks: trained tokens N of equation (1), real tokens, and whether any rank was asked to stop.
        trained, tokens, stopping = run.sum_ranks(torch.tensor([*counts, stop.signal is not None])).tolist()
        nats = torch.zeros((), device=run.device)
        balance = torch.zeros((), device=run.device)

        for i, micro in enumerate(micros):
            with run.sync_only_if(model, last=i == len(micros) - 1), run.autocast():
                inputs = {name: micro[name] for name in ("input_ids", "position_ids", "documents")}
                out = model(**inputs, need_logits=False)
                micro_nats = nll(out.hidden_states, utils.head_weight(raw_model), micro)
                # The balance loss is a mean over rows; padding that fills up the last update of an epoch is none.
                micro_balance = out.aux_loss * (micro["documents"][:, 0] >= 0).sum() / rows
                # DDP averages gradients over ranks, the sum is wanted: hence × world_size.
                loss = (micro_nats / max(trained, 1) + micro_balance) * run.world_size
                run.backward(loss)
            nats += micro_nats.detach()
            balance += micro_balance.detach()
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
        log.count(torch.where(finite, nats, 0.0), finite * trained, tokens, waited)
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


def main() -> None:
    # 1. Flags
    parser = argparse.ArgumentParser(
        description="Teach a model to think before it answers.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    utils.add_shared_flags(parser, epochs=1, learning_rate=1e-3, max_seq_len=1024)
    parser.add_argument("--from_weight", default="full_sft", help="stage or file to start from; none: a new model")
    reason = parser.add_argument_group("reasoning")
    positive = number(float, 0, excluded=True)
    reason.add_argument("--tag_weight", type=positive, default=3.0, help="weight of the four tags in the loss")
    utils.add_mix_flags(parser, share=0.5)
    args = checkpoint.parse_flags(parser, STAGE)

    # 2. Process and seed
    run = utils.Run(args.device, args.dtype, args.seed, args.rank_timeout)

    # 3. Model: weights that know their configuration
    tokenizer = checkpoint.start_tokenizer(args)
    raw_model = checkpoint.start_model(args, tokenizer, run)

    if any(tag not in tokenizer.get_vocab() for tag in TAGS):
        raise UserError(f"the tokenizer has no {', '.join(TAGS)}; the shipped one has.")
    tags = torch.tensor(tokenizer.convert_tokens_to_ids(TAGS), device=run.device)

    # 4. Data: tokenised once, packed into rows
    args.data_path = str(utils.find_data(args.data_path, DATA_NAMES, "reason", run))
    data, held_out = utils.load_splits(ReasonDataset, args, tokenizer, run)
    data, mix_held_out = utils.load_mixed(data, DialogueDataset, args, tokenizer, run)
    utils.plan_updates(args, len(data), run)

    # 5. Optimiser, and the state of an interrupted run
    optimizer = make_optimizer(raw_model, args.weight_decay, run.device, args.optimizer, run.dtype)
    keeper = checkpoint.Keeper(run, STAGE, args, raw_model, optimizer)
    keeper.also_same = {"tag_weight": args.tag_weight}
    progress = keeper.restore_or_start(data.data_key)

    # 6. Compile and wrap
    model, _ = utils.compile_and_wrap(raw_model, optimizer, None, run, args)
    nll = functools.partial(weighted_nll, tags=tags, tag_weight=args.tag_weight)
    log = run_log.RunLog(run, STAGE, keeper, args, raw_model, data)
    bytes_of = token_bytes(tokenizer)

    def check() -> None:
        with log.pause():
            settings = summed_nll, run, args.batch_size, args.val_rows, bytes_of
            result = utils.validate(raw_model, held_out, *settings)
            if mix_held_out and (mixed := utils.validate(raw_model, mix_held_out, *settings)):
                result = {**(result or {}), "val_mix_loss": mixed["val_loss"]}
            log.validation(progress, result)

    # 7. Epochs
    stop = utils.StopRequest()
    stopped = False
    while not stopped and progress.step < args.total_steps:
        order = utils.RowOrder(len(data), args, run, progress.epoch, progress.rows_done)
        updates = utils.read_updates(data, order, run.device, args.num_workers)
        stopped = train_epoch(model, raw_model, nll, optimizer, updates, run, args, keeper, log, stop, check)
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
