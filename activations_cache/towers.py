"""Pairs of towers, one for texts and one for images, whose embeddings lie in one space.

CLIP and SigLIP of transformers. What a tower needs is tried on the one at hand: which padding its
pooling goes with, whether both sides are equally wide, whether texts are told apart.

Embeddings are kept in the user's cache, one small file for each tower and list of texts or images.
"""

import gzip
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Float32, Int
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from activations_cache import io
from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.config import ImagePreprocessing, ModelConfig, TextSource
from activations_cache.conversion import cache_directory
from activations_cache.documents import documents
from activations_cache.images import read_pixels
from activations_cache.loading import ModelError, Refusing, one_line, quiet
from activations_cache.models import files_of, model_class_of, read_model, read_tokenizer
from activations_cache.preprocessing import Preprocessing, read_settings, resolve

TEXTS_AT_ONCE, IMAGES_AT_ONCE = 128, 32

PROBES = ("a", "a photo of a red dog on a green table", "two")
"""Texts of several lengths, on which a text tower is tried."""

EQUAL = 1e-3
"""Two embeddings that differ by less are one: float32 on any device stays below."""

_ADVICE = "pass a directory or hub id of CLIP or SigLIP as save_pretrained writes it"


class EmbeddedConcepts(NamedTuple):
    """What an image may show."""

    names: tuple[str, ...]
    """Words, or captions."""
    embeddings: Float32[Tensor, "word d_model"]
    """Of norm 1."""


@dataclass(frozen=True)
class Towers:
    """Both towers of a model, ready to be asked."""

    name: str
    """As the configuration names it."""
    model: PreTrainedModel
    """In evaluation mode."""
    tokenizer: Tokenizer
    """Its tokenizer."""
    preprocessing: Preprocessing
    """What is done to images."""
    context: int
    """Tokens of a text, at most."""
    padding: Literal["longest", "max_length"]
    """How far texts are padded: to the longest of a batch, or always to `context` tokens."""
    width: int
    """Of an embedding."""
    scale: float | None
    """By what the model multiplies cosines; None where it has no such weight."""
    identity: Mapping[str, str]
    """Hashes of what embeddings depend on, besides the texts and images."""

    @property
    def fingerprint(self) -> str:
        """A hash of the model and of what is done to images."""
        return _digest({**self.identity, "preprocessing": asdict(self.preprocessing)})

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def texts(
        self, texts: Sequence[str], *, progress: Progress = silent
    ) -> Float32[Tensor, "word d_model"]:
        """Embeddings of texts, of norm 1; from the cache where it has them.

        Raises:
            ValueError: If a text is empty or longer than the tower reads.
        """
        ids = self._ids(texts)
        key = {**self.identity, "ids": ids, "padding": self.padding}
        return _kept(key, lambda: self._embedded(ids, progress))

    def concepts(
        self,
        names: Sequence[str],
        templates: Sequence[str] = ("{}",),
        *,
        progress: Progress = silent,
    ) -> EmbeddedConcepts:
        """Embeddings of concepts; with several templates the normalised mean over them.

        Args:
            names: Words, or captions.
            templates: Texts with one {} each, such as "a photo of a {}".
            progress: Called with the unit "texts embedded".
        """
        each = [
            self.texts([t.replace("{}", name) for name in names], progress=progress)
            for t in templates
        ]
        mean = torch.stack(each).mean(dim=0)
        return EmbeddedConcepts(tuple(names), nn.functional.normalize(mean, dim=1))

    def images(
        self,
        image: Callable[[int], Image.Image],
        examples: Sequence[int],
        digests: Sequence[str],
        *,
        progress: Progress = silent,
    ) -> Float32[Tensor, "example d_model"]:
        """Embeddings of images, of norm 1; from the cache where it has them.

        Args:
            image: Gives the image of an example.
            examples: Numbers of examples.
            digests: Hash of each image's bytes, by which its embedding is known again.
            progress: Called with the unit "images embedded".
        """
        key = {"towers": self.fingerprint, "images": list(digests)}
        return _kept(key, lambda: self._seen(image, examples, progress))

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if "" in (stripped := [text.strip() for text in texts]):
            raise MonosemaError(
                f"text {stripped.index('') + 1} of {len(texts)} must hold a word, got none"
            )
        ids: list[list[int]] = self.tokenizer(list(texts))["input_ids"]
        for text, row in zip(texts, ids, strict=True):
            if len(row) > self.context:
                raise MonosemaError(
                    f"each text must have at most {self.context} tokens for {self.name}, got "
                    f"{len(row)}: {text[:40]!r}; shorten it"
                )
        return ids

    @torch.no_grad()
    def _embedded(
        self, ids: Sequence[Sequence[int]], progress: Progress
    ) -> Float32[Tensor, "word d_model"]:
        """Batches of about equal length, each padded as its tower needs."""
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        result = torch.empty(len(ids), self.width)
        for start in range(0, len(order), TEXTS_AT_ONCE):
            part = order[start : start + TEXTS_AT_ONCE]
            width = self.context if self.padding == "max_length" else None
            inputs = _padded(self.tokenizer, [ids[i] for i in part], width)
            result[part] = _of_texts(self.model, inputs)
            progress(min(start + TEXTS_AT_ONCE, len(order)), len(order), "texts embedded")
        return result

    @torch.no_grad()
    def _seen(
        self, image: Callable[[int], Image.Image], examples: Sequence[int], progress: Progress
    ) -> Float32[Tensor, "example d_model"]:
        result = torch.empty(len(examples), self.width)
        for start in range(0, len(examples), IMAGES_AT_ONCE):
            part = slice(start, start + IMAGES_AT_ONCE)
            pixels = torch.from_numpy(read_pixels(self.preprocessing, image, examples[part]))
            result[part] = _of_images(self.model, pixels)
            progress(min(part.stop, len(examples)), len(examples), "images embedded")
        return result


