"""One flipped bit in any file that is read back: refused by name, or mended to what it was.

Caches have their own test (test_cache_damage.py), and every bit of a checkpoint is flipped in
tests/sae/train/test_checkpoint.py. Files that people edit (run.yaml) and pictures do not count.
"""

import json
import random
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import sae
from activations_cache import seals
from activations_cache.checks import MonosemaError
from sae.browser.server import BrowserServer
from sae.config import load_overrides
from sae.evaluate.report import plain, read_json
from sae.explain.collect import read_windows
from sae.explain.config import ExplainConfig
from sae.explain.llm.chat import Response
from sae.explain.llm.store import AnswerCache
from sae.explain.tables import iter_examples, read_examples, read_latents, read_summary
from sae.metrics import Firing
from sae.run.browsing import read_explained
from sae.run.config import RunConfig
from tests.tiny import cache_record

N_FLIPS = {"short": 200, "long": 1000}
REPLY = Response("a label", "stop", 12, 3)


def config_of(output: Path, model: Path, text: Path) -> RunConfig:
    entry = {"d_sae": 41, "activation": {"kind": "topk", "k": 5}, "dead_after_tokens": 500}
    record = {
        "output": str(output),
        "cache": cache_record(model, text, 2003) | {"rows_per_shard": 1009},
        "train": {"batch": 127, "epochs": 2, "precision": "fp32", "saes": {"topk": entry}},
        "evaluate": {"n_contexts": 6, "n_contexts_special": 2},
        "explain": {"min_firings": 5, "min_examples": 2},
    }
    return load_overrides(RunConfig, [], record)


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_model_dir, tiny_text) -> Path:
    """A run up to its labels, the dictionary's own labels with rules and map, and its browser."""
    path = tmp_path_factory.mktemp("rot") / "run"
    sae.run.job(config_of(path, tiny_model_dir, tiny_text), "explain")
    topk = path / "train" / "topk"
    config = ExplainConfig(min_firings=5, min_examples=2)
    sae.run.explain(topk, path / "cache", config)
    sae.run.browse(topk)
    answers = AnswerCache(path / "llm.sqlite")
    answers.put("a" * 64, "what?", REPLY)
    answers.close()
    return path


def tensors(path: Path) -> dict[str, list]:
    return {name: t.tolist() for name, t in sae.load(path).state_dict().items()}


def firing(path: Path) -> tuple:
    stats = Firing.read(path)
    return stats.n_rows, stats.n_fired.tolist(), stats.max_activation.tolist()


def served(folder: Path, name: str) -> bytes:
    with BrowserServer(folder) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        try:
            with urllib.request.urlopen(f"{server.url}{name}", timeout=30) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise MonosemaError(error.read().decode()) from error
        finally:
            thread.join()


def answered(path: Path) -> Response | None:
    answers = AnswerCache(path)
    try:
        return answers.get("a" * 64)
    finally:
        answers.close()


@dataclass(frozen=True)
class Watched:
    """A file, and what reads it back."""

    file: str
    read: Callable[[Path], object]
    mended: bool = False
    """Whether nothing, or the right thing, may be read instead of a refusal."""


TOPK, LABELS, FOLDER = "train/topk", "train/topk/explain", "train/topk/browse"
FILES = [
    Watched(f"{TOPK}/sae.safetensors", lambda run: tensors(run / TOPK)),
    Watched(f"{TOPK}/config.json", lambda run: (tensors(run / TOPK), sae.load(run / TOPK).config)),
    Watched(f"{TOPK}/provenance.json", lambda run: tensors(run / TOPK)),
    Watched(f"{TOPK}/files.json", lambda run: tensors(run / TOPK)),
    Watched(f"{TOPK}/stats.safetensors", lambda run: firing(run / TOPK)),
    Watched("evaluate/report.json", lambda run: plain(read_json(run / "evaluate/report.json"))),
    Watched("evaluate/files.json", lambda run: plain(read_json(run / "evaluate/report.json"))),
    Watched(
        f"{LABELS}/latents.parquet", lambda run: read_latents(run / LABELS / "latents.parquet")
    ),
    Watched(
        f"{LABELS}/examples.parquet", lambda run: read_examples(run / LABELS / "examples.parquet")
    ),
    Watched(
        f"{LABELS}/examples.parquet",
        lambda run: list(iter_examples(run / LABELS / "examples.parquet")),
    ),
    Watched(f"{LABELS}/summary.json", lambda run: read_summary(run / LABELS / "summary.json")),
    Watched(f"{LABELS}/rules.jsonl", lambda run: read_explained(run / LABELS)),
    Watched(f"{LABELS}/windows.parquet", lambda run: list(read_windows(run / LABELS, [3]))),
    Watched(f"{LABELS}/activity.parquet", lambda run: list(read_windows(run / LABELS, [3]))),
    Watched(f"{FOLDER}/index.html", lambda run: served(run / FOLDER, "")),
    Watched(f"{FOLDER}/data/index.js", lambda run: served(run / FOLDER, "data/index.js")),
    Watched(f"{FOLDER}/data/d0/map.js", lambda run: served(run / FOLDER, "data/d0/map.js")),
    Watched("llm.sqlite", lambda run: answered(run / "llm.sqlite"), mended=True),
]


