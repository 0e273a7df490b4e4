"""What each stage after SFT teaches, in figures on questions that no stage trains on: `python scripts/show_stages.py`.

Starts from the SFT weights of the quick start and repeats each stage on the demo data with fixed seeds: LoRA (a name,
a price list), DPO, distillation, reasoning, GRPO and PPO. Before and after each, the test questions are asked; table
and a JSON are kept in out/stages, with one picture per stage. What is finished is not run again.

    python scripts/quick_start.py && python scripts/show_stages.py
    python scripts/show_stages.py --stages dpo reason --images images

中文：在演示数据上重做 SFT 之后的每个阶段，用从未训练过的题目比较训练前后，输出表格、JSON 和图片。
"""

import argparse
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from dataset.lm_dataset import SFTDataset, token_bytes
from dataset.make_demo_data import generate, is_polite_and_short, is_right
from model.files import atomic_open
from model.generation import Decoder, Sampling, stop_ids
from model.model_lora import load_lora, lora_state_dict
from model.weights import WeightsError, load_model, load_tokenizer
from scripts.bench_train import machine
from scripts.chat_text import chat_ids, decode, split_thinking
from scripts.score_questions import read_questions, wilson
from trainer import trainer_utils as utils
from trainer.checkpoint import sha256_of
from trainer.command_line import UserError, check_writable, run_script
from trainer.rewards import format as well_formed
from trainer.run_log import read_metrics
from trainer.train_full_sft import summed_nll

DEMO = generate(ROOT / "dataset" / "demo")
SHARED = "--device cpu --batch_size 8 --accumulation_steps 1 --log_interval 20".split()
SEEDS = (42, 43, 44)  # of the distillation


class Bench:
    """Runs trainers and asks questions; all figures land in `results`."""

    def __init__(self, base: Path, out: Path, images: Path):
        self.base, self.out, self.images = base, out, images
        self.tokenizer, self.base_sha256 = load_tokenizer(), sha256_of(base)
        self.dtype = str(utils.best_dtype(torch.device("cpu")))
        self.results: dict[str, dict] = {}
        self.seconds: dict[str, float] = {}

    def train(self, script: str, folder: str, *flags: str | Path | int | float) -> Path:
        """Runs a trainer into out/stages/FOLDER, unless it is finished there; its output goes to a file beside.

        Returns: its folder.  Raises: UserError when it fails.
        """
        out = self.out / folder
        words = [sys.executable, f"trainer/{script}", "--out_dir", out, *SHARED, *flags]
        words = [str(word) for word in words]
        stamp = out / "finished.json"
        ran = {"words": words, "base": self.base_sha256, "dtype": self.dtype}
        if stamp.is_file() and ran.items() <= json.loads(stamp.read_text(encoding="utf-8")).items():
            self.seconds[folder] = json.loads(stamp.read_text(encoding="utf-8"))["seconds"]
            return out
        out.mkdir(parents=True, exist_ok=True)
        print(f"  {' '.join(words[1:])}", flush=True)
        started = time.perf_counter()
        with open(out / "output.txt", "w", encoding="utf-8") as f:
            status = subprocess.run(words, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, check=False).returncode
        if status:
            raise UserError(f"{script} ended with status {status}; see {out / 'output.txt'}.")
        self.seconds[folder] = time.perf_counter() - started
        with atomic_open(stamp, "w") as f:
            json.dump({**ran, "seconds": self.seconds[folder]}, f)
        return out

    def ask(
        self,
        weights: Path,
        questions: str,
        *,
        lora: Path | None = None,
        thinking: bool | None = None,
        sampling: Sampling | None = None,
        keep: Callable[[dict], bool] = lambda question: True,
        each: int = 1,
    ) -> list[dict]:
        """The questions of a demo test file with `reply` (as written), `said` (without the thought), `right`.

        Args: keep: which questions; each: answers to each of them, drawn with seeds of their own.
        """
        model = load_model(weights)
        if lora is not None:
            load_lora(model, lora)
        rows = [dict(question) for question in read_questions(DEMO[questions]) if keep(question) for _ in range(each)]
        prompts = [chat_ids(self.tokenizer, row["conversations"], thinking) for row in rows]
        stop = frozenset(stop_ids(model, self.tokenizer))
        settings = sampling or Sampling(temperature=0)
        samplings = [
            Sampling(temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=160, stop_ids=stop, seed=i)
            for i in range(len(rows))
        ]
        decoder = Decoder(model, 32, max(map(len, prompts)) + 160)
        for row, request in zip(rows, decoder.generate(prompts, samplings), strict=True):
            reply = decode(self.tokenizer, request.answer)
            said = split_thinking(reply, opened=thinking is True)[1]
            ended = request.finish_reason == "stop"
            row |= {"reply": reply, "said": said, "right": is_right(said, row), "ended": ended}
        return rows

    def answer_loss(self, weights: Path) -> float:
        """Nats per token of the right answers to the demo test questions."""
        rows = [
            {"conversations": [*question["conversations"], {"role": "assistant", "content": question["answer"]}]}
            for question in read_questions(DEMO["test"])
        ]
        path = write_records(self.out / "test_answers.jsonl", rows)
        data = SFTDataset(path, self.tokenizer, 128, "all", cache_dir=self.out / "cache", show_progress=False)
        run, bytes_of = utils.Run("cpu", "float32", seed=0), token_bytes(self.tokenizer)
        return utils.validate(load_model(weights), data, summed_nll, run, 8, len(data), bytes_of)["val_loss"]


