"""A GGUF is converted once, whole or not at all, and damaged files cost one line."""

import hashlib
import importlib.util
import json
import multiprocessing
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from activations_cache import conversion as conversion
from activations_cache.checks import MissingPackageError
from activations_cache.config import ModelConfig
from activations_cache.loading import ModelError
from activations_cache.models import load_model


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=307,
        hidden_size=22,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=11,
        num_key_value_heads=11,
        max_position_embeddings=67,
        initializer_range=0.3,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def gguf_path(
    tmp_path_factory: pytest.TempPathFactory,
    llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """The random Llama as a GGUF in float32, with the tiny tokenizer inside."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    write_settings(writer, llama.config)
    write_tokenizer(writer, tiny_tokenizer)
    for name, weight in llama.model.state_dict().items():
        writer.add_tensor(gguf_name(name), gguf_weight(name, weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_settings(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].get))
    writer.add_token_types([3] + [1] * (len(model["vocab"]) - 1))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def gguf_name(name: str) -> str:
    for ours, theirs in (
        ("embed_tokens", "token_embd"),
        ("layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ):
        name = name.replace(ours, theirs)
    return "output_norm.weight" if name == "norm.weight" else name


def gguf_weight(name: str, weight: torch.Tensor) -> np.ndarray:
    """llama.cpp interleaves the two halves of each head's rotary dimensions."""
    if "q_proj" in name or "k_proj" in name:
        weight = weight.view(11, 2, 1, 22).transpose(1, 2).reshape(22, 22)
    return weight.numpy()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MONOSEMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_converted_model_has_the_weights_and_tokens_of_the_file(
    cache, gguf_path, llama, tiny_tokenizer
):
    loaded = load_model(ModelConfig(path=str(gguf_path), sha256=sha256(gguf_path)))
    expected = {name: w.bfloat16() for name, w in llama.state_dict().items()}
    result = loaded.model.state_dict()
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert loaded.model.config.rms_norm_eps == pytest.approx(1e-5)
    text = "Aeio bund, lo tis \n\n Emug?"
    assert loaded.tokenizer(text).input_ids == tiny_tokenizer(text).input_ids
    assert loaded.identity["model_sha256"] == sha256(gguf_path)


def test_conversion_is_done_once(cache, gguf_path, monkeypatch):
    config, steps = ModelConfig(path=str(gguf_path)), []
    report = lambda done, total, unit: steps.append((done, total, unit))  # noqa: E731
    first = load_model(config, progress=report)
    assert (3, 3, "conversion steps") in steps
    monkeypatch.setattr(conversion, "_convert", lambda *_: pytest.fail("converted again"))
    second = load_model(config)
    assert first.identity == second.identity
    names = sorted(path.name for path in (cache / "models").iterdir())
    assert names == [sha256(gguf_path)]


def test_an_interrupted_conversion_leaves_nothing_and_is_made_again(cache, gguf_path, monkeypatch):
    digest = sha256(gguf_path)
    write_files = conversion.io.write_files

    def killed(files: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion.io, "write_files", killed)
    with pytest.raises(KeyboardInterrupt):
        conversion.converted(gguf_path, digest)
    assert not (cache / "models" / digest).exists()
    (cache / "models" / f"{digest}.partial" / "junk").write_text("from before")
    monkeypatch.setattr(conversion.io, "write_files", write_files)
    target = conversion.converted(gguf_path, digest)
    assert conversion.is_complete(target)
    assert not (target / "junk").exists()
    assert not target.with_name(f"{digest}.partial").exists()


@pytest.mark.parametrize("damage", ["flip", "delete", "no manifest", "broken manifest"])
def test_a_damaged_conversion_is_made_again(cache, gguf_path, damage):
    digest = sha256(gguf_path)
    target = conversion.converted(gguf_path, digest)
    weights = target / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "delete":
        weights.unlink()
    elif damage == "broken manifest":
        (target / "manifest.json").write_text('{"files": {')
    else:
        (target / "manifest.json").unlink()
    assert not conversion.is_complete(target)
    assert conversion.converted(gguf_path, digest) == target
    assert weights.read_bytes() == whole


def test_two_processes_do_not_collide(cache, gguf_path):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        result = pool.starmap(conversion.converted, [(gguf_path, sha256(gguf_path))] * 2)
    assert result == [cache / "models" / sha256(gguf_path)] * 2
    assert conversion.is_complete(result[0])
    assert [path.name for path in (cache / "models").iterdir()] == [sha256(gguf_path)]


def test_another_hash_is_refused_with_both(cache, gguf_path):
    with pytest.raises(ModelError, match=f"must have sha256 {'0' * 64}, got {sha256(gguf_path)}"):
        load_model(ModelConfig(path=str(gguf_path), sha256="0" * 64))
    assert not cache.exists()


def test_a_file_that_is_no_gguf_is_refused(cache, tmp_path):
    path = tmp_path / "wrong.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ModelError, match=r"must be a whole GGUF file, got the first bytes b'PK"):
        load_model(ModelConfig(path=str(path)))
    path.write_bytes(b"")
    with pytest.raises(ModelError, match=r"must be a whole GGUF file, got the first bytes b''"):
        load_model(ModelConfig(path=str(path)))


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_refused_in_one_line(cache, gguf_path, tmp_path, share):
    whole = gguf_path.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match=r"must be a whole GGUF file, got .*fetch the") as error:
        load_model(ModelConfig(path=str(path)))
    assert "\n" not in str(error.value)
    assert not list((cache / "models").iterdir())


def test_a_missing_file_or_package_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf must exist"):
        load_model(ModelConfig(path=str(tmp_path / "none.gguf")))
    with pytest.raises(FileNotFoundError, match=r"no package absent_model; run `pip install"):
        load_model(ModelConfig(path="package://absent_model/a.gguf"))
    with pytest.raises(FileNotFoundError, match=r"file of the package json, got no a\.gguf"):
        load_model(ModelConfig(path="package://json/a.gguf"))


def test_missing_packages_are_named(cache, gguf_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name)
    )
    with pytest.raises(
        MissingPackageError,
        match=r"package accelerate, got none; run `pip install 'monosema\[demo\]'`",
    ):
        conversion.converted(gguf_path, sha256(gguf_path))


def test_the_cache_directory_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.delenv("MONOSEMA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert conversion.cache_directory() == Path("/home/user/.cache/monosema")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert conversion.cache_directory() == Path("/xdg/monosema")
    monkeypatch.setenv("MONOSEMA_CACHE", "/own")
    assert conversion.cache_directory() == Path("/own")


def test_loading_is_silent(cache, gguf_path, capfd, caplog):
    load_model(ModelConfig(path=str(gguf_path)))
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.name.startswith("transformers")]


def test_flipped_bytes_load_or_cost_one_line(cache, gguf_path, tmp_path):
    """Flips in the description of the file; those in the weights are what `sha256` is for."""
    whole, generator = gguf_path.read_bytes(), random.Random(0)
    path, messages = tmp_path / "flipped.gguf", []
    for _ in range(97):
        damaged = bytearray(whole)
        for _ in range(generator.choice([1, 7])):
            damaged[generator.randrange(4, 9000)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            load_model(ModelConfig(path=str(path)))
        except ModelError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert not any("\n" in message for message in messages)
