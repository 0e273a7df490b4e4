"""White-box distillation: a small student learns from the whole distribution of a large teacher, not from one token.

    loss = 1/N · Σ_t [ α·CE_t + (1 − α)·τ²·KL_t ]                                                             (1)
    CE_t = − log q(y_t)                                      the hard label, as in SFT                         (2)
    KL_t = Σ_v p(v)·log(p(v) / q(v))                         forward: the student covers what the teacher says (3)
    KL_t = Σ_v q(v)·log(q(v) / p(v))                         reverse: the student keeps to what is likely      (4)

p and q are the distributions of teacher and student at temperature τ (at 1 in (2)); τ² keeps the size of the gradient
independent of τ. Only what the assistant wrote is trained on; N counts it over *all* micro-batches and ranks. (1), (3)
Hinton et al. 2015, arXiv:1503.02531; (4) Gu et al. 2023, arXiv:2306.08543.

The gradients with respect to the student's logits z are written out, so that of both models the logits of a piece of
the batch are held, never all:

    ∂CE/∂z = q − onehot(y),   ∂τ²KL/∂z = τ·(q − p)  for (3),   τ·q·(log(q/p) − KL)  for (4)                     (5)

Logged: the loss, its two parts CE and KL; held-out CE and bits per byte as in SFT.

    python trainer/train_distillation.py                                   # newest SFT weights teach a fifth of them
    python trainer/train_distillation.py --teacher out/full_sft_768.pth --from_weight out/full_sft_512.pth
    python trainer/train_distillation.py --teacher folder/of/transformers --hidden_size 512 --num_hidden_layers 8
    torchrun --nproc_per_node 2 trainer/train_distillation.py
    python trainer/train_distillation.py --resume                          # after Ctrl-C, kill -9, a power cut

Black-box distillation is SFT on a file that a teacher wrote: scripts/write_answers.py makes one.

中文：白盒蒸馏：小模型学习大模型的整个输出分布（前向或反向 KL），logits 按块计算，从不整批保存。

Dimension legend: B batch · T tokens · V vocabulary · N trained positions · n those of a piece · D hidden size.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.lm_dataset import SFTDataset, token_bytes
from model.model_minimind import IGNORE, MiniMindForCausalLM
from model.weights import STAGES, WeightsError, find_weights, load_model, load_tokenizer, read_about
from trainer import checkpoint, run_log
from trainer import trainer_utils as utils
from trainer.chunked_nll import summed_through_head
from trainer.command_line import number, run_script
from trainer.optimizer import make_optimizer, step_if
from trainer.train_full_sft import DATA_NAMES, summed_nll

STAGE = "full_dist"


class Teacher:
    """A frozen model of any size, ours or one of transformers, in the arithmetic of the run."""

    def __init__(self, path: Path, tokenizer, run: utils.Run):
        self.path, self.run = path, run
        self.model = load_model(path, run.device, run.dtype).requires_grad_(False)
        self.head = self.model.get_output_embeddings().weight
        check_vocabulary(path, self.model, tokenizer)
        if not isinstance(self.model, MiniMindForCausalLM):
            self.check_logits()

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Final hidden states at the trained positions.  Shape: → (N, D of the teacher)."""
        with self.run.autocast():
            if isinstance(self.model, MiniMindForCausalLM):
                inputs = {name: batch[name] for name in ("input_ids", "position_ids", "documents")}
                hidden = self.model(**inputs, need_logits=False).hidden_states
            else:  # transformers tells packed documents apart by positions that begin anew
                inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
                hidden = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)[batch["head_positions"]]

    @torch.no_grad()
    def check_logits(self) -> None:
        """Two documents in one row, against the model's own logits of the second one alone.

        Raises: WeightsError where they differ: a bias, scale or cap behind the head, or layers that ignore positions.
        """
        ids = torch.arange(3, 27, device=self.run.device)[None] % self.model.config.vocab_size
        positions = torch.cat([torch.arange(16), torch.arange(8)]).to(ids)[None]
        batch = {"input_ids": ids, "position_ids": positions, "head_positions": torch.arange(16, 24)}
        with self.run.autocast():
            found = (self(batch) @ self.head.T).float()
            expected = self.model(ids[:, 16:], use_cache=False).logits[0].float()
        far = not (found - expected).abs().mean() < 0.05 * expected.std()  # bfloat16 rounds by less than a hundredth
        if far or getattr(self.model.config, "final_logit_softcapping", None):  # small logits do not reach a cap
            raise WeightsError(
                f"the teacher {self.path} cannot be asked about packed rows: its logits are more than a product with "
                "its last hidden states, or its layers mix what stands in one row. Let it write answers "
                "(scripts/write_answers.py) and use train_full_sft.py."
            )


