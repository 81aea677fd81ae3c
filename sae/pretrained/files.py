"""The files of a foreign dictionary, read within limits: safetensors, JSON, npz; .pt if allowed.

Nothing here trusts a file: headers are parsed before the library that reads the data sees them,
sizes are held against the file's own size, and only regular files inside the dictionary's directory
(or inside the hub's cache that it lies in) are opened.
"""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from activations_cache import seals
from monosema.checks import MonosemaError
from sae.pretrained import foreign
from sae.pretrained.foreign import DictionaryFormatError, one_line

MAX_JSON_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 16
MAX_TENSORS = 64
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL"}
PICKLED = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
_HUB_SNAPSHOTS = "snapshots"


class Stated(NamedTuple):
    """What a list of releases says of a dictionary whose own files lack it or have it wrong."""

    input_scale: float = 0.0
    """The factor of an average norm; 0 where the files have what is needed."""
    normalize_activations: str = ""
    """SAELens' word for a norm; empty where the files are right."""
    is_centred: bool = False
    """Whether the rows that it was trained on had no mean over dimensions."""


class Files:
    """One dictionary's directory, or one file of it; whatever is read is hashed into `sha256`."""

    def __init__(
        self,
        path: Path,
        *,
        allow_pt: bool = False,
        is_named: bool = False,
        latents: int | slice | None = None,
    ) -> None:
        """Take a directory, or one file.

        Args:
            path: Where the dictionary is.
            allow_pt: Pickled weights may be read, in a confined process.
            is_named: The user has named the format, so it need not be certain from the files.
            latents: The latents that a reader takes into memory; all when absent.
        """
        self.path, self.allow_pt, self.is_named = path, allow_pt, is_named
        self.latents = latents
        self.stated = Stated()
        self.root = path if path.is_dir() else path.parent
        self._read: set[str] = set()
        self._pickled: dict[str, foreign.Content] = {}

    @property
    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256 of every file that was read; this reads them whole."""
        return {name: seals.sha256(self.root / name) for name in sorted(self._read)}

    def has(self, name: str) -> bool:
        """Say whether a file belongs to the dictionary."""
        return (self.path.is_dir() or self.path.name == name) and (self.root / name).is_file()

    def has_sibling(self, name: str) -> bool:
        """Say whether a file lies in the directory, also where one of its files was given."""
        return (self.root / name).is_file()

    def one_file(self) -> str:
        """The name of the file that was given, or of the one .pt file in the directory."""
        if not self.path.is_dir():
            return self.path.name
        results = sorted(p.name for p in self.path.iterdir() if p.suffix in PICKLED)
        if len(results) != 1:
            raise DictionaryFormatError(f"{self.path} must hold one .pt file, got {results}")
        return results[0]

    def json(self, name: str) -> dict[str, object]:
        """Read a JSON object of at most 1 MiB, in which no key stands twice."""
        data = self._open(name, MAX_JSON_BYTES).read_bytes()
        return parse_json(data, str(self.root / name))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Map all tensors of a safetensors file, as they are stored; nothing is read yet."""
        file = self._open(name)
        check_header(file)
        try:
            with safe_open(file, framework="pt") as opened:
                return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DictionaryFormatError(
                f"{file} must be a whole safetensors file, got: {one_line(error)}; copy it again"
            ) from error

    def tensor_names(self, name: str) -> set[str]:
        """The names in a safetensors file's header; none where there is no such file."""
        return set(check_header(self._open(name))) if self.has(name) else set()

    def arrays(self, name: str) -> dict[str, Tensor]:
        """Read all arrays of an npz file; none may be pickled."""
        return foreign.read_npz(self._open(name))

    def pickled(self, name: str, start: int = 0) -> foreign.Content:
        """Read the tensors and plain values of a .pt file from a byte on, if it was allowed."""
        if not self.allow_pt:
            raise DictionaryFormatError(
                f"{self.root / name} must not be a pickled file, got one; pass allow_pt=True to "
                "read it in a confined process, or write it as ours by "
                f"`sae convert {self.root} TARGET --allow-pt`"
            )
        if name not in self._pickled:
            self._pickled[name] = foreign.read(self._open(name), start=start)
        return self._pickled[name]

    def text(self, name: str) -> bytes:
        """Read a text file of at most 1 MiB."""
        return self._open(name, MAX_JSON_BYTES).read_bytes()

    def first_line(self, name: str) -> bytes:
        """Read the first line of a file with its end, at most 64 KiB of it."""
        with self._open(name).open("rb") as stream:
            return stream.readline(MAX_LINE_BYTES)

    def pickled_names(self) -> set[str]:
        """The tensors' names in a single .pt file; none where it is something else or forbidden."""
        if not self.allow_pt or self.path.is_dir() or self.path.suffix not in PICKLED:
            return set()
        if self.first_line(self.path.name).startswith(b"{"):  # saev's, a pickle after a line
            return set()
        return set(self.pickled(self.path.name).tensors)

    def _open(self, name: str, most: int | None = None) -> Path:
        file = self.root / name
        if not file.is_file():
            raise DictionaryFormatError(f"{self.root} must hold {name}, got no such file")
        if not _contains(self.root.resolve(), file.resolve()):
            raise DictionaryFormatError(f"{file} must lie inside {self.root}, got a link out of it")
        size = file.stat().st_size
        if most is not None and size > most:
            raise DictionaryFormatError(f"{file} must have at most {most:,} bytes, got {size:,}")
        self._read.add(name)
        return file


