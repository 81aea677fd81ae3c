"""What a cache is made from: model, text, hook points and sizes.

Plain frozen dataclasses that import neither torch nor a third-party package, so that a
configuration is checked before anything slow is loaded. Checks raise MonosemaError with the field's
name first; nothing here touches the disk.

The images that a vision model reads: where they lie, and how they become pixels.

Like `activations_cache.config`, this imports neither torch nor a third-party package.

"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, get_args

from activations_cache.checks import (
    DATASET,
    LATER,
    MonosemaError,
    at_least,
    package_path,
    positive,
    require,
    split_fractions,
)

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
Tokens = Literal["patches", "cls", "all"]
TOKENS: tuple[Tokens, ...] = get_args(Tokens)


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """A set of images and where their classes stand."""

    path: str
    """A folder or .tar (class = its subfolder), a .npy, .parquet, saved dataset,
    package://PACKAGE/FILE, or dataset://NAME: one of the `datasets` library, on the hub or not."""
    field: str = "image"
    """Field of a record that holds the image (.parquet, dataset)."""
    label: str | None = None
    """Field of a record with the class; for a .npy, the path of a .npy with the classes."""
    subset: str | None = None
    """Configuration of a dataset on the hub."""
    part: str = "train"
    """Split of a dataset://NAME, as its authors call it."""

    def __post_init__(self) -> None:
        """Check the fields that need no disk."""
        require(bool(self.path), "path", "not be empty", self.path)
        package_path(self.path)
        is_dataset = self.path.startswith(DATASET)
        require(self.path != DATASET, "path", f"have the form {DATASET}NAME", self.path)
        only = f"be absent where path is not {DATASET}NAME"
        require(self.subset is None or is_dataset, "subset", only, self.subset)
        require(bool(self.part), "part", "not be empty", self.part)
        require(bool(self.field), "field", "not be empty", self.field)
        require(self.label != "", "label", "not be empty", self.label)
        if self.path.endswith(".npy") and self.label is not None:
            is_array = self.label.endswith(".npy")
            require(is_array, "label", "be the path of a .npy file where path is one", self.label)


@dataclass(frozen=True, kw_only=True)
class ImagePreprocessing:
    """How an image becomes pixels; what is absent is taken from the model's own settings."""

    size: int | None = None
    """Height and width that the model reads, in pixels."""
    crop: bool | None = None
    """Whether the middle is cut out; otherwise the whole image is squeezed into the square."""
    shortest_edge: int | None = None
    """Where the middle is cut out: length to which the shorter side is brought before."""
    interpolation: Interpolation | None = None
    """How pixels are mixed when the image is resized."""
    mean: tuple[float, float, float] | None = None
    """What is subtracted from red, green and blue, which go from 0 to 1."""
    std: tuple[float, float, float] | None = None
    """By what they are divided then."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour behind transparent pixels, each part from 0 to 255."""

    def __post_init__(self) -> None:
        """Check sizes and colours."""
        for name in ("size", "shortest_edge"):
            if (value := getattr(self, name)) is not None:
                at_least(name, value, 1)
        squeezed = self.crop is False and self.shortest_edge is not None
        require(not squeezed, "shortest_edge", "be absent where crop is false", self.shortest_edge)
        if self.size is not None and self.shortest_edge is not None:
            at_least("shortest_edge", self.shortest_edge, self.size)
        if self.interpolation is not None:
            rule = f"be one of {', '.join(INTERPOLATIONS)}"
            require(self.interpolation in INTERPOLATIONS, "interpolation", rule, self.interpolation)
        for value in self.std or ():
            positive("std", value)
        inside = all(0 <= value <= 255 for value in self.background)
        require(inside, "background", "have parts from 0 to 255", self.background)


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """The images that the model reads: sources, pixels, positions, the three splits."""

    sources: tuple[ImageSource, ...]
    """Sets of images."""
    preprocessing: ImagePreprocessing = ImagePreprocessing()
    """How an image becomes pixels."""
    tokens: Tokens = "patches"
    """Positions that give rows: patches, cls (the class token alone), or all, registers too."""
    explain: float = 0.6
    """Fraction of the images from which explanations are made."""
    score: float = 0.3
    """Fraction of the images on which explanations are scored."""
    hold: float = 0.1
    """Fraction of the images that neither training nor explaining sees."""
    seed: int = 0
    """Decides, with an image's bytes, its split and its place in the order."""

    def __post_init__(self) -> None:
        """Check the fields against each other."""
        require(len(self.sources) > 0, "sources", "name at least one source", self.sources)
        distinct = len(set(self.sources)) == len(self.sources)
        require(distinct, "sources", "differ from each other", [s.path for s in self.sources])
        require(self.tokens in TOKENS, "tokens", f"be one of {', '.join(TOKENS)}", self.tokens)
        split_fractions(self.explain, self.score, self.hold, "images")
        at_least("seed", self.seed, 0)


