"""Where images come from: folders, tar files, NumPy arrays, Parquet files and saved datasets.

Each is opened as an `ImageStore`, which reads nothing until an image is asked for. The order of the
images depends on nothing but the source.

From the bytes of a file to an image: what is decoded, and what damaged bytes raise.
"""

import contextlib
import io
import struct
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from activations_cache.checks import DATASET, locate
from activations_cache.config import ImageSource
from activations_cache.conversion import cache_directory
from activations_cache.documents import dataset_table
from activations_cache.loading import one_line
from monosema.checks import MonosemaError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Files of a folder that are taken for images; others are not looked at."""

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, whatever a file is called: Pillow reads others by running Ghostscript."""

UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders raise for damaged bytes, and the file system for files out of reach."""


def decode(data: bytes) -> Image.Image:
    """Return an encoded image, all of it read, turned as its EXIF entry says; of several the first.

    Raises:
        OSError: If the bytes are no whole image; of other errors see UNREADABLE.
    """
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    image.load()
    return ImageOps.exif_transpose(image)


@contextlib.contextmanager
def careful_pillow() -> Iterator[None]:
    """Silence Pillow's remarks on files that it can read, and refuse images of absurd size.

    Not for use in a thread, as warnings are one for all; threads started inside are covered.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@dataclass(frozen=True)
class Folder:
    """Image files below a folder; the class is the name of the first folder on the way."""

    root: Path
    names: Sequence[str]
    labels: Sequence[str | None]
    """None for images that lie in the root itself."""

    def data(self, index: int) -> bytes:
        """Return the file's bytes."""
        return (self.root / self.names[index]).read_bytes()

    def image(self, index: int) -> Image.Image:
        """Return an image, decoded."""
        return decode(self.data(index))


@dataclass(frozen=True)
class Archive:
    """Image files in an uncompressed .tar, read where they lie; classes as in a folder."""

    path: Path
    names: Sequence[str]
    labels: Sequence[str | None]
    places: Sequence[tuple[int, int]]
    """Where each file begins, and its length."""

    def data(self, index: int) -> bytes:
        """Return the file's bytes."""
        start, length = self.places[index]
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def image(self, index: int) -> Image.Image:
        """Return an image, decoded."""
        return decode(self.data(index))


@dataclass(frozen=True)
class Arrays:
    """Images as numbers from 0 to 255: (image, height, width), with 3 or 1 channels behind."""

    values: np.ndarray
    names: Sequence[str]
    labels: Sequence[str | None]

    def data(self, index: int) -> bytes:
        """Return the image's numbers in C order."""
        return self.values[index].tobytes()

    def image(self, index: int) -> Image.Image:
        """Return an image."""
        values = np.array(self.values[index])
        return Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values)


@dataclass(frozen=True)
class Records:
    """A dataset of the library `datasets` with encoded images in one column."""

    rows: Any
    """The dataset, with that column alone."""
    field: str
    names: Sequence[str]
    labels: Sequence[str | None]

    def data(self, index: int) -> bytes:
        """Return the encoded image."""
        entry = self.rows[index][self.field]
        if entry["bytes"] is not None:
            return entry["bytes"]
        path = Path(entry["path"])
        if not path.is_file():  # a device, say, would never end
            raise FileNotFoundError(f"record {index} must hold an image or the path of one")
        return path.read_bytes()

    def image(self, index: int) -> Image.Image:
        """Return an image, decoded."""
        return decode(self.data(index))


ImageStore = Folder | Archive | Arrays | Records
"""The images of a source. `names` are paths relative to it, or numbers; `labels` the classes."""


def open_store(source: ImageSource) -> ImageStore:
    """Open a source.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it holds no images, or not in the form that the source says.
    """
    if source.path.startswith(DATASET):
        return _not_empty(_records(dataset_table(source), source), source)
    path = locate(source.path)
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
        raise MonosemaError(
            f"path must name one of {splits} inside {source.path}, got their folder"
        )
    if path.is_dir() and not (path / "dataset_info.json").is_file():
        store = _folder(path, source)
    elif path.suffix == ".tar":
        store = _archive(path, source)
    elif path.suffix == ".npy":
        store = _arrays(path, source)
    elif path.is_dir() or path.suffix == ".parquet":
        store = _records(_table(path), source)
    else:
        kinds = "a folder, a .tar, .npy or .parquet file, a saved dataset or dataset://NAME"
        raise MonosemaError(f"path must be {kinds}, got {source.path}")
    return _not_empty(store, source)


