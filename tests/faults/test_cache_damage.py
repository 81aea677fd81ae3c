"""Any damaged file is found and named; a cache that is whole never raises an alarm."""

import random
import re
import shutil
from pathlib import Path

import pytest
import torch

import activations_cache
from activations_cache import io
from activations_cache.checks import CacheFormatError
from activations_cache.testing import synthetic_plan, write_synthetic

PLAN = synthetic_plan({"a.1:out": 7, "a.2:in": 5}, n_examples=14)  # 5 shards
KINDS = ("flip", "flip", "flip", "truncate", "extend", "delete", "zero", "swap")
READ = ("/acts/c/", "/norm/c/", "/mean/c/", "rows/", "examples/", "journal", "manifest")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damage") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "fsync", lambda descriptor: None)
        write_synthetic(path, PLAN)
    shutil.rmtree(path / ".locks")
    return path


def damaged(kind: str, data: bytes, others: list[bytes], made: random.Random) -> bytes | None:
    """Return what a file holds after the damage; None where it is gone."""
    at = made.randrange(len(data))
    match kind:
        case "flip":
            return data[:at] + bytes([data[at] ^ (1 << made.randrange(8))]) + data[at + 1 :]
        case "truncate":
            return data[:at]
        case "extend":
            return data + bytes(made.randint(1, 9))
        case "zero":
            return bytes(len(data))
        case "swap":
            return made.choice(others)
        case _:
            return None


def read_everything(path: Path) -> torch.Tensor:
    cache = activations_cache.open(path)
    rows = cache.rows()
    values = [cache[name][rows] for name in cache.hook_points]
    numbers = [cache[name].norms(rows).unsqueeze(1) for name in cache.hook_points]
    means = [cache[name].mean.expand(len(rows), -1) for name in cache.hook_points]
    refs = torch.stack([*cache.refs(rows), cache.token_labels(rows)], dim=1)
    return torch.cat([*values, *numbers, *means, refs.float()], dim=1)


def alarms(path: Path) -> list[str]:
    try:
        return activations_cache.open(path).verify()
    except CacheFormatError as error:
        return [str(error)]


def damage_and_look(path: Path, n: int, seed: int) -> None:
    made, intact = random.Random(seed), read_everything(path)
    names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    contents = {name: (path / name).read_bytes() for name in names}
    for case in range(n):
        name = made.choice(names)
        before, kind = contents[name], made.choice(KINDS)
        others = [data for data in contents.values() if len(data) == len(before)]
        after = damaged(kind, before, others, made)
        if after == before:
            continue
        (path / name).unlink() if after is None else (path / name).write_bytes(after)
        result = alarms(path)
        assert len(result) == 1, (case, kind, name, result)
        # Without its manifest a cache is one that is not finished.
        said = "must be finished" if (name, after) == ("manifest.json", None) else name
        assert said in result[0]
        if "/c/" in name and "/mean/" not in name:
            shard = name.split("/c/")[1].split("/")[0]
            assert f"shard {shard}" in result[0]
        if any(part in name for part in READ) and "zarr.json" not in name:
            with pytest.raises(CacheFormatError, match=f"damaged|{re.escape(said)}"):
                read_everything(path)
        (path / name).write_bytes(before)
        assert alarms(path) == []
    assert torch.equal(read_everything(path), intact)


def test_two_hundred_damages_are_found_and_nothing_else(path: Path, figure):
    damage_and_look(path, 200, seed=0)
    figure("R5", "200 damaged files of caches: 200 found by name, 0 false alarms")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_thousand_damages_are_found_and_nothing_else(path: Path, figure):
    damage_and_look(path, 2000, seed=1)
    figure("R5", "2,000 damaged files of caches: 2,000 found by name, 0 false alarms")


def test_two_files_exchanged_are_both_found(path: Path, tmp_path: Path):
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    one, other = copy / "a.1:out/acts/c/1/0", copy / "a.1:out/acts/c/3/0"
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    assert ["shard 1" in alarms(copy)[0], "shard 3" in alarms(copy)[1]] == [True, True]