def read_records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_records(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path, "w") as f:
        f.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return path


def share(rows: list[dict], test: Callable[[dict], bool] = lambda row: row["right"]) -> dict:
    """{"share", "interval95", "total"} of the rows that pass."""
    passed = sum(bool(test(row)) for row in rows)
    return {"share": passed / len(rows), "interval95": wilson(passed, len(rows)), "total": len(rows)}


def last_metric(folder: Path, name: str) -> float:
    return next(r[name] for r in reversed(read_metrics(folder / "metrics.jsonl")) if name in r)


# --- the stages -------------------------------------------------------------------------------------------------------


def ordinary(question: dict) -> bool:
    return question["kind"] != "identity"


def show_lora(bench: Bench, name: str, title: str, test: Callable[[dict], bool]) -> None:
    """An adapter: its own questions, and all the others, before and after."""
    out = bench.train(
        "train_lora.py", name, "--lora_name", name, "--from_weight", bench.base, "--data_path", DEMO[name],
        "--mix_path", DEMO["sft"], "--epochs", LORA_EPOCHS[name], *LORA,
    )  # fmt: skip
    adapter = next((out / "lora").glob(f"{name}_*.pth"))
    model = load_model(bench.base)
    parameters = sum(p.numel() for p in model.parameters())
    load_lora(model, adapter)
    added = sum(t.numel() for t in lora_state_dict(model).values())
    figures = {"adapter_share": added / parameters, "adapter_kib": adapter.stat().st_size / 1024}
    for moment, lora in (("before", None), ("after", adapter)):
        figures |= {
            f"{title} {moment}": share(bench.ask(bench.base, f"{name}_test", lora=lora), test),
            f"other questions {moment}": share(bench.ask(bench.base, "test", lora=lora, keep=ordinary)),
        }
    bench.results[name] = figures


def show_dpo(bench: Bench) -> None:
    out = bench.train(
        "train_dpo.py", "dpo", "--from_weight", bench.base, "--data_path", DEMO["dpo"], "--val_ratio", 0.02, *DPO
    )
    after = next(out.glob("rlhf_*.pth"))
    figures = {"held-out pairs": {"share": last_metric(out / "runs" / after.stem, "val_accuracy")}}
    sampled = Sampling(temperature=0.85, top_p=0.85)  # as eval_model.py answers by default
    for moment, weights in (("before", bench.base), ("after", after)):
        polite = share(
            bench.ask(weights, "test", sampling=sampled), lambda row: is_polite_and_short(row["said"]) and row["ended"]
        )
        figures |= {f"style {moment}": polite, f"questions {moment}": share(bench.ask(weights, "test"))}
    bench.results["dpo"] = figures


def partly_wrong(folder: Path) -> Path:
    """The SFT conversations, three answers in ten replaced by another of the file: labels that nobody has checked."""
    rows = read_records(DEMO["sft"])
    answers = [turn for row in rows for turn in row["conversations"] if turn["role"] == "assistant"]
    others, draw = [turn["content"] for turn in answers], random.Random(0)
    for turn in answers:
        if draw.random() < 0.3:
            turn["content"] = draw.choice(others)
    return write_records(folder / "partly_wrong_sft.jsonl", rows)


def show_distillation(bench: Bench) -> None:
    """A student of a quarter of the size: KL to the teacher against hard labels, same rows, same number of updates.

    The rows are `partly_wrong`: where each label is right and has one answer only, the teacher knows no more than it.
    """
    figures: dict = {}
    data = partly_wrong(bench.out)
    for seed in SEEDS:
        for kind, alpha in (("kl", 0.0), ("hard", 1.0)):
            folder = f"distillation/{kind}_{seed}"
            out = bench.train(
                "train_distillation.py", folder, "--teacher", bench.base, "--data_path", data, "--alpha", alpha,
                "--seed", seed, *DISTILL,
            )  # fmt: skip
            student = next(out.glob("full_dist_*.pth"))
            figures[f"{'KL' if kind == 'kl' else 'hard labels'}, seed {seed}"] = {
                "loss": bench.answer_loss(student),
                **share(bench.ask(student, "test")),
            }
    sizes = [sum(p.numel() for p in load_model(path).parameters()) for path in (student, bench.base)]
    bench.results["distillation"] = figures | {"student_share": sizes[0] / sizes[1]}


