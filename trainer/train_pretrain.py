"""Pretraining: the model learns to predict the next token of plain text.

    loss = − 1/N · Σ log p(token_t | tokens before it in the same document)                                (1)

N counts the trained tokens of *all* micro-batches and ranks of an update, so accumulation 8 × batch 4, batch 32, and
two processes with batch 16 are the same update. Documents are packed into full rows; attention never crosses from one
document into another. A mixture of experts adds its balance loss (model/model_minimind.py, `MoEGate`).

Logged: loss (1) since the last line, learning rate, gradient norm before clipping, real tokens per second over all
ranks, MFU (known cards), peak memory, share of time spent waiting for data, and at intervals held-out loss and bits
per byte.

    python trainer/train_pretrain.py                                       # demo data, best device
    python trainer/train_pretrain.py --data_path dataset/pretrain_hq.jsonl --epochs 1
    python trainer/train_pretrain.py --device cpu --hidden_size 256 --num_hidden_layers 4
    torchrun --nproc_per_node 2 trainer/train_pretrain.py
    python trainer/train_pretrain.py --resume                              # after Ctrl-C, kill -9, a power cut

中文：预训练，让模型学会预测下一个词元；损失按一次更新中所有被训练的词元数取平均。

Dimension legend: B batch · T tokens · V vocabulary.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.lm_dataset import PretrainDataset, token_bytes
from trainer import checkpoint, run_log
from trainer import trainer_utils as utils
from trainer.chunked_nll import chunked_nll, nll_and_gradient
from trainer.command_line import run_script
from trainer.optimizer import make_optimizer, step_if

STAGE = "pretrain"
DATA_NAMES = ("pretrain_hq.jsonl", "pretrain_t2t.jsonl", "pretrain_t2t_mini.jsonl")


def summed_nll(hidden: Tensor, head: Tensor, batch: dict[str, Tensor], piece: Callable = nll_and_gradient) -> Tensor:
    """Σ −log p of each next token in nats; labels shift by one here and nowhere else.

    Shape: final hidden states (B, T, D), weight of the head (V, D), labels (B, T) aligned with the input → () float32.
    """
    return chunked_nll(hidden[:, :-1].flatten(0, 1), head, batch["labels"][:, 1:].flatten(), piece=piece)


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
        description="Pretrain a MiniMind model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    utils.add_shared_flags(parser, epochs=1, learning_rate=2e-3, max_seq_len=512)
    parser.add_argument("--from_weight", help="go on from these weights (stage name or file) instead of from nothing")
    args = checkpoint.parse_flags(parser, STAGE)

    # 2. Process and seed
    run = utils.Run(args.device, args.dtype, args.seed, args.rank_timeout)

    # 3. Model: new, or from weights that know their configuration
    tokenizer = checkpoint.start_tokenizer(args)
    raw_model = checkpoint.start_model(args, tokenizer, run)

    # 4. Data: tokenised once, packed into rows
    args.data_path = str(utils.find_data(args.data_path, DATA_NAMES, STAGE, run))
    data, held_out = utils.load_splits(PretrainDataset, args, tokenizer, run)
    utils.plan_updates(args, len(data), run)

    # 5. Optimiser, and the state of an interrupted run
    optimizer = make_optimizer(raw_model, args.weight_decay, run.device, args.optimizer, run.dtype)
    keeper = checkpoint.Keeper(run, STAGE, args, raw_model, optimizer)
    progress = keeper.restore_or_start(data.data_key)

    # 6. Compile and wrap
    model, nll = utils.compile_and_wrap(raw_model, optimizer, summed_nll, run, args)
    log = run_log.RunLog(run, STAGE, keeper, args, raw_model, data)
    bytes_of = token_bytes(tokenizer)

    def check() -> None:
        with log.pause():
            result = utils.validate(raw_model, held_out, summed_nll, run, args.batch_size, args.val_rows, bytes_of)
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
