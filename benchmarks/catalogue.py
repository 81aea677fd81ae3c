"""Make sae/pretrained/releases.json.gz, the names of public dictionaries, without a network.

    pip download --no-deps sae-lens==6.54.12 -d build
    python -m benchmarks.catalogue build/sae_lens-6.54.12-py3-none-any.whl

SAELens carries a list of releases in its wheel; what its readers work out from a path (hook point,
width) is worked out here by rules. Other releases are those that their projects' documentation
names. With `--check` nothing is written: it prints what a newer wheel has that the file lacks.
"""

import argparse
import gzip
import hashlib
import json
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

TARGET = Path(__file__).parents[1] / "sae" / "pretrained" / "releases.json.gz"
LISTING = "sae_lens/pretrained_saes.yaml"

MODELS = {
    "gpt2-small": ("openai-community/gpt2", "gpt2"),
    "gemma-2b": ("google/gemma-2b", "gemma"),
    "gemma-2b-it": ("google/gemma-2b-it", "gemma"),
    "gemma-2-2b": ("google/gemma-2-2b", "gemma2"),
    "gemma-2-9b": ("google/gemma-2-9b", "gemma2"),
    "gemma-2-9b-it": ("google/gemma-2-9b-it", "gemma2"),
    "gemma-2-27b": ("google/gemma-2-27b", "gemma2"),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", "mistral"),
    "pythia-70m-deduped": ("EleutherAI/pythia-70m-deduped", "gpt_neox"),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", "qwen3"),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", "qwen3"),
    "qwen3-4b": ("Qwen/Qwen3-4B", "qwen3"),
    "qwen3-8b": ("Qwen/Qwen3-8B", "qwen3"),
    "qwen3-14b": ("Qwen/Qwen3-14B", "qwen3"),
    "openai/gpt-oss-20b": ("openai/gpt-oss-20b", "gpt_oss"),
    "Qwen/Qwen2.5-7B-Instruct": ("Qwen/Qwen2.5-7B-Instruct", "qwen2"),
    "Qwen/Qwen3-30B-A3B-Base": ("Qwen/Qwen3-30B-A3B-Base", "qwen3_moe"),
}
"""Names of TransformerLens -> the hub's id and the family; others are told by their words."""

FAMILY_OF = (
    (r"gemma-3-(270m|1b)", "gemma3_text"), (r"gemma-3-", "gemma3"), (r"[Ll]lama", "llama"),
    (r"Qwen3\.5", "qwen3_5"), (r"Qwen3-", "qwen3"),
)  # fmt: skip

FORMATS = {
    None: "saelens",
    "gemma_2": "gemma_scope",
    "gemma_3": "gemma_scope",
    "gemma_2_transcoder": "gemma_scope",
    "dictionary_learning_1": "dictionary_learning",
    "qwen_scope": "qwen_scope",
    "llama_scope": "llama_scope",
    "llama_scope_r1_distill": "llama_scope_r1",
    "mwhanna_transcoder": "circuit_tracer",
    "mntss_clt_layer_transcoder": "circuit_tracer",
    "goodfire": "goodfire",
    "deepseek_r1": "",
    "connor_rob_hook_z": "",
    "temporal": "",
}
"""SAELens' word -> our reader; empty where there is none."""

PLACES = (
    ("resid_post", "hook_resid_post"), ("attn_out", "attn.hook_z"), ("mlp_out", "hook_mlp_out"),
)  # fmt: skip
"""Folders of Gemma Scope 2."""
LAYER = re.compile(r"(?:^|[/_lL.])(?:layer_?)?(\d+)(?=[/_.RAMram-]|$)")
WIDTHS = (
    (re.compile(r"width_(\d+)([km])"), None),
    (re.compile(r"-2pow(\d+)"), lambda m: 1 << int(m[1])),
    (re.compile(r"[-_](?:w-?|W|v5[-_])(\d+)[kK]"), lambda m: int(m[1]) * 1024),
    (re.compile(r"[A-Z]-(8|32)x"), lambda m: int(m[1]) * 4096),
    (re.compile(r"_(\d{3,6})(?:_anthropic|:v\d)?$"), lambda m: int(m[1])),
)


