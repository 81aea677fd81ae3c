import logging
from pathlib import Path

import numpy as np
import pytest

import sae
from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.pretrained import DictionaryFormatError, hub, load_with_source
from sae.pretrained.loading import FORMATS

D, F = 7, 23
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sparsify(path, make, peer):
    shapes = {"encoder.weight": (F, D), "encoder.bias": F, "W_dec": (F, D), "b_dec": D}
    peer.write(path / "cfg.json", {"d_in": D, "k": 3, "num_latents": F})
    peer.tensors(path / "sae.safetensors", make(**shapes))
    return path


def test_two_readings_are_not_guessed_between(tmp_path, make, peer):
    sparsify(tmp_path, make, peer)
    peer.tensors(tmp_path / "params.safetensors", make(b=3))
    with pytest.raises(DictionaryFormatError, match=r"got 2: \['gemma_scope', 'sparsify'\]"):
        sae.load(tmp_path)
    assert sae.load(tmp_path, format="sparsify").config.d_sae == F


def test_a_format_must_be_a_known_one(tmp_path, make, peer):
    with pytest.raises(DictionaryFormatError, match=r"format must be one of.*got 'other'"):
        sae.load(sparsify(tmp_path, make, peer), format="other")


def test_nothing_that_is_known(tmp_path):
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(DictionaryFormatError, match=r"got \['weights.safetensors'\]; name the"):
        sae.load(tmp_path)
    for where in (tmp_path / "absent", str(tmp_path / "absent"), "not a name", "../up", "one"):
        with pytest.raises(FileNotFoundError, match="a dictionary must be at"):
            sae.load(where)


def test_what_is_loaded_is_saved_and_read_back_as_our_own(tmp_path, make, peer, rows, agree):
    loaded = load_with_source(sparsify(tmp_path / "a", make, peer))
    sae.save(loaded.dictionary, tmp_path / "b")
    again = load_with_source(tmp_path / "b")
    assert again.source.source_format == "monosema"
    assert again.dictionary.config == loaded.dictionary.config
    read = {"config.json", "sae.safetensors", "provenance.json"}
    assert again.source.source_sha256.keys() == read
    loaded_state, state = loaded.dictionary.state_dict(), again.dictionary.state_dict()
    assert all(bool((state[name] == loaded_state[name]).all()) for name in state)


def test_each_format_is_known_by_its_module_s_name():
    named = {name for name in FORMATS if FORMATS[name].__name__ == f"sae.pretrained.{name}"}
    assert FORMATS.keys() - named == {"monosema"}


def test_a_repository_of_the_hub(fake_hub, make, peer, caplog):
    root, asked = fake_hub.root, fake_hub.asked
    sparsify(root / "layers.3", make, peer)
    with caplog.at_level(logging.WARNING):
        loaded = load_with_source("org/name/layers.3")
    assert loaded.source.source_path == f"org/name/layers.3@{COMMIT}"
    assert "names no commit" in caplog.text
    repo, revision, patterns = asked[0]
    assert (repo, revision) == ("org/name", None)
    assert "layers.3/sae.safetensors" in patterns
    assert not any("*" in pattern or pattern.endswith(".pt") for pattern in patterns)
    caplog.clear()
    sae.load(f"org/name/layers.3@{COMMIT}", allow_pt=True)
    assert not caplog.text
    assert asked[1][1] == COMMIT
    assert "layers.3/ae.pt" in asked[1][2]


def test_a_file_of_the_hub(fake_hub, make, peer):
    root, asked = fake_hub.root, fake_hub.asked
    peer.pt(root / "a" / "model.pth", make(b=3))
    with pytest.raises(DictionaryFormatError, match="pass allow_pt=True"):
        sae.load("org/name/a/model.pth@main")
    repo, revision, patterns = asked[0]
    assert (repo, revision, patterns[:2]) == ("org/name", "main", ["a/model.pth", "a/config.json"])
    assert not any("*" in pattern for pattern in patterns)


