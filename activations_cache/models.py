"""Models and their tokenizers, from a directory, a GGUF file, a package or the hub.

Nothing of a model is executed and nothing is unpickled: classes come from transformers, weights
from safetensors or GGUF.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from activations_cache import conversion
from activations_cache.checks import PACKAGE, MonosemaError, Progress, locate, silent
from activations_cache.config import ModelConfig
from activations_cache.hooks import blocks_of
from activations_cache.loading import ModelError, Refusing, one_line, quiet, widen_products

_HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*model*.safetensors"]
_SINGLE = ("model.safetensors", "open_clip_model.safetensors")
_CHUNK = 1 << 26
_SAFELY: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
_VOLATILE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be read: in evaluation mode, without gradients for its weights."""

    model: PreTrainedModel
    """The model, of the class that its configuration names."""
    tokenizer: Tokenizer
    """Its fast tokenizer."""
    identity: dict[str, str]
    """What the activations depend on, as hashes; the same wherever the files lie."""
    provenance: dict[str, str] = field(default_factory=dict)
    """The path that was asked for, and the commit where it is a hub id; never compared."""

    @property
    def mask_token(self) -> int | None:
        """What hides a token that a masked model shall tell; None in a tokenizer without it."""
        result = self.tokenizer.mask_token_id
        assert result is None or isinstance(result, int), result
        return result


def load_model(config: ModelConfig, *, progress: Progress | None = None) -> LoadedModel:
    """Load the model and the tokenizer that a configuration names.

    A GGUF file is converted at its first use (`activations_cache.conversion`).

    Args:
        config: Which model, what its weights must hash to, and the dtype.
        progress: Called while weights are hashed and converted.

    Raises:
        FileNotFoundError: If the named file or package does not exist.
        ModelError: If it cannot be read, lacks weights, or has another hash.
    """
    progress = progress or silent
    directory, identity = files_of(config, progress)
    rule = f"model {config.path} must be readable by transformers {transformers.__version__}"
    with Refusing(rule, "check its files"), quiet():
        names = AutoConfig.from_pretrained(directory, **_SAFELY)
        if not hasattr(names.get_text_config(), "vocab_size"):
            rule = f"model {config.path} must be a language model"
            raise ModelError(f"{rule}, got {names.model_type}, which has no vocabulary")
        tokenizer = read_tokenizer(directory)
        spread = {"device_map": "auto"} if config.devices == "all" else {}
        model = read_model(directory, config, model_class_of(names), **spread)
    if config.compile:
        compile_blocks(model)
        identity["compiled"] = "blocks"
    identity["model"] = type(model).__name__
    identity["tokenizer_sha256"] = tokenizer_sha256(tokenizer)
    identity["dtype"] = config.dtype
    return LoadedModel(model, tokenizer, identity, provenance_of(config, directory))


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward of each block.

    Block by block, so that hooks run between them and the forward can still stop at a hook point.
    """
    for block in blocks_of(model)[1]:
        block.forward = torch.compile(block.forward)


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Return a hash of everything that decides which ids a text gets.

    It is taken over the tokenizer as it runs, not over its files: a change of the library that
    alters the ids alters the hash.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    del parts["truncation"], parts["padding"]  # set by calls, not by the model
    return _digest_of_json(parts)


def files_of(config: ModelConfig, progress: Progress) -> tuple[Path, dict[str, str]]:
    """Return the directory that holds a model, and the hashes of what it was made from."""
    if config.path.endswith((".gguf", ".onnx")):
        path = locate(config.path)
        digest = _weights_sha256(config, [path], progress)
        read = None if config.path.endswith(".gguf") else conversion.read_dinov2
        directory = conversion.converted(path, digest, read=read, progress=progress)
        return directory, {"model_sha256": digest}
    is_local = config.path.startswith(PACKAGE) or Path(config.path).is_dir()
    directory = locate(config.path) if is_local else _download(config)
    files = _weight_files(config.path, directory)
    return directory, {
        "model_sha256": _weights_sha256(config, files, progress),
        "config_sha256": _config_sha256(config.path, directory),
    }


def stream_width(config: ModelConfig, *, of_images: bool = False) -> int:
    """Return the width of a model's stream, from its config; no weights are read.

    Raises:
        ModelError: If no config says it.
    """
    is_hub = not (config.path.startswith(PACKAGE) or Path(config.path).exists())
    source = config.path if is_hub else files_of(config, silent)[0]
    rule = f"model {config.path} must have a config.json that names its width"
    with Refusing(rule, "build the cache first"), quiet():
        options = {**_SAFELY, "local_files_only": not is_hub, "revision": config.revision}
        names = AutoConfig.from_pretrained(source, **options)
        tower = getattr(names, "vision_config", names) if of_images else names.get_text_config()
        return int(tower.hidden_size)


def _download(config: ModelConfig) -> Path:
    """Return the hub's files in its local cache; the hub's client shows its own bar."""
    try:
        result = snapshot_download(
            config.path,
            revision=config.revision,
            allow_patterns=_HUB_FILES,
            ignore_patterns=["*/*"],
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model path {config.path} must be a directory, a *.gguf file, {PACKAGE}PACKAGE/FILE "
            f"or a hub id that can be fetched, got {one_line(error)}"
        ) from error
    return Path(result)


def _weight_files(path: str, directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    single = [file for name in _SINGLE if (file := directory / name).exists()]
    if single:
        files = single[:1]
    elif index.exists():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        files = [directory / name for name in sorted(names)]
    else:
        names = sorted(entry.name for entry in directory.iterdir())[:5]
        raise ModelError(
            f"model {path} must have model.safetensors or its index, got {', '.join(names)}; "
            "a model in pickle files must be saved again by save_pretrained"
        )
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ModelError(f"model {path} must have every file of its index, got no {missing[0]}")
    return files


def _config_sha256(path: str, directory: Path) -> str:
    names = ("config.json", "open_clip_config.json")
    file = next((f for name in names if (f := directory / name).is_file()), directory / names[0])
    try:
        entries = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise ModelError(
            f"model {path} must have a readable config.json, got {one_line(error)}"
        ) from error
    return _digest_of_json({key: entries[key] for key in entries if key not in _VOLATILE})


def read_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer of a model.

    Raises:
        ModelError: If it is not a fast one; what transformers raises for damaged files besides.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory, **_SAFELY)
    if not isinstance(tokenizer, Tokenizer):
        raise ModelError(f"the tokenizer must be a fast one, got {type(tokenizer).__name__}")
    return tokenizer


def read_model(
    directory: Path, config: ModelConfig, model_class: type[PreTrainedModel], **options: Any
) -> PreTrainedModel:
    """Read a model of a class of transformers, in evaluation mode.

    Raises:
        ModelError: If weights are missing; what transformers raises for damaged files besides.
    """
    model, report = model_class.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        directory,
        dtype=getattr(torch, config.dtype),
        use_safetensors=True,
        output_loading_info=True,
        local_files_only=True,
        **options,
    )
    if report["missing_keys"]:
        raise ModelError(
            f"model {config.path} must have all weights of {model_class.__name__}, "
            f"got none for {min(report['missing_keys'])}"
        )
    widen_products(model)
    return model.eval().requires_grad_(False)


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers that a model's configuration names.

    Raises:
        ModelError: If it names none.
    """
    names = config.architectures or ["none"]
    result = getattr(transformers, names[0], None)
    if not (isinstance(result, type) and issubclass(result, PreTrainedModel)):
        raise ModelError(
            f"architectures in config.json must name a model class of transformers "
            f"{transformers.__version__}, got {names[0]}"
        )
    return result


