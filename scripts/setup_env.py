"""A virtual environment with the pinned packages, made once. Standard library only: nothing is installed yet."""

from __future__ import annotations  # an older Python is to get as far as the message that it is too old

import contextlib
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def read_pins(path: Path) -> dict[str, str]:
    """Package → version of a requirements file, `-r` followed, lines for other Python versions and systems left out."""
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            pins |= read_pins(path.with_name(line[3:].strip()))
            continue
        pin, _, marker = line.partition(";")
        wanted = re.fullmatch(r'\s*python_version\s*(>=|<)\s*"3\.(\d+)"\s*', marker)
        if wanted and (sys.version_info[1] >= int(wanted[2])) != (wanted[1] == ">="):
            continue
        system = re.fullmatch(r'\s*sys_platform\s*==\s*"(\w+)"\s*', marker)
        if system and system[1] != sys.platform:
            continue
        if "==" in pin:
            name, _, version = pin.strip().partition("==")
            pins[name] = version
    return pins


def installed(pins: dict[str, str]) -> bool:
    """Whether the running interpreter already has every pin (a local build such as 2.13.0+cu130 counts)."""
    try:
        importlib.import_module("importlib.metadata")  # here: Python 3.7 has none, and is to be told so below
        return all(importlib.metadata.version(name).split("+")[0] == version for name, version in pins.items())
    except importlib.metadata.PackageNotFoundError:
        return False


def ensure_environment(requirements: str) -> Path:
    """The Python with the packages of a requirements file: this one, or that of `.venv`, filled on first use.

    Raises: SystemExit with one line when Python is too old, venv is missing or the installation fails.
    """
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever runs this may well have an older one
        raise SystemExit(f"error: Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    pins = read_pins(ROOT / requirements)
    if installed(pins):
        return Path(sys.executable)

    folder = ROOT / ".venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / f"{requirements}.done"
    key = hashlib.sha256(repr(sorted(pins.items())).encode()).hexdigest()
    if python.is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
        return python
    try:
        pip = [str(python), "-m", "pip"]
        if not python.is_file() or subprocess.run([*pip, "--version"], capture_output=True).returncode:
            if importlib.util.find_spec("ensurepip") is None:
                raise SystemExit("error: this Python lacks venv; on Debian and Ubuntu: apt install python3-venv")
            print(f"making a virtual environment in {folder}", flush=True)
            venv.create(folder, with_pip=True, clear=True)  # what an interrupted start left there goes
        if sys.platform == "win32":
            print("note: this torch is for the CPU; for an NVIDIA card see https://pytorch.org", flush=True)
        # torch first: other packages ask for it with open ranges, and would draw a build of their own
        for what in ([f"torch=={pins['torch']}"], ["-r", str(ROOT / requirements)]):
            print(f"installing {what[-1]}", flush=True)
            subprocess.run([*pip, "install", "-q", "--disable-pip-version-check", *what], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"error: setting up {folder} failed (see the lines above); delete the folder to start over"
        ) from error
    except OSError as error:
        raise SystemExit(f"error: {folder} cannot be written ({error.strerror}); copy the project elsewhere") from error
    except KeyboardInterrupt:
        raise SystemExit("error: interrupted; the same command goes on where it stopped") from None
    stamp.write_text(key, encoding="utf-8")
    return python


def run_step(python: Path, *arguments: str, typed: str | None = None) -> None:
    """Runs one script of the repository in its own process; its failure ends this one with the same status.

    `typed` is what it reads as if somebody typed it. Ctrl-C reaches that process too: it saves and leaves in its own
    time, and is waited for.
    """
    environment = {**os.environ, "PYTHONUTF8": "1"}
    stdin = None if typed is None else subprocess.PIPE
    process = subprocess.Popen([str(python), *arguments], cwd=ROOT, env=environment, stdin=stdin, encoding="utf-8")
    if typed is not None:
        with contextlib.suppress(BrokenPipeError), process.stdin:  # it may have ended already, with a status that tells
            process.stdin.write(typed)
    status = None
    while status is None:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            continue
    if status:
        raise SystemExit(status if status > 0 else 128 - status)
