import numpy as np
import pytest

import sae
from sae.architecture import JumpReLU, ReLU, TopK
from sae.pretrained import DictionaryFormatError, load_with_source

D, F, K, POINTS = 7, 23, 4, 5
pytestmark = pytest.mark.usefixtures("pickles_here")
WEIGHT, BIAS = "encoder.final_block.0.weight", "encoder.final_block.0.bias"
BATCH_NORM = "encoder.final_block.1."


def arrays(make, **more):
    given = make(**{"dictionary._weights": (F, D), WEIGHT: (F, D), BIAS: F})
    return given | {"dictionary.multiplier": np.array(0.3, np.float32)} | more


def put(peer, path, given, **settings):
    peer.write(path / "overcomplete.json", {"class": "SAE", "normalization": "l2"} | settings)
    peer.pt(path / "sae.pt", given)
    return path


NORMS = {
    "l2": lambda w: w / (np.linalg.norm(w, axis=1, keepdims=True) + 1e-8),
    "max_l2": lambda w: w / np.linalg.norm(w, axis=1).max(),
    "l1": lambda w: w / (np.abs(w).sum(1, keepdims=True) + 1e-8),
    "max_l1": lambda w: w / np.abs(w).sum(1).max(),
    "identity": lambda w: w,
}


def reference(peer, given, x, kind="SAE", norm="l2", dictionary=None):
    wide = {name: array.astype(np.float64) for name, array in given.items()}
    if dictionary is None:
        dictionary = NORMS[norm](wide["dictionary._weights"])
    dictionary = dictionary * np.exp(wide["dictionary.multiplier"])
    h = x @ wide.get(WEIGHT, dictionary).T + wide.get(BIAS, 0)
    if f"{BATCH_NORM}weight" in wide:
        w = {n[len(BATCH_NORM) :]: a for n, a in wide.items() if n.startswith(BATCH_NORM)}
        h = (h - w["running_mean"]) / np.sqrt(w["running_var"] + 1e-5) * w["weight"] + w["bias"]
    acts = peer.top_k(h, K) if kind == "TopKSAE" else peer.relu(h)
    if kind == "JumpSAE":
        acts = peer.relu(h) * (peer.relu(h) >= np.exp(wide["thresholds"]))
    return acts, acts @ dictionary


@pytest.mark.parametrize("norm", NORMS)
def test_each_normalisation(tmp_path, make, peer, rows, agree, norm):
    given = arrays(make)
    path = put(peer, tmp_path, given, normalization=norm)
    x = rows(D)
    loaded = load_with_source(path, allow_pt=True)
    assert loaded.source.source_format == "overcomplete"
    agree(loaded.dictionary, x, *reference(peer, given, x, norm=norm))
    other = "l2" if norm != "l2" else "l1"
    with pytest.raises(AssertionError, match="is off"):
        agree(loaded.dictionary, x, *reference(peer, given, x, norm=other))


@pytest.mark.parametrize(
    ("kind", "form"), [("SAE", ReLU()), ("TopKSAE", TopK(k=K)), ("JumpSAE", JumpReLU())]
)
def test_each_class(tmp_path, make, peer, rows, agree, kind, form):
    given = arrays(make) | (make(thresholds=F) if kind == "JumpSAE" else {})
    path = put(peer, tmp_path, given, **{"class": kind, "top_k": K})
    dictionary = sae.load(path, allow_pt=True)
    assert dictionary.config.activation == form
    x = rows(D)
    agree(dictionary, x, *reference(peer, given, x, kind))


def test_a_threshold_itself_fires(tmp_path, make, peer):
    given = arrays(make, thresholds=np.zeros(F, np.float32))
    given[WEIGHT][:], given[BIAS][:] = 0, 1
    dictionary = sae.load(put(peer, tmp_path, given, **{"class": "JumpSAE"}), allow_pt=True)
    import torch

    assert (dictionary.encode_dense(torch.zeros(2, D)) == 1).all()