class ZeroShot(nn.Module):
    """The tower for images, and a logit for each of some texts: scale x cosine.

    Hook points are those of the tower alone, as `load_vision_model` has them. The result has the
    logits of one position, as a language model's are those of its tokens.
    """

    def __init__(self, towers: Towers, texts: Float[Tensor, "word d_model"]) -> None:
        """Take both; the weights are shared."""
        super().__init__()
        self.towers = towers
        for name, part in cast(nn.Module, towers.model.vision_model).named_children():
            self.add_module(name, part)
        self.register_buffer("texts", texts.to(towers.device))

    def forward(self, pixels: Float[Tensor, "example 3 size size"]) -> SimpleNamespace:
        """Return the logits, (example, 1, word)."""
        rows = cast(Any, self.towers.model).get_image_features(pixel_values=pixels)
        rows = rows if isinstance(rows, Tensor) else rows.pooler_output
        cosine = nn.functional.normalize(rows.float(), dim=1) @ cast(Tensor, self.texts).T
        return SimpleNamespace(logits=(cosine * (self.towers.scale or 1.0))[:, None])


def load_towers(config: ModelConfig, *, progress: Progress = silent) -> Towers:
    """Load a pair of towers, onto the GPU where there is one, and try what it needs.

    Args:
        config: Which, and the dtype.
        progress: Called while weights are hashed.

    Raises:
        FileNotFoundError: If the named file does not exist.
        ModelError: If it cannot be read, or has not both towers, or they do not fit each other.
    """
    directory, identity = files_of(config, progress)
    rule = f"tower {config.path} must be a readable model of transformers with towers for texts "
    with Refusing(f"{rule}and images", _ADVICE), quiet():
        names = AutoConfig.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
        kind = model_class_of(names)
        if not all(hasattr(kind, f"get_{side}_features") for side in ("text", "image")):
            raise ModelError(
                f"tower {config.path} must have a tower for texts beside that for images, got "
                f"{kind.__name__}; {_ADVICE}"
            )
        tokenizer = _tokenizer(directory)
        model = read_model(directory, config, kind)
        settings = read_settings(directory)
        if torch.cuda.is_available():
            nn.Module.to(model, "cuda")  # the model's own `to` has no usable type
        size = int(names.vision_config.image_size)
        preprocessing = resolve(_sized(settings, size), settings)
        tried = _tried(config.path, model, tokenizer, preprocessing)
    identity |= {"model": kind.__name__, "dtype": config.dtype}
    return Towers(config.path, model, tokenizer, preprocessing, identity=identity, **tried)


def _tokenizer(directory: Path) -> Tokenizer:
    """The fast one, also where the files name SigLIP's own class, which needs SentencePiece.

    Where that is installed, the class needs its file as well, and some releases say TypeError.
    """
    try:
        return read_tokenizer(directory)
    except (ImportError, TypeError):
        if not (directory / "tokenizer.json").is_file():
            raise
        return Tokenizer.from_pretrained(directory, local_files_only=True)


def _sized(settings: ImagePreprocessing, size: int) -> ImagePreprocessing:
    """The tower's own size, which its positions are made for, where its files name another."""
    return ImagePreprocessing(size=size, crop=settings.crop)