SPLITS = ("explain", "score", "hold")
"""The three disjoint parts of the documents: to make explanations, to score them, to hold out."""

TRAINING_SPLITS = ("explain", "score")
"""The splits whose rows dictionaries are trained on; they are what `n_rows` counts."""

Dtype = Literal["bfloat16", "float32", "float16", "int8"]

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
Compression = Literal["none", "zstd"]
COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)

Attention = Literal["context", "document"]
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)

TEXT_FORMATS = (".txt", ".jsonl", ".parquet", ".arrow")

SPECIAL = "special"
"""Stands for all special tokens of a tokenizer in `exclude_tokens`."""

_HOOK_POINT = re.compile(r"(?P<module>\w+(?:\.\w+)*):(?P<side>in|out)", re.ASCII)


def parse_hook_point(hook_point: str) -> tuple[str, str]:
    """Split `<module path>:(in|out)` into the module path and the side.

    Raises:
        ValueError: If the text has another form.
    """
    match = _HOOK_POINT.fullmatch(hook_point)
    if match is None:
        raise MonosemaError(
            "hook_points must have the form '<module path>:(in|out)', "
            f"such as 'model.layers.15:out', got {hook_point!r}"
        )
    return match["module"], match["side"]


def text_format(path: str) -> str:
    """Return the format of a text file by its name: `.txt`, `.jsonl`, `.parquet` or `.arrow`.

    A trailing `.gz` is looked through. Raises ValueError for any other name.
    """
    suffix = PurePosixPath(path.removesuffix(".gz")).suffix
    rule = "end in .txt, .jsonl, .parquet or .arrow (or these + .gz)"
    require(suffix in TEXT_FORMATS, "path", rule, path)
    return suffix


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is read, and in which number format it runs."""

    path: str
    """A directory (transformers, timm, open_clip), a .gguf or .onnx file, package://, or hub id."""
    sha256: str | None = None
    """What the weights must hash to: the one file, or the safetensors files in order of name."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the model's weights and stream."""
    revision: str | None = None
    """Commit, tag or branch; only for a hub id."""
    devices: Literal["one", "all"] = "one"
    """Whether the model lies on this process's device, or over all of them by accelerate."""
    compile: bool = False
    """Whether torch.compile speeds up the blocks; it changes the last bits of the rows."""

    def __post_init__(self) -> None:
        """Check the fields that need neither disk nor network."""
        require(bool(self.path), "path", "not be empty", self.path)
        package_path(self.path)
        _check_one_of("dtype", self.dtype, ("bfloat16", "float32"))
        _check_one_of("devices", self.devices, ("one", "all"))
        if self.sha256 is not None:
            is_digest = re.fullmatch("[0-9a-f]{64}", self.sha256) is not None
            require(is_digest, "sha256", "be 64 lower-case hexadecimal digits", self.sha256)
        is_file = self.path.endswith((".gguf", ".onnx")) or self.path.startswith("package://")
        only_hub = "be absent where path is a file or a package"
        require(self.revision is None or not is_file, "revision", only_hub, self.revision)


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """One file of text and how documents are found in it."""

    path: str
    """A .txt, .jsonl, .parquet or .arrow file (also .gz), package://PACKAGE/FILE, dataset://NAME.

    A dataset is one of the `datasets` library: on the hub, or a directory that it can read.
    """
    share: float = 1.0
    """Weight of this source among all: it gives share / (sum of shares) of the rows."""
    field: str = "text"
    """Field of a record that holds the text, or token ids, which are read as they are."""
    label: str | None = None
    """Field of a record that is carried along as the label of its tokens."""
    document_pattern: str | None = None
    """Regular expression; a line of plain text that begins with it begins a new document (.txt)."""
    chat: bool = False
    """Whether the field holds messages, which the tokenizer's chat template turns into text."""
    subset: str | None = None
    """Configuration of a dataset, such as a language."""
    part: str = "train"
    """Split of a dataset, as its authors call it."""
    n_documents: int | None = None
    """Only the first so many records are read."""
    shuffle_buffer: int | None = dataclasses.field(default=None, metadata=LATER)
    """Records of a stream from the hub that are shuffled as they come; its files are, too."""
    special_tokens: bool = dataclasses.field(default=False, metadata=LATER)
    """Whether names of special tokens in the text are read as such; otherwise they are split."""

    def __post_init__(self) -> None:
        """Check the fields that need no disk."""
        package_path(self.path)
        is_dataset = self.path.startswith(DATASET)
        is_plain = not is_dataset and text_format(self.path) == ".txt"
        require(self.path != DATASET, "path", f"have the form {DATASET}NAME", self.path)
        require(not (self.chat and is_plain), "chat", "be false for plain text", self.chat)
        only = f"be absent where path is not {DATASET}NAME"
        require(self.subset is None or is_dataset, "subset", only, self.subset)
        require(bool(self.part), "part", "not be empty", self.part)
        if self.n_documents is not None:
            at_least("n_documents", self.n_documents, 1)
        if self.shuffle_buffer is not None:
            at_least("shuffle_buffer", self.shuffle_buffer, 1)
            require(is_dataset, "shuffle_buffer", only, self.shuffle_buffer)
        positive("share", self.share)
        require(bool(self.field), "field", "not be empty", self.field)
        require(self.label is None or not is_plain, "label", "be absent for plain text", self.label)
        if self.document_pattern is not None:
            pattern = self.document_pattern
            require(is_plain, "document_pattern", "be absent for records", pattern)
            require(_is_regex(pattern), "document_pattern", "be a regular expression", pattern)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text that the model reads: its sources, the length of a context, the three splits."""

    sources: tuple[TextSource, ...]
    """Files of text; a context never mixes two of them."""
    context: int = 256
    """Tokens per context."""
    attention: Attention = "context"
    """Whether a token sees the whole context before it, or only its own document there."""
    explain: float = 0.6
    """Fraction of the documents from which explanations are made."""
    score: float = 0.3
    """Fraction of the documents on which explanations are scored."""
    hold: float = 0.1
    """Fraction of the documents that neither training nor explaining sees."""
    seed: int = 0
    """Decides each document's split and the order of documents and contexts."""

    def __post_init__(self) -> None:
        """Check sizes and that the three fractions cover the documents."""
        require(len(self.sources) > 0, "sources", "name at least one source", self.sources)
        distinct = len(set(self.sources)) == len(self.sources)
        require(distinct, "sources", "differ from each other", [s.path for s in self.sources])
        at_least("context", self.context, 2)
        _check_one_of("attention", self.attention, ATTENTIONS)
        split_fractions(self.explain, self.score, self.hold, "documents")
        at_least("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """A cache of activations: which stream of which model on what data, and how much of it."""

    model: ModelConfig
    """The model."""
    text: TextConfig | None = None
    """What a language model reads."""
    images: ImagesConfig | None = None
    """What a vision model reads; exactly one of text and images is given."""
    hook_points: tuple[str, ...]
    """Places in the model, '<module path>:(in|out)', such as 'model.layers.15:out'."""
    n_rows: int
    """Rows to train on, at least: those of explain and score; hold comes on top by its fraction."""
    skip_positions: int = 1
    """Positions at the start of a context of text that give no row: the first is a sink."""
    exclude_tokens: tuple[int | str, ...] = dataclasses.field(default=(), metadata=LATER)
    """Tokens that give no row: ids, names of tokens, or `special` for all special ones."""
    dtype: Dtype = "bfloat16"
    """Number format of the rows on disk; int8 has a scale for each row, and half the size."""
    compression: Compression = "none"
    """zstd is for archives: smaller files, which are unpacked before they can be read."""
    rows_per_shard: int = 65536
    """Rows in one file."""
    contexts_per_forward: int = 16
    """Contexts, or images, that the model reads at once."""

    def __post_init__(self) -> None:
        """Check sizes, and the fields against each other."""
        require(len(self.hook_points) > 0, "hook_points", "name at least one", self.hook_points)
        distinct = len(set(self.hook_points)) == len(self.hook_points)
        require(distinct, "hook_points", "differ from each other", self.hook_points)
        for hook_point in self.hook_points:
            parse_hook_point(hook_point)
        at_least("n_rows", self.n_rows, 1)
        _check_one_of("dtype", self.dtype, DTYPES)
        _check_one_of("compression", self.compression, COMPRESSIONS)
        at_least("rows_per_shard", self.rows_per_shard, 1)
        at_least("contexts_per_forward", self.contexts_per_forward, 1)
        self._check_data()

    @property
    def data(self) -> TextConfig | ImagesConfig:
        """What the model reads, text or images."""
        data = self.images if self.text is None else self.text
        assert data is not None, "one of them is given"
        return data

    def _check_data(self) -> None:
        given = [name for name in ("text", "images") if getattr(self, name) is not None]
        rule = "be given, or images in its place"
        require(len(given) == 1, "text", rule, " and ".join(given) or "neither")
        at_least("skip_positions", self.skip_positions, 0)
        if self.text is None:
            rule = "be left out with images, where images.tokens decides"
            require(self.skip_positions == 1, "skip_positions", rule, self.skip_positions)
            no_tokens = "be left out with images, which have no tokens"
            require(not self.exclude_tokens, "exclude_tokens", no_tokens, self.exclude_tokens)
            return
        shorter = self.skip_positions < self.text.context
        rule = f"be less than text.context={self.text.context}"
        require(shorter, "skip_positions", rule, self.skip_positions)
        at_least("rows_per_shard", self.rows_per_shard, self.text.context)


def _check_one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    require(value in allowed, field, f"be one of {', '.join(allowed)}", value)


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
