"""Images get a fixed order and their splits by their bytes; those that are damaged are left out."""

import hashlib
import io
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from activations_cache.config import ImagesConfig, ImageSource
from activations_cache.image_sources import Folder
from activations_cache.images import PickedImages, pick

N_FILES = 23


def values(seed: int, height: int = 11, width: int = 13) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values(seed)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """23 images in 3 classes."""
    root = tmp_path / "photos"
    for i in range(N_FILES):
        file = root / ("cat", "dog/small", "bird")[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(i))
    return root


def config(path: Path, **changes: object) -> ImagesConfig:
    return ImagesConfig(**{"sources": (ImageSource(path=str(path)),), "seed": 3, **changes})


def names(picked: PickedImages) -> list[str]:
    return [record.name for record in picked.records]


def test_the_choice_is_enough_and_no_more(folder: Path):
    picked = pick(config(folder), n_rows=7 * 17 - 6, rows_per_image=7)
    splits = [record.split for record in picked.records]
    assert splits.count("explain") + splits.count("score") == 17
    assert splits[-1] != "hold"
    assert {"explain", "score", "hold"} == set(splits)
    assert len(set(names(picked))) == len(splits)
    assert picked.source_names == ("photos",)
    assert picked.label_names == ("bird", "cat", "dog")
    for example, record in enumerate(picked.records):
        seed = int(Path(record.name).stem)
        assert record.sha256 == hashlib.sha256(encoded(seed)).hexdigest()
        assert record.label == ("cat", "dog", "bird")[seed % 3]
        np.testing.assert_array_equal(np.asarray(picked.image(example)), values(seed))


def test_order_and_splits_follow_the_bytes_and_not_the_names(folder: Path, tmp_path: Path):
    one = pick(config(folder), n_rows=9, rows_per_image=1)
    moved = tmp_path / "elsewhere"
    for i, file in enumerate(sorted(folder.rglob("*.png"))):
        if not file.name.startswith("."):
            (moved / "x").mkdir(parents=True, exist_ok=True)
            (moved / "x" / f"renamed{N_FILES - i}.png").write_bytes(file.read_bytes())
    other = pick(config(moved), n_rows=9, rows_per_image=1)
    assert [r.sha256 for r in other.records] == [r.sha256 for r in one.records]
    assert [r.split for r in other.records] == [r.split for r in one.records]
    reseeded = pick(config(moved, seed=4), n_rows=9, rows_per_image=1)
    assert [r.sha256 for r in reseeded.records] != [r.sha256 for r in one.records]


def test_more_rows_only_add_images(folder: Path):
    few = pick(config(folder), n_rows=5, rows_per_image=1)
    many = pick(config(folder), n_rows=13, rows_per_image=1)
    assert list(many.records)[: len(few.records)] == list(few.records)


def test_the_splits_have_their_fractions(tmp_path: Path):
    np.save(tmp_path / "many.npy", np.random.default_rng(0).integers(0, 256, (997, 2, 2), np.uint8))
    fractions = {"explain": 0.5, "score": 0.2, "hold": 0.3}
    picked = pick(config(tmp_path / "many.npy", **fractions), n_rows=500, rows_per_image=1)
    splits = [record.split for record in picked.records]
    for split, fraction in fractions.items():
        assert splits.count(split) / len(splits) == pytest.approx(fraction, abs=0.05)


def test_copies_of_an_image_share_their_split(folder: Path):
    (folder / "copies").mkdir()
    for file in folder.glob("cat/*.png"):
        (folder / "copies" / file.name).write_bytes(file.read_bytes())
    picked = pick(config(folder), n_rows=13, rows_per_image=1)
    by_hash: dict[str, set[str]] = {}
    for record in picked.records:
        by_hash.setdefault(record.sha256, set()).add(record.split)
    assert all(len(splits) == 1 for splits in by_hash.values())


def test_unreadable_images_are_left_out_counted_and_listed(
    folder: Path, caplog: pytest.LogCaptureFixture
):
    whole = pick(config(folder), n_rows=9, rows_per_image=1)
    victim = whole.records[2].name
    cut = (folder / victim).read_bytes()[:-200]
    (folder / victim).write_bytes(cut)
    everything = replace(config(folder), explain=0.0, score=1.0, hold=0.0)
    with caplog.at_level(logging.WARNING):
        picked = pick(everything, n_rows=N_FILES - 1, rows_per_image=1)
    assert len(picked.records) == N_FILES - 1
    assert victim not in names(picked)
    [skipped] = picked.skipped
    assert (skipped.source, skipped.name) == ("photos", victim)
    assert "OSError" in skipped.reason
    assert f"1 images cannot be read and are left out, the first is {victim}" in caplog.text


def test_a_file_out_of_reach_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Folder, index: int) -> bytes:
        if self.names[index] == "bird/2.png":
            raise PermissionError("no")
        return read(self, index)

    read = Folder.data
    monkeypatch.setattr(Folder, "data", refuse)
    picked = pick(config(folder), n_rows=9, rows_per_image=1)
    assert [skipped.name for skipped in picked.skipped] == ["bird/2.png"]


def test_too_few_images_are_refused_with_what_they_give(folder: Path):
    with pytest.raises(ValueError, match=r"images must give at least 700 rows .*, got") as error:
        pick(config(folder), n_rows=700, rows_per_image=7)
    fitting = int(str(error.value).rpartition("lower cache.n_rows to ")[2].split()[0])
    assert fitting % 7 == 0
    pick(config(folder), n_rows=fitting, rows_per_image=7)
    with pytest.raises(
        ValueError, match=f"got {fitting}, from 23 images beside 0 that cannot be read; lower"
    ):
        pick(config(folder), n_rows=fitting + 1, rows_per_image=7)


def test_several_sources_are_mixed_and_told_apart(folder: Path, tmp_path: Path):
    np.save(tmp_path / "photos.npy", np.stack([values(100 + i) for i in range(17)]))
    sources = (ImageSource(path=str(folder)), ImageSource(path=str(tmp_path / "photos.npy")))
    picked = pick(config(folder, sources=sources), n_rows=19, rows_per_image=1)
    assert picked.source_names == ("photos", "photos#2")
    assert {record.source for record in picked.records} == {"photos", "photos#2"}
    for example, record in enumerate(picked.records):
        expected = 100 + int(record.name) if record.source == "photos#2" else None
        seed = expected if expected is not None else int(Path(record.name).stem)
        np.testing.assert_array_equal(np.asarray(picked.image(example)), values(seed))


def test_progress_ends_at_its_totals(folder: Path):
    calls: list[tuple[int, int, str]] = []
    pick(config(folder), n_rows=9, rows_per_image=1, progress=lambda *call: calls.append(call))
    last = {unit: (done, total) for done, total, unit in calls}
    assert last == {"images hashed": (N_FILES, N_FILES), "images chosen": (9, 9)}
