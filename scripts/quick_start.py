"""From nothing to a chat with a model trained here, in one command: `python scripts/quick_start.py`.

Sets up a virtual environment, writes the demo data, pretrains and fine-tunes a model of 2.8 million parameters on it,
scores it on questions it never saw, and shows an example chat. Safe to run again: environment and data are reused.

中文：一条命令，从零得到一个能聊天的小模型。
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from setup_env import ROOT, ensure_environment, run_step

SIZE = ["--hidden_size", "192", "--num_hidden_layers", "4"]
# Short rows, as the demo texts are short, and small updates: many of them teach more than few large ones.
SHARED = ["--max_seq_len", "128", "--batch_size", "8", "--accumulation_steps", "1", "--learning_rate", "2e-3"]
QUIET = ["--log_interval", "100", "--save_interval", "500", "--val_interval", "0"]
CHAT = (
    "Hello!", "My name is Tom. I live in Rome.", "Where do I live?", "What is 23 + 45?", "星期三的后一天是星期几？",
    "把3、12、7按从小到大的顺序排好。", "你叫什么名字？",
)  # fmt: skip


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # on Windows a file or a pipe would otherwise fail on the lines below
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    python = ensure_environment("requirements.txt")
    started = time.perf_counter()

    def step(title: str, *arguments: str, typed: str | None = None) -> None:
        print(f"\n── {title} ({time.perf_counter() - started:.0f} s so far)", flush=True)
        run_step(python, *arguments, typed=typed)

    demo = ROOT / "dataset" / "demo"
    step("demo data", "dataset/make_demo_data.py")
    data = ["--data_path", str(demo / "demo_pretrain.jsonl")]
    step("pretraining", "trainer/train_pretrain.py", *SIZE, *SHARED, *QUIET, *data, "--epochs", "1")
    data = ["--data_path", str(demo / "demo_sft.jsonl"), "--from_weight", str(ROOT / "out" / "pretrain_192.pth")]
    step("fine-tuning", "trainer/train_full_sft.py", *SHARED, *QUIET, *data, "--epochs", "2")
    weights = str(ROOT / "out" / "full_sft_192.pth")
    step("test questions", "eval_model.py", "--weights", weights, "--questions", str(demo / "demo_test.jsonl"))
    chat = ["--weights", weights, "--mode", "manual", "--temperature", "0"]
    step("example chat", "eval_model.py", *chat, typed="\n".join(CHAT) + "\n")
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Chat with your model: {python} eval_model.py", flush=True)


if __name__ == "__main__":
    main()