def main() -> None:
    """Write the file, or say what it lacks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="sae_lens-VERSION-py3-none-any.whl")
    parser.add_argument("--prisma", type=Path, help="ViT-Prisma's docs/sae_table.md, if it is new")
    parser.add_argument("--check", action="store_true", help="only say what the file lacks")
    arguments = parser.parse_args()
    if arguments.check:
        missing = missing_from(TARGET, arguments.wheel)
        print("\n".join(missing) or "nothing is missing")
        return
    TARGET.write_bytes(made(arguments.wheel, arguments.prisma))
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


def made(wheel: Path, prisma: Path | None) -> bytes:
    """The file: a line of JSON about its sources, then one for each release."""
    releases = {**of_saelens(wheel), **documented(prisma)}
    version = wheel.name.split("-")[1]
    head = {
        "sources": {
            "sae-lens": {
                "version": version,
                "file": LISTING,
                "sha256": hashlib.sha256(listing(wheel)).hexdigest(),
                "licence": "MIT",
            },
            **DOCUMENTS,
        },
        "releases": {name: len(entry["rows"]) for name, entry in releases.items()},
        "families": {
            **{name: family for name, (_, family) in MODELS.items()},
            **{entry["model"]: entry["family"] for entry in releases.values() if entry["family"]},
        },
    }
    lines = [head, *({"name": name} | entry for name, entry in releases.items())]
    text = "\n".join(json.dumps(line, separators=(",", ":")) for line in lines)
    return gzip.compress(text.encode(), 9, mtime=0)


def listing(wheel: Path) -> bytes:
    """SAELens' list, as it stands in its wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(LISTING)


def missing_from(target: Path, wheel: Path) -> list[str]:
    """The `NAME:ID` that a wheel lists and the file does not."""
    known = set()
    for line in gzip.decompress(target.read_bytes()).splitlines()[1:]:
        entry = json.loads(line)
        known |= {f"{entry['name']}:{row[0]}" for row in entry["rows"]}
    listed = yaml.safe_load(listing(wheel))
    names = (f"{name}:{row['id']}" for name, entry in listed.items() for row in entry["saes"])
    return [name for name in names if name not in known]


def of_saelens(wheel: Path) -> dict[str, Any]:
    """Every release that SAELens lists."""
    listed = yaml.safe_load(listing(wheel))
    return {name: _release(entry) for name, entry in listed.items()}


def _release(entry: dict[str, Any]) -> dict[str, Any]:
    kind, repo = entry["conversion_func"], entry["repo_id"]
    model, family = MODELS.get(entry["model"], (entry["model"], ""))
    family = family or next(name for words, name in FAMILY_OF if re.search(words, model))
    release: dict[str, Any] = {
        "source": "sae-lens", "repo": repo, "format": FORMATS[kind], "model": model,
        "family": family,
    }  # fmt: skip
    if kind == "gemma_2":  # the list has the base model for a release of the instructed one
        size = repo.split("-scope-")[1].rpartition("-")[0].removesuffix("-pt")
        release["model"] = f"google/gemma-2-{size}"
    overrides = entry.get("config_overrides") or {}
    if norm := overrides.get("normalize_activations"):
        release["normalize_activations"] = norm
    if overrides.get("model_from_pretrained_kwargs", {}).get("center_writing_weights"):
        release["centred"] = True
    if "transcoder" in str(kind) or "transcoder" in str(entry["saes"][0]["path"]):
        release["hook_out"] = "hook_mlp_out"
    if kind == "gemma_3" and "hook_out" in release:
        release["reads"] = "pre_feedforward_layernorm:out"
    release["rows"] = [_row(row, kind, repo) for row in entry["saes"]]
    return release