def show_reason(bench: Bench) -> None:
    out = bench.train(
        "train_distill_reason.py", "reason", "--from_weight", bench.base, "--data_path", DEMO["reason"], "--mix_path",
        DEMO["sft"], *REASON,
    )  # fmt: skip
    after = next(out.glob("reason_*.pth"))
    thought = bench.ask(after, "reason_test")
    bench.results["reason"] = {
        "multi-step before": share(bench.ask(bench.base, "reason_test")),
        "multi-step after": share(thought),
        "format after": share(thought, lambda row: well_formed(row["reply"], row)),
        "thinking on after": share(bench.ask(after, "reason_test", thinking=True)),
        "questions before": share(bench.ask(bench.base, "test")),
        "questions after, thinking off": share(bench.ask(after, "test", thinking=False)),
        "questions after, own choice": share(bench.ask(after, "test")),
    }


def half_learnt(folder: Path) -> Path:
    """A reasoning file of all sortings and the first 600 sums: sums are learnt sooner, and half of both is wanted."""
    rows = DEMO["reason"].read_text(encoding="utf-8").splitlines()
    sums = [row for row in rows if not re.search(r"<answer>\\n[^<]*[,、]", row)]
    kept = set(sums[:600]) | (set(rows) - set(sums))
    path = folder / "half_reason.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_open(path, "w") as f:
        f.writelines(f"{row}\n" for row in rows if row in kept)
    return path


def show_rl(bench: Bench) -> None:
    """GRPO and PPO from a reasoning model that was stopped early, at about half of the answers it draws right."""
    half = bench.train(
        "train_distill_reason.py", "half_reason", "--from_weight", bench.base, "--data_path", half_learnt(bench.out),
        "--mix_path", DEMO["sft"], *HALF,
    )  # fmt: skip
    before = next(half.glob("reason_*.pth"))
    for name, script, flags in (("grpo", "train_grpo.py", GRPO), ("ppo", "train_ppo.py", PPO)):
        out = bench.train(script, name, "--from_weight", before, "--data_path", DEMO["rl"], *flags)
        after = next(path for path in out.glob("*.pth"))
        replies = {"before": bench.ask(before, "reason_test"), "after": bench.ask(after, "reason_test")}
        figures = {f"multi-step, greedy, {moment}": share(rows) for moment, rows in replies.items()}
        drawn = Sampling(temperature=1.0)  # as the policy answers while it trains: what the reward is a mean of
        figures |= {
            f"multi-step, drawn, {moment}": share(bench.ask(weights, "reason_test", sampling=drawn, each=8))
            for moment, weights in (("before", before), ("after", after))
        }
        figures |= {
            f"format {moment}": share(rows, lambda row: well_formed(row["reply"], row))
            for moment, rows in replies.items()
        }
        kls = [r["kl"] for r in read_metrics(out / "runs" / after.stem / "metrics.jsonl") if "kl" in r]
        bench.results[name] = figures | {"kl_last": kls[-1], "kl_largest": max(kls)}


# Settings of the stages: rows are short, as the demo texts are.
LORA = "--rank 4 --alpha 8 --max_seq_len 128 --learning_rate 2e-3 --val_interval 200 --mix_ratio 0.75".split()
LORA_EPOCHS = {"lora_identity": 3, "lora_domain": 12}
DPO = "--max_seq_len 256 --epochs 1 --learning_rate 2e-4 --beta 1 --sft_weight 3 --val_interval 100".split()
DISTILL = "--hidden_size 80 --num_hidden_layers 2 --max_seq_len 128 --epochs 1 --learning_rate 2e-3".split()
DISTILL += "--val_interval 500".split()
REASON = "--max_seq_len 256 --epochs 2 --learning_rate 1e-3 --mix_ratio 0.7 --val_interval 100".split()
HALF = "--max_seq_len 256 --epochs 3 --max_steps 260 --learning_rate 1e-3 --mix_ratio 0.5 --val_interval 100".split()
# Hundreds of answers per update: fewer drown in noise (trainer/LOG.md).
RL = "--max_seq_len 256 --max_new_tokens 128 --epochs 60 --beta 0.05 --warmup_iters 3".split()
RL += "--val_interval 25 --log_interval 1".split()
GRPO = [*RL, *"--max_steps 75 --learning_rate 1.5e-4 --batch_size 64 --num_generations 8".split()]
PPO = [*RL, *"--max_steps 130 --learning_rate 1e-4 --batch_size 256 --num_generations 1 --gae_lambda 1".split()]


def named(row: dict) -> bool:
    return "Jasmine" in row["said"] or "茉莉" in row["said"]