def flip(watched: Watched, run: Path, n: int, made: random.Random) -> dict[str, int]:
    """Flip n bits, one at a time; what came of it, by kind."""
    file, outcome = run / watched.file, {"refused": 0, "mended": 0, "wrong": 0}
    data, good = file.read_bytes(), watched.read(run)
    for _ in range(n):
        bit = made.randrange(8 * len(data))
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            result = watched.read(run)
        except MonosemaError as error:
            outcome["refused" if file.name in str(error) else "wrong"] += 1
        else:
            outcome["mended" if watched.mended and result in (good, None) else "wrong"] += 1
        finally:
            file.write_bytes(data)
    assert watched.read(run) == good
    return outcome


@pytest.mark.parametrize(
    "form", ["short", pytest.param("long", marks=[pytest.mark.long, pytest.mark.timeout(3000)])]
)
def test_a_flipped_bit_is_refused_by_name_or_mended(done, form, figure):
    made, n = random.Random(form), -(-N_FLIPS[form] // len(FILES))
    results = {
        f"{i} {watched.file}": flip(watched, done, n, made) for i, watched in enumerate(FILES)
    }
    wrong = {name: outcome for name, outcome in results.items() if outcome["wrong"]}
    assert not wrong
    total = sum(o["refused"] + o["mended"] for o in results.values())
    assert total >= N_FLIPS[form]
    figure("R5", f"{total:,} flipped bits in results: {total:,} refused by name, or mended")


RESULTS = [
    "cache/manifest.json", "train/topk/sae.safetensors", "train/topk/config.json",
    "train/topk/provenance.json", "train/topk/files.json", "train/topk/stats.safetensors",
    "evaluate/report.json", "evaluate/files.json", "evaluate/done.json",
    "explain/topk/latents.parquet", "explain/topk/summary.json", "train/done.json",
]  # fmt: skip


@pytest.mark.parametrize("damage", ["flip", "empty", "gone"])
@pytest.mark.parametrize(
    "at_once", [True, pytest.param(False, marks=[pytest.mark.long, pytest.mark.timeout(3000)])]
)
def test_the_same_command_makes_damaged_results_again(
    done, damage, at_once, tmp_path, tiny_model_dir, tiny_text
):
    made, config = random.Random(damage), config_of(tmp_path / "run", tiny_model_dir, tiny_text)
    shutil.copytree(done, tmp_path / "run")
    before = read_everything(tmp_path / "run")
    for name in RESULTS:
        file = tmp_path / "run" / name
        data = bytearray(file.read_bytes())
        if damage == "gone":
            file.unlink()
        else:
            data[made.randrange(len(data))] ^= 1 << made.randrange(8)
            file.write_bytes(data if damage == "flip" else b"")
        if at_once and name != RESULTS[-1]:
            continue
        sae.run.job(config, "explain")
        assert read_everything(tmp_path / "run") == before, name


def read_everything(run: Path) -> list[object]:
    return [
        tensors(run / TOPK), firing(run / TOPK), plain(read_json(run / "evaluate/report.json")),
        read_latents(run / "explain/topk/latents.parquet"),
        json.loads(seals.read(run / "explain/topk/summary.json")),
    ]  # fmt: skip


def test_a_flipped_bit_in_a_dictionary_without_a_list_is_found_by_its_hash(done, tmp_path):
    shutil.copytree(done / TOPK, tmp_path / "old", ignore=shutil.ignore_patterns("files.json"))
    file, made = tmp_path / "old" / "sae.safetensors", random.Random(0)
    data = file.read_bytes()
    for _ in range(40):
        changed = bytearray(data)
        changed[made.randrange(len(data))] ^= 1 << made.randrange(8)
        file.write_bytes(changed)
        with pytest.raises(MonosemaError, match=r"sae\.safetensors"):
            sae.load(tmp_path / "old")
    file.write_bytes(data)
    assert torch.equal(sae.load(tmp_path / "old").W_dec, sae.load(done / TOPK).W_dec)