def check_vocabulary(path: Path, teacher: nn.Module, tokenizer) -> None:
    """Raises: WeightsError unless teacher and student mean the same by the same id."""
    folder = path if path.is_dir() else read_about(path).get("tokenizer")
    theirs = load_tokenizer(folder).get_vocab()
    if theirs != tokenizer.get_vocab() or teacher.config.vocab_size != len(tokenizer):
        raise WeightsError(
            f"the teacher {path} has another vocabulary ({teacher.config.vocab_size} tokens) than the student "
            f"({len(tokenizer)}): their distributions cannot be compared. Train the student with --tokenizer of the "
            "teacher, or let the teacher write answers (scripts/write_answers.py) and use train_full_sft.py."
        )


class Distillation:
    """Equation (1) and its gradient (5), piece by piece; sums of CE and KL are kept for the log."""

    def __init__(self, teacher: Teacher, alpha: float, temperature: float, reverse: bool):
        self.teacher, self.alpha, self.temperature, self.reverse = teacher, alpha, temperature, reverse
        self.sums = torch.zeros(2, device=teacher.run.device)

    def __call__(self, hidden: Tensor, head: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The loss summed over the trained positions.  Shape: hidden (B, T, D), head (V, D) → ()."""
        student = hidden.flatten(0, 1)[batch["head_positions"]]
        targets = batch["targets"], self.teacher(batch)
        return summed_through_head(student, head, targets, self.piece)

    def piece(self, logits: Tensor, targets: Tensor, teacher_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Shape: (n, V), (n,), (n, D of the teacher) → (), gradient (n, V)."""
        trained = (targets != IGNORE)[:, None]
        place, tau = targets.clamp(min=0)[:, None], self.temperature
        z = logits.float()
        log_q = z.log_softmax(-1)
        ce = -(log_q.gather(-1, place) * trained).sum()
        gradient = self.alpha * log_q.exp().scatter_add_(-1, place, torch.full_like(log_q[:, :1], -1.0))
        log_p = ((teacher_hidden @ self.teacher.head.T).float() / tau).log_softmax(-1)
        log_q = (z / tau).log_softmax(-1) if tau != 1 else log_q
        ratio = log_q - log_p
        if self.reverse:
            q = log_q.exp()
            kl = (q * ratio).sum(-1, keepdim=True)  # (n, 1)
            gradient += (1 - self.alpha) * tau * q * (ratio - kl)
        else:
            p = log_p.exp()
            kl = -(p * ratio).sum(-1, keepdim=True)
            gradient += (1 - self.alpha) * tau * (log_q.exp() - p)
        kl = tau**2 * (kl * trained).sum()
        self.sums += torch.stack([ce, kl])
        return self.alpha * ce + (1 - self.alpha) * kl, (gradient * trained).to(logits.dtype)

    def take_sums(self) -> dict[str, Tensor]:
        """CE and τ²·KL summed since the last call."""
        (ce, kl), self.sums = self.sums, torch.zeros_like(self.sums)
        return {"ce": ce, "kl": kl}


def train_epoch(model, raw_model, distillation, optimizer, updates, run, args, keeper, log, stop, check) -> bool:
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
        losses = torch.zeros((), device=run.device)
        balance = torch.zeros((), device=run.device)

        for i, micro in enumerate(micros):
            with run.sync_only_if(model, last=i == len(micros) - 1), run.autocast():
                inputs = {name: micro[name] for name in ("input_ids", "position_ids", "documents")}
                out = model(**inputs, need_logits=False)
                micro_loss = distillation(out.hidden_states, utils.head_weight(raw_model), micro)
                # The balance loss is a mean over rows; padding that fills up the last update of an epoch is none.
                micro_balance = out.aux_loss * (micro["documents"][:, 0] >= 0).sum() / rows
                # DDP averages gradients over ranks, the sum is wanted: hence × world_size.
                loss = (micro_loss / max(trained, 1) + micro_balance) * run.world_size
                run.backward(loss)
            losses += micro_loss.detach()
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
        parts = {name: torch.where(finite, total, 0.0) for name, total in distillation.take_sums().items()}
        log.count(torch.where(finite, losses, 0.0), finite * trained, tokens, waited, **parts)
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
        description="Distil a teacher into a student.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    utils.add_shared_flags(parser, epochs=1, learning_rate=1e-3, max_seq_len=512)
    parser.add_argument("--from_weight", default="none", help="the student: a stage, a file, or none for a new one")
    distill = parser.add_argument_group("distillation")
    distill.add_argument("--teacher", default="full_sft", help="a stage, a file or a transformers folder")
    share, positive = number(float, 0, most=1), number(float, 0, excluded=True)
    distill.add_argument("--alpha", type=share, default=0.0, help="weight of the hard labels; 1: no distillation")
    distill.add_argument("--temperature", type=positive, default=1.0, help="τ, of both distributions")
    distill.add_argument("--kl", choices=["forward", "reverse"], default="forward", help="equation (3) or (4)")
    args = checkpoint.parse_flags(parser, STAGE)

    # 2. Process and seed
    run = utils.Run(args.device, args.dtype, args.seed, args.rank_timeout)

    # 3. Model: the teacher, and a student, by default of half its width and depth
    transformers_logging.disable_progress_bar()
    path = find_weights(args.out_dir, args.teacher) if args.teacher in STAGES else Path(args.teacher)
    args.teacher = args.given["teacher"] = str(path.resolve())  # "the newest" may be another one tomorrow
    if args.tokenizer is None and args.from_weight == "none":
        args.tokenizer = str(path) if path.is_dir() else read_about(path).get("tokenizer")
    tokenizer = checkpoint.start_tokenizer(args)
    teacher = Teacher(path, tokenizer, run)
    if args.from_weight == "none":
        args.hidden_size = args.hidden_size or max(teacher.model.config.hidden_size // 32, 1) * 16
        args.num_hidden_layers = args.num_hidden_layers or max(teacher.model.config.num_hidden_layers // 2, 1)
    run.seed_step(0)  # the first weights of a student do not depend on how its teacher was loaded
    raw_model = checkpoint.start_model(args, tokenizer, run)
    distillation = Distillation(teacher, args.alpha, args.temperature, args.kl == "reverse")

    # 4. Data: tokenised once, packed into rows
    args.data_path = str(utils.find_data(args.data_path, DATA_NAMES, "sft", run))
    data, held_out = utils.load_splits(SFTDataset, args, tokenizer, run)
    utils.plan_updates(args, len(data), run)

    # 5. Optimiser, and the state of an interrupted run
    optimizer = make_optimizer(raw_model, args.weight_decay, run.device, args.optimizer, run.dtype)
    keeper = checkpoint.Keeper(run, STAGE, args, raw_model, optimizer)
    keeper.also_same = {name: getattr(args, name) for name in ("alpha", "temperature", "kl")}
    keeper.depends_on("teacher", path)
    progress = keeper.restore_or_start(data.data_key)

    # 6. Compile and wrap
    model, _ = utils.compile_and_wrap(raw_model, optimizer, None, run, args)
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
        stopped = train_epoch(model, raw_model, distillation, optimizer, updates, run, args, keeper, log, stop, check)
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
