"""What every script does at its edge: errors in one line, the end of a process, the types of flags.

It asks torch only where a script has loaded it: scripts that do without start at once.

中文：每个脚本的边界：一行报错、进程如何结束、命令行参数的类型。
"""

import argparse
import contextlib
import errno
import math
import os
import re
import secrets
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """Something the user can put right. The message says what came, what was expected and what to type."""


LESS_MEMORY = (
    "Less is needed with half the --batch_size and twice the --accumulation_steps (the same update), with "
    "--checkpoint_activations, with a shorter --max_seq_len, or on several cards with --deepspeed "
    "trainer/deepspeed/zero2.json"
)


# What torch.compile says where there is no C++ compiler, no Python.h or no triton
NO_COMPILER = re.compile(
    r"No working C\+\+ compiler[^\n]*|Compiler: .* is not found|C\+\+ compile error|Failed to find C compiler[^\n]*"
    r"|Cannot find a working triton[^\n.]*"
)


def run_script(main: Callable[[], None]) -> None:
    """Calls main; an error the user can put right becomes one line on stderr and exit status 2, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console would otherwise fail on Chinese text
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        leave(130)
    except BrokenPipeError:  # the reader of our output went away (`| head`): nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(1)
    except (ValueError, OSError) as error:
        if os.environ.get("MINIMIND_TRACEBACK"):
            raise
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        hint = "" if type(error) is not ValueError else " [set MINIMIND_TRACEBACK=1 to see where]"
        if getattr(error, "errno", None) == errno.ENOSPC:
            hint = ". Free some space, or write to another disk; a run that saved a state goes on with --resume"
        print(f"error{rank}: {error}{hint}", file=sys.stderr, flush=True)
        leave(2)
    except Exception as error:  # shown as Python would show it, but without the teardown that `leave` avoids
        if is_out_of_memory(error):
            print(f"error: the device is out of memory. {LESS_MEMORY}.", file=sys.stderr, flush=True)
            leave(2)
        found = NO_COMPILER.search(str(error)) if type(error).__module__.startswith("torch.") else None
        if found and not os.environ.get("MINIMIND_TRACEBACK"):
            off = "turn it off: --no-compile (--compile 0 in the measuring scripts)"
            print(f"error: compiling cannot work here ({found[0]}); {off}.", file=sys.stderr, flush=True)
            leave(2)
        if not in_a_group():
            raise
        print(f"error on rank {os.environ.get('RANK', '0')}:", file=sys.stderr)
        traceback.print_exc()
        leave(1)


def is_out_of_memory(error: Exception) -> bool:
    """A card says so with a type of its own, main memory and Apple's chips only in words."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or torch and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and re.search(r"can't allocate memory|out of memory", str(error)) is not None


def in_a_group() -> bool:
    """Whether this process is one of several ranks."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def leave(status: int) -> None:
    """Ends this process, with several ranks without taking their group apart.

    With gloo that now and then never ends (3 of 22 runs with torch 2.13): a thread of the group waits for the
    interpreter's lock, whose holder waits for the thread. Everything is on disk by then, so nothing is lost.
    """
    if in_a_group():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def check_writable(folder: str | Path, flag: str) -> None:
    """Makes the folder and tries it, now and not after an hour of work.  Raises: UserError naming the flag."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        trial = Path(folder) / f".{secrets.token_hex(6)}.tmp"  # tempfile would try names for ever on Windows
        trial.touch(exist_ok=False)
        with contextlib.suppress(PermissionError):  # Windows: a virus scanner looks at it
            trial.unlink()
    except OSError as error:
        reason = f"{folder} cannot be written ({error.strerror})"
        raise UserError(f"{flag}: {reason}; name a folder you may write to.") from error


class BoolFlag(argparse.BooleanOptionalAction):
    """`--flag`, `--no-flag`, and the older spelling `--flag True/False/1/0`."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, **kwargs)
        self.nargs = "?"

    def __call__(self, parser, namespace, values, option_string=None):
        value = not option_string.startswith("--no-")
        if values is not None:
            if str(values).lower() not in ("true", "false", "1", "0", "yes", "no"):
                parser.error(f"{option_string} takes True or False, got {values!r}")
            value = value == (str(values).lower() in ("true", "1", "yes"))
        setattr(namespace, self.dest, value)


def number(
    kind: type, low: float, excluded: bool = False, high: float = math.inf, most: float = math.inf
) -> Callable[[str], float]:
    """An argparse type: an int or float from `low` on (above it, when excluded), below `high`, at most `most`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value > low if excluded else value >= low) or not value < high or value > most:
            what = "a whole number" if kind is int else "a number"
            limit = f", below {high}" if high < math.inf else f", at most {most}" if most < math.inf else ""
            expected = f"{what} {'above' if excluded else 'from'} {low}{limit}"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
        return value

    return read
