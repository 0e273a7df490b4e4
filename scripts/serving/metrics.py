"""Figures about the server in Prometheus' text format, https://prometheus.io/docs/instrumenting/exposition_formats/.

All of them are counted on the event loop's thread.

中文：Prometheus 文本格式的监控指标。
"""

import bisect
import os
import sys
import time
from collections.abc import Iterable

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


def escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def labelled(name: str, labels: dict[str, str]) -> str:
    inside = ",".join(f'{key}="{escape(value)}"' for key, value in labels.items())
    return f"{name}{{{inside}}}" if inside else name


class Counter:
    """A sum per set of labels."""

    def __init__(self, name: str, text: str, *labels: str):
        self.name, self.text, self.labels = name, text, labels
        self.values: dict[tuple[str, ...], float] = {} if labels else {(): 0}

    def add(self, amount: float, *labels: str) -> None:
        self.values[labels] = self.values.get(labels, 0) + amount

    def lines(self) -> Iterable[str]:
        yield f"# HELP {self.name} {self.text}"
        yield f"# TYPE {self.name} counter"
        for labels, value in self.values.items():
            yield f"{labelled(self.name, dict(zip(self.labels, labels, strict=True)))} {value:g}"


class Histogram:
    """How often a figure was at most so large."""

    def __init__(self, name: str, text: str, bounds: Iterable[float]):
        self.name, self.text, self.bounds = name, text, tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self) -> Iterable[str]:
        yield f"# HELP {self.name} {self.text}"
        yield f"# TYPE {self.name} histogram"
        total = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            yield f'{self.name}_bucket{{le="{"+Inf" if bound == float("inf") else f"{bound:g}"}"}} {total}'
        yield f"{self.name}_sum {self.sum:.6f}"
        yield f"{self.name}_count {total}"


def gauge(name: str, text: str, value: float) -> Iterable[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} gauge"
    yield f"{name} {value:.15g}"


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM; None where the system does not tell as Linux does."""
    if not sys.platform.startswith("linux"):
        return None
    with open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Metrics:
    """What the server counts."""

    def __init__(self):
        self.started = time.time()
        self.requests = Counter("minimind_requests_total", "Requests answered.", "endpoint", "status")
        self.prompt_tokens = Counter("minimind_prompt_tokens_total", "Prompt tokens of accepted requests.", "model")
        self.tokens = Counter("minimind_generated_tokens_total", "Tokens drawn.", "model")
        self.finished = Counter("minimind_answers_total", "Answers by how they ended.", "model", "finish_reason")
        self.first_token = Histogram(
            "minimind_time_to_first_token_seconds", "From the request to the first piece of its answer.", SECONDS
        )
        self.duration = Histogram("minimind_request_seconds", "From the request to the end of its answer.", SECONDS)
        self.per_token = Histogram(
            "minimind_time_per_output_token_seconds", "Between first and last piece, per token.", TOKEN_SECONDS
        )

    def text(self, running: int, waiting: int, slots: int) -> str:
        parts = [self.requests, self.prompt_tokens, self.tokens, self.finished]
        parts += [self.first_token, self.duration, self.per_token]
        lines = [line for part in parts for line in part.lines()]
        lines += gauge("minimind_running", "Answers being written.", running)
        lines += gauge("minimind_waiting", "Answers that wait for a slot.", waiting)
        lines += gauge("minimind_slots", "Answers that can be written at a time, over all models.", slots)
        lines += gauge("process_start_time_seconds", "When the server started, Unix time.", self.started)
        if (resident := resident_bytes()) is not None:
            lines += gauge("process_resident_memory_bytes", "Memory in RAM.", resident)
        return "\n".join(lines) + "\n"