def test_a_batch_norm_is_folded_as_in_evaluation(tmp_path, make, peer, rows, agree):
    given = arrays(make)
    norm = make(weight=F, bias=F, running_mean=F, running_var=F)
    norm["running_var"] = np.abs(norm["running_var"])
    given |= {f"{BATCH_NORM}{name}": array for name, array in norm.items()}
    given[f"{BATCH_NORM}num_batches_tracked"] = np.array(9)
    loaded = load_with_source(put(peer, tmp_path, given), allow_pt=True)
    assert any("batch normalisation" in fold for fold in loaded.source.folds_applied)
    x = rows(D)
    agree(loaded.dictionary, x, *reference(peer, given, x))
    for name in ("running_mean", "bias"):
        wrong = given | {f"{BATCH_NORM}{name}": np.zeros(F, np.float32)}
        with pytest.raises(AssertionError, match="is off"):
            agree(loaded.dictionary, x, *reference(peer, wrong, x))


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_tieable_encoder(tmp_path, make, peer, rows, agree, is_tied):
    given = arrays(make)
    weight = given.pop(WEIGHT)
    del given[BIAS]
    tied = {f"encoder.tied_to.{n}": given[f"dictionary.{n}"] for n in ("_weights", "multiplier")}
    stored = given | (tied if is_tied else {"encoder.weight": weight})
    dictionary = sae.load(put(peer, tmp_path, stored), allow_pt=True)
    assert not dictionary.b_enc.any()
    x = rows(D)
    agree(dictionary, x, *reference(peer, given | ({} if is_tied else {WEIGHT: weight}), x))


def test_an_archetypal_dictionary(tmp_path, make, peer, rows, agree):
    given = arrays(make)
    del given["dictionary._weights"]
    parts = make(W=(F, POINTS), C=(POINTS, D), Relax=(F, D))
    stored = given | {f"dictionary.{name}": array for name, array in parts.items()}
    path = put(peer, tmp_path, stored, **{"class": "RATopKSAE", "top_k": K, "delta": 0.7})
    w = peer.wide(parts)
    mixed = peer.relu(w.W) / (peer.relu(w.W).sum(1, keepdims=True) + 1e-8)
    limit = np.minimum(1, 0.7 / np.linalg.norm(w.Relax, axis=1, keepdims=True))
    x = rows(D)
    dictionary = sae.load(path, allow_pt=True)
    agree(
        dictionary,
        x,
        *reference(peer, given, x, "TopKSAE", dictionary=mixed @ w.C + w.Relax * limit),
    )
    wrong = reference(peer, given, x, "TopKSAE", dictionary=mixed @ w.C + w.Relax)
    with pytest.raises(AssertionError, match="is off"):
        agree(dictionary, x, *wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class": "BatchTopKSAE"}, "its threshold is not saved"),
        ({"class": "MpSAE"}, "its encoder is a loop"),
        ({"class": "QSAE"}, "its latents are quantised"),
        ({"class": "Other"}, "class must be one of"),
        ({"class": "TopKSAE"}, "must have the key 'top_k'"),
        ({"normalization": None}, "must have the key 'normalization'"),
        ({"class": "RATopKSAE", "delta": 1}, "must hold dictionary.W"),
    ],
)
def test_settings_that_are_refused(tmp_path, make, peer, settings, message):
    with pytest.raises(DictionaryFormatError, match=message):
        sae.load(put(peer, tmp_path, arrays(make), **settings), allow_pt=True)


def test_files_that_are_refused(tmp_path, make, peer):
    for more, message in [
        ({"encoder.mlp_blocks.0.0.weight": np.zeros((F, D), np.float32)}, "with hidden layers"),
        ({"extra": np.zeros(3, np.float32)}, r"unknown \['extra'\]"),
        ({f"{BATCH_NORM}weight": np.zeros(F, np.float32)}, "unknown"),
        ({BIAS: np.zeros(3, np.float32)}, "must have one shape"),
    ]:
        path = put(peer, tmp_path, arrays(make, **more))
        with pytest.raises(DictionaryFormatError, match=message):
            sae.load(path, allow_pt=True)
    (tmp_path / "overcomplete.json").unlink()
    with pytest.raises(DictionaryFormatError, match=r"must hold overcomplete\.json with what the"):
        sae.load(tmp_path / "sae.pt", allow_pt=True)


def test_tied_matrices_have_two_names_in_a_file(tmp_path, make, peer, rows, agree):
    """torch writes what is shared once, so the file is smaller than its tensors."""
    import torch

    given = {name: torch.from_numpy(array) for name, array in arrays(make).items()}
    given = {name: given[name] for name in ("dictionary._weights", "dictionary.multiplier")}
    tied = {f"encoder.tied_to.{n}": given[f"dictionary.{n}"] for n in ("_weights", "multiplier")}
    peer.write(tmp_path / "overcomplete.json", {"class": "SAE", "normalization": "l2"})
    torch.save(given | tied, tmp_path / "sae.pt")
    plain = {name: tensor.numpy() for name, tensor in given.items()}
    x, dictionary = rows(D), sae.load(tmp_path, allow_pt=True)
    assert dictionary.config.activation == ReLU()
    agree(dictionary, x, *reference(peer, plain, x))