def _contains(root: Path, file: Path) -> bool:
    """The hub's cache keeps files as links from snapshots/ into blobs/ beside it."""
    if _HUB_SNAPSHOTS in root.parts:
        root = Path(*root.parts[: root.parts.index(_HUB_SNAPSHOTS)])
    return file.is_relative_to(root)


def parse_json(data: bytes, what: str) -> dict[str, object]:
    """Parse a JSON object; refuse repeated keys, NaN and infinities, and anything but an object."""
    try:
        record = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DictionaryFormatError(
            f"{what} must be readable JSON, got: {one_line(error)}"
        ) from error
    if not isinstance(record, dict):
        raise DictionaryFormatError(f"{what} must be a JSON object, got {type(record).__name__}")
    return record


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        raise MonosemaError(
            f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice"
        )
    return record


def _refuse(constant: str) -> object:
    raise MonosemaError(f"{constant} is not a JSON number")


def check_header(file: Path) -> dict[str, object]:
    """Check a safetensors header before the library reads it; it accepts keys that stand twice."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        rest = file.stat().st_size - 8
        if not 0 < length <= min(MAX_JSON_BYTES, rest):
            raise DictionaryFormatError(
                f"{file} must be a whole safetensors file with a header of at most "
                f"{MAX_JSON_BYTES:,} bytes, got {length:,} in a file of {rest + 8:,}; copy it again"
            )
        header = parse_json(stream.read(length), f"the header of {file}")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise DictionaryFormatError(
            f"{file} must hold at most {MAX_TENSORS} tensors, got {len(header):,}"
        )
    for name, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise DictionaryFormatError(
                f"{file} must hold tensors of {sorted(DTYPES)}, got {dtype!r} for {name!r}"
            )
    return header


def expect_keys(
    tensors: dict[str, Tensor], wanted: set[str], what: str, optional: frozenset[str] = frozenset()
) -> None:
    """Require exactly these tensors, besides optional ones."""
    missing, extra = wanted - tensors.keys(), tensors.keys() - wanted - optional
    if missing or extra:
        raise DictionaryFormatError(
            f"{what} must hold the tensors {sorted(wanted)}, got {sorted(tensors)}: "
            f"missing {sorted(missing)}, unknown {sorted(extra)}"
        )


def expect_shape(tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Require a shape, and floating-point numbers."""
    if tuple(tensor.shape) != shape:
        raise DictionaryFormatError(
            f"the tensor {name} must have shape {shape}, got {tuple(tensor.shape)}"
        )
    if not tensor.is_floating_point():
        raise DictionaryFormatError(
            f"the tensor {name} must hold floating-point numbers, got {tensor.dtype}"
        )
