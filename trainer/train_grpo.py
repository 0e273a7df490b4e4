"""GRPO: the model answers each question several times, and the better answers of a group become likelier.

    A_i = (r_i − mean(r)) / std(r)                     of the G answers to one question: no value model       (1)
    ρ_t = π(token_t) / π_old(token_t)                  π_old: the policy that drew the answers                (2)
    loss = 1/N · Σ_t [ − min(ρ_t·A, clamp(ρ_t, 1 − ε_low, 1 + ε_high)·A) + β·KL_t ]                           (3)
    KL_t = e^d − d − 1,   d = log π_ref(token_t) − log π(token_t)                                             (4)

An update draws G answers to each of its questions on the lean decoder (trainer/rollout.py), rates them with the rewards
named by `--rewards` (trainer/rewards.py), and makes `--inner_updates` steps on them. N counts the answer tokens of
*all* micro-batches and ranks; no token of a prompt is scored. π_ref is the model before this training, frozen.
Shao et al. 2024, arXiv:2402.03300; token-level mean and ε_high > ε_low: Yu et al. 2025, arXiv:2503.14476; without the
division in (1) (`--scale_rewards none`): Liu et al. 2025, arXiv:2503.20783.

Logged: mean reward and its parts ("answer" is the accuracy), KL, share of clipped tokens, entropy, length of answers,
tokens/s of drawing and of training; the same rewards of greedy answers to held-out questions; samples in samples.jsonl.

    python trainer/train_grpo.py                                           # newest reasoning weights, demo data
    python trainer/train_grpo.py --data_path dataset/rlaif-mini.jsonl --rewards model:out/reward_512.pth length:0.2
    python trainer/train_grpo.py --loss cispo --clip_high 4 --beta 0
    torchrun --nproc_per_node 2 trainer/train_grpo.py
    python trainer/train_grpo.py --resume                                  # after Ctrl-C, kill -9, a power cut
    python eval_model.py --model_mode 4

中文：GRPO：对同一问题采样一组回答，以组内相对奖励为优势；奖励函数在命令行上按名字选用。

Dimension legend: B rows · T tokens · N answer tokens of a micro-batch · G answers to a question.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainer import checkpoint, run_log
from trainer import trainer_utils as utils
from trainer.command_line import UserError, run_script
from trainer.optimizer import make_optimizer, step_if
from trainer.rewards import check_rewards, model_paths, parse_rewards, whole_paths
from trainer.rollout import (
    Roller,
    forget_samples,
    kl_estimate,
    load_prompts,
    pack_answers,
    policy_loss,
    rewarded,
    write_samples,
)
from trainer.token_logps import token_logps

STAGE = "grpo"
DATA_NAMES = ("rlaif-mini.jsonl", "rlaif.jsonl")


def group_advantages(rewards: Tensor, scale: str) -> Tensor:
    """Equation (1); with scale "none" without its division.  Shape: (questions, G) → (questions, G)."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if scale == "std" else centred


def answer_logps(model, run, micro: dict[str, Tensor], temperature: float) -> tuple[Tensor, Tensor, object]:
    """Log-probabilities of the answers' tokens, entropies (N,) each, and the model's output."""
    inputs = {name: micro[name] for name in ("input_ids", "position_ids", "documents")}
    with run.autocast():
        out = model(**inputs, need_logits=False)
        hidden = out.hidden_states.flatten(0, 1)[micro["head_positions"]]
        head = utils.head_weight(getattr(model, "module", model))
        return *token_logps(hidden, head, micro["targets"], temperature), out


