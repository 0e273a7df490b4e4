"""Sets everything up and runs the tests. Further words go to pytest: `python scripts/run_tests.py -k resume -x`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from setup_env import ensure_environment, run_step


def main() -> None:
    python = ensure_environment("requirements-test.txt")
    run_step(python, "-m", "ruff", "check", ".")
    # One process per core and one thread per process: most of a test's time goes into starting things. A file's tests
    # stay together, as they share what was costly to make.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    workers = min(os.cpu_count() or 1, 8)
    run_step(python, "-m", "pytest", "-n", str(workers), "--dist", "loadfile", *sys.argv[1:])


if __name__ == "__main__":
    main()
