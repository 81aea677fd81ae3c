"""The confined process that reads .pt files; it takes seconds to start, so few tests start it."""

import pickle
import platform
import re
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch

import sae
from sae.pretrained import DictionaryFormatError, foreign, pickled_child


class Canary:
    """Creates a file when it is unpickled by a careless reader."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_the_confined_process_reads_what_it_may(tmp_path, make):
    given = make(W_enc=(7, 5), b=3)
    content = OrderedDict({n: torch.from_numpy(a) for n, a in given.items()})
    content["half"] = torch.tensor([1.5], dtype=torch.bfloat16)
    content["turned"] = content["W_enc"].T
    torch.save({"ae": content, "k": 3, "name": "x", "none": None, "list": [1]}, tmp_path / "a.pt")
    result = foreign.read(tmp_path / "a.pt")
    assert result.values == {"k": 3, "name": "x", "none": None, "list": "<list>"}
    assert result.tensors.keys() == {"ae.W_enc", "ae.b", "ae.half", "ae.turned"}
    assert np.array_equal(result.tensors["ae.turned"].numpy(), given["W_enc"].T)
    assert result.tensors["ae.half"].dtype == torch.bfloat16


def test_a_pickle_that_would_run_code_is_refused_in_one_line(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"W_enc": torch.zeros(3), "x": Canary(canary)}, tmp_path / "a.pt")
    with pytest.raises(DictionaryFormatError, match="tensors and plain values alone") as caught:
        sae.load(tmp_path / "a.pt", format="goodfire", allow_pt=True)
    assert "\n" not in str(caught.value)
    assert not canary.exists()


# A reader with a hole: what lies in the file is run, inside the process that reads it.
HOLE = """
import os, pickle, runpy, sys
import torch
{before}
torch.load = lambda source, **_: (
    exec(pickle.load(source), {{}}) if hasattr(source, "name") else {{"a": torch.zeros(2)}}
)
sys.argv = sys.argv[2:]
sys.path.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""

ATTACK = """
import ctypes, os, resource, signal, socket, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(*request):
    if libc.syscall(*request) < 0:
        raise OSError(ctypes.get_errno(), "refused")
victim, folder, parent = {victim!r}, {folder!r}, os.getppid()
attempts = dict(
    unlink=lambda: os.unlink(victim),
    truncate=lambda: os.truncate(victim, 0),
    rename=lambda: os.rename(victim, victim + ".moved"),
    symlink=lambda: os.symlink(victim, folder + "/link"),
    link=lambda: os.link(victim, folder + "/hard"),
    mkdir=lambda: os.mkdir(folder + "/made"),
    chmod=lambda: os.chmod(victim, 0),
    utime=lambda: os.utime(victim, (1, 1)),
    read=lambda: open(victim),
    write=lambda: open(victim, "w"),
    create=lambda: open(folder + "/new", "w"),
    list=lambda: os.listdir(folder),
    stat=lambda: os.stat(victim),
    chdir=lambda: os.chdir("/"),
    environ=lambda: open("/proc/self/environ"),
    parent=lambda: open(f"/proc/{{parent}}/environ"),
    key=lambda: os.environ["OPENAI_API_KEY"],
    signal=lambda: os.kill({bystander}, signal.SIGTERM),
    group=lambda: os.killpg(0, signal.SIGCONT),
    limits=lambda: resource.prlimit(parent, resource.RLIMIT_CORE, (0, 0)),
    socket=lambda: socket.socket(),
    pair=lambda: socket.socketpair(),
    exec=lambda: os.execv("/bin/true", ["true"]),
    run=lambda: subprocess.run(["true"]),
    fork=lambda: os.fork() or os._exit(0),
    thread=lambda: threading.Thread(target=int).start(),
    pipe=lambda: os.pipe(),
    memory_file=lambda: os.memfd_create("x"),
    root=lambda: os.setuid(0),
    ptrace=lambda: call({ptrace}, 0x4206, parent, 0, 0),
    io_uring=lambda: call(425, 8, bytes(120)),
    other_numbers=lambda: call(1 << 30 | {getpid}),
    memory=lambda: bytearray(9 << 30),
)
through = []
for name, attempt in attempts.items():
    try:
        attempt()
    except (OSError, MemoryError, KeyError, RuntimeError):
        continue
    through.append(name)
raise ValueError(f"{{len(attempts)}} attempts, through: {{through}}")
"""


@pytest.fixture
def holed(tmp_path, monkeypatch):
    """Let the process that reads pickles have a hole; `before` is run in it first."""

    def holed(before=""):
        script = tmp_path / "hole.py"
        script.write_text(HOLE.format(before=before))
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))

    return holed


def attacked(tmp_path, code, **values):
    (tmp_path / "a.pt").write_bytes(pickle.dumps(code.format(**values)))
    with pytest.raises(DictionaryFormatError) as caught:
        sae.load(tmp_path / "a.pt", format="goodfire", allow_pt=True)
    return str(caught.value)


def test_code_that_runs_in_the_confined_process_can_do_nothing(
    tmp_path, monkeypatch, holed, figure
):
    monkeypatch.setenv("OPENAI_API_KEY", "canary")
    folder = tmp_path / "home"
    folder.mkdir()
    victim = folder / "thesis.txt"
    victim.write_text("years of work")
    before = victim.stat()
    holed()
    x86 = platform.machine() == "x86_64"
    with subprocess.Popen(["sleep", "30"]) as bystander:
        said = attacked(
            tmp_path, ATTACK, victim=str(victim), folder=str(folder), bystander=bystander.pid,
            ptrace=101 if x86 else 117, getpid=39 if x86 else 172,
        )  # fmt: skip
        assert bystander.poll() is None
        bystander.kill()
    assert said.endswith("ValueError: 33 attempts, through: []")
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    assert victim.stat()[:9] == before[:9]
    assert victim.read_text() == "years of work"
    figure("S3", "code inside the process that reads pickles: 0 of 33 attempts got through")


def test_the_environment_of_the_confined_process_is_empty(tmp_path, monkeypatch, holed):
    monkeypatch.setenv("OPENAI_API_KEY", "canary")
    holed("os.given = open('/proc/self/environ').read()")
    said = attacked(tmp_path, "import os\nraise ValueError(os.given.split(chr(0)))")
    names = set(re.findall(r"(\w+)=", said))
    assert names <= {"PWD", "OLDPWD", "SHLVL", "_"}  # what the shell of `holed` sets itself


OLD_KERNEL = """
import ctypes
class Libc:
    prctl = staticmethod(lambda *_: -1)
ctypes.CDLL = lambda *_, **__: Libc()
"""


@pytest.mark.parametrize(
    "before", ["import platform; platform.machine = lambda: 'riscv64'", OLD_KERNEL]
)
def test_without_seccomp_nothing_is_read(tmp_path, holed, before):
    holed(before)
    said = attacked(tmp_path, "raise ValueError('it was read')")
    assert "must be read by a process that seccomp confines" in said
    assert "it was read" not in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "a Tensor instead of a dict"),
        ({"a": torch.zeros(1).expand(1 << 20)}, "tensors of 4,194,304 bytes in a file of"),
        ({"a": torch.zeros(3, 3).to_sparse()}, "'a' is not a plain tensor"),
    ],
)
def test_what_conversion_refuses(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with (tmp_path / "a.pt").open("rb") as file, pytest.raises(ValueError, match=message):
        pickled_child.convert(file, (tmp_path / "a.pt").stat().st_size)


def test_a_process_that_does_not_end_is_stopped(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"")
    assert foreign.convert(tmp_path / "a.pt", tmp_path / "b", 0.01) == "no end within 0 s"
