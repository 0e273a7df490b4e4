"""Breaks training runs on purpose and looks at what is left: `python scripts/fault_tests.py`.

A small run on the demo data is done once undisturbed. Then again and again with a fault: killed at random moments and
while a state is written, asked to stop, its newest state damaged, disk full, folder read-only, a batch that gives NaN,
data changed between runs, two runs on one folder, a clock that jumps. Each disturbed run goes on with `--resume` and
has to end with exactly the weights of the undisturbed one, or has to be refused with a reason.

    python scripts/fault_tests.py                                       # 50 kills, about ten minutes on two cores
    python scripts/fault_tests.py --kills 4 --only kill truncated
    python scripts/fault_tests.py --json scripts/bench/results/faults.json

Full disk and read-only folder need Linux with user namespaces (`unshare`); elsewhere they are left out and
said so, on Windows SIGTERM too.

中文：故意制造各种故障（kill -9、断电式截断、磁盘满、NaN 等），检查续训后权重与未受干扰的训练逐位相同。
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.make_demo_data import generate
from model.files import atomic_open
from trainer.checkpoint import last_progress, newest_state
from trainer.command_line import UserError, number, run_script

TRAINER = ROOT / "trainer" / "train_pretrain.py"
STEPS, SAVE_INTERVAL = 600, 10
LIMIT_SECONDS = 300  # of a process
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


@dataclass
class Outcome:
    fault: str
    happened: str
    good: bool
    figures: dict[str, float]


def tensors(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors in nested dictionaries and lists, by the path to them."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {path: t for key, part in inner for path, t in tensors(part, f"{name}/{key}").items()}


class Scene:
    """The undisturbed run, and the tools to disturb others."""

    def __init__(self, folder: Path, kills: int, seed: int):
        self.folder, self.kills, self.random = folder, kills, random.Random(seed)
        lines = generate(ROOT / "dataset" / "demo")["pretrain"].read_text(encoding="utf-8").splitlines(keepends=True)
        self.data = folder / "data.jsonl"
        self.data.write_text("".join(lines[:600]), encoding="utf-8")
        self.whole = folder / "undisturbed"
        self.finish(self.start(self.whole))
        self.truth = self.weights(self.whole)

    def flags(self, out_dir: Path, *more: str) -> list[str]:
        words = "--hidden_size 32 --num_hidden_layers 1 --max_seq_len 64 --batch_size 4 --accumulation_steps 1"
        words += f" --epochs 20 --max_steps {STEPS} --save_interval {SAVE_INTERVAL} --log_interval 1 --val_interval 0"
        words += " --device cpu --no-compile"
        paths = ["--data_path", self.data, "--cache_dir", self.folder / "cache", "--out_dir", out_dir]
        return [*words.split(), *map(str, paths), *more]

    def start(self, out_dir: Path, *more: str, code: str | None = None, before: list[str] = ()) -> subprocess.Popen:
        """A trainer in a process of its own; `code` runs in it first."""
        run = [sys.executable, TRAINER]
        if code:
            begin, end = (
                f"import sys; sys.path.insert(0, {str(ROOT)!r})",
                "train_pretrain.run_script(train_pretrain.main)",
            )
            run = [sys.executable, "-c", f"{begin}\n{code}\n{end}"]
        return subprocess.Popen(
            [*before, *run, *self.flags(out_dir, *more)],
            cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip

    def finish(self, process: subprocess.Popen, status: int = 0) -> str:
        """Waits for its end.  Returns: what it said.  Raises: UserError when it ends with another status."""
        try:
            out, err = process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise UserError(f"a process hung for {LIMIT_SECONDS} seconds") from None
        if process.returncode != status:
            raise UserError(f"a process ended with {process.returncode} instead of {status}: {err[-600:].strip()}")
        return out + err

    def copy(self, name: str) -> Path:
        """The undisturbed run as it was two saves before its end."""
        out_dir = self.folder / name
        shutil.copytree(self.whole, out_dir)
        for path in self.states(out_dir):
            if int(path.stem[5:]) == STEPS:
                path.unlink()
                path.with_suffix(".json").unlink()
        return out_dir

    @staticmethod
    def run_folder(out_dir: Path) -> Path:
        return out_dir / "runs" / "pretrain_32"

    def states(self, out_dir: Path) -> list[Path]:
        return sorted(self.run_folder(out_dir).glob("step_*.pt"))

    def weights(self, out_dir: Path) -> dict[str, torch.Tensor]:
        path, facts = newest_state(self.run_folder(out_dir))
        if not facts["progress"]["finished"]:
            raise UserError(f"{out_dir} is not finished")
        return tensors(torch.load(path, map_location="cpu", weights_only=True))

    def same(self, out_dir: Path) -> bool:
        """Weights and the optimiser's state, bit for bit those of the undisturbed run."""
        now = self.weights(out_dir)
        return now.keys() == self.truth.keys() and all(torch.equal(now[name], self.truth[name]) for name in now)

    def logged(self, out_dir: Path) -> int:
        path = self.run_folder(out_dir) / "metrics.jsonl"
        return path.read_text(encoding="utf-8").count('"loss"') if path.is_file() else 0

    def wait_for(self, process: subprocess.Popen, ready: Callable[[], bool]) -> bool:
        """Polls often; False when the process ended first."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            if ready():
                return True
            time.sleep(0.0005)
        return False


def equal(good: bool) -> str:
    return "equal" if good else "DIFFERENT"


def kill(scene: Scene) -> Outcome:
    """kill -9 at random moments, every other one while a file is half written."""
    out_dir = scene.folder / "killed"
    lost, writing, done, runs = [], 0, 0, 0
    same = True
    process = scene.start(out_dir)
    while done < scene.kills:
        before = scene.logged(out_dir)
        reached = before + scene.random.randint(1, 60)
        alive = scene.wait_for(process, lambda at=reached: scene.logged(out_dir) >= at)
        if alive and done % 2:
            alive = scene.wait_for(process, lambda: any(out_dir.rglob("*.part")))
            writing += alive
        if alive:
            process.kill()
            process.communicate()
            done += 1
            saved = last_progress(scene.run_folder(out_dir))
            lost.append(scene.logged(out_dir) - (saved["step"] if saved else 0))
            process = scene.start(out_dir, *(["--resume"] if saved else []))
        else:  # it came to its end before the moment
            scene.finish(process)
            same, runs = same and scene.same(out_dir), runs + 1
            shutil.rmtree(out_dir)
            process = scene.start(out_dir)
    scene.finish(process)
    same, runs = same and scene.same(out_dir), runs + 1
    happened = f"{done} kills, {writing} of them while writing; weights at the end of {runs} runs {equal(same)}"
    happened += (
        f"; updates lost {sum(lost) / len(lost):.1f} on average, at most {max(lost)} (saved every {SAVE_INTERVAL})"
    )
    figures = {"kills": done, "while_writing": writing, "lost_mean": sum(lost) / len(lost), "lost_most": max(lost)}
    return Outcome("kill -9", happened, same and max(lost) <= 2 * SAVE_INTERVAL, figures)


def sigterm(scene: Scene) -> Outcome:
    if os.name == "nt":
        raise OSError("Windows cannot ask a process to end")
    out_dir = scene.folder / "terminated"
    process = scene.start(out_dir)
    scene.wait_for(process, lambda: scene.logged(out_dir) >= 37)
    started = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    scene.finish(process, 128 + signal.SIGTERM)
    seconds = time.perf_counter() - started
    lost = scene.logged(out_dir) - last_progress(scene.run_folder(out_dir))["step"]
    scene.finish(scene.start(out_dir, "--resume"))
    good = scene.same(out_dir) and lost == 0
    happened = f"saved and left in {seconds:.2f} s, {lost} updates lost; weights in the end {equal(good)}"
    return Outcome("SIGTERM", happened, good, {"seconds": seconds, "updates_lost": lost})


def damaged(name: str, damage: Callable[[bytes], bytes]) -> Callable[[Scene], Outcome]:
    def fault(scene: Scene) -> Outcome:
        out_dir = scene.folder / name.replace(" ", "_")
        shutil.copytree(scene.whole, out_dir)
        before, newest = scene.states(out_dir)  # the last two saves of the finished run
        newest.write_bytes(damage(newest.read_bytes()))
        said = scene.finish(scene.start(out_dir, "--resume"))
        told = "incomplete or damaged" in said and f"resumed at update {int(before.stem[5:])}," in said
        good = told and scene.same(out_dir)
        happened = f"detected, and the state before it used: {told}; weights in the end {equal(good)}"
        return Outcome(name, happened, good, {})

    return fault


def bit_flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def in_namespace(command: str) -> list[str]:
    """A shell whose mounts nobody else sees; "$@" is the trainer.  Raises: OSError where that cannot be."""
    probe = subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False) if shutil.which("unshare") else None
    if probe is None or probe.returncode:
        raise OSError("needs Linux with user namespaces")
    return [*NAMESPACE, "sh", "-c", command, "sh"]


def full_disk(scene: Scene) -> Outcome:
    """A disk on which the second state does not fit any more; then there is room again, and the run goes on."""
    out_dir, kept = scene.folder / "full", scene.folder / "kept"
    out_dir.mkdir()
    command = f"""
        mount -t tmpfs -o size=16m tmpfs '{out_dir}' && head -c 11m /dev/zero > '{out_dir}/filler'
        "$@"; test $? = 2 && rm '{out_dir}/filler' && "$@" --resume && cp -r '{out_dir}' '{kept}'
    """
    said = scene.finish(scene.start(out_dir, before=in_namespace(command)))
    told = [line for line in said.splitlines() if line.startswith("error")]
    good = len(told) == 1 and scene.same(kept)
    return Outcome("full disk", f"{told[0][:150] if told else 'nothing said'}; with room again equal: {good}", good, {})


def read_only(scene: Scene) -> Outcome:
    out_dir = scene.folder / "read_only"
    out_dir.mkdir()
    command = f"mount -t tmpfs -o ro tmpfs '{out_dir}' && exec \"$@\""
    said = scene.finish(scene.start(out_dir, before=in_namespace(command)), 2)
    told = "cannot be written" in said and "--out_dir" in said
    return Outcome("read-only folder", said.strip().splitlines()[-1][:160], told, {})


NAN_BATCH = """
from trainer import train_pretrain
real, calls = train_pretrain.summed_nll, [0]
def spoiled(hidden, *rest, **more):
    calls[0] += 1
    return real(hidden * (float("nan") if calls[0] == 25 else 1.0), *rest, **more)