def train_epoch(
    model, raw_model, reference, optimizer, data, order, roller, rewards, run, args, keeper, log, stop, check
):
    """Trains on the questions of `order`, update by update. True when the run was asked to stop.

    `model` is the wrapped module, whose forward gets the gradient; `raw_model` holds the same weights unwrapped.
    """
    progress = keeper.progress
    for questions, micro_questions in order.updates():
        run.seed_step(progress.step)
        lr = utils.cosine_lr(progress.step, args.total_steps, args.warmup_iters, args.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Draw G answers to each question of this rank, rate them, compare them within their group.
        started = time.perf_counter()
        mine = [number for numbers in micro_questions for number in numbers if number >= 0]
        with run.whole():
            answers = roller(data, mine, args.num_generations, args.temperature, progress.step)
        drawn = sum(len(answer.tokens) for answer in answers)
        drawing = time.perf_counter() - started
        parts = rewarded(rewards, answers)
        grouped = torch.tensor(parts["reward"], dtype=torch.float64).view(-1, args.num_generations)
        advantages = group_advantages(grouped, args.scale_rewards).flatten().float().to(run.device)
        if len(answers) == 0:  # only at the end of an epoch, on a rank for which no question is left
            advantages = torch.zeros(1, device=run.device)
        micros, _ = pack_answers(answers, args.max_seq_len, args.micro_rows, roller.pad, run)

        # Over all ranks: answer tokens N of equation (3), tokens trained on, rows, and whether any was asked to stop.
        rows = sum(int((micro["documents"][:, 0] >= 0).sum()) for micro in micros)
        read = sum(int((micro["documents"] >= 0).sum()) for micro in micros)
        counts = torch.tensor([drawn, read, rows, stop.signal is not None])
        tokens, read, rows, stopping = run.sum_ranks(counts).tolist()

        if args.beta:
            with torch.no_grad():
                for micro in micros:
                    micro["reference_logps"] = answer_logps(reference, run, micro, args.temperature)[0]

        all_finite = torch.ones((), dtype=torch.bool, device=run.device)
        for _ in range(args.inner_updates):
            losses, balance, kls, clips, entropies = torch.zeros(5, device=run.device)
            for i, micro in enumerate(micros):
                with run.sync_only_if(model, last=i == len(micros) - 1), run.autocast():
                    logps, entropy, out = answer_logps(model, run, micro, args.temperature)
                    real = micro["targets"] >= 0
                    gain = advantages[micro["answers"]] * real
                    token_loss, clipped = policy_loss(
                        logps, micro["old_logps"], gain, args.loss, args.clip_low, args.clip_high
                    )
                    if args.beta:
                        kl = kl_estimate(logps, micro["reference_logps"]) * real
                        token_loss = token_loss + args.beta * kl
                        kls += kl.detach().sum()
                    micro_loss = (token_loss * real).sum()
                    micro_balance = out.aux_loss * (micro["documents"][:, 0] >= 0).sum() / rows
                    # DDP averages gradients over ranks, the sum is wanted: hence × world_size.
                    loss = (micro_loss / max(tokens, 1) + micro_balance) * run.world_size
                    run.backward(loss)
                losses += micro_loss.detach()
                balance += micro_balance.detach()
                clips += (clipped & real).sum()
                entropies += entropy.sum()
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
            all_finite = all_finite & finite

        progress.advance(questions, read)
        progress.count_skip(all_finite, run.skips_allowed)
        figures = {"kl": kls, "clip": clips, "entropy": entropies}
        figures = {name: torch.where(finite, total, 0.0) for name, total in figures.items()}
        log.count(torch.where(finite, losses, 0.0), finite * tokens, read, 0.0, **figures)
        log.count_means(len(answers), **{name: sum(values) for name, values in parts.items()}, answer_tokens=drawn)
        log.count_means(drawing, drawn_per_second=drawn)
        log.count_means(time.perf_counter() - started - drawing, trained_per_second=drawn * args.inner_updates)
        if progress.step % args.log_interval == 0 or progress.step == args.total_steps:
            if run.is_main:
                write_samples(keeper.folder, progress.step, answers, parts, args.num_generations)
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
    return False


def validate(roller, rewards, data, run, args) -> dict[str, float] | None:
    """Mean reward and its parts of greedy answers to held-out questions; None without any."""
    count = min(len(data), args.val_rows)
    if count == 0:
        return None
    with run.whole():
        answers = roller(data, range(run.rank, count, run.world_size), 1, 0.0, 0)
    parts = rewarded(rewards, answers)
    totals = run.sum_ranks(torch.tensor([sum(values) for values in parts.values()], dtype=torch.float64))
    means = {f"val_{name}": total / count for name, total in zip(parts, totals.tolist(), strict=True)}
    return {"val_reward": means.pop("val_reward"), **means}


def main() -> None:
    # 1. Flags
    parser = argparse.ArgumentParser(
        description="Group relative policy optimisation (GRPO).", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    utils.add_shared_flags(
        parser, epochs=1, learning_rate=3e-5, max_seq_len=512, optimizer="adamw", weight_decay=0.0, batch_size=16,
        accumulation_steps=1, val_ratio=0.05, log_interval=1, val_interval=20, save_interval=20,
    )  # fmt: skip
    parser.add_argument("--from_weight", default="reason", help="the policy to begin with: a stage or a file")
    utils.add_rollout_flags(parser, generations=8, beta=0.02)
    grpo = parser.add_argument_group("GRPO")
    grpo.add_argument("--loss", choices=["clip", "cispo"], default="clip", help="how the ratio is bounded")
    grpo.add_argument("--scale_rewards", choices=["std", "none"], default="std", help="division in equation (1)")
    args = checkpoint.parse_flags(parser, STAGE)
    if args.num_generations < 2:
        raise UserError("--num_generations 1: GRPO compares the answers to a question; give 2 or more.")

    # 2. Process and seed
    run = utils.Run(args.device, args.dtype, args.seed, args.rank_timeout)
    args.rewards = args.given["rewards"] = whole_paths(args.rewards)
    rewards = parse_rewards(args.rewards, str(run.device))

    # 3. Model: one that learns and, where its distance counts, a frozen copy to compare with
    tokenizer = checkpoint.start_tokenizer(args)
    raw_model = checkpoint.start_base(args, tokenizer, run)
    reference = copy.deepcopy(raw_model).eval().requires_grad_(False) if args.beta else None

    # 4. Data: questions, and who answers them
    args.data_path = str(utils.find_data(args.data_path, DATA_NAMES, "rl", run))
    data, held_out = load_prompts(args, tokenizer, run)
    check_rewards(rewards, (part[i]["record"] for part in (data, held_out) for i in range(len(part))))
    utils.plan_updates(args, len(data), run)
    roller = Roller(raw_model, tokenizer, run, args.rollout_slots, args.max_seq_len, args.max_new_tokens)

    # 5. Optimiser, and the state of an interrupted run
    optimizer = make_optimizer(raw_model, args.weight_decay, run.device, args.optimizer, run.dtype)
    keeper = checkpoint.Keeper(run, STAGE, args, raw_model, optimizer)
    keeper.depends_on("reference", Path(args.from_weight))
    for i, path in enumerate(model_paths(rewards)):
        keeper.depends_on(f"reward model {i + 1}", path)
    same = "rewards num_generations max_new_tokens temperature inner_updates beta clip_low clip_high loss scale_rewards"
    keeper.also_same |= {name: getattr(args, name) for name in same.split()}
    progress = keeper.restore_or_start(data.data_key)

    # 6. Compile and wrap
    model, _ = utils.compile_and_wrap(raw_model, optimizer, None, run, args)
    batch = f"{args.batch_size * args.accumulation_steps} questions × {args.num_generations} answers"
    log = run_log.RunLog(run, STAGE, keeper, args, raw_model, data, unit="per answer", curve="reward", batch=batch)
    if run.is_main:
        forget_samples(keeper.folder, progress.step)

    def check() -> None:
        with log.pause():
            log.validation(progress, validate(roller, rewards, held_out, run, args))

    # 7. Epochs
    stop = utils.StopRequest()
    stopped = False
    if progress.step == 0:
        check()
    while not stopped and progress.step < args.total_steps:
        order = utils.RowOrder(len(data), args, run, progress.epoch, progress.rows_done)
        stopped = train_epoch(
            model, raw_model, reference, optimizer, data, order, roller, rewards, run, args, keeper, log, stop, check
        )
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
