"""Names of public dictionaries, without a network; the long form holds them against the wheel."""

import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import sae
from benchmarks import catalogue as maker
from sae.pretrained import DictionaryFormatError, catalogue, hub, load_with_source
from sae.pretrained.loading import FORMATS

GEMMA = "gemma-scope-2b-pt-res-canonical"
ID = "layer_20/width_16k/canonical"
PINNED = ("6.54.12", 170, 13_857)
"""SAELens' version, its releases and its dictionaries, as the wheel has them."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"
D, F = 7, 16


def test_the_catalogue_has_every_name_of_the_pinned_list():
    names = [entry.name for entry in catalogue.every()]
    lines = gzip.decompress(catalogue.DATA.read_bytes()).splitlines()[1:]
    entries = [json.loads(line) for line in lines]
    from_list = {entry["name"] for entry in entries if entry["source"] == "sae-lens"}
    n = sum(catalogue.releases()[name] for name in from_list)
    assert (catalogue.sources()["sae-lens"]["version"], len(from_list), n) == PINNED
    assert len(names) == len(set(names)) == sum(catalogue.releases().values())
    assert catalogue.DATA.stat().st_size < 300_000


KNOWN = {
    f"{GEMMA}:{ID}": (
        "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", "gemma_scope",
        "google/gemma-2-2b", "blocks.20.hook_resid_post", "model.layers.20:out", 16_384, 71,
    ),
    "gemma-scope-9b-it-res:layer_9/width_131k/average_l0_121": (
        "google/gemma-scope-9b-it-res", "layer_9/width_131k/average_l0_121", "gemma_scope",
        "google/gemma-2-9b-it", "blocks.9.hook_resid_post", "model.layers.9:out", 131_072, 121,
    ),
    "gemma-scope-2b-pt-att-canonical:layer_3/width_65k/canonical": (
        "google/gemma-scope-2b-pt-att", "layer_3/width_65k/average_l0_83", "gemma_scope",
        "google/gemma-2-2b", "blocks.3.attn.hook_z", "model.layers.3.self_attn.o_proj:in", 65_536,
        83,
    ),
    "gemma-scope-2-4b-it-res:layer_17_width_16k_l0_big": (
        "google/gemma-scope-2-4b-it", "resid_post/layer_17_width_16k_l0_big", "gemma_scope",
        "google/gemma-3-4b-it", "blocks.17.hook_resid_post",
        "model.language_model.layers.17:out", 16_384, 150,
    ),
    "gemma-scope-2-1b-pt-transcoders-all:layer_5_width_16k_l0_small_affine": (
        "google/gemma-scope-2-1b-pt", "transcoder_all/layer_5_width_16k_l0_small_affine",
        "gemma_scope", "google/gemma-3-1b-pt", "blocks.5.hook_mlp_in",
        "model.layers.5.pre_feedforward_layernorm:out", 16_384, 15,
    ),
    "gpt2-small-res-jb:blocks.11.hook_resid_post": (
        "jbloom/GPT2-Small-SAEs-Reformatted", "blocks.11.hook_resid_post", "saelens",
        "openai-community/gpt2", "blocks.11.hook_resid_post", "transformer.h.11:out", 0, 70,
    ),
    "gpt2-small-mlp-tm:blocks.11.hook_mlp_out": (
        "tommmcgrath/gpt2-small-mlp-out-saes", "sae_group_gpt2_blocks.11.hook_mlp_out_24576:v2",
        "saelens", "openai-community/gpt2", "blocks.11.hook_mlp_out", "transformer.h.11.mlp:out",
        24_576, 170,
    ),
    "llama_scope_lxa_8x:l31a_8x": (
        "fnlp/Llama3_1-8B-Base-LXA-8x", "Llama3_1-8B-Base-L31A-8x", "llama_scope",
        "meta-llama/Llama-3.1-8B", "blocks.31.hook_attn_out", "model.layers.31.self_attn:out",
        32_768, 50,
    ),
    "mntss-gemma-2-2b-2.5m-clt-as-per-layer:layer_25": (
        "mntss/clt-gemma-2-2b-2.5M", "W_enc_25.safetensors", "circuit_tracer",
        "google/gemma-2-2b", "", "", 0, 0,
    ),
    "qwen-scope-3-8b-base-w64k-l100:layer35": (
        "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_100", "layer35.sae.pt", "qwen_scope",
        "Qwen/Qwen3-8B-Base", "blocks.35.hook_resid_post", "model.layers.35:out", 65_536, 100,
    ),
    "mwhanna-qwen3-4b-transcoders:layer_7": (
        "mwhanna/qwen3-4b-transcoders", "layer_7.safetensors", "circuit_tracer", "Qwen/Qwen3-4B",
        "blocks.7.mlp.hook_in", "model.layers.7.mlp:in", 0, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_a_name_is_a_repository_a_path_and_a_hook_point(name):
    entry = catalogue.named(name)
    assert entry is not None
    assert KNOWN[name] == (
        entry.repo, entry.path, entry.format, entry.model, entry.hook_name, entry.hook_point,
        entry.width, entry.l0,
    )  # fmt: skip
    assert catalogue.named(*name.split(":")) == entry


def test_every_entry_has_a_reader_or_says_that_it_has_none():
    without = {entry.release for entry in catalogue.every() if not entry.format}
    assert without == {
        "gpt2-small-hook-z-kk", "temporal-sae-gemma-2-2b", "temporal-sae-llama-3.1-8b",
        "deepseek-r1-distill-llama-8b-qresearch",
    }  # fmt: skip
    assert {e.format for e in catalogue.every()} - {""} <= FORMATS.keys()
    with pytest.raises(DictionaryFormatError, match="of a format that is read here"):
        sae.load("temporal-sae-gemma-2-2b")


def test_a_look_up_takes_no_time():
    code = (
        "import time; from sae.pretrained import catalogue\n"
        "began = time.process_time()\n"
        f"assert catalogue.named({GEMMA!r}, {ID!r}).width == 16384\n"
        "print(time.process_time() - began)\n"
        "import sys; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.05


def test_a_search_finds_by_model_layer_and_width():
    entries = catalogue.search(["gemma-2-2b", "layer_20", "16k", "resid"])
    assert f"{GEMMA}:{ID}" in {entry.name for entry in entries}
    assert {(e.layer, e.width) for e in entries} == {(20, 16_384)}
    assert {e.layer for e in catalogue.search(["gpt2", "l8"])} == {8}
    assert {e.width for e in catalogue.search(["width=98304"])} == {98_304}
    assert {e.width for e in catalogue.search(["llama", "131k"])} == {131_072}
    with pytest.raises(DictionaryFormatError, match="of a like name: gemma-scope-2b-pt-res"):
        catalogue.table(["gema-scope-2b-pt-res"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (GEMMA, f"one of the 58 of {GEMMA}, got none; type for example {GEMMA}:layer_0/"),
        (f"{GEMMA}:layer_20/width_16k/cannonical", f"type for example {GEMMA}:{ID}"),
        (f"{GEMMA}:20", "got '20'; type for example"),
        ("gema-scope-2b-pt-res-canonical", f"like name: {GEMMA}"),
        (f"gema-scope-2b-pt-res-canonical:{ID}", f"like name: {GEMMA}"),
        ("blocks.8.hook_resid_pre", "as an id: gpt2-small-res-jb:blocks.8.hook_resid_pre, "),
        ("one", "or RELEASE:ID"),
    ],
)
def test_a_near_miss_is_one_line_with_what_to_type(name, message):
    with pytest.raises((DictionaryFormatError, FileNotFoundError)) as error:
        sae.load(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_right_gets_no_suggestions(monkeypatch):
    def offline(repo, revision, allow_patterns):
        raise OSError("no way\nto the hub")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(DictionaryFormatError, match=r"got no way to the hub$"):
        sae.load(f"{GEMMA}:{ID}")
    with pytest.raises(DictionaryFormatError, match="as an id: gemma-scope-2b-pt-att-canon"):
        sae.load(ID)


def test_an_id_is_given_once():
    with pytest.raises(DictionaryFormatError, match="id must be given once"):
        sae.load(f"{GEMMA}:{ID}", id=ID)


def gemma_scope(folder: Path, make) -> None:
    folder.mkdir(parents=True)
    shapes = {"W_enc": (D, 16_384), "W_dec": (16_384, D), "b_enc": 16_384, "b_dec": D}
    np.savez(folder / "params.npz", **make(**shapes), threshold=np.full(16_384, 0.5, np.float32))


def test_a_release_is_loaded_by_its_name(fake_hub, make, caplog):
    gemma_scope(fake_hub.root / "layer_20/width_16k/average_l0_71", make)
    with caplog.at_level(logging.WARNING):
        loaded = load_with_source(GEMMA, id=ID)
    assert "names no commit" in caplog.text
    assert loaded.dictionary.config.inputs[0].hook_point == "model.layers.20:out"
    assert loaded.source.source_path == f"{GEMMA}:{ID}@{COMMIT}"
    site = loaded.source.site
    assert (site["model_name"], site["l0"]) == ("google/gemma-2-2b", "71")
    assert site["neuronpedia"].endswith("gemma-2-2b/20-gemmascope-res-16k")
    again = sae.load(loaded.source.source_path)
    assert again.config == loaded.dictionary.config
    repos = [repo for repo, _, _ in fake_hub.asked]
    assert repos == ["google/gemma-scope-2b-pt-res"] * 2
    assert [revision for _, revision, _ in fake_hub.asked] == [None, COMMIT]


def test_a_local_path_of_that_name_wins(fake_hub, make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gemma_scope(tmp_path / GEMMA / ID, make)
    assert sae.load(GEMMA, id=ID, format="gemma_scope").config.d_sae == 16_384
    assert not fake_hub.asked
    with pytest.raises(FileNotFoundError, match="id must be a folder in"):
        sae.load(GEMMA, id="layer_21")


def test_a_repository_takes_an_id_as_a_folder(fake_hub, make):
    gemma_scope(fake_hub.root / "layer_1/width_16k", make)
    assert sae.load("org/name", id="layer_1/width_16k").config.d_in == D
    assert fake_hub.asked[0][0] == "org/name"


def saelens(folder: Path, peer, make, **more) -> dict:
    cfg = {
        "d_in": D, "d_sae": F, "hook_point": "blocks.0.hook_mlp_out", "activation_fn": "relu",
        "normalize_activations": "expected_average_only_in", **more,
    }  # fmt: skip
    peer.write(folder / "cfg.json", cfg)
    given = make(W_enc=(D, F), W_dec=(F, D), b_enc=F, b_dec=D)
    peer.tensors(folder / "sae_weights.safetensors", given)
    return given


def test_a_factor_that_only_the_list_has_is_applied(fake_hub, peer, make, rows, agree):
    folder = fake_hub.root / "sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1"
    w = peer.wide(saelens(folder, peer, make))
    loaded = load_with_source("gpt2-small-mlp-tm:blocks.0.hook_mlp_out")
    x, scale = rows(D), 1.049317316132615
    # TransformerLens' stream has no mean over dimensions
    u = (x - x.mean(axis=1, keepdims=True)) * scale
    acts = peer.relu((u - w.b_dec) @ w.W_enc + w.b_enc)
    agree(loaded.dictionary, x, acts, (acts @ w.W_dec + w.b_dec) / scale)
    assert any("mean over dimensions" in fold for fold in loaded.source.folds_applied)
    with pytest.raises(DictionaryFormatError, match="must come with activation_scaler"):
        sae.load(folder)


def test_a_norm_that_the_files_have_wrong_is_the_list_s(fake_hub, peer, make):
    saelens(fake_hub.root / "mistral_7b_layer_8", peer, make, normalize_activations="none")
    name = "mistral-7b-res-wg:blocks.8.hook_resid_pre"
    assert sae.load(name).config.input_norm == "rms"
    assert sae.load(fake_hub.root / "mistral_7b_layer_8").config.input_norm == "none"


def test_a_pickled_release_is_refused_before_it_is_fetched(fake_hub):
    name = "qwen-scope-3-8b-base-w64k-l100:layer35"
    with pytest.raises(DictionaryFormatError, match=f"sae convert {name} TARGET --allow-pt"):
        sae.load(name)
    assert not fake_hub.asked


def refused(kind):
    response = SimpleNamespace(headers={}, request=None, status_code=403)
    return kind("403 Client Error\n\nno", response=response)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, "log in by `hf auth login`"),
        (RevisionNotFoundError, f"got {COMMIT}, which is not there or has moved"),
        (RepositoryNotFoundError, "which is not there or is private"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_what_to_type(monkeypatch, kind, message):
    def refuse(repo, revision, allow_patterns):
        raise refused(kind)

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(DictionaryFormatError) as error:
        sae.load(f"{GEMMA}:{ID}@{COMMIT}")
    assert message in str(error.value)
    assert "google/gemma-scope-2b-pt-res" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_catalogue_older_than_the_hub_and_a_download_that_was_cut_off(fake_hub):
    fake_hub.root.mkdir(parents=True)
    with pytest.raises(DictionaryFormatError, match="may be older than the repository: look"):
        sae.load(f"{GEMMA}:{ID}")
    folder = fake_hub.root / "layer_20/width_16k/average_l0_71"
    folder.mkdir(parents=True)
    (folder / "params.npz").symlink_to("../../../blobs/absent")
    with pytest.raises(DictionaryFormatError, match=r"unfinished download without params.npz; rem"):
        sae.load(f"{GEMMA}:{ID}")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """SAELens' wheel of the pinned version, by pip; nothing of it is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, f"sae-lens=={PINNED[0]}"], check=True)
    return next(folder.glob("*.whl"))


