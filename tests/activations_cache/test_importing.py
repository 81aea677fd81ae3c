"""An array becomes a cache: same rows, same format, and what is no matrix of floats is refused."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import zarr
from safetensors.torch import save_file

from activations_cache.checks import CacheFormatError
from activations_cache.importing import import_array

ROWS = np.random.default_rng(5).standard_normal((211, 7)).astype(np.float32)


def as_npy(path: Path) -> str:
    np.save(path / "rows.npy", ROWS)
    return str(path / "rows.npy")


def as_safetensors(path: Path) -> str:
    safetensors.numpy.save_file({"image_embeds": ROWS}, path / "rows.safetensors")
    return str(path / "rows.safetensors")


def as_one_of_several(path: Path) -> str:
    tensors = {"a": ROWS[:3], "image_embeds": ROWS}
    safetensors.numpy.save_file(tensors, path / "several.safetensors")
    return str(path / "several.safetensors") + "::image_embeds"


def as_zarr(path: Path) -> str:
    zarr.save_array(path / "rows.zarr", ROWS)
    return str(path / "rows.zarr")


@pytest.mark.parametrize("make", [as_npy, as_safetensors, as_one_of_several, as_zarr])
def test_the_rows_come_back(tmp_path: Path, make):
    reports = []
    cache = import_array(
        make(tmp_path), tmp_path / "cache", rows_per_shard=61, progress=lambda *a: reports.append(a)
    )
    assert torch.equal(cache["embedding:out"][cache.rows()], torch.from_numpy(ROWS))
    assert cache.refs(cache.rows()).example.tolist() == list(range(211))
    assert cache.verify() == []
    assert reports[-1][:2] == (211, 211)
    assert (
        len(cache.rows(("explain",))) > len(cache.rows(("score",))) > len(cache.rows(("hold",))) > 0
    )
    batches = list(cache.batches(batch=17, seed=0))
    assert len({int(r) for b in batches for r in b.rows}) == len(batches) * 17


def test_half_precision_is_read_and_chosen(tmp_path: Path):
    np.save(tmp_path / "half.npy", ROWS.astype(np.float16))
    cache = import_array(
        tmp_path / "half.npy", tmp_path / "c", dtype="float16", hook_point="clip:out"
    )
    wanted = torch.from_numpy(ROWS.astype(np.float16).astype(np.float32))
    assert torch.equal(cache["clip:out"][cache.rows()], wanted)


def test_another_array_in_the_same_place_is_refused(tmp_path: Path):
    import_array(as_npy(tmp_path), tmp_path / "cache")
    np.save(tmp_path / "rows.npy", ROWS + 1)
    with pytest.raises(CacheFormatError, match="array_sha256"):
        import_array(tmp_path / "rows.npy", tmp_path / "cache")


@pytest.mark.parametrize(
    ("array", "got"),
    [(ROWS[0], r"\(7,\)"), (ROWS.astype(int), "int64"), (ROWS[:0], r"\(0, 7\)")],
)
def test_what_is_no_matrix_of_floats_is_refused(tmp_path: Path, array, got):
    np.save(tmp_path / "wrong.npy", array)
    with pytest.raises(
        ValueError, match=rf"array must be a matrix \(row, d_model\) of floats.*{got}"
    ):
        import_array(tmp_path / "wrong.npy", tmp_path / "cache")


def test_bad_input_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"array nowhere\.npy must exist"):
        import_array("nowhere.npy", tmp_path / "cache")
    (tmp_path / "rows.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"must be a .npy, a .safetensors or a Zarr directory"):
        import_array(tmp_path / "rows.csv", tmp_path / "cache")
    as_one_of_several(tmp_path)
    with pytest.raises(ValueError, match="must hold one array, got a, image_embeds"):
        import_array(tmp_path / "several.safetensors", tmp_path / "cache")
    with pytest.raises(ValueError, match="must hold the array b, got a, image_embeds"):
        import_array(str(tmp_path / "several.safetensors") + "::b", tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must be a Zarr array"):
        import_array(tmp_path / "empty", tmp_path / "cache")
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        import_array(tmp_path / "objects.npy", tmp_path / "cache")


LAYERS = ("model.layers.3:out", "model.layers.7:out")


def as_requests(path: Path, n_layers: int = 2, n: int = 41) -> dict[int, dict[str, torch.Tensor]]:
    """What a server wrote: a file per request; the last one has the tokens of the first."""
    generator, made = torch.Generator().manual_seed(3), {}
    path.mkdir()
    for number in range(n):
        n_tokens = 2 + number % 7
        states = torch.randn(n_tokens, n_layers, 5, generator=generator).bfloat16()
        ids = torch.randint(97, (n_tokens,), generator=generator)
        made[number] = {"hidden_states": states, "token_ids": ids}
    made[n - 1] = {name: tensor.clone() for name, tensor in made[0].items()}
    for number, tensors in made.items():
        save_file(tensors, path / f"request-{number:03d}.safetensors")
        (path / f"request-{number:03d}.safetensors.lock").touch()
    return made


def test_hidden_states_of_requests_are_examples(tmp_path: Path):
    made = as_requests(tmp_path / "states")
    cache = import_array(
        tmp_path / "states", tmp_path / "cache", hook_point=",".join(LAYERS), dtype="bfloat16"
    )
    assert cache.hook_points == LAYERS
    assert cache.n_rows == sum(len(one["token_ids"]) - 1 for one in made.values())
    refs = cache.refs(cache.rows())
    for layer, name in enumerate(LAYERS):
        for row, x in enumerate(cache[name][cache.rows()]):
            one = made[int(refs.example[row])]
            position = int(refs.position[row])
            assert position >= 1
            assert torch.equal(x, one["hidden_states"][position, layer].float())
            assert int(refs.token[row]) == int(one["token_ids"][position])
    assert set(cache.examples.split.tolist()) == {0, 1, 2}
    assert cache.examples.split[0] == cache.examples.split[40]
    assert cache.verify() == []


def test_requests_that_do_not_fit_are_named(tmp_path: Path):
    as_requests(tmp_path / "states")
    given = (tmp_path / "states", tmp_path / "cache")
    with pytest.raises(ValueError, match=r"000\.safetensors must hold hidden_states \(token, 1 l"):
        import_array(*given, hook_point=LAYERS[0])
    one = tmp_path / "states" / "request-007.safetensors"
    save_file({"hidden_states": torch.zeros(3, 2, 4), "token_ids": torch.zeros(3)}, one)
    with pytest.raises(ValueError, match=r"007\.safetensors must hold .*, 5\) and token_ids"):
        import_array(*given, hook_point=",".join(LAYERS))
    one.write_bytes(one.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"007\.safetensors must be a whole safetensors file"):
        import_array(*given, hook_point=",".join(LAYERS))
    as_requests(tmp_path / "others", n=3)
    with pytest.raises(ValueError, match="hook_points must have the form"):
        import_array(tmp_path / "others", tmp_path / "cache", hook_point="a,b")
