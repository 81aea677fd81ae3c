import io
import zipfile

import numpy as np
import pytest

import sae
from sae.architecture import JumpReLU
from sae.pretrained import DictionaryFormatError, foreign, load_with_source

D, F, D_OUT = 7, 23, 11
CONFIG = {
    "architecture": "jump_relu",
    "width": F,
    "model_name": "gemma-v3-270m",
    "hf_hook_point_in": "model.layers.5.output",
    "hf_hook_point_out": "model.layers.5.output",
    "l0": 60,
    "type": "sae",
    "affine_connection": False,
}


def arrays(make, d_in=D, d_sae=F, d_out=D):
    return make(
        w_enc=(d_in, d_sae), w_dec=(d_sae, d_out), b_enc=d_sae, b_dec=d_out, threshold=d_sae
    )


def reference(peer, given, x):
    w = peer.wide(given)
    acts = peer.jump(x @ w.w_enc + w.b_enc, w.threshold)
    skip = x @ w.affine_skip_connection if "affine_skip_connection" in given else 0
    return acts, acts @ w.w_dec + w.b_dec + skip


def first(path, given, save=np.savez):
    path.mkdir(parents=True, exist_ok=True)
    save(path / "params.npz", **given)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("is_directory", [True, False])
def test_the_first_release(tmp_path, make, peer, rows, agree, save, is_directory):
    given = arrays(make)
    stored = {n.replace("w_", "W_"): a for n, a in given.items()}
    path = first(tmp_path, stored | {"scaling_factor": np.ones(F, np.float32)}, save)
    loaded = load_with_source(path if is_directory else path / "params.npz")
    assert loaded.source.folds_applied == (
        "scaling_factor of ones dropped",
        "thresholds below 0 raised to 0",
    )
    assert loaded.dictionary.config.activation == JumpReLU()
    x = rows(D)
    agree(loaded.dictionary, x, *reference(peer, given, x))


@pytest.mark.parametrize("is_affine", [True, False])
def test_the_second_release(tmp_path, make, peer, rows, agree, is_affine):
    given = arrays(make, d_out=D_OUT)
    if is_affine:
        given |= make(affine_skip_connection=(D, D_OUT))
    peer.write(tmp_path / "config.json", CONFIG | {"affine_connection": is_affine})
    peer.tensors(tmp_path / "params.safetensors", given)
    loaded = load_with_source(tmp_path)
    assert loaded.source.site["hf_hook_point_in"] == "model.layers.5.output"
    config = loaded.dictionary.config
    assert [s.hook_point for s in config.slices_in] == ["model.layers.5:out"]
    assert [s.hook_point for s in config.slices_out] == ["model.layers.5:out"]
    x = rows(D)
    agree(loaded.dictionary, x, *reference(peer, given, x))


def test_a_skip_is_applied_untransposed(tmp_path, make, peer, rows, agree):
    given = arrays(make) | make(affine_skip_connection=(D, D))
    peer.tensors(tmp_path / "params.safetensors", given)
    x = rows(D)
    agree(sae.load(tmp_path), x, *reference(peer, given, x))
    turned = given | {"affine_skip_connection": given["affine_skip_connection"].T}
    with pytest.raises(AssertionError, match="decode is off"):
        agree(sae.load(tmp_path), x, *reference(peer, turned, x))


def test_what_the_path_of_the_first_release_tells(tmp_path, make):
    path = tmp_path / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "average_l0_71"
    first(path, arrays(make, d_sae=16384))
    assert load_with_source(path).source.site == {
        "release": "gemma-scope-2b-pt-res", "layer": "3", "width": "16k", "average_l0": "71",
    }  # fmt: skip
    with pytest.raises(DictionaryFormatError, match="the width of the weights, 23, got 16k"):
        sae.load(first(path, arrays(make)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "relu"}, "architecture must be one of"),
        ({"width": F + 1}, "width must be 23"),
        ({"affine_connection": True}, "affine_connection must say whether"),
        ({"new": 1}, r"known keys, got \['new'\]"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, make, peer, changes, message):
    peer.write(tmp_path / "config.json", CONFIG | changes)
    peer.tensors(tmp_path / "params.safetensors", arrays(make))
    with pytest.raises(DictionaryFormatError, match=message):
        sae.load(tmp_path)


