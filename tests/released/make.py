"""Make the files that a commit writes, small enough to be committed: see README.md beside this.

PYTHONPATH=.:kernels OMP_NUM_THREADS=1 python tests/released/make.py DIRECTORY
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import activations_cache
import sae
from activations_cache import ActivationCache
from sae.config import load
from sae.explain import read_latents
from sae.run.config import RunConfig
from sae.train.fit import train
from sae.train.signals import Stopped
from tests.exact import numerics
from tests.tiny import sentences

COMMAND = (sys.executable, "-m", "sae.cli")
END, VOCAB, D_MODEL, D_SAE = "<|endoftext|>", 97, 8, 32
STOPPED_AT = 11
BULK = (
    "run/browse/assets",
    "run/explain/topk-frozen/*.parquet",
    "run/train/checkpoints",
    "run/train/curves.png",
    "run/train/logs/tensorboard",
)
N_ROWS = 17
"""Rows whose codes are recorded."""
HERE, BEFORE = "model.layers.1:out", "model.layers.0:out"
TOPK = {
    "d_sae": D_SAE,
    "inputs": [HERE],
    "activation": {"kind": "topk", "k": 3},
    "dead_after_tokens": 150,
}
RUN = {
    "output": "run",
    "title": "A small run",
    "cache": {
        "model": {"path": "model", "dtype": "float32"},
        "text": {
            "sources": [
                {"path": "chapters.txt", "document_pattern": "CHAPTER"},
                {"path": "glosses.jsonl", "field": "gloss", "label": "kind"},
            ],
            "context": 29,
            "explain": 0.5,
            "score": 0.3,
            "hold": 0.2,
        },
        "hook_points": [HERE, BEFORE],
        "n_rows": 301,
        "rows_per_shard": 199,
        "skip_positions": 1,
    },
    "train": {
        "batch": 31,
        "epochs": 3,
        "log_every": 5,
        "precision": "fp32",
        "saes": {"topk": TOPK, "topk-frozen": {**TOPK, "frozen": "decoder"}},
    },
    "evaluate": {"n_contexts": 5, "n_contexts_special": 2, "n_resamples": 50},
    "explain": {"min_firings": 5, "min_examples": 2, "min_word_count": 2},
    "steer": {"dictionary": "topk", "prompt": "", "max_new_tokens": 7, "n_candidates": 3},
}
KINDS = {
    "auxk": {**TOPK, "auxk": {"coefficient": 0.5}, "ema": 0.9},
    "default": {
        **TOPK,
        "activation": {"kind": "batchtopk", "k": 3},
        "matryoshka": {"kind": "fixed", "ends": [5, 11], "until": 0.6},
        "refine": {"steps": 1, "until": 0.7, "held_until": 0.85, "slack": 1.5},
        "auxk": {"coefficient": 0.5},
        "optimizer": {"lr": "auto", "decay": 0.5},
    },
    "jumprelu": {
        "d_sae": D_SAE,
        "inputs": [HERE],
        "activation": {"kind": "jumprelu"},
        "l0": {"coefficient": 0.1},
    },
    "l1": {
        "d_sae": D_SAE,
        "activation": {"kind": "relu"},
        "l1": {"coefficient": 0.3},
        "unit_norm": False,
        "inputs": [BEFORE, HERE],
    },
}
"""The dictionaries of the stopped training: what a checkpoint holds differs by kind."""


def main() -> None:
    """Write everything below the directory that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory.resolve()
    directory.mkdir(parents=True)
    os.chdir(directory)  # paths are part of an identity, so they are relative
    torch.set_num_threads(1)
    write_text()
    write_model()
    override = write_run()
    write_stopped()
    write_expected(override)
    for name, folder in (("cache", "run/cache"), ("run", "run"), ("stopped", "stopped")):
        with tarfile.open(f"{name}.tar.xz", "w:xz") as archive:
            archive.add(folder, filter=without_bulk)
        shutil.rmtree(folder)


