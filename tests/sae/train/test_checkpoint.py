import os

import pytest
import torch

from sae.train import checkpoint

STATE = {"a/x": torch.arange(7.0), "a/n": torch.tensor(3)}


def test_the_newest_that_verifies_is_read(tmp_path):
    checkpoint.save(tmp_path, 5, STATE, "id")
    checkpoint.save(tmp_path, 9, {**STATE, "a/n": torch.tensor(4)}, "id")
    steps, state = checkpoint.load_newest(tmp_path, "id")
    assert steps == 9
    assert int(state["a/n"]) == 4
    assert torch.equal(state["a/x"], STATE["a/x"])


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest", "no state", "half manifest"])
def test_a_damaged_newest_falls_back_to_the_older(tmp_path, damage):
    checkpoint.save(tmp_path, 5, STATE, "id")
    path = checkpoint.save(tmp_path, 9, STATE, "id")
    state, manifest = path / "state.safetensors", path / "manifest.json"
    match damage:
        case "flip":
            data = bytearray(state.read_bytes())
            data[-3] ^= 1
            state.write_bytes(data)
        case "cut":
            os.truncate(state, 40)
        case "no manifest":
            manifest.unlink()
        case "no state":
            state.unlink()
        case _:
            manifest.write_text(manifest.read_text()[:20])
    assert checkpoint.load_newest(tmp_path, "id")[0] == 5


def test_two_are_kept_and_other_runs_are_not_read(tmp_path):
    for n in (1, 2, 3, 4):
        checkpoint.save(tmp_path, n, STATE, "id")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert checkpoint.load_newest(tmp_path, "other") is None
    assert checkpoint.load_newest(tmp_path / "nothing", "id") is None
