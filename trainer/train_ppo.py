"""PPO: the model answers, a value head says what was to be expected, and what went better becomes likelier.

    r_t = − β·(log π_old(token_t) − log π_ref(token_t))  [ + reward of the answer, at its last token ]        (1)
    δ_t = r_t + γ·V(t+1) − V(t),     A_t = δ_t + γλ·A_{t+1}                                                   (2)
    loss = 1/N · Σ_t [ − min(ρ_t·A_t, clamp(ρ_t, 1 − ε_low, 1 + ε_high)·A_t) + c·(V(t) − R_t)² / 2 ]          (3)
    ρ_t = π(token_t) / π_old(token_t),     R_t = A_t + V_old(t)

V(t) is read off the hidden state from which token t is drawn, by a small network beside the head, with a learning rate
of its own; policy and value share the rest of the model. A is brought to mean 0 and variance 1 over the tokens of an
update. N counts the answer tokens of *all* micro-batches and ranks; no token of a prompt is scored. π_ref is the model
before this training, frozen. Schulman et al. 2017, arXiv:1707.06347; (2) GAE, arXiv:1506.02438; (1) Ziegler et al.
2019, arXiv:1909.08593.

Logged: as in GRPO, and the value loss.

    python trainer/train_ppo.py                                            # newest reasoning weights, demo data
    python trainer/train_ppo.py --data_path dataset/rlaif-mini.jsonl --rewards model:out/reward_512.pth length:0.2
    torchrun --nproc_per_node 2 trainer/train_ppo.py
    python trainer/train_ppo.py --resume                                   # after Ctrl-C, kill -9, a power cut
    python eval_model.py --weights out/ppo_actor_512.pth

中文：PPO：价值头预测期望回报，用 GAE 计算优势；每个词元的 KL 惩罚并入奖励。

Dimension legend: B rows · T tokens · N answer tokens of a micro-batch · A answers · L longest of them.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainer import checkpoint, run_log
from trainer import trainer_utils as utils
from trainer.command_line import number, run_script
from trainer.optimizer import add_group, make_optimizer, step_if
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
from trainer.train_grpo import DATA_NAMES, validate

STAGE = "ppo_actor"


def make_value_head(hidden_size: int, device: torch.device) -> nn.Module:
    """Hidden state → value; it begins with 0 everywhere."""
    head = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, 1)).to(device)
    for p in head[-1].parameters():
        nn.init.zeros_(p)
    return head


def advantages_of(rewards: Tensor, values: Tensor, real: Tensor, gamma: float, lam: float) -> Tensor:
    """Equation (2), from the last token of each answer backwards.

    Shape: (A, L) each, real True where an answer has a token, first tokens first → (A, L), 0 behind the end.
    """
    advantages, following, ahead = (
        torch.zeros_like(values),
        torch.zeros_like(values[:, 0]),
        torch.zeros_like(values[:, 0]),
    )
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        ahead = torch.where(real[:, t], delta + gamma * lam * ahead, 0.0)
        following = torch.where(real[:, t], values[:, t], 0.0)
        advantages[:, t] = ahead
    return advantages


def answer_outputs(model, raw_model, run, micro: dict[str, Tensor], temperature: float):
    """Log-probabilities of the answers' tokens, entropies, values (N,) each, and the model's output."""
    inputs = {name: micro[name] for name in ("input_ids", "position_ids", "documents")}
    with run.autocast():
        out = model(**inputs, need_logits=False)
        hidden = out.hidden_states.flatten(0, 1)[micro["head_positions"]]
        logps, entropy = token_logps(hidden, utils.head_weight(raw_model), micro["targets"], temperature)
        values = raw_model.value_head(hidden)[:, 0].float() if hasattr(raw_model, "value_head") else None
    return logps, entropy, values, out


@torch.no_grad()
def judge(micros, held, answers, rewards, raw_model, reference, run, args) -> None:
    """Adds to each micro-batch what the steps need: `advantages` (scaled over all ranks) and `returns`, (N,) each."""
    for micro, numbers in zip(micros, held, strict=True):
        values = answer_outputs(raw_model, raw_model, run, micro, args.temperature)[2]
        micro["reference_logps"] = answer_outputs(reference, reference, run, micro, args.temperature)[0]
        token_rewards = -args.beta * (micro["old_logps"] - micro["reference_logps"])
        lengths = torch.tensor([len(answers[number].tokens) for number in numbers] or [1], device=run.device)
        real = torch.arange(int(lengths.max()), device=run.device) < lengths[:, None]  # (A, L)
        padded_rewards, padded_values = (
            torch.zeros(real.shape, device=run.device),
            torch.zeros(real.shape, device=run.device),
        )
        padded_rewards[real], padded_values[real] = token_rewards, values
        final = torch.tensor([rewards[number] for number in numbers] or [0.0], device=run.device)
        padded_rewards[torch.arange(len(lengths), device=run.device), lengths - 1] += final
        advantages = advantages_of(padded_rewards, padded_values, real, args.gamma, args.gae_lambda)
        micro["advantages"], micro["returns"] = advantages[real], (advantages + padded_values)[real]
    real = torch.cat([micro["targets"] >= 0 for micro in micros])
    every = torch.cat([micro["advantages"] for micro in micros])[real].cpu().double()
    count = torch.tensor(every.numel(), dtype=torch.float64)
    count, total, squares = run.sum_ranks(torch.stack([count, every.sum(), (every**2).sum()])).tolist()
    mean = total / max(count, 1)
    deviation = max(squares / max(count, 1) - mean**2, 1e-8) ** 0.5
    for micro in micros:
        micro["advantages"] = (micro["advantages"] - mean) / deviation


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
            group["lr"] = lr * group.get("lr_factor", 1.0)

        # Draw answers to the questions of this rank, rate them, and judge each token by what was expected.
        started = time.perf_counter()
        mine = [number for numbers in micro_questions for number in numbers if number >= 0]
        with run.whole():
            answers = roller(data, mine, args.num_generations, args.temperature, progress.step)
        drawn = sum(len(answer.tokens) for answer in answers)
        drawing = time.perf_counter() - started
        parts = rewarded(rewards, answers)
        micros, held = pack_answers(answers, args.max_seq_len, args.micro_rows, roller.pad, run)
        judge(micros, held, answers, parts["reward"], raw_model, reference, run, args)

        # Over all ranks: answer tokens N of equation (3), tokens trained on, rows, and whether any was asked to stop.
        rows = sum(int((micro["documents"][:, 0] >= 0).sum()) for micro in micros)
        read = sum(int((micro["documents"] >= 0).sum()) for micro in micros)
        counts = torch.tensor([drawn, read, rows, stop.signal is not None])
        tokens, read, rows, stopping = run.sum_ranks(counts).tolist()

        all_finite = torch.ones((), dtype=torch.bool, device=run.device)
        for _ in range(args.inner_updates):
            losses, balance, kls, clips, entropies, value_losses = torch.zeros(6, device=run.device)
            for i, micro in enumerate(micros):
                with run.sync_only_if(model, last=i == len(micros) - 1), run.autocast():
                    logps, entropy, values, out = answer_outputs(model, raw_model, run, micro, args.temperature)
                    real = micro["targets"] >= 0
                    token_loss, clipped = policy_loss(
                        logps, micro["old_logps"], micro["advantages"], "clip", args.clip_low, args.clip_high
                    )
                    value_loss = (values - micro["returns"]) ** 2 / 2
                    micro_loss = ((token_loss + args.value_coef * value_loss) * real).sum()
                    micro_balance = out.aux_loss * (micro["documents"][:, 0] >= 0).sum() / rows
                    # DDP averages gradients over ranks, the sum is wanted: hence × world_size.
                    loss = (micro_loss / max(tokens, 1) + micro_balance) * run.world_size
                    run.backward(loss)
                losses += micro_loss.detach()
                balance += micro_balance.detach()
                value_losses += (value_loss.detach() * real).sum()
                kls += (kl_estimate(logps.detach(), micro["reference_logps"]) * real).sum()
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
        figures = {"kl": kls, "clip": clips, "entropy": entropies, "value_loss": value_losses}
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


def main() -> None:
    # 1. Flags
    parser = argparse.ArgumentParser(
        description="Proximal policy optimisation (PPO).", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    utils.add_shared_flags(
        parser, epochs=1, learning_rate=3e-5, max_seq_len=512, optimizer="adamw", weight_decay=0.0, batch_size=32,
        accumulation_steps=1, val_ratio=0.05, log_interval=1, val_interval=20, save_interval=20,
    )  # fmt: skip
    parser.add_argument("--from_weight", default="reason", help="the policy to begin with: a stage or a file")
    utils.add_rollout_flags(parser, generations=4, beta=0.02)
    ppo = parser.add_argument_group("value head")
    share = number(float, 0, most=1)
    ppo.add_argument("--critic_learning_rate", type=number(float, 0), default=1e-3, help="of the value head alone")
    ppo.add_argument("--value_coef", type=number(float, 0), default=0.1, help="c of equation (3)")
    ppo.add_argument("--gamma", type=share, default=1.0, help="γ: what a later token's reward is worth")
    ppo.add_argument("--gae_lambda", type=share, default=0.95, help="λ: 1 trusts the rewards alone, 0 the values")
    args = checkpoint.parse_flags(parser, STAGE)

    # 2. Process and seed
    run = utils.Run(args.device, args.dtype, args.seed, args.rank_timeout)
    args.rewards = args.given["rewards"] = whole_paths(args.rewards)
    rewards = parse_rewards(args.rewards, str(run.device))

    # 3. Model: the reference, frozen, and a copy that learns
    tokenizer = checkpoint.start_tokenizer(args)
    reference = checkpoint.start_base(args, tokenizer, run)
    raw_model = copy.deepcopy(reference)
    reference.eval().requires_grad_(False)

    # 4. Data: questions, and who answers them
    args.data_path = str(utils.find_data(args.data_path, DATA_NAMES, "rl", run))
    data, held_out = load_prompts(args, tokenizer, run)
    check_rewards(rewards, (part[i]["record"] for part in (data, held_out) for i in range(len(part))))
    utils.plan_updates(args, len(data), run)
    roller = Roller(raw_model, tokenizer, run, args.rollout_slots, args.max_seq_len, args.max_new_tokens)

    # 5. Optimiser, and the state of an interrupted run
    optimizer = make_optimizer(raw_model, args.weight_decay, run.device, args.optimizer, run.dtype)
    raw_model.value_head = make_value_head(raw_model.config.hidden_size, run.device)
    factor = args.critic_learning_rate / args.learning_rate if args.learning_rate else 0.0
    add_group(optimizer, raw_model.value_head.parameters(), lr_factor=factor)
    keeper = checkpoint.ActorKeeper(run, STAGE, args, raw_model, optimizer)
    keeper.depends_on("reference", Path(args.from_weight))
    for i, path in enumerate(model_paths(rewards)):
        keeper.depends_on(f"reward model {i + 1}", path)
    same = "rewards num_generations max_new_tokens temperature inner_updates beta clip_low clip_high"
    same += " critic_learning_rate value_coef gamma gae_lambda"
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
