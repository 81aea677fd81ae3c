"""What goes wrong: one line for what a user can cause, a file with the traceback for what we did.

The table EXPECTED is all that a request, a machine or another process can bring about. Whatever is
not in it is a fault of this program, and is said to be one.
"""

import contextlib
import errno
import os
import platform
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import typer

from activations_cache.checks import CacheBusyError, DiskFullError, MonosemaError
from sae.config import ConfigError
from sae.train.signals import Stopped

FAILED, WRONG_REQUEST, BUG = 1, 2, 70
"""Exit codes; 70 is EX_SOFTWARE of sysexits.h. After a signal: 128 + its number."""

SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")
"""Parts of the names of variables whose values stand in no file."""

_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "cannot allocate memory")
_OURS = ("sae", "activations_cache", "sae_kernels")


class TerminatedError(SystemExit):
    """A signal came outside of training; what is finished is on the disk."""

    def __init__(self, number: int) -> None:
        """Take the signal's number, which decides the exit code."""
        super().__init__(128 + number)
        self.wants_requeue = number == signal.SIGUSR1
        self.message = (
            f"stopped by {signal.Signals(number).name}; what is finished is saved, run the same "
            "command again, it goes on from here"
        )


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Stop in one line at SIGTERM and SIGUSR1, from the first second of a command to its end.

    Training has its own answer, which saves a checkpoint first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        raise TerminatedError(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_slurm() -> bool:
    """Whether SLURM started this process."""
    return "SLURM_JOB_ID" in os.environ


def in_array() -> bool:
    """Whether the ranks are the tasks of an array job, each of which SLURM starts again alone."""
    n_tasks = os.environ.get("SLURM_ARRAY_TASK_COUNT")
    return n_tasks is not None and os.environ.get("WORLD_SIZE") == n_tasks


def _words(problem: BaseException) -> str:
    text = problem.args[0] if isinstance(problem, KeyError) and problem.args else problem
    return str(text) or type(problem).__name__


def _of_system(problem: OSError) -> str:
    """An error of the system, with its path and what mends it."""
    if isinstance(problem, DiskFullError) or problem.errno is None:
        return str(problem)
    where = problem.filename or "the output"
    advice = {
        errno.ENOSPC: f"{where} must have room, got a full disk; free space and run it again",
        errno.EDQUOT: f"{where} must have room, got a full quota; free space and run it again",
        errno.EFBIG: f"{where} must be allowed to grow, got a limit on the size of files; raise it "
        "by `ulimit -f unlimited`",
        errno.ENOLCK: f"{where} must be on a file system with locks, got none; write elsewhere",
        errno.EMFILE: f"{where} must be opened, got too many open files; raise the limit by "
        "`ulimit -n 4096`",
        errno.EROFS: f"{where} must be writable, got a read-only file system; write to another one",
    }
    return advice.get(problem.errno, str(problem))


def _of_memory(problem: BaseException) -> str:
    said = " ".join(_words(problem).split())[:160]
    return (
        f"memory must suffice, got {said!r}; lower train.batch, d_sae or rows at once, or take a "
        "larger machine"
    )


def _of_package(problem: BaseException) -> str:
    name = getattr(problem, "name", None) or _words(problem)
    return f"the package {name} must be installed, got none; install it with `pip install {name}`"


def _is_memory(problem: BaseException) -> bool:
    said = _words(problem).lower()
    is_ours = isinstance(problem, RuntimeError) and any(words in said for words in _MEMORY)
    return isinstance(problem, MemoryError) or is_ours


def _is_package(problem: BaseException) -> bool:
    name = getattr(problem, "name", None) or ""
    return isinstance(problem, ModuleNotFoundError) and name.partition(".")[0] not in _OURS


EXPECTED: tuple[tuple[Callable[[BaseException], bool], Callable, int], ...] = (
    (lambda p: isinstance(p, ConfigError), str, WRONG_REQUEST),
    (lambda p: isinstance(p, typer.TyperException), lambda p: p.format_message(), WRONG_REQUEST),
    (lambda p: isinstance(p, MonosemaError | CacheBusyError), _words, FAILED),
    (lambda p: isinstance(p, FloatingPointError), _words, FAILED),
    (_is_memory, _of_memory, FAILED),
    (_is_package, _of_package, FAILED),
    (lambda p: isinstance(p, OSError), _of_system, FAILED),
)
"""Which trouble, its one line, its exit code; the first that fits is taken."""


def is_unread(problem: BaseException) -> bool:
    """Whether who reads our lines has seen enough, such as `| head`; rich makes it an exit."""
    if isinstance(problem, SystemExit):
        return isinstance(problem.__context__, BrokenPipeError)
    return isinstance(problem, BrokenPipeError)


def ended_by(problem: BaseException) -> tuple[str, int]:
    """Return the one line and the exit code for what ended a command."""
    if isinstance(problem, Stopped | TerminatedError):
        return problem.message, int(str(problem.code))
    if isinstance(problem, SystemExit):
        return f"the command must end by itself, got exit {problem.code}", FAILED
    if isinstance(problem, KeyboardInterrupt | typer.Abort):
        return "interrupted; run the same command again, it goes on from here", FAILED
    for fits, line, code in EXPECTED:
        if fits(problem):
            return line(problem), code
    file = write_report(problem)
    kind = type(problem).__name__
    line = (
        f"this is a bug of Monosema, please report it: {kind}: {_words(problem)[:160]}; the "
        f"traceback is in {file}"
    )
    return line, BUG


def write_report(problem: BaseException) -> Path:
    """Write the traceback of a bug into the working directory, or where there is room for it."""
    lines = traceback.format_exception(problem)
    system = f"Python {platform.python_version()}, {platform.platform()}"
    text = "\n".join([" ".join(sys.argv), system, "", "".join(lines)])
    for name, value in os.environ.items():
        if any(part in name.upper() for part in SECRET) and len(value) >= 6:
            text = text.replace(value, f"<{name}>")
    name = f"monosema-bug-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for directory in (Path.cwd(), Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            (directory / name).write_text(text, encoding="utf-8")
            return directory / name
    sys.stderr.write(text)
    return Path("the lines above")
