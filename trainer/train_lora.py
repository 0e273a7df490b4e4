"""LoRA: a frozen model learns a skill or a name through small added matrices (model/model_lora.py).

    loss = − 1/N · Σ log p(token_t | tokens before it in the same conversation),  t over what the assistant wrote   (1)

The loss of SFT; only A and B of each targeted layer get gradients, optimiser state and a place in the file, about a
MB. The base stays as it is on disk and can carry other adapters tomorrow.

Logged: as in SFT; the gradient norm is that of the adapter.

    python trainer/train_lora.py                                           # newest SFT weights, demo data
    python trainer/train_lora.py --lora_name lora_medical --data_path dataset/lora_medical.jsonl --rank 16 --alpha 32
    python trainer/train_lora.py --target_modules q_proj v_proj --from_weight out/reason_512.pth
    torchrun --nproc_per_node 2 trainer/train_lora.py
    python trainer/train_lora.py --resume                                  # after Ctrl-C, kill -9, a power cut
    python eval_model.py --lora_name lora_identity

中文：LoRA 微调，冻结原模型，只训练各层旁边的两个小矩阵；文件约 1 MB。

Dimension legend: B batch · T tokens · V vocabulary.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.lm_dataset import SFTDataset, token_bytes
from model.model_lora import TARGETS, LoraConfig, add_lora, key_of
from trainer import checkpoint, run_log
from trainer import trainer_utils as utils
from trainer.command_line import UserError, number, run_script
from trainer.optimizer import make_optimizer, step_if
from trainer.train_full_sft import summed_nll

STAGE = "lora_{lora_name}"  # of the run folder; the adapter itself goes to out/lora/
DATA_NAMES = ("lora_identity.jsonl", "lora_medical.jsonl")


def adapter_name(text: str) -> str:
    """An argparse type: a name that can be that of a file.  Raises: argparse.ArgumentTypeError."""
    try:
        key_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


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
        description="Train a LoRA adapter.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    utils.add_shared_flags(parser, epochs=1, learning_rate=1e-3, max_seq_len=512, optimizer="adamw")
    parser.add_argument("--from_weight", default="full_sft", help="the frozen base: a stage or a file")
    lora = parser.add_argument_group("adapter")
    lora.add_argument("--lora_name", type=adapter_name, default="lora_identity", help="its file: out/lora/NAME_512.pth")
    lora.add_argument("--rank", type=number(int, 1), default=8, help="columns of B, rows of A")
    lora.add_argument("--alpha", type=number(float, 0, excluded=True), default=16.0, help="its weight is alpha / rank")
    lora.add_argument("--dropout", type=number(float, 0, high=1), default=0.0, help="of the inputs of A, in training")
    lora.add_argument("--target_modules", nargs="+", choices=TARGETS, default=list(TARGETS), help="layers to adapt")
    utils.add_mix_flags(parser, share=0.5)
    args = checkpoint.parse_flags(parser, STAGE)

    # 2. Process and seed
    run = utils.Run(args.device, args.dtype, args.seed, args.rank_timeout)

    # 3. Model: the base, frozen, and a new adapter, which changes nothing yet
    tokenizer = checkpoint.start_tokenizer(args)
    raw_model = checkpoint.start_base(args, tokenizer, run)
    if args.dropout and raw_model.config.use_moe:  # grouped products take whole matrices, whose inputs are not theirs
        raise UserError("--dropout: a mixture of experts takes none in its adapters; leave the flag out.")
    config = LoraConfig(args.rank, args.alpha, args.dropout, tuple(args.target_modules))
    add_lora(raw_model, config)

    # 4. Data: tokenised once, packed into rows
    demo = args.lora_name if args.lora_name == "lora_domain" else "lora_identity"
    args.data_path = str(utils.find_data(args.data_path, (f"{args.lora_name}.jsonl", *DATA_NAMES), demo, run))
    data, held_out = utils.load_splits(SFTDataset, args, tokenizer, run)
    data, mix_held_out = utils.load_mixed(data, SFTDataset, args, tokenizer, run)
    utils.plan_updates(args, len(data), run)

    # 5. Optimiser, and the state of an interrupted run
    optimizer = make_optimizer(raw_model, args.weight_decay, run.device, args.optimizer, run.dtype)
    keeper = checkpoint.LoraKeeper(run, STAGE, args, raw_model, optimizer, config)
    progress = keeper.restore_or_start(data.data_key)

    # 6. Compile and wrap
    model, nll = utils.compile_and_wrap(raw_model, optimizer, summed_nll, run, args)
    log = run_log.RunLog(run, keeper.stage, keeper, args, raw_model, data)
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
