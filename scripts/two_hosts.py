"""Two machines on one: a run over both, one cut off in the middle: `sudo python scripts/two_hosts.py`.

Makes two network namespaces, 10.77.0.1 and 10.77.0.2, joined by a cable, and starts torchrun in each as on two machines
(elastic rendezvous, 1 to 2 hosts). After some updates the second one loses its cable and is killed. torchrun on the
first one notices, starts its process again, and the run goes on alone from its newest state, with the same rows per
update. In the end its losses are compared with those of a run on one machine that nobody disturbed.

    sudo python scripts/two_hosts.py
    sudo python scripts/two_hosts.py --json scripts/bench/results/two_hosts.json

Linux only, as root (`ip netns`).

中文：用两个网络命名空间模拟两台机器，中途切断一台，检查训练能否自动从最近的状态继续。
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.make_demo_data import generate
from model.files import atomic_open
from trainer.command_line import UserError, run_script
from trainer.run_log import read_metrics

HOSTS = {"minimind_a": "10.77.0.1", "minimind_b": "10.77.0.2"}
STEPS, CUT_AT = 300, 60
LIMIT_SECONDS = 400


def network(*words: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, encoding="utf-8", check=False)
    if check and done.returncode:
        raise UserError(f"ip {' '.join(words)}: {done.stderr.strip()} (this needs Linux and root)")


def lay_cable() -> None:
    """Two namespaces and a pair of virtual network cards, one end in each."""
    a, b = HOSTS
    for host in HOSTS:
        network("netns", "add", host)
    network("link", "add", "mm_a", "netns", a, "type", "veth", "peer", "name", "mm_b", "netns", b)
    for host, card in ((a, "mm_a"), (b, "mm_b")):
        network("-n", host, "addr", "add", f"{HOSTS[host]}/24", "dev", card)
        network("-n", host, "link", "set", card, "up")
        network("-n", host, "link", "set", "lo", "up")


def start(host: str, card: str, data: Path, out_dir: Path) -> subprocess.Popen:
    """torchrun as it is typed on each machine; only the host of the rendezvous is named."""
    # Machines with names of their own need no is_host: torchrun looks up who the endpoint is.
    conf = f"join_timeout=60,last_call_timeout=5,timeout=60,is_host={int(host == 'minimind_a')}"
    command = f"""torchrun --nnodes 1:2 --nproc_per_node 1 --max-restarts 3 --rdzv_id demo --rdzv_backend c10d
        --rdzv_endpoint {HOSTS["minimind_a"]}:29400 --rdzv_conf {conf}
        --local_addr {HOSTS[host]} {ROOT / "trainer" / "train_pretrain.py"}"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": card, "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", *command.split()[1:]]
    with open(out_dir.with_suffix(f".{host}.txt"), "w", encoding="utf-8") as f:
        return subprocess.Popen(
            ["ip", "netns", "exec", host, *torchrun, *flags(data, out_dir, 2)],
            env=environment, stdout=f, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def flags(data: Path, out_dir: Path, batch_size: int) -> list[str]:
    words = f"--hidden_size 64 --num_hidden_layers 2 --max_seq_len 64 --batch_size {batch_size} --accumulation_steps 1"
    words += f" --epochs 20 --max_steps {STEPS} --save_interval 20 --log_interval 1 --val_interval 0"
    words += " --device cpu --rank_timeout 15"
    return [*words.split(), "--no-compile", "--optimizer", "adamw", "--data_path", str(data), "--out_dir", str(out_dir)]


def losses(out_dir: Path) -> list[float]:
    path = out_dir / "runs" / "pretrain_64" / "metrics.jsonl"
    return [record["loss"] for record in read_metrics(path) if "loss" in record] if path.is_file() else []


def wait_until(ready: Callable[[], bool], processes: list[subprocess.Popen], what: str, output: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            raise UserError(f"{what}: not within {LIMIT_SECONDS} seconds")
        if all(process.poll() is not None for process in processes):
            said = "".join(path.read_text(encoding="utf-8")[-1500:] for path in output.parent.glob("*.txt"))
            raise UserError(f"{what}: every torchrun has ended before. {said}")
        time.sleep(0.05)


def end(process: subprocess.Popen) -> None:
    """The whole machine: torchrun and its workers."""
    for line in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = line.read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == process.pid:  # its session
                os.kill(int(line.parent.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue  # it has just ended
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    if not shutil.which("ip") or os.name == "nt" or os.geteuid() != 0:
        raise UserError("this needs Linux, root and the `ip` command.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = generate(ROOT / "dataset" / "demo")["pretrain"].read_text(encoding="utf-8").splitlines(keepends=True)
        data, out_dir, alone = folder / "data.jsonl", folder / "two", folder / "alone"
        data.write_text("".join(lines[:1000]), encoding="utf-8")
        script = [sys.executable, ROOT / "trainer" / "train_pretrain.py", *flags(data, alone, 4)]
        subprocess.run(script, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=True)
        running: list[subprocess.Popen] = []
        output = out_dir.with_suffix(".minimind_a.txt")
        try:
            for host in HOSTS:  # what a run that was cut off itself left behind
                network("netns", "del", host, check=False)
            lay_cable()
            running = [start(host, card, data, out_dir) for host, card in zip(HOSTS, ("mm_a", "mm_b"), strict=True)]
            wait_until(lambda: len(losses(out_dir)) >= CUT_AT, running, f"update {CUT_AT}", output)
            network("-n", "minimind_b", "link", "set", "mm_b", "down")
            end(running[1])
            cut = time.monotonic()
            before = len(losses(out_dir))
            print(f"host b is cut off after update {before}", flush=True)
            wait_until(
                lambda: "resumed at update" in output.read_text(encoding="utf-8"), running[:1], "the restart", output
            )
            seconds = time.monotonic() - cut
            resumed = int(output.read_text(encoding="utf-8").split("resumed at update ")[1].split(",")[0])
            print(f"host a goes on alone {seconds:.1f} s later, from update {resumed}", flush=True)
            if status := running[0].wait(timeout=LIMIT_SECONDS):
                raise UserError(f"host a ended with {status}:\n{output.read_text(encoding='utf-8')[-1500:]}")
        finally:
            for process in running:
                end(process)
            for host in HOSTS:
                network("netns", "del", host, check=False)
        one, two = losses(alone), losses(out_dir)
        far = max(abs(a - b) / a for a, b in zip(one, two, strict=True))
        print(f"{len(two)} updates; losses differ from the undisturbed run by at most {far:.1e} of their size")
        figures = {"cut_after": before, "resumed_from": resumed, "restart_seconds": seconds, "largest_difference": far}
        if args.json:
            with atomic_open(args.json, "w") as f:
                json.dump(figures, f, indent=1)
        if far > 1e-3:
            raise UserError("the disturbed run is another one.")


if __name__ == "__main__":
    run_script(main)