def _row(row: dict[str, Any], kind: str | None, repo: str) -> list[Any]:
    """id, path, hook point, width, L0, Neuronpedia, FVU, input scale; without the last zeros."""
    name, path = row["id"], str(row["path"])
    if kind == "mntss_clt_layer_transcoder":
        path = f"W_enc_{path}.safetensors"
    in_path = re.search(r"average_l0_(\d+)", path)
    l0 = row.get("l0") or (int(in_path[1]) if in_path else 0)
    explained = row.get("variance_explained")
    fvu = round(1 - explained, 6) if explained is not None and 0 < explained < 1 else 0
    values = [
        name, 0 if path == name else path, hook_of(kind, repo, name, path),
        width_of(repo, name, path), l0, row.get("neuronpedia") or 0, fvu,
        row.get("norm_scaling_factor") or 0,
    ]  # fmt: skip
    while not values[-1]:
        values.pop()
    return values


def hook_of(kind: str | None, repo: str, name: str, path: str) -> str | int:
    """The hook point in TransformerLens' words, as SAELens has it; 0 where only files say it."""
    if stated := re.match(r"blocks\.\d+\.(hook_[a-z]+(_(pre|post|mid|out))?)", name):
        return stated[0].replace(".hook_z", ".attn.hook_z")
    if kind == "mntss_clt_layer_transcoder":
        return 0  # its config.yaml says it
    if kind == "gemma_2" and "embedding" in path:
        return "hook_embed"
    return f"blocks.{layer_of(path)}.{_place(kind, repo, path)}"


def _place(kind: str | None, repo: str, path: str) -> str:
    if kind == "gemma_2":
        sublayer = repo.rpartition("-")[2]
        return {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}[sublayer]
    if kind == "gemma_3":
        return next((place for word, place in PLACES if path.startswith(word)), "hook_mlp_in")
    if kind == "llama_scope":
        place = re.search(r"L\d+([RAM])-", path)
        assert place is not None, path
        return {"R": "hook_resid_post", "A": "hook_attn_out", "M": "hook_mlp_out"}[place[1]]
    fixed = {"gemma_2_transcoder": "ln2.hook_normalized", "mwhanna_transcoder": "mlp.hook_in"}
    return fixed.get(str(kind), "hook_resid_post")


def layer_of(path: str) -> int:
    """The layer that a path names."""
    stated = re.search(r"layer_?(\d+)", path) or re.search(r"[/-][Ll](\d+)[A-Z.]", path)
    assert stated is not None, path
    return int(stated[1])


def width_of(repo: str, name: str, path: str) -> int:
    """The number of latents where the listing tells it, else 0."""
    for text in (path, name, repo):
        for pattern, value in WIDTHS:
            if match := pattern.search(text):
                return value(match) if value else _binary(int(match[1]), match[2])
    return 0


def _binary(number: int, unit: str) -> int:
    """16k is 16,384 and 131k is 131,072: the power of two that is meant."""
    return 1 << round(math.log2(number * (1_000_000 if unit == "m" else 1000)))


DOCUMENTS = {
    "circuit-tracer": {
        "version": "aa5ff6a", "file": "README.md, Available Transcoders", "licence": "MIT",
    },
    "ViT-Prisma": {"version": "4bb8c0e", "file": "docs/sae_table.md", "licence": "MIT"},
    "saev": {"version": "3d73f1f", "file": "docs/src/users/inference.md", "licence": "MIT"},
    "Llama Scope": {
        "version": "arXiv 2410.20526", "file": "names of the repositories", "licence": "-",
    },
}  # fmt: skip
"""Whose documentation names the other releases. MSAE's says that none is published."""