train_pretrain.summed_nll = spoiled
"""


def nan_batch(scene: Scene) -> Outcome:
    out_dir = scene.folder / "nan"
    scene.finish(scene.start(out_dir, code=NAN_BATCH))
    path, facts = newest_state(scene.run_folder(out_dir))
    weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
    finite = all(bool(t.isfinite().all()) for t in weights.values())
    skipped = facts["progress"]["skipped_steps"]
    return Outcome("NaN batch", f"{skipped} update left out, weights finite: {finite}", finite and skipped == 1, {})


def data_changed(scene: Scene) -> Outcome:
    out_dir = scene.copy("changed")
    other = scene.folder / "other.jsonl"
    other.write_text(scene.data.read_text(encoding="utf-8").replace("the", "tha", 1), encoding="utf-8")
    said = scene.finish(scene.start(out_dir, "--resume", "--data_path", str(other)), 2)
    forced = scene.finish(scene.start(out_dir, "--resume", "--data_path", str(other), "--force"))
    good = "--resume cannot go on: data" in said and "warning: data" in forced
    happened = f"refused: {'cannot go on' in said}; with --force a warning, then it goes on"
    return Outcome("data file changed", happened, good, {})


def two_runs(scene: Scene) -> Outcome:
    out_dir = scene.folder / "two"
    first = scene.start(out_dir)
    scene.wait_for(first, lambda: scene.logged(out_dir) >= 15)
    said = scene.finish(scene.start(out_dir), 2)
    resumed = scene.finish(scene.start(out_dir, "--resume"), 2)
    scene.finish(first)
    told = all("another run is writing" in text for text in (said, resumed))
    good = told and scene.same(out_dir)
    return Outcome("two runs in one folder", f"second refused: {told}; first one undisturbed: {good}", good, {})


CLOCK_JUMP = """
import time
from trainer import train_pretrain
real, calls = time.time, [0]
def jumped():
    calls[0] += 1
    return real() - (3e8 if calls[0] > 20 else 0)
