"""Files of other libraries, written and computed by numpy in float64 alone."""

import io
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sae.autoencoder import SparseAutoencoder
from sae.pretrained import foreign, hub, pickled_child

TOLERANCE = 1e-6
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def relu(h):
    return np.where(h > 0, h, 0.0)


def jump(h, threshold):
    """relu(h) where h is above the threshold, as every release has it."""
    return relu(h) * (h > np.asarray(threshold, np.float64))


def top_k(h, k):
    """The k largest of each row, then ReLU."""
    out = np.zeros_like(h)
    for row, values in zip(out, h, strict=True):
        best = np.argsort(-values, kind="stable")[:k]
        row[best] = relu(values[best])
    return out


def write(path: Path, record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def tensors(path: Path, arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.array(a, order="C") for name, a in arrays.items()}, path)


def pt(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)

    def convert(value):
        if isinstance(value, dict):
            return {key: convert(v) for key, v in value.items()}
        return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value

    torch.save(convert(content), path)


def wide(arrays):
    """The same numbers in float64."""
    return SimpleNamespace(**{n.replace(".", "_"): a.astype(np.float64) for n, a in arrays.items()})


@pytest.fixture
def make():
    """Random float32 arrays of given shapes; always the same ones."""
    rng = np.random.default_rng(11)

    def arrays(**shapes) -> dict[str, np.ndarray]:
        return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}

    return arrays


@pytest.fixture
def peer():
    """What the other library does, and how it writes."""
    return SimpleNamespace(
        relu=relu, jump=jump, top_k=top_k, write=write, tensors=tensors, pt=pt, wide=wide
    )


@pytest.fixture
def rows():
    """Rows of the model, of a width."""
    return lambda d: np.random.default_rng(3).standard_normal((29, d))


@pytest.fixture
def agree():
    """Require encode, encode_dense, decode and forward to be what the reference gives."""

    def check(dictionary: SparseAutoencoder, x, acts, x_hat) -> None:
        acts, x_hat = np.broadcast_to(acts, (len(x), acts.shape[1])), np.asarray(x_hat)
        assert (acts != 0).any()
        assert (acts == 0).any()
        dictionary, x = dictionary.double(), torch.from_numpy(x)
        with torch.no_grad():
            dense, sparse = dictionary.encode_dense(x), dictionary.encode(x)
            spread = torch.zeros_like(dense).scatter_add(1, sparse.indices, sparse.values)
            close(dense, acts, "encode_dense")
            close(spread, acts, "encode")
            close(dictionary.decode(sparse, x), x_hat, "decode")
            close(dictionary(x), x_hat, "forward")

    return check


def close(got: torch.Tensor, wanted: np.ndarray, what: str) -> None:
    error = np.abs(got.numpy() - wanted).max() / np.abs(wanted).max()
    assert error < TOLERANCE, f"{what} is off by {error:.2g}"


@pytest.fixture
def pickles_here(monkeypatch):
    """Read .pt files in this process: the confined one takes seconds to start."""

    def convert(path, target, seconds, start=0):
        source = io.BytesIO(path.read_bytes()[start:])
        target.write_bytes(pickled_child.convert(source, path.stat().st_size))

    monkeypatch.setattr(foreign, "convert", convert)


class Canary:
    """Makes a file when it is unpickled by a careless reader."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def code(path) -> bytes:
    """A bare pickle, by its opcodes, that would run a command."""
    return f"cos\nsystem\n(S'touch {path}'\ntR.".encode()


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=array.dtype.hasobject)
    return stream.getvalue()


def archive(members, compression=zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, data in members:
            file.writestr(name, data)
    return stream.getvalue()


def bad_archives(canary) -> dict[str, bytes]:
    small = npy(np.zeros(5, np.float32))
    whole = archive([("w_enc.npy", small)])
    return {
        "objects": archive([("w_enc.npy", npy(np.array([Canary(canary)], dtype=object)))]),
        "texts": archive([("w_enc.npy", npy(np.array(["text"])))]),
        "a bomb of 64 MB": archive([("w_enc.npy", bytes(64 << 20))], zipfile.ZIP_DEFLATED),
        "300 arrays": archive([(f"{i}.npy", b"") for i in range(300)]),
        "up": archive([("../w_enc.npy", small)]),
        "absolute": archive([("/tmp/w_enc.npy", small)]),
        "backslash": archive([("..\\w_enc.npy", small)]),
        "another kind": archive([("w_enc.pkl", code(canary))]),
        "a lie about its size": archive([
            ("w_enc.npy", small.replace(b"(5,), }      ", b"(5000000,), }"))
        ]),
        "code in a header": archive([
            ("w_enc.npy", small.replace(b"(5,), }      ", b"(f(5),), }   "))
        ]),
        "cut": whole[: len(whole) // 2],
        "a flipped bit": whole[:60] + bytes([whole[60] ^ 1]) + whole[61:],
        "no zip": b"x" * 99,
        "bzip2 bomb": archive([("w_enc.npy", bytes(20 << 20))], zipfile.ZIP_BZIP2),
    }


@pytest.fixture(scope="session")
def malice():
    """What the makers of hostile files use."""
    return SimpleNamespace(Canary=Canary, code=code, archives=bad_archives)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """Serves a directory as the hub's client would, and records what was asked."""
    asked = []
    root = tmp_path / "models--org--name" / "snapshots" / COMMIT

    def download(repo, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns))
        return str(root)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setenv("MONOSEMA_CACHE", str(tmp_path / "cache"))
    return SimpleNamespace(root=root, asked=asked)