def _tried(
    name: str, model: PreTrainedModel, tokenizer: Tokenizer, preprocessing: Preprocessing
) -> dict[str, Any]:
    """Context, padding, width and scale of the embeddings, each as the model at hand has it."""

    def wrong(rule: str, got: object) -> ModelError:
        return ModelError(f"tower {name} must {rule}, got {got}; {_ADVICE}")

    if tokenizer.pad_token_id is None:
        raise wrong("have a tokenizer with a token for padding", "none")
    context = int(model.config.text_config.max_position_embeddings)
    known = int(model.config.text_config.vocab_size)
    ids: list[list[int]] = tokenizer(list(PROBES))["input_ids"]
    largest = max(len(tokenizer) - 1, *(max(row, default=0) for row in ids))
    if largest >= known:
        raise wrong(f"have a tokenizer of at most {known} tokens", largest + 1)
    ids = [row[:1] + row[1:][-(context - 1) :] for row in ids]  # its end is what is pooled
    with torch.no_grad():
        full = _of_texts(model, _padded(tokenizer, ids, context))
        alone = torch.cat([_of_texts(model, _padded(tokenizer, [row], None)) for row in ids])
        side = preprocessing.size
        images = _of_images(model, torch.zeros(1, 3, side, side))
    if full.shape[1] != images.shape[1]:
        rule = "give texts and images embeddings of one width"
        raise wrong(rule, f"{full.shape[1]} and {images.shape[1]}")
    if not bool(torch.cat([full, images]).isfinite().all()):
        raise wrong("give finite embeddings", "nan or inf")
    if float((full[0] - full[1]).norm()) < EQUAL:
        rule = "give different texts different embeddings"
        raise wrong(rule, f"one for {PROBES[0]!r} and {PROBES[1]!r}: its end token is not found")
    scale = getattr(model, "logit_scale", None)
    scale = None if scale is None else math.exp(float(scale))
    is_same = float((full - alone).norm(dim=1).max()) < EQUAL
    return {
        "context": context,
        "padding": "longest" if is_same else "max_length",
        "width": full.shape[1],
        "scale": scale,
    }


def _padded(
    tokenizer: Tokenizer, ids: Sequence[Sequence[int]], width: int | None
) -> dict[str, Int[Tensor, "word pos"]]:
    """What the tokenizer says its model takes: ids on the left, padding on the right."""
    width = width or max(map(len, ids))
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int), pad
    inputs = {"input_ids": torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids])}
    if "attention_mask" in tokenizer.model_input_names:
        length = torch.tensor([len(row) for row in ids])
        inputs["attention_mask"] = (torch.arange(width) < length[:, None]).long()
    return inputs


def _of_texts(
    model: PreTrainedModel, inputs: Mapping[str, Int[Tensor, "word pos"]]
) -> Float32[Tensor, "word d_model"]:
    device = next(model.parameters()).device
    given = {name: values.to(device) for name, values in inputs.items()}
    return _unit(cast(Any, model).get_text_features(**given))


def _of_images(
    model: PreTrainedModel, pixels: Float[Tensor, "example 3 size size"]
) -> Float32[Tensor, "example d_model"]:
    weight = next(model.parameters())
    return _unit(cast(Any, model).get_image_features(pixel_values=pixels.to(weight)))


def _unit(features: Any) -> Float32[Tensor, "batch d_model"]:
    rows = features if isinstance(features, Tensor) else features.pooler_output
    return nn.functional.normalize(rows.float(), dim=1).cpu()


def _kept(key: Mapping[str, Any], make: Callable[[], Tensor]) -> Float32[Tensor, "batch d_model"]:
    """What was made under the same key before, if its file is whole; else it is made and kept."""
    file = cache_directory() / "embeddings" / f"{_digest(key)}.safetensors"
    try:
        with safe_open(file, "pt") as stored:
            rows, crc = stored.get_tensor("rows"), (stored.metadata() or {}).get("crc32c")
        if crc == io.crc32c(rows.numpy()):
            return rows
    except (OSError, SafetensorError):
        pass
    rows = make().contiguous()
    metadata = {"crc32c": io.crc32c(rows.numpy())}
    io.write_files({file: save({"rows": rows}, metadata)})
    return rows


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_concepts(path: str, field: str = "text") -> list[str]:
    """Words or captions of a file, each once: a line of a .txt each, or a field of records.

    Args:
        path: A .txt file, .jsonl or .parquet or .arrow (or these + .gz).
        field: Of a record.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or has fewer than two concepts.
    """
    texts: Iterable[str]
    if path.endswith((".txt", ".txt.gz")):
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"concepts must be an existing file, got {path}")
        try:
            data = file.read_bytes()
            data = gzip.decompress(data) if path.endswith(".gz") else data
            texts = data.decode("utf-8-sig").splitlines()
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise MonosemaError(f"{path} must be text in UTF-8, got {one_line(error)}") from error
    else:
        texts = (document.text for document in documents(TextSource(path=path, field=field)))
    names = list(dict.fromkeys(name for text in texts if (name := " ".join(text.split()))))
    if len(names) < 2:
        raise MonosemaError(
            f"concepts must be at least two to be told apart, got {len(names)} in {path}; add some"
        )
    return names