time.time = jumped
"""


def clock_jump(scene: Scene) -> Outcome:
    """Back by ten years in the middle of a run, and states from the future when it is resumed."""
    out_dir = scene.folder / "clock"
    process = scene.start(out_dir, code=CLOCK_JUMP)
    scene.wait_for(process, lambda: scene.logged(out_dir) >= 60)
    process.kill()
    process.communicate()
    for path in scene.run_folder(out_dir).iterdir():
        os.utime(path, (4e9, 4e9))
    scene.finish(scene.start(out_dir, "--resume"))
    good = scene.same(out_dir)
    happened = f"ten years back, then files from the year 2096; weights in the end {equal(good)}"
    return Outcome("clock jump", happened, good, {})


FAULTS: dict[str, Callable[[Scene], Outcome]] = {
    "kill": kill,
    "sigterm": sigterm,
    "truncated": damaged("truncated state", lambda data: data[: len(data) // 2]),
    "empty": damaged("zero-byte state", lambda data: b""),
    "bit_flip": damaged("bit-flipped state", bit_flip),
    "full_disk": full_disk,
    "read_only": read_only,
    "nan_batch": nan_batch,
    "data_changed": data_changed,
    "two_runs": two_runs,
    "clock_jump": clock_jump,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Break training runs on purpose.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kills", type=number(int, 1), default=50, help="how often a run is killed")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), help="which faults")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="file for the outcomes")
    args = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder), args.kills, args.seed)
        print("| fault | what happened | as it should |\n|---|---|---|", flush=True)
        for name in args.only:
            try:
                outcome = FAULTS[name](scene)
            except UserError as error:
                outcome = Outcome(name, str(error).replace("\n", " "), False, {})
            except OSError as error:
                print(f"| {name} | left out here: {error} | |", flush=True)
                continue
            outcomes.append(outcome)
            print(f"| {outcome.fault} | {outcome.happened} | {'yes' if outcome.good else 'NO'} |", flush=True)
    if args.json:
        with atomic_open(args.json, "w") as f:
            json.dump([asdict(outcome) for outcome in outcomes], f, ensure_ascii=False, indent=1)
    if not all(outcome.good for outcome in outcomes):
        raise UserError("something was lost; see the table.")


if __name__ == "__main__":
    run_script(main)
