"""Sets everything up and runs the tests. Further words go to pytest: `python scripts/run_tests.py -k resume -x`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from setup_env import ensure_environment, run_step


def main() -> None:
    python = ensure_environment("requirements-test.txt")
    run_step(python, "-m", "ruff", "check", ".")
    run_step(python, "-m", "pytest", *sys.argv[1:])


if __name__ == "__main__":
    main()
