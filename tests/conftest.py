"""Puts the repository root first on the import path, whatever folder pytest was started from."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@contextlib.contextmanager
def unchanged_process() -> Iterator[None]:
    """Undoes what a trainer sets for its whole process: signal handlers, deterministic algorithms, threads."""
    import torch

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.set_num_threads(threads)


@pytest.fixture
def restored_process() -> Iterator[None]:
    with unchanged_process():
        yield