def without_bulk(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out what is large and never read again once a run is done."""
    return None if any(Path(member.name).match(part) for part in BULK) else member


def write_text() -> None:
    """Made-up words, as plain text and as records."""
    lines = sentences(60, seed=3)
    chapters = [f"CHAPTER {i}\n" + "\n".join(lines[4 * i : 4 * i + 4]) for i in range(10)]
    Path("chapters.txt").write_text("\n".join(chapters) + "\n")
    kinds = itertools.cycle(("animal", "plant", "motion"))
    records = [{"gloss": text, "kind": kind} for text, kind in zip(lines[40:], kinds, strict=False)]
    Path("glosses.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_model() -> None:
    """A random Llama of two blocks beside its tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], show_progress=False)
    tokenizer.train(["chapters.txt", "glosses.jsonl"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.save_pretrained("model")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=11,
        num_hidden_layers=2,
        num_attention_heads=1,
        head_dim=4,
        initializer_range=0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained("model")


def write_run() -> str:
    """`sae run` with an override, as a user steers by a latent whose label is known."""
    prompt = sentences(1, seed=3)[0].partition(" ")[0]
    config = {**RUN, "steer": {**RUN["steer"], "prompt": prompt}}
    Path("run.yaml").write_text(json.dumps(config, indent=1) + "\n")  # JSON is YAML
    subprocess.run([*COMMAND, "explain", "run.yaml"], check=True)
    records = read_latents(Path("run/explain/topk/latents.parquet"))
    override = f"steer.latent={next(r.latent for r in records if r.status == 'scored')}"
    subprocess.run([*COMMAND, "run", "run.yaml", override], check=True)
    return override


def write_stopped() -> None:
    """A training of four kinds that SIGTERM stopped."""
    config = json.loads(Path("run.yaml").read_text())
    config |= {"output": "stopped", "cache_path": "run/cache"}
    config["train"]["saes"] = KINDS
    del config["steer"]
    Path("stopped.yaml").write_text(json.dumps(config, indent=1) + "\n")
    checked = load(RunConfig, "stopped.yaml")

    def stop(done: int, total: int, unit: str) -> None:
        if done == STOPPED_AT * checked.train.batch:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train(activations_cache.open("run/cache"), checked.train, "stopped/train", progress=stop)
    except Stopped:
        shutil.rmtree("stopped/train/logs")
    else:
        raise RuntimeError(f"the training must stop at step {STOPPED_AT}, got its end")


def write_expected(override: str) -> None:
    """What is asked of a later commit; the fixtures hold the rest."""
    command = [*COMMAND, "train", "stopped.yaml", "output=whole"]
    subprocess.run(command, check=True)
    weights = {n: Path("whole/train", n, "sae.safetensors").read_bytes() for n in KINDS}
    shutil.rmtree("whole")
    cache, dictionary = activations_cache.open("run/cache"), sae.load("run/train/topk")
    x = cache[HERE][:N_ROWS]
    with torch.no_grad():
        latents, x_hat = dictionary.encode(x), dictionary(x)
    expected = {
        "numerics": numerics(),
        "override": override,
        "fingerprint": cache.fingerprint,
        "acts_sha256": {n: acts_sha256(Path("run/cache"), n) for n in (HERE, BEFORE)},
        "rows_sha256": {
            n: sha256(cache[n][cache.rows()].numpy().tobytes()) for n in (HERE, BEFORE)
        },
        "weights_sha256": {name: sha256(data) for name, data in weights.items()},
        "indices": latents.indices.tolist(),
        "values": latents.values.numpy().tobytes().hex(),
        "x_hat": x_hat.numpy().tobytes().hex(),
    }
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def acts_sha256(cache: Path, hook_point: str) -> str:
    """Hash of the files that hold the rows of a hook point, in order of name."""
    files = sorted((cache / hook_point / "acts" / "c").rglob("0"))
    return sha256(b"".join(file.read_bytes() for file in files if file.is_file()))


def rows_sha256(cache: ActivationCache, hook_point: str) -> str:
    """Hash of the rows as the reader gives them."""
    return sha256(cache[hook_point][cache.rows()].numpy().tobytes())


def sha256(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    main()