STAGES: dict[str, Callable[[Bench], None]] = {
    "lora_identity": lambda bench: show_lora(bench, "lora_identity", "new name", named),
    "lora_domain": lambda bench: show_lora(bench, "lora_domain", "prices", lambda row: row["right"]),
    "dpo": show_dpo,
    "distillation": show_distillation,
    "reason": show_reason,
    "rl": show_rl,
}


PARTS = {"rl": ["grpo", "ppo"]}


# --- table and pictures -----------------------------------------------------------------------------------------------


def table(results: dict[str, dict]) -> str:
    """A markdown table of the figures; shares with their 95 % interval."""
    lines = ["| stage | figure | value |", "|---|---|---|"]
    for stage, figures in results.items():
        for name, value in figures.items():
            if isinstance(value, dict):
                text = f"{value['share']:.1%}"
                if "interval95" in value:
                    text += " ({:.1%} to {:.1%} of {})".format(*value["interval95"], value["total"])
                if "loss" in value:
                    text += f", held-out loss {value['loss']:.4f}"
            else:
                text = f"{value:.2%}" if name.endswith("share") else f"{value:.4g}"
            lines.append(f"| {stage} | {name.replace('_', ' ')} | {text} |")
    return "\n".join(lines)


def draw(bench: Bench, name: str) -> None:
    """The picture of a stage: bars of the shares; for GRPO and PPO, reward over updates beside them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = PARTS.get(name, [name])
    figure, axes = plt.subplots(1, 2 if name == "rl" else 1, figsize=(10 if name == "rl" else 8, 4.2), dpi=120)
    bars = axes[1] if name == "rl" else axes
    shares = [
        (f"{part}: {label}" if len(parts) > 1 else label, value["share"], value.get("interval95"))
        for part in parts
        for label, value in bench.results[part].items()
        if isinstance(value, dict)
    ]
    for y, (label, value, interval) in enumerate(reversed(shares)):
        colour = "#9fb4c7" if "before" in label or "hard" in label else "#3b6ea5"
        bars.barh(y, 100 * value, color=colour, height=0.7)
        if interval:
            bars.plot([100 * end for end in interval], [y, y], color="#333333", linewidth=1)
        bars.text(101.5, y, f"{value:.1%}", va="center", fontsize=8)
    bars.set_yticks(range(len(shares)), [label for label, *_ in reversed(shares)], fontsize=8)
    bars.set(xlim=(0, 112), xlabel="% of held-out questions", title=name.replace("_", " "))
    if name == "rl":
        for part, colour in (("grpo", "#3b6ea5"), ("ppo", "#c8553d")):
            weights = next((bench.out / part).glob("*.pth"))
            records = read_metrics(bench.out / part / "runs" / weights.stem / "metrics.jsonl")
            for key, style in (("answer", "-"), ("val_answer", "o--")):
                points = [(r["step"], 100 * r[key]) for r in records if key in r]
                label = f"{part}, {'drawn' if key == 'answer' else 'held out, greedy'}"
                axes[0].plot(*zip(*points, strict=True), style, color=colour, markersize=3, linewidth=1, label=label)
        axes[0].set(xlabel="update", ylabel="% of right answers", title="accuracy while training")
        axes[0].legend(frameon=False, fontsize=8)
    for one in figure.axes:
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    figure.tight_layout()
    with atomic_open(bench.images / f"stage_{name}.png") as f:
        figure.savefig(f, format="png")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Repeat every stage after SFT on the demo data, with figures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--base", type=Path, default=ROOT / "out" / "full_sft_192.pth", help="SFT weights to begin with"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="which to show")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "stages", help="runs, table and JSON")
    parser.add_argument("--images", type=Path, help="folder for the pictures; default that of --out_dir")
    args = parser.parse_args()
    if not args.base.is_file():
        raise WeightsError(f"{args.base} does not exist: run `python scripts/quick_start.py`, or name SFT weights.")
    check_writable(args.out_dir, "--out_dir")
    bench = Bench(args.base.resolve(), args.out_dir.resolve(), (args.images or args.out_dir).resolve())
    path = bench.out / "stages.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        bench.results, bench.seconds = kept["results"], kept["seconds"]
    for name in args.stages:
        print(f"── {name}", flush=True)
        STAGES[name](bench)
        with atomic_open(path, "w") as f:
            made_on = machine("cpu") | {"dtype": bench.dtype}
            kept = {"machine": made_on, "results": bench.results, "seconds": bench.seconds}
            json.dump(kept, f, ensure_ascii=False, indent=1)
        draw(bench, name)
        print(table({key: bench.results[key] for key in PARTS.get(name, [name])}), flush=True)
    with atomic_open(bench.out / "stages.md", "w") as f:
        f.write(table(bench.results) + "\n")


if __name__ == "__main__":
    run_script(main)
