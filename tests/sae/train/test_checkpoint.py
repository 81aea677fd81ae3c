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


def test_what_does_not_read_back_is_no_checkpoint_and_removes_none(tmp_path, monkeypatch):
    for n in (1, 2):
        checkpoint.save(tmp_path, n, STATE, "id")
    write = checkpoint.io.write

    def rotten(descriptor, data):
        write(descriptor, memoryview(bytes(data)[:-1] + b"?"))

    monkeypatch.setattr(checkpoint.io, "write", rotten)
    with pytest.raises(OSError, match="step-00000003 must read back as it was written, got other"):
        checkpoint.save(tmp_path, 3, STATE, "id")
    assert checkpoint.load_newest(tmp_path, "id")[0] == 2
    assert (tmp_path / "step-00000001").is_dir()


def test_two_are_kept_and_other_runs_are_not_read(tmp_path):
    for n in (1, 2, 3, 4):
        checkpoint.save(tmp_path, n, STATE, "id")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert checkpoint.load_newest(tmp_path, "other") is None
    assert checkpoint.load_newest(tmp_path / "nothing", "id") is None


def test_checkpoints_of_another_run_are_kept_and_remove_none_of_ours(tmp_path):
    for n in (900, 960):
        checkpoint.save(tmp_path, n, STATE, "old recipe")
    for n in (10, 20, 30):
        path = checkpoint.save(tmp_path, n, STATE, "new recipe")
        assert path.is_dir()
        assert checkpoint.load_newest(tmp_path, "new recipe")[0] == n
    assert checkpoint.load_newest(tmp_path, "old recipe")[0] == 960
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"step-{n:08d}" for n in (20, 30, 900, 960)]


def test_two_runs_at_one_step_have_a_checkpoint_each(tmp_path):
    one, other = {"a": STATE["a/x"] + 1}, {"a": STATE["a/x"] + 2}
    checkpoint.save(tmp_path, 7, one, "one")
    checkpoint.save(tmp_path, 7, other, "other")
    checkpoint.save(tmp_path, 7, other, "other")
    assert torch.equal(checkpoint.load_newest(tmp_path, "one")[1]["a"], one["a"])
    assert torch.equal(checkpoint.load_newest(tmp_path, "other")[1]["a"], other["a"])
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_checkpoints_beyond_the_newest_make_no_room_for_themselves(tmp_path):
    for n in (900, 960):
        path = checkpoint.save(tmp_path, n, STATE, "id")
        (path / checkpoint.STATE).write_bytes(b"")
    assert checkpoint.load_newest(tmp_path, "id") is None
    path = checkpoint.save(tmp_path, 10, STATE, "id")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_a_killed_write_left_goes_with_the_next_one(tmp_path):
    other = checkpoint.save(tmp_path, 3, STATE, "another run")
    torn = tmp_path / "step-00000009"
    torn.mkdir()
    (torn / "state.safetensors").write_bytes(bytes(41))
    newest = checkpoint.save(tmp_path, 5, STATE, "id")
    assert sorted(tmp_path.iterdir()) == [other, newest]


def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path):
    checkpoint.save(tmp_path, 4, STATE, "id")
    path = checkpoint.save(tmp_path, 5, {"a": STATE["a/x"] + 1}, "id")
    for file in (path / checkpoint.STATE, path / checkpoint.MANIFEST):
        data = file.read_bytes()
        for bit in range(8 * len(data)):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            n_steps, state = checkpoint.load_newest(tmp_path, "id")
            assert n_steps == 4
            assert torch.equal(state["a/x"], STATE["a/x"])
        file.write_bytes(data)
    assert checkpoint.load_newest(tmp_path, "id")[0] == 5