def test_a_commit_that_gives_other_files_than_before_is_refused(
    fake_hub, make, peer, monkeypatch, figure
):
    """A commit never changes; each folder of it is a dictionary of its own."""
    for folder in ("a", "b"):
        sparsify(fake_hub.root / folder, make, peer)
        sae.load(f"org/name/{folder}@{COMMIT}")
        sae.load(f"org/name/{folder}@{COMMIT}")
    weights = fake_hub.root / "a" / "sae.safetensors"
    before = weights.read_bytes()
    sparsify(fake_hub.root / "a", make, peer)  # other numbers
    said = r"a/sae\.safetensors must be what it was when .*, sha256 [0-9a-f]{64}, got [0-9a-f]{64};"
    for load in (sae.load, load_with_source):
        with pytest.raises(DictionaryFormatError, match=said):
            load(f"org/name/a@{COMMIT}")
    after = weights.read_bytes()
    weights.write_bytes(before)
    assert sae.load(f"org/name/a@{COMMIT}").config.d_sae == F
    weights.write_bytes(after)
    monkeypatch.setenv("MONOSEMA_CACHE", str(fake_hub.root / "another user"))
    assert sae.load(f"org/name/a@{COMMIT}").config.d_sae == F
    figure("S9", "files of a commit that changed after the first load: refused with both SHA-256")


def test_the_hub_s_refusals_are_one_line(fake_hub, monkeypatch):
    with pytest.raises(DictionaryFormatError, match="must hold the files of a dictionary"):
        sae.load("org/name/absent@main")

    def refuse(repo, **_):
        raise OSError("no\nconnection")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(DictionaryFormatError, match="can be fetched, got no connection"):
        sae.load("org/name@main")


@pytest.mark.parametrize(
    "name",
    ["org/../name", "org/name/../../x", "/org/name", "org/name\\x", "org//name", "org/n@", ""],
)
def test_names_that_are_no_names(name, fake_hub):
    with pytest.raises(FileNotFoundError):
        hub.parsed(name)
    assert not fake_hub.asked


def test_a_path_is_never_taken_for_a_repository(fake_hub):
    with pytest.raises(FileNotFoundError, match="got nothing there"):
        sae.load(Path("org/name"))
    assert not fake_hub.asked


def test_the_weights_can_be_trained_on(tmp_path):
    sae.save(SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, activation=ReLU())), tmp_path)
    assert all(p.requires_grad for p in sae.load(tmp_path).parameters())


def read_so_far() -> int:
    """Bytes that this process allocated for tensors' data at most, by the counter of the kernel."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def test_one_latent_is_read_without_the_others(tmp_path, peer):
    d, f = 256, 32768
    given = {
        "W_enc": np.zeros((d, f), np.float32), "W_dec": np.zeros((f, d), np.float32),
        "b_enc": np.zeros(f, np.float32), "b_dec": np.zeros(d, np.float32),
    }  # fmt: skip
    given["W_dec"][4099], given["W_enc"][:, 4099] = 3, 5
    record = {"architecture": "standard", "d_in": d, "d_sae": f, "apply_b_dec_to_input": True}
    record |= {"normalize_activations": "none", "metadata": {"sae_lens_version": "6.18.0"}}
    peer.write(tmp_path / "cfg.json", record)
    peer.tensors(tmp_path / "sae_weights.safetensors", given)
    del given
    sae.load(tmp_path, latents=7)
    before = read_so_far()
    one = sae.load(tmp_path, latents=4099)
    assert read_so_far() - before < 4 << 20  # the weights have 64 MiB
    assert (one.W_dec == 3).all()
    assert (one.W_enc == 5).all()
    assert one.W_dec.shape == (1, d)


@pytest.mark.parametrize("latents", [F, -1, slice(9, 3), slice(F, None), slice(None, None, -1)])
def test_latents_that_are_not_there(tmp_path, make, peer, latents):
    with pytest.raises(
        DictionaryFormatError, match="latents must select ascending ones of 0 to 22"
    ):
        sae.load(sparsify(tmp_path, make, peer), latents=latents)


@pytest.mark.parametrize("latents", [0, F - 1, slice(3), slice(-4, None), slice(1, 20, 3)])
def test_latents_of_every_kind_of_choice(tmp_path, make, peer, latents):
    path = sparsify(tmp_path, make, peer)
    rows = range(F)[latents]
    rows = [rows] if isinstance(rows, int) else list(rows)
    whole, part = sae.load(path), sae.load(path, latents=latents)
    for name in ("enc_rows", "dec_rows", "b_enc"):
        assert (getattr(part, name) == getattr(whole, name)[rows]).all()
    assert (part.b_dec == whole.b_dec).all()
    assert part.config.activation.k == min(3, len(rows))
