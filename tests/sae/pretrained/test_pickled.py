"""The confined process that reads .pt files; it takes seconds to start, so few tests start it."""

import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch

import sae
from sae.pretrained import DictionaryFormatError, pickled, pickled_child


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
    found = pickled.read(tmp_path / "a.pt")
    assert found.values == {"k": 3, "name": "x", "none": None, "list": "<list>"}
    assert found.tensors.keys() == {"ae.W_enc", "ae.b", "ae.half", "ae.turned"}
    assert np.array_equal(found.tensors["ae.turned"].numpy(), given["W_enc"].T)
    assert found.tensors["ae.half"].dtype == torch.bfloat16


def test_a_pickle_that_would_run_code_is_refused_in_one_line(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"W_enc": torch.zeros(3), "x": Canary(canary)}, tmp_path / "a.pt")
    with pytest.raises(DictionaryFormatError, match="tensors and plain values alone") as caught:
        sae.load(tmp_path / "a.pt", format="goodfire", allow_pt=True)
    assert "\n" not in str(caught.value)
    assert not canary.exists()


def test_a_confined_process_can_open_and_start_nothing(tmp_path):
    code = """
import resource, socket, subprocess, sys, threading
sys.path.insert(0, {folder!r})
import pickled_child
pickled_child._confine(1000)
attempts = [
    lambda: open("canary", "w"),
    lambda: socket.socket(),
    lambda: subprocess.run(["true"]),
    lambda: bytearray(9 << 30),
]
stopped = 0
for attempt in attempts:
    try:
        attempt()
    except (OSError, MemoryError):
        stopped += 1
print(stopped)
"""
    folder = pickled_child.__file__.rpartition("/")[0]
    done = subprocess.run(
        [sys.executable, "-c", code.format(folder=folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "4", done.stderr


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
    assert pickled.convert(tmp_path / "a.pt", tmp_path / "b", 0.01) == "no end within 0 s"
