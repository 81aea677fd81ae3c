"""Images and their classes are found in folders, arrays, Parquet files and saved datasets."""

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from activations_cache import documents as reading
from activations_cache.config import ImageSource
from activations_cache.image_sources import (
    UNREADABLE,
    Archive,
    Arrays,
    Folder,
    careful_pillow,
    decode,
    open_store,
)

N_FILES = 23


def values(seed: int, height: int = 11, width: int = 13) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values(seed)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONOSEMA_CACHE", str(tmp_path / "user-cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """23 images in 3 classes, one of them two levels down, and files that are no images."""
    root = tmp_path / "photos"
    for i in range(N_FILES):
        file = root / ("cat", "dog/small", "bird")[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(i))
    (root / "notes.txt").write_text("no image")
    (root / "cat" / ".hidden.png").write_bytes(b"")
    return root


def test_a_folder_gives_its_first_subfolders_as_classes(folder: Path):
    store = open_store(ImageSource(path=str(folder)))
    assert isinstance(store, Folder)
    assert len(store.names) == N_FILES
    assert list(store.names) == sorted(store.names)
    at = store.names.index("dog/small/4.png")
    assert store.labels[at] == "dog"
    assert store.data(at) == encoded(4)
    np.testing.assert_array_equal(np.asarray(store.image(at)), values(4))


def packed(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def test_a_tar_gives_what_the_folder_gives(folder: Path, tmp_path: Path):
    expected = open_store(ImageSource(path=str(folder)))
    for name in ("photos", "."):
        file = tmp_path / f"packed{len(name)}.tar"
        with tarfile.open(file, "w") as archive:
            archive.add(folder, arcname=name)
        store = open_store(ImageSource(path=str(file)))
        assert isinstance(store, Archive)
        assert list(store.names) == list(expected.names)
        assert list(store.labels) == list(expected.labels)
        every = range(N_FILES)
        assert [store.data(i) for i in every] == [expected.data(i) for i in every]
        np.testing.assert_array_equal(np.asarray(store.image(4)), np.asarray(expected.image(4)))


def test_links_of_a_tar_are_not_followed_and_one_class_stays_one(tmp_path: Path):
    path = packed(tmp_path / "a.tar", {"cat/1.png": encoded(1), "cat/2.png": encoded(2)})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("cat/3.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    store = open_store(ImageSource(path=str(path)))
    assert list(store.names) == ["cat/1.png", "cat/2.png"]
    assert list(store.labels) == ["cat", "cat"]


@pytest.mark.parametrize("data", [b"", b"no tar", encoded(1)])
def test_what_is_no_tar_is_refused(tmp_path: Path, data: bytes):
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"path must (be an uncompressed \.tar|hold images), got"):
        open_store(ImageSource(path=str(tmp_path / "bad.tar")))


def test_images_beside_the_classes_have_none(folder: Path):
    (folder / "loose.PNG").write_bytes(encoded(97))
    store = open_store(ImageSource(path=str(folder)))
    assert store.labels[store.names.index("loose.PNG")] is None
    assert set(store.labels) == {None, "cat", "dog", "bird"}


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_arrays_are_images(tmp_path: Path, channels: tuple[int, ...]):
    given = np.random.default_rng(0).integers(0, 256, (5, 11, 13, *channels), np.uint8)
    np.save(tmp_path / "images.npy", given)
    np.save(tmp_path / "classes.npy", np.array([3, 1, 3, 0, 1]))
    store = open_store(
        ImageSource(path=str(tmp_path / "images.npy"), label=str(tmp_path / "classes.npy"))
    )
    assert isinstance(store, Arrays)
    assert list(store.labels) == ["3", "1", "3", "0", "1"]
    assert store.names[4] == "4"
    np.testing.assert_array_equal(np.asarray(store.image(2)), given[2].squeeze())
    assert store.data(2) == given[2].tobytes()


@pytest.mark.parametrize("kind", ["saved", "parquet", "plain parquet"])
def test_datasets_are_images(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]):
    path, classes = tmp_path / "birds.parquet", ["cat", "dog", None, "dog", "cat"]
    if kind == "plain parquet":
        table = pa.table({"jpg": [encoded(i) for i in range(5)], "kind": classes})
        pq.write_table(table, path)
    else:
        features = datasets.Features(
            jpg=datasets.Image(), kind=datasets.ClassLabel(names=["dog", "cat"])
        )
        columns = {
            "jpg": [{"bytes": encoded(i), "path": None} for i in range(5)],
            "kind": [1, 0, -1, 0, 1],
        }
        rows = datasets.Dataset.from_dict(columns, features=features)
        path = tmp_path / "birds" if kind == "saved" else path
        (rows.save_to_disk if kind == "saved" else rows.to_parquet)(str(path))
        capfd.readouterr()
    store = open_store(ImageSource(path=str(path), field="jpg", label="kind"))
    assert capfd.readouterr() == ("", "")
    assert list(store.labels) == classes
    assert store.data(3) == encoded(3)
    np.testing.assert_array_equal(np.asarray(store.image(3)), values(3))