def test_an_orientation_that_shapes_do_not_show_must_be_named(tmp_path, make, peer, rows, agree):
    given = arrays(make, D, D, D)
    path = first(tmp_path, given)
    with pytest.raises(DictionaryFormatError, match="show its orientation by its shape"):
        sae.load(path)
    x = rows(D)
    agree(sae.load(path, format="gemma_scope"), x, *reference(peer, given, x))


def test_keys_and_shapes_that_do_not_fit(tmp_path, make):
    given = arrays(make)
    for changed, message in [
        (given | {"extra": given["b_dec"]}, r"unknown \['extra'\]"),
        ({n: a for n, a in given.items() if n != "threshold"}, r"missing \['threshold'\]"),
        (given | {"w_enc": given["w_enc"].T}, "w_enc must have shape"),
        (given | {"w_dec": given["w_dec"].T}, "w_dec must have shape"),
        (given | {"b_dec": given["b_dec"] * np.nan}, "b_dec must hold finite numbers"),
        (given | {"scaling_factor": given["b_enc"]}, "scaling_factor must be all ones"),
    ]:
        with pytest.raises(DictionaryFormatError, match=message):
            sae.load(first(tmp_path, changed))


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=array.dtype.hasobject)
    return stream.getvalue()


class Canary:
    def __reduce__(self):
        return open, ("canary", "w")


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path / "params.npz", "w", compression) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def test_pickled_arrays_are_not_read(tmp_path):
    bad = npy(np.array([Canary()], dtype=object))
    with pytest.raises(DictionaryFormatError, match="pickled objects are never read"):
        sae.load(archive(tmp_path, [("w_enc.npy", bad)]))
    assert not (tmp_path / "canary").exists()
    with pytest.raises(DictionaryFormatError, match="pickled objects are never read"):
        sae.load(archive(tmp_path, [("w_enc.npy", npy(np.array(["text"])))]))


def test_sizes_are_held_against_the_file(tmp_path):
    bomb = archive(tmp_path, [("w_enc.npy", bytes(40 << 20))], zipfile.ZIP_DEFLATED)
    assert (bomb / "params.npz").stat().st_size < 100_000
    with pytest.raises(DictionaryFormatError, match="must expand to at most"):
        sae.load(bomb)
    small = npy(np.zeros(5, np.float32))
    huge = small.replace(b"(5,), }      ", b"(5000000,), }")
    assert len(huge) == len(small)
    by_column = archive(tmp_path, [("x.npy", npy(np.asfortranarray([[1.0, 2, 3], [4, 5, 6]])))])
    assert foreign.read_npz(by_column / "params.npz")["x"].tolist() == [[1, 2, 3], [4, 5, 6]]
    for data in (small[:-4], small + b"more", npy(np.zeros(6, np.float32))[:140], huge):
        with pytest.raises(DictionaryFormatError, match=r"must hold .* numbers|plain npy header"):
            sae.load(archive(tmp_path, [("w_enc.npy", data)]))


def test_damaged_and_strange_archives(tmp_path, make):
    path = first(tmp_path, arrays(make))
    whole = (path / "params.npz").read_bytes()
    for damaged in (whole[:-30], whole[: len(whole) // 2], b"", b"PK\x03\x04"):
        (path / "params.npz").write_bytes(damaged)
        with pytest.raises(DictionaryFormatError, match="must be a whole npz file"):
            sae.load(path)
    flipped = bytearray(whole)
    flipped[300] ^= 1
    (path / "params.npz").write_bytes(flipped)
    with pytest.raises(DictionaryFormatError, match="must be a whole npz file"):
        sae.load(path)
    for name in ("../w_enc.npy", "a/w_enc.npy", "w_enc.txt"):
        with pytest.raises(DictionaryFormatError, match=r"arrays NAME\.npy alone"):
            sae.load(archive(path, [(name, b"")]))
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive(path, [("a.npy", b""), ("a.npy", b"")])
    with pytest.raises(DictionaryFormatError, match="arrays of different names"):
        sae.load(path)
    with pytest.raises(DictionaryFormatError, match="arrays of different names"):
        sae.load(archive(path, [(f"{i}.npy", b"") for i in range(65)]))
    (path / "params.npz").write_bytes(whole)
    (path / "params.safetensors").write_bytes(b"")
    with pytest.raises(DictionaryFormatError, match="one of them"):
        sae.load(path)