LLAMA = "meta-llama/Llama-3.2-1B"
CIRCUITS = (
    ("mntss/clt-gemma-2-2b-426k", "google/gemma-2-2b", "gemma2", 26, "W_enc_{}.safetensors"),
    ("mntss/clt-llama-3.2-1b-524k", LLAMA, "llama", 16, "W_enc_{}.safetensors"),
    ("mntss/clt-131k", "openai/gpt-oss-20b", "gpt_oss", 24, "W_enc_{}.safetensors"),
    ("mntss/transcoder-Llama-3.2-1B", LLAMA, "llama", 16, "layer_{}.safetensors"),
)  # fmt: skip
SAEV = (
    ("clip-vit-b-16", "SAE_CLIP_24K_ViT-B-16_IN1K", "sae", "sae.pt"),
    ("dinov2-vit-b-14", "SAE_DINOv2_24K_ViT-B-14_IN1K", "sae", "sae.pt"),
    (
        "dinov3-vit-l-16",
        "SAE_DINOv3_ViT-L-16_IN1K",
        "layer_23/lnleoyf6",
        "layer_23/lnleoyf6/sae.pt",
    ),
)


def documented(prisma: Path | None) -> dict[str, Any]:
    """Releases that only their documentation names; ViT-Prisma's as they were without its table."""
    releases: dict[str, Any] = dict(_of_circuit_tracer())
    for wide, width in (("8x", 32768), ("32x", 131072)):
        rows = [[f"l{n}tc_{wide}", f"Llama3_1-8B-Base-L{n}TC-{wide}", 0, width] for n in range(32)]
        releases[f"llama_scope_lxtc_{wide}"] = {
            "source": "Llama Scope", "repo": f"fnlp/Llama3_1-8B-Base-LXTC-{wide}",
            "format": "llama_scope", "model": "meta-llama/Llama-3.1-8B", "family": "llama",
            "rows": rows,
        }  # fmt: skip
    for name, repo, row, path in SAEV:
        releases[f"saev-{name}"] = {
            "source": "saev", "repo": f"osunlp/{repo}", "format": "saev", "model": name,
            "family": "", "rows": [[row, path, 0, 24576 if "24K" in repo else 0]],
        }  # fmt: skip
    return releases | (_of_prisma(prisma) if prisma else _stored("ViT-Prisma"))


def _stored(source: str) -> dict[str, Any]:
    lines = gzip.decompress(TARGET.read_bytes()).splitlines()[1:]
    entries = (json.loads(line) for line in lines)
    return {entry.pop("name"): entry for entry in entries if entry["source"] == source}


def _of_prisma(table: Path) -> dict[str, Any]:
    """Each dictionary has a repository; the table's columns tell layer, place, L0 and variance."""
    releases: dict[str, Any] = {}
    model = part = ""
    columns: list[str] = []
    for line in table.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("# "):
            model = line[2:].partition(" Sparse")[0]
        elif line.startswith("## "):
            part = re.sub(r"[^a-z0-9]+", "-", line[3:].lower()).strip("-")
        elif cells[0] == "Model":
            columns = cells
        elif line.startswith("| [link]"):
            values = dict(zip(columns, cells, strict=True))
            name = f"vit-prisma-{model.lower()}-{part}"
            entry = releases.setdefault(name, {
                "source": "ViT-Prisma", "repo": "", "format": "vit_prisma", "model": model,
                "family": "", "rows": [],
            })  # fmt: skip
            entry["rows"].append(_prisma_row(values))
    return releases


def _prisma_row(values: dict[str, str]) -> list[Any]:
    address = values["Model"].partition("huggingface.co/")[2].rstrip(")")
    place, layer = values["Sublayer"], values["Layer"]
    fvu = round(1 - float(values["% Explained var."]) / 100, 6)
    l0 = float(values.get("Avg L0") or values["Avg CLS L0"])
    return [
        f"layer_{layer}/{place}", address, f"blocks.{layer}.hook_{place}", 768 * 64, l0, 0, fvu,
    ]  # fmt: skip


def _of_circuit_tracer() -> Iterator[tuple[str, Any]]:
    for repo, model, family, n, file in CIRCUITS:
        rows = [[f"layer_{i}", file.format(i)] for i in range(n)]
        yield repo.replace("/", "-"), {
            "source": "circuit-tracer", "repo": repo, "format": "circuit_tracer", "model": model,
            "family": family, "rows": rows,
        }  # fmt: skip


if __name__ == "__main__":
    main()
