"""What ends a command: one line for what a user can cause, a report for what we did."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from activations_cache.checks import (
    CacheBusyError,
    CacheFormatError,
    DamagedFileError,
    DiskFullError,
    HookPointError,
    MonosemaError,
    NonFiniteError,
    WrongClassError,
)
from sae.cli import main, troubles
from sae.config import ConfigError
from sae.explain.llm.chat import EndpointError, ReplayMissError
from sae.pretrained import DictionaryFormatError
from sae.train.ranks import RankError

PATH = "/data/run/x"
EXPECTED = [
    *(kind("x must y, got z; do w") for kind in (
        MonosemaError, CacheBusyError, CacheFormatError, DamagedFileError, DiskFullError,
        NonFiniteError, WrongClassError, HookPointError, EndpointError, ReplayMissError,
        DictionaryFormatError, RankError, FloatingPointError,
    )),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    OSError(errno.ENOSPC, "No space left on device", PATH),
    OSError(errno.EFBIG, "File too large"),
    OSError(errno.ENOLCK, "No locks available", PATH),
    OSError(errno.EMFILE, "Too many open files", PATH),
    PermissionError(errno.EACCES, "Permission denied", PATH),
    ModuleNotFoundError("No module named 'umap'", name="umap"),
]  # fmt: skip
BUGS = [
    ValueError("zip() argument 2 is longer than argument 1"),
    KeyError("x"),
    IndexError("list index out of range"),
    ZeroDivisionError("division by zero"),
    OverflowError("int too large"),
    RecursionError("maximum recursion depth exceeded"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    NotImplementedError(),
    AssertionError("n=3"),
    TypeError("x"),
    StopIteration(),
    ModuleNotFoundError("No module named 'sae.gone'", name="sae.gone"),
]


def ended(monkeypatch, capsys, problem: BaseException) -> tuple[int, str]:
    def app(*, standalone_mode: bool) -> None:
        raise problem

    monkeypatch.setattr(main, "app", app)
    with pytest.raises(SystemExit) as stop:
        main.main()
    return int(stop.value.code), capsys.readouterr().err


@pytest.mark.parametrize("problem", EXPECTED, ids=lambda p: f"{type(p).__name__}-{str(p)[:12]}")
def test_what_a_user_can_cause_is_one_line(monkeypatch, capsys, tmp_path, problem):
    monkeypatch.chdir(tmp_path)
    code, error = ended(monkeypatch, capsys, problem)
    assert code == troubles.FAILED
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "bug" not in error
    assert PATH in error or getattr(problem, "filename", None) is None
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_request_has_a_code_of_its_own(monkeypatch, capsys):
    code, _ = ended(monkeypatch, capsys, ConfigError("k must be 1, got 2"))
    assert code == troubles.WRONG_REQUEST


@pytest.mark.parametrize("problem", BUGS, ids=lambda p: type(p).__name__)
def test_our_own_fault_is_said_to_be_one_and_its_traceback_is_in_a_file(
    monkeypatch, capsys, tmp_path, problem
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-123")
    monkeypatch.setattr(sys, "argv", ["sae", "explain", "key=sk-canary-123"])
    code, error = ended(monkeypatch, capsys, problem)
    (report,) = tmp_path.iterdir()
    assert code == troubles.BUG
    assert error.count("\n") == 1
    assert "this is a bug of Monosema" in error
    assert str(report) in error
    text = report.read_text()
    assert "Traceback" in text
    assert type(problem).__name__ in text
    assert "sae explain" in text
    assert "sk-canary" not in text


def test_a_report_goes_elsewhere_where_nothing_can_be_written(monkeypatch, capsys, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    monkeypatch.setattr(Path, "cwd", lambda: Path("/proc/nowhere"))
    monkeypatch.setattr(troubles.tempfile, "gettempdir", lambda: str(tmp_path))
    _, error = ended(monkeypatch, capsys, KeyError("x"))
    assert str(tmp_path) in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_command_in_one_line_with_its_code(number, tmp_path):
    script = (
        "import sys, time\nfrom sae.cli import main\n"
        "def app(**_):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "main.app = app\nmain.main()\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as child:
        assert child.stdout.readline() == "ready\n"
        os.kill(child.pid, number)
        began = time.monotonic()
        _, error = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert f"stopped by {number.name}; what is finished is saved" in error
    assert error.count("\n") == 1
    assert time.monotonic() - began < 10


def test_who_listened_before_listens_again():
    before = signal.getsignal(signal.SIGUSR1)
    with troubles.listening():
        assert signal.getsignal(signal.SIGUSR1) is not before
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_signal_of_slurm_asks_for_a_requeue(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(main, "_requeue", lambda: asked.append(1))
    code, _ = ended(monkeypatch, capsys, troubles.TerminatedError(signal.SIGUSR1))
    assert (code, asked) == (128 + signal.SIGUSR1, [1])
    ended(monkeypatch, capsys, troubles.TerminatedError(signal.SIGTERM))
    assert asked == [1]