def test_a_record_may_name_a_file_but_no_device(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(encoded(7))
    paths = [str(tmp_path / "a.png"), "/dev/zero", "absent.png"]
    pq.write_table(pa.table({"image": paths}), tmp_path / "named.parquet")
    store = open_store(ImageSource(path=str(tmp_path / "named.parquet")))
    assert store.data(0) == encoded(7)
    for index in (1, 2):
        with pytest.raises(FileNotFoundError, match=f"record {index} must hold an image or the"):
            store.data(index)


def bad_array(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


def test_what_is_no_source_of_images_is_refused(folder: Path, tmp_path: Path):
    np.save(tmp_path / "two.npy", np.zeros(2, np.int64))
    (tmp_path / "empty").mkdir()
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "dataset_dict.json").write_text("{}")
    (tmp_path / "split" / "train").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    floats = bad_array(tmp_path / "floats.npy", np.zeros((2, 5, 5, 3)))
    flat = bad_array(tmp_path / "flat.npy", np.zeros((2, 5), np.uint8))
    good = bad_array(tmp_path / "good.npy", np.zeros((3, 5, 5), np.uint8))
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}]), allow_pickle=True)
    for changes, message in (
        ({"path": str(folder), "label": "x"}, "label must be absent where subfolders are the cla"),
        ({"path": str(tmp_path / "empty")}, "path must hold images, got none in .*empty"),
        ({"path": str(tmp_path / "split")}, "path must name one of train inside"),
        (
            {"path": str(folder / "notes.txt")},
            "path must be a folder, a .tar, .npy or .parquet file",
        ),
        ({"path": floats}, r"must be uint8 of shape .*, got float64 \(2, 5, 5, 3\)"),
        ({"path": flat}, r"must be uint8 of shape .*, got uint8 \(2, 5\)"),
        ({"path": str(objects)}, "path must be a .npy file of numbers, got"),
        ({"path": good, "label": str(tmp_path / "two.npy")}, "must hold 3 classes, one for each"),
        ({"path": str(tmp_path / "text.parquet")}, "must have the field 'image', got text"),
    ):
        with pytest.raises(ValueError, match=message):
            open_store(ImageSource(**changes))
    with pytest.raises(FileNotFoundError, match="absent must exist"):
        open_store(ImageSource(path="absent"))


def test_other_formats_are_refused_whatever_the_file_is_called(folder: Path):
    out = io.BytesIO()
    Image.fromarray(values(0)).save(out, "EPS")
    (folder / "cat" / "0.png").write_bytes(out.getvalue())
    store = open_store(ImageSource(path=str(folder)))
    with pytest.raises(UNREADABLE, match="cannot identify image file"):
        store.image(store.names.index("cat/0.png"))


@pytest.mark.parametrize("name", ["BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"])
def test_the_usual_formats_are_read(name: str):
    out = io.BytesIO()
    Image.new("RGB", (13, 11), (200, 100, 50)).save(out, name)
    image = decode(out.getvalue()).convert("RGB")
    assert image.size == (13, 11)
    assert np.abs(np.asarray(image).astype(int) - (200, 100, 50)).max() <= 3


def test_exif_turns_the_image():
    image = Image.fromarray(values(1))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    out = io.BytesIO()
    image.save(out, "PNG", exif=exif)
    turned = np.asarray(decode(out.getvalue()))
    np.testing.assert_array_equal(turned, np.rot90(values(1), k=-1))


@given(st.integers(0, 400), st.integers(0, 255))
def test_damaged_bytes_give_an_image_or_an_expected_error(at: int, byte: int):
    data = bytearray(encoded(0))
    data[at % len(data)] = byte
    with careful_pillow():
        try:
            image = decode(bytes(data[: max(at, 9)] if byte % 2 else data))
        except UNREADABLE:
            image = None
    assert image is None or min(image.size) > 0


def test_an_image_of_absurd_size_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with careful_pillow(), pytest.raises(Image.DecompressionBombWarning):
        decode(encoded(0))


def dataset_of(n: int) -> datasets.Dataset:
    features = datasets.Features({
        "image": datasets.Image(),
        "kind": datasets.ClassLabel(names=["owl", "wren"]),
    })
    columns = {
        "image": [{"bytes": encoded(i), "path": None} for i in range(n)],
        "kind": [i % 2 for i in range(n)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def test_a_dataset_of_the_hub_is_fetched_whole_and_read_in_any_order(monkeypatch):
    asked, pauses = [], []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        if len(asked) < 3:
            raise ConnectionResetError("connection reset by peer")
        return dataset_of(5)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(reading.time, "sleep", pauses.append)
    source = ImageSource(path="dataset://org/birds", label="kind", subset="small", part="test")
    store = open_store(source)
    assert asked[2] == (("org/birds", "small"), {"split": "test", "streaming": False})
    assert pauses == [1, 2]
    assert list(store.labels) == ["owl", "wren", "owl", "wren", "owl"]
    np.testing.assert_array_equal(np.asarray(store.image(4)), values(4))


def test_a_directory_that_the_library_reads_is_a_dataset(tmp_path: Path, capfd):
    dataset_of(3).to_parquet(str(tmp_path / "test.parquet"))
    store = open_store(ImageSource(path=f"dataset://{tmp_path}", part="test"))
    assert store.data(2) == encoded(2)
    with pytest.raises(ValueError, match="must have part 'train'"):
        open_store(ImageSource(path=f"dataset://{tmp_path}"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"path": "dataset://"}, "path must have the form dataset://NAME"),
        ({"path": "birds", "subset": "small"}, "subset must be absent where path is not dataset"),
        ({"path": "birds", "part": ""}, "part must not be empty"),
    ],
)
def test_a_dataset_is_named_whole(fields, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        ImageSource(**fields)
