import io
import json

import numpy as np
import pytest
import torch

import sae
from sae.architecture import ReLU, TopK
from sae.pretrained import DictionaryFormatError, load_with_source

D, F, K = 7, 21, 4
SIZES = {"d_vit": D, "exp_factor": 3, "seed": 0, "normalize_w_dec": True}


def second(kind, **params):
    return {
        "schema": 2,
        "lib": "0.2",
        "cfg": SIZES | {"activation": {"cls": kind, "params": params}},
    }


def put(path, given, header):
    state = {name: torch.from_numpy(array.copy()) for name, array in given.items()}
    stream = io.BytesIO()
    torch.save(state, stream)
    line = header if isinstance(header, bytes) else json.dumps(header).encode() + b"\n"
    path.write_bytes(line + stream.getvalue())
    return path


def reference(peer, given, x, *, k=None, centred=False):
    w = peer.wide(given)
    h = (x - w.b_dec if centred else x) @ w.W_enc + w.b_enc
    acts = peer.top_k(h, k) if k else peer.relu(h)
    return acts, acts @ w.W_dec + w.b_dec


@pytest.fixture
def given(make, pickles_here):
    return make(W_enc=(D, F), W_dec=(F, D), b_enc=F, b_dec=D)


@pytest.mark.parametrize(
    ("header", "k"),
    [
        (second("Relu"), None),
        (second("TopK", top_k=K), K),
        (second("BatchTopK", top_k=K), K),
        ({"schema": 1, "cls": "Relu", "cfg": SIZES}, None),
        ({"schema": 1, "cls": "TopK", "cfg": SIZES | {"top_k": K}}, K),
        (second("TopK", top_k=K) | {"schema": 1, "cls": "SparseAutoencoderConfig"}, K),
    ],
)
def test_each_schema(tmp_path, given, peer, rows, agree, header, k):
    if k:
        given["b_enc"] += 9  # the k largest are positive, as in a trained dictionary
    path = put(tmp_path / "sae.pt", given, header)
    if k:
        with pytest.raises(DictionaryFormatError, match="must cut negative values at 0"):
            sae.load(path, allow_pt=True)
    loaded = load_with_source(path, format="saev" if k else None, allow_pt=True)
    assert loaded.dictionary.config.activation == (TopK(k=k) if k else ReLU())
    x = rows(D)
    agree(loaded.dictionary, x, *reference(peer, given, x, k=k))
    with pytest.raises(AssertionError, match="is off"):
        agree(loaded.dictionary, x, *reference(peer, given, x, k=k, centred=True))


def test_the_first_version_centred_rows_and_must_be_named(tmp_path, given, peer, rows, agree):
    path = put(tmp_path / "sae.pt", given, SIZES | {"sparsity_coeff": 4e-4, "ghost_grads": False})
    with pytest.raises(DictionaryFormatError, match="must say its schema, got none"):
        sae.load(path, allow_pt=True)
    x = rows(D)
    dictionary = sae.load(path, format="saev", allow_pt=True)
    agree(dictionary, x, *reference(peer, given, x, centred=True))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (second("Relu") | {"schema": 9}, "schema must be 1 or 2, got 9"),
        (second("Softmax"), "cls must be one of"),
        (second("TopK"), "must have the key 'top_k'"),
        (b'{"schema": 2', "must be readable JSON"),
        (b'{"schema": 2, "schema": 2}\n', "the key 'schema' stands twice"),
        (b"{" + b" " * (1 << 17), "must be readable JSON"),
        ({"schema": 2, "cfg": {"d_vit": D + 1, "exp_factor": 3} | second("Relu")["cfg"]
          | {"d_vit": D + 1}}, "must have shape"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, given, header, message):
    with pytest.raises(DictionaryFormatError, match=message):
        sae.load(put(tmp_path / "sae.pt", given, header), allow_pt=True)


def test_it_is_refused_unless_allowed(tmp_path, given):
    with pytest.raises(DictionaryFormatError, match="pass allow_pt=True"):
        sae.load(put(tmp_path / "sae.pt", given, second("Relu")))


def test_the_confined_process_reads_what_follows_the_line(tmp_path, make):
    given = make(W_enc=(D, F), W_dec=(F, D), b_enc=F, b_dec=D)
    dictionary = sae.load(put(tmp_path / "sae.pt", given, second("Relu")), allow_pt=True)
    assert np.array_equal(dictionary.W_dec.numpy(), given["W_dec"])