def _not_empty(store: ImageStore, source: ImageSource) -> ImageStore:
    if not store.names:
        raise MonosemaError(f"path must hold images, got none in {source.path}")
    return store


def _folder(path: Path, source: ImageSource) -> Folder:
    _no_label(source)
    result = (file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    names = (name.as_posix() for name in result if not name.name.startswith("."))
    names = sorted(name for name in names if (path / name).is_file())
    return Folder(path, names, _first_folders(names))


def _archive(path: Path, source: ImageSource) -> Archive:
    _no_label(source)
    try:
        with tarfile.open(path, "r:") as archive:
            files = [m for m in archive if m.isreg() and not m.issparse()]
    except (tarfile.TarError, EOFError) as error:
        raise MonosemaError(
            f"path must be an uncompressed .tar, got {source.path}: {one_line(error)}"
        ) from error
    results = [m for m in files if Path(m.name).suffix.lower() in SUFFIXES]
    results = sorted((m for m in results if Path(m.name).name[0] != "."), key=lambda m: m.name)
    names = [m.name.removeprefix("./") for m in results]
    tops = set(_first_folders(names))
    if len(tops) == 1 and None not in tops and all(name.count("/") > 1 for name in names):
        names = [name.partition("/")[2] for name in names]  # one folder holds everything
    places = [(m.offset_data, m.size) for m in results]
    return Archive(path, names, _first_folders(names), places)


def _no_label(source: ImageSource) -> None:
    if source.label is not None:
        rule = "be absent where subfolders are the classes"
        raise MonosemaError(f"label must {rule}, got {source.label!r} for {source.path}")


def _first_folders(names: Sequence[str]) -> list[str | None]:
    return [name.split("/")[0] if "/" in name else None for name in names]


def _arrays(path: Path, source: ImageSource) -> Arrays:
    try:
        values = np.lib.format.open_memmap(path, mode="r")
        labels = _array_labels(source.label) if source.label else [None] * len(values)
    except (ValueError, TypeError) as error:
        reason = one_line(error)
        raise MonosemaError(
            f"path must be a .npy file of numbers, got {source.path}: {reason}"
        ) from (error)
    channels = values.shape[3:]
    if values.dtype != np.uint8 or values.ndim not in {3, 4} or channels not in {(), (1,), (3,)}:
        raise MonosemaError(
            f"{source.path} must be uint8 of shape (image, height, width) or with 3 channels "
            f"behind, got {values.dtype} {values.shape}"
        )
    if len(labels) != len(values):
        rule = f"hold {len(values)} classes, one for each image"
        raise MonosemaError(f"{source.label} must {rule}, got {len(labels)}")
    return Arrays(values, _numbers(values), labels)


def _numbers(items: Sized) -> list[str]:
    return [str(i) for i in range(len(items))]


def _array_labels(path: str) -> list[str | None]:
    values = np.lib.format.open_memmap(locate(path), mode="r")
    if values.ndim != 1:
        raise MonosemaError(f"{path} must have one axis, got the shape {values.shape}")
    return [str(value) for value in values.tolist()]


def _table(path: Path) -> Any:
    import datasets  # 0.8 s, for this kind of source alone

    if path.is_dir():
        return datasets.load_from_disk(str(path))
    made = str(cache_directory() / "datasets")
    with _without_bars(datasets):
        return datasets.Dataset.from_parquet(str(path), cache_dir=made)


def _records(rows: Any, source: ImageSource) -> Records:
    import datasets

    assert isinstance(rows, datasets.Dataset), type(rows)
    for name in (source.field, source.label):
        if name is not None and name not in rows.column_names:
            listed = ", ".join(rows.column_names)
            raise MonosemaError(f"{source.path} must have the field {name!r}, got {listed}")
    labels = _record_labels(rows, source.label) if source.label else [None] * len(rows)
    try:
        rows = rows.select_columns([source.field])
        rows = rows.cast_column(source.field, datasets.Image(decode=False))
    except (TypeError, ValueError) as error:
        raise MonosemaError(
            f"{source.path} must hold images in the field {source.field!r}, got {one_line(error)}"
        ) from error
    return Records(rows, source.field, _numbers(rows), labels)


@contextlib.contextmanager
def _without_bars(datasets: ModuleType) -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _record_labels(rows: Any, field: str) -> list[str | None]:
    names = getattr(rows.features[field], "names", None)
    values = rows.select_columns([field]).with_format("arrow")[:][field].to_pylist()
    if names is None:
        return [None if value is None else str(value) for value in values]
    return [names[value] if value is not None and value >= 0 else None for value in values]