def provenance_of(config: ModelConfig, directory: Path) -> dict[str, str]:
    """Return the path that was asked for, and the commit where it is a hub id."""
    provenance = {"path": config.path}
    if directory.parent.name == "snapshots":  # the hub's cache names a folder by the commit
        provenance["revision"] = directory.name
    return provenance


def _digest_of_json(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _weights_sha256(config: ModelConfig, paths: list[Path], progress: Progress) -> str:
    """Hash the files as if they were one, and compare with what the configuration expects."""
    total = sum(path.stat().st_size for path in paths)
    digest, done = hashlib.sha256(), 0
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                progress(done >> 20, total >> 20, "MB hashed")
    result = digest.hexdigest()
    if config.sha256 not in {None, result}:
        raise ModelError(
            f"model {config.path} must have sha256 {config.sha256}, got {result}; "
            "fetch the right file or change model.sha256"
        )
    return result


def n_embeddings(loaded: LoadedModel) -> int:
    """Return how many token ids a model has an embedding for."""
    embeddings = loaded.model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor), type(embeddings)
    return embeddings.shape[0]


_POSITIONS = ("position_embeddings", "embed_positions", "wpe")


def require_positions(context: int, loaded: LoadedModel) -> None:
    """Refuse a context that is longer than what the model can read.

    Raises:
        ValueError: If it is.
    """
    text = loaded.model.config.get_text_config()
    most = [getattr(text, "max_position_embeddings", None)]
    for name, module in loaded.model.named_modules():
        if name.rpartition(".")[2] in _POSITIONS and isinstance(module, nn.Embedding):
            # The first positions of some stand for padding: those of RoBERTa, or of OPT.
            padding = -1 if module.padding_idx is None else module.padding_idx
            most.append(module.num_embeddings - getattr(module, "offset", padding + 1))
    least = min((n for n in most if isinstance(n, int) and n > 0), default=context)
    if context > least:
        raise MonosemaError(
            f"text.context must be at most {least}, the positions of the model, got {context}"
        )
