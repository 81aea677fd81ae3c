"""Files that somebody made to do harm: each is refused in one line, at once, and does nothing.

A process of its own loads them all, under limits of memory and of file size, so that a file which
got through would also be stopped; a canary file tells whether any code ran.
"""

import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save as safetensors

import sae
import sae_kernels

D, F = 7, 23
SPARSIFY = {"d_in": D, "k": 3, "num_latents": F}
OURS = {
    "format": "monosema", "format_version": 1, "d_in": D, "d_sae": F, "d_out": None,
    "activation": {"kind": "relu"}, "b_in": "b_dec", "input_scale": 1.0,
}  # fmt: skip
SOURCES = [str(Path(module.__file__).parents[1]) for module in (sae, sae_kernels)]
SECONDS = 1.0
MEGABYTES = 100


def header(record, data=b"") -> bytes:
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def weights(**changes):
    shapes = {"encoder.weight": (F, D), "encoder.bias": F, "W_dec": (F, D), "b_dec": D}
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    return arrays | changes


def with_bad(value) -> bytes:
    bad = np.ones((F, D), np.float32)
    bad[3, 2] = value
    return safetensors(weights(W_dec=bad))


ONE = entry(0, 4, [1])
TEXT = json.dumps(ONE).encode()
GOOD = safetensors(weights())
HEADERS = {
    "empty": b"",
    "a pickle": b"cos\nsystem\n(S'touch canary'\ntR.",
    "2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "2^64-1": b"\xff" * 8 + b"{}",
    "2 MiB of header": struct.pack("<Q", 2 << 20) + bytes(3 << 20),
    "header longer than the file": struct.pack("<Q", 1 << 19) + b"{}",
    "header of 0": struct.pack("<Q", 0),
    "depth 10^5": header(b"[" * 100_000),
    "a list": header(b"[]"),
    "NaN": header(b'{"a": NaN}'),
    "no text": header(b"\xff\xfe\xfd"),
    "NUL": header(b'{"a\x00b": 1}'),
    "a key twice": header(b'{"a": 1, "a": 1}'),
    "a dtype twice": header(b'{"a": {"dtype": "F32", "dtype": "F16"}}'),
    "a name twice over the same bytes": header(b'{"a":%b,"a":%b}' % (TEXT, TEXT), bytes(4)),
    "65 tensors": header({str(i): ONE for i in range(65)}, bytes(4)),
    "20,000 tensors": header({str(i): ONE for i in range(20_000)}, bytes(4))[: 1 << 20],
    "strange dtype": header({"a": ONE | {"dtype": "F8_E5M2"}}, bytes(4)),
    "dtype of a list": header({"a": ONE | {"dtype": ["F32"]}}, bytes(4)),
    "no entry": header({"a": 3}, bytes(4)),
    "no offsets": header({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "offsets of text": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": "x"}}, bytes(4)),
    "overlap": header({"a": ONE, "b": ONE}, bytes(4)),
    "a hole": header({"a": ONE, "b": entry(8, 12, [1])}, bytes(12)),
    "too small": header({"a": entry(0, 4, [2])}, bytes(4)),
    "too large": header({"a": ONE}, bytes(8)),
    "past the end": header({"a": entry(0, 8, [2])}, bytes(4)),
    "2^62 x 2^62": header({"a": entry(0, 4, [1 << 62, 1 << 62])}, bytes(4)),
    "2^64 x 0": header({"a": entry(0, 0, [1 << 64, 0])}),
    "turned offsets": header({"a": entry(4, 0, [1])}, bytes(4)),
    "negative offsets": header({"a": entry(-4, 0, [1])}, bytes(4)),
    "negative shape": header({"a": entry(0, 4, [-1])}, bytes(4)),
    "fractions": header({"a": entry(0, 4, [1.5])}, bytes(4)),
    "a name with ..": header({"../../a": ONE}, bytes(4)),
    "an absolute name": header({"/etc/passwd": ONE}, bytes(4)),
    "a name of 1 MB": header({"a" * 1_000_000: ONE}, bytes(4)),
    "a name with an escape": header({"\x1b[2J\x1b]0;x\x07\n": ONE}, bytes(4)),
    "metadata of a bomb": header({"__metadata__": {"a": 3}, "a": ONE}, bytes(4)),
    "NaN weights": with_bad(np.nan),
    "infinite weights": with_bad(np.inf),
    "whole numbers for weights": safetensors(weights(W_dec=np.ones((F, D), np.int64))),
    "an extra tensor": safetensors(weights(extra=np.ones(3, np.float32))),
    "no bias": safetensors({n: a for n, a in weights().items() if n != "b_dec"}),
    "turned weights": safetensors(weights(W_dec=np.ones((D, F), np.float32))),
    "cut in the middle": GOOD[: len(GOOD) // 2],
    "one byte short": GOOD[:-1],
    "one byte more": GOOD + b"x",
    "a zip": b"PK\x03\x04" + bytes(100),
}
CONFIGS = {
    "100 MB": b'{"a": "' + b"x" * (100 << 20) + b'"}',
    "1 MiB and a byte": b" " * (1 << 20) + b"{}",
    "empty": b"",
    "depth 10^5": b'{"a":' * 100_000,
    "a key twice": b'{"d_in": 7, "d_in": 8}',
    "a key twice inside": b'{"d_in": {"a": 1, "a": 2}}',
    "NaN": b'{"d_in": NaN}',
    "infinity": b'{"d_in": -Infinity}',
    "1e999": b'{"d_in": 1e999, "k": 3, "num_latents": 23}',
    "5,000 digits": b'{"d_in": ' + b"9" * 5000 + b"}",
    "no text": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"d_in": 7}'.encode("utf-16"),
}
CHANGES = {
    "d_in of 10^12": {"d_in": 10**12},
    "d_in of -1": {"d_in": -1},
    "d_in of true": {"d_in": True},
    "k over d_sae": {"k": F + 1},
    "k of 2^31": {"k": 1 << 31},
    "an unknown key": {"__class__": "os.system"},
    "escapes in a value": {"activation": "\x1b[2J\nx" * 999},
}
CONFIGS |= {n: json.dumps(SPARSIFY | c).encode() for n, c in CHANGES.items()}
OUR_CONFIGS = {
    "another version": OURS | {"format_version": 99},
    "d_sae of 2^40": OURS | {"d_sae": 1 << 40},
    "scale of 0": OURS | {"input_scale": 0},
    "scale of 1e300": OURS | {"input_scale": 1e300},
    "kind of a path": OURS | {"activation": {"kind": "../../x"}},
    "kind of a list": OURS | {"activation": {"kind": ["relu"]}},
    "no kind": OURS | {"activation": {}},
    "slices of text": OURS | {"inputs": "x"},
    "slices of 10^5": OURS | {"inputs": [{"hook_point": "", "width": 1, "scale": 1.0}] * 10**4},
}


def put(folder: Path, **files) -> Path:
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return folder


def special(root: Path, canary: Path, malice) -> dict[str, tuple[Path, str | None]]:
    """Links, devices and directories where files should be, and pickles under every name."""
    cases: dict[str, tuple[Path, str | None]] = {}

    def case(name, format=None, **files):
        folder = put(root / name.replace("/", " "), **files)
        folder.mkdir(exist_ok=True)
        cases[name] = (folder, format)
        return folder

    secret = root.parent / "secret.json"
    secret.write_text("{}")
    pickled = malice.code(canary)
    stream = io.BytesIO()
    torch.save({"W_enc": malice.Canary(canary)}, stream)
    for name in ("/etc/hostname", str(secret), "../../secret.json", "/dev/zero", "/dev/stdin"):
        folder = case(f"config is a link to {Path(name).name} {len(cases)}", "sparsify",
                      sae_DOT_safetensors=GOOD)  # fmt: skip
        (folder / "cfg.json").symlink_to(name)
    for name in ("/dev/zero", str(secret)):
        folder = case(f"weights are a link to {Path(name).name}", "sparsify", cfg_DOT_json=SPARSIFY)
        (folder / "sae.safetensors").symlink_to(name)
    os.mkfifo(case("a pipe", "sparsify", cfg_DOT_json=SPARSIFY) / "sae.safetensors")
    (case("a directory", "sparsify", cfg_DOT_json=SPARSIFY) / "sae.safetensors").mkdir()
    loop = case("a link to itself", "sparsify", cfg_DOT_json=SPARSIFY)
    (loop / "sae.safetensors").symlink_to("sae.safetensors")
    case("pickle as safetensors", cfg_DOT_json=SPARSIFY, sae_DOT_safetensors=pickled)
    case("pickle as config", cfg_DOT_json=pickled, sae_DOT_safetensors=GOOD)
    case("pickle as npz", params_DOT_npz=pickled)
    case("zip of torch as npz", params_DOT_npz=stream.getvalue())
    case("zip of torch as safetensors", cfg_DOT_json=SPARSIFY,
         sae_DOT_safetensors=stream.getvalue())  # fmt: skip
    case("ae.pt beside a config", config_DOT_json={"trainer": {}}, ae_DOT_pt=stream.getvalue())
    case("a DCP folder", **{"model.dcp__.metadata": pickled, "model.dcp____0_0.distcp": pickled})
    for suffix in ("pt", "pth", "bin", "pkl", "ckpt"):
        folder = case(f"a pickle .{suffix}", **{f"x.{suffix}": pickled})
        cases[f"a pickle .{suffix}"] = (folder / f"x.{suffix}", None)
    line = b'{"schema": 2}\n' + pickled
    cases["a pickle after a line"] = (put(root / "line", sae_DOT_pt=line) / "sae.pt", "saev")
    return cases


@pytest.fixture(scope="module")
def results(tmp_path_factory, malice):
    """Every case loaded by one limited process: name -> what it did."""
    root = tmp_path_factory.mktemp("malice")
    canary = root / "canary"
    cases = special(root / "special", canary, malice)
    for name, data in HEADERS.items():
        folder = put(root / f"header {len(cases)}", cfg_DOT_json=SPARSIFY, sae_DOT_safetensors=data)
        cases[f"header: {name}"] = (folder, None)
    for name, data in CONFIGS.items():
        folder = put(root / f"config {len(cases)}", cfg_DOT_json=data, sae_DOT_safetensors=GOOD)
        cases[f"config: {name}"] = (folder, None)
    for name, record in OUR_CONFIGS.items():
        folder = put(root / f"own {len(cases)}", config_DOT_json=record, sae_DOT_safetensors=GOOD)
        cases[f"own config: {name}"] = (folder, None)
    for name, data in malice.archives(canary).items():
        cases[f"archive: {name}"] = (put(root / f"npz {len(cases)}", params_DOT_npz=data), None)
    good = put(root / "good", cfg_DOT_json=SPARSIFY, sae_DOT_safetensors=GOOD)
    listed = {name: (str(path), format) for name, (path, format) in cases.items()}
    (root / "cases.json").write_text(json.dumps([["good", (str(good), None)], *listed.items()]))
    before = sorted(root.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(root / "cases.json"), str(MEGABYTES), *SOURCES],
        capture_output=True, text=True, check=False, cwd=root, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(root.rglob("*")) == before, "a file was made"
    assert not canary.exists()
    return json.loads(done.stdout)


LOADER = """
import json, resource, sys, time
sys.path[:0] = sys.argv[3:]
import sae
from sae.pretrained import DictionaryFormatError
cases = json.load(open(sys.argv[1]))
results = {}
def data():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmData" in line)
def load(path, format):
    began = time.process_time()
    try:
        sae.load(path, format=format)
        kind, said = "loaded", ""
    except BaseException as error:
        kind, said = type(error).__name__, str(error)
    return {"kind": kind, "said": said, "seconds": time.process_time() - began}
load(*cases[0][1])
limit = (data() << 10) + (int(sys.argv[2]) << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
for name, case in cases:
    results[name] = load(*case)
print(json.dumps(results))
"""


def test_there_are_many_and_a_good_file_still_loads(results):
    assert len(results) - 1 >= 80
    assert results["good"]["kind"] == "loaded"


def test_all_are_refused(results, figure):
    kinds = {name: result["kind"] for name, result in results.items() if name != "good"}
    wrong = {name: k for name, k in kinds.items() if k != "DictionaryFormatError"}
    assert not wrong
    figure("S2", f"{len(kinds)} hostile files: {len(kinds)} refused in one line, 0 ran code")


def test_each_in_one_short_line_without_control_characters(results):
    said = {name: result["said"] for name, result in results.items() if name != "good"}
    assert all(text.isprintable() and 20 < len(text) <= 1010 for text in said.values()), said


def test_each_within_a_second(results):
    slow = {
        name: result["seconds"] for name, result in results.items() if result["seconds"] > SECONDS
    }
    assert not slow