@pytest.mark.long
def test_the_file_is_what_the_wheel_gives_and_a_newer_wheel_tells_what_is_missing(wheel, tmp_path):
    assert maker.made(wheel, None) == catalogue.DATA.read_bytes()
    assert maker.missing_from(catalogue.DATA, wheel) == []
    lines = gzip.decompress(catalogue.DATA.read_bytes()).splitlines()
    short = [line for line in lines if b'"name":"gpt2-small-res_sce-ajt"' not in line]
    (tmp_path / "old.gz").write_bytes(gzip.compress(b"\n".join(short)))
    missing = maker.missing_from(tmp_path / "old.gz", wheel)
    assert missing == [f"gpt2-small-res_sce-ajt:blocks.{n}.hook_resid_pre" for n in (2, 6, 10)]


SAELENS = '''
import sys, json, types, importlib.abc, importlib.machinery
sys.path.insert(0, sys.argv[1])

class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for the packages that SAELens imports beside what its lists need."""
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("transformer_lens", "sae_lens"):
            if name not in ("sae_lens.loading", *WANTED):
                return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda key: type(key, (Exception,), {})
        return module
    def exec_module(self, module):
        pass

WANTED = ["sae_lens.loading.pretrained_sae_loaders", "sae_lens.loading.pretrained_saes_directory"]
home = sys.argv[1] + "/sae_lens"
package = types.ModuleType("sae_lens"); package.__path__ = [home]
loader = importlib.machinery.SourceFileLoader("sae_lens", home + "/__init__.py")
package.__spec__ = importlib.machinery.ModuleSpec("sae_lens", loader, is_package=True)
package.logger = None; sys.modules["sae_lens"] = package
sys.meta_path.insert(0, Absent())
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory as listed
loaders.get_safetensors_tensor_shapes = lambda *_: {"w_enc": (2, 3), "w_dec": (3, 2)}
def absent(*_, **__):
    raise loaders.EntryNotFoundError("no")
loaders.hf_hub_download = absent
OFFLINE = {"gemma_2", "gemma_2_transcoder", "gemma_3", "qwen_scope", "goodfire", "deepseek_r1"}
out = {}
for release, entry in listed().items():
    for id, path in entry.saes_map.items():
        hook = None
        if entry.conversion_func in OFFLINE:
            get = loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS[entry.conversion_func]
            cfg = get(entry.repo_id, path, "cpu", False, {})
            hook = [cfg["hook_name"], cfg.get("hook_name_out", ""), cfg["model_name"]]
        out[f"{release}:{id}"] = [entry.repo_id, path, hook]
print(json.dumps(out))
'''


@pytest.mark.long
def test_saelens_own_code_resolves_every_name_alike(wheel, tmp_path):
    import zipfile

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SAELENS, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    assert len(theirs) == PINNED[2]
    with_hooks = 0
    for name, (repo, path, hook) in theirs.items():
        entry = catalogue.named(name)
        assert entry is not None
        assert entry.repo == repo
        is_layer = entry.release.startswith("mntss-")  # their path is a number, its file is this
        assert entry.path == (f"W_enc_{path}.safetensors" if is_layer else path)
        if hook:
            assert hook[:2] == [entry.hook_name, entry.hook_name_out], name
            assert hook[2].rpartition("/")[2] == entry.model.rpartition("/")[2], name
            with_hooks += 1
    assert with_hooks > 11_000
