"""Files of a cache and of a dictionary, changed at random: read, or refused by a class of ours.

`python -m tests.faults.fuzz SCRATCH N NAME...` does it N times to each file, in a process without
the type checks that the tests have. Half of the changes keep the checksum right, as a foreign
writer would: then what the record says is wrong, not its bytes. `corpus/` has what was mishandled
once: a number, then the name of the file whose place it takes.
"""

import copy
import json
import logging
import sys
import time
import traceback
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import activations_cache
import sae
from activations_cache import io
from activations_cache.checks import MonosemaError
from activations_cache.journal import seal, unseal
from activations_cache.testing import synthetic_plan, write_synthetic
from sae.architecture import BatchTopK, SAEConfig, Slice
from sae.autoencoder import SparseAutoencoder, initialise

CORPUS = Path(__file__).with_name("corpus")
SEALED = ("manifest.json", "journal.rank0.jsonl")
PLAIN = ("config.json", "provenance.json", "sae.safetensors")
ODD = [
    None, True, -1, 0, 3, 1 << 31, 1 << 63, 1 << 70, 0.5, 1e308, "", "x" * 2000, "../../x", "\0",
    "\ud800", [], [None], [[]], {}, {"a": {}}, [1] * 9,
]  # fmt: skip
SECONDS = 1.0


def make(scratch: Path) -> None:
    """A cache and a dictionary, as small as they may be."""
    plan = synthetic_plan({"a.1:out": 3}, n_examples=7, dtype="float32")
    write_synthetic(scratch / "cache", plan)
    slices = (Slice(hook_point="a.1:out", width=3, scale=0.5),)
    made = SparseAutoencoder(SAEConfig(d_in=3, d_sae=5, activation=BatchTopK(k=2), inputs=slices))
    initialise(made, torch.Generator().manual_seed(0))
    made.get_buffer("threshold").fill_(0.1)
    path = sae.save(made, scratch / "dictionary")
    (path / "files.json").unlink()  # which would find every change by its checksum


def places(record, path=()):
    """The keys of a record, at every depth."""
    inner = record.items() if isinstance(record, dict) else []
    inner = enumerate(record) if isinstance(record, list) else inner
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def changed_bytes(draw, data):
    """Bytes are left out, put in or replaced, at up to four places."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        new = draw(st.binary(max_size=6) | st.sampled_from([b"{", b"9" * 30, b"[" * 3000, b"NaN"]))
        data = data[:at] + new + data[at + draw(st.integers(0, 6)) :]
    return data


@st.composite
def changed_record(draw, record):
    """Up to three entries have another value, are gone, or are new."""
    record = copy.deepcopy(record)
    for _ in range(draw(st.integers(1, 3))):
        results = list(places(record))
        if not results:
            break
        *path, last = draw(st.sampled_from(results))
        owner = record
        for key in path:
            owner = owner[key]
        what = draw(st.sampled_from(["value", "value", "value", "gone", "new"]))
        if what == "gone":
            del owner[last]
        elif what == "new" and isinstance(owner, dict):
            owner[draw(st.text(max_size=9))] = copy.deepcopy(draw(st.sampled_from(ODD)))
        else:
            owner[last] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return record


def seal_any(record):
    """Seal what other writers may write: also numbers that are not finite."""
    body = json.dumps(record).encode()
    return b'{"crc32c": "%s", "record": ' % io.crc32c(body).encode() + body + b"}\n"


@st.composite
def changed(draw, name, data):
    """A file of that name with another content."""
    if name == "sae.safetensors" or draw(st.booleans()):
        return draw(changed_bytes(data))
    if name not in SEALED:
        return json.dumps(draw(changed_record(json.loads(data)))).encode()
    lines = [data] if name == "manifest.json" else data.splitlines(keepends=True)
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = seal_any(draw(changed_record(unseal(lines[at], name))))
    return b"".join(lines)


def read(path):
    """Read all that lies there."""
    if path.name == "dictionary":
        sae.load(path)
        return
    cache = activations_cache.open(path)
    for name in cache.hook_points:
        cache[name][cache.rows()[:3]]
        cache[name].statistics  # noqa: B018
    cache.refs(cache.rows()[:3])
    cache.verify()


def look(path, name, data):
    """Put the content in the file's place and read all; it may be right or refused, at once."""
    manifest = path / "manifest.json"
    before = {file: file.read_bytes() for file in (path / name, manifest) if file.is_file()}
    if name.startswith("journal"):  # the manifest has its checksum
        record = unseal(before[manifest], name)
        manifest.write_bytes(seal({**record, "journals": {name: io.describe(data)}}))
    began = time.process_time()
    (path / name).write_bytes(data)
    try:
        read(path)
    except (MonosemaError, FileNotFoundError) as error:
        return str(error)
    finally:
        for file, content in before.items():
            file.write_bytes(content)
        assert time.process_time() - began < SECONDS
    return None


def home_of(name: str, scratch: Path) -> Path:
    """The directory that a file of that name lies in."""
    return scratch / ("cache" if name in SEALED else "dictionary")


def fuzzed(scratch: Path, name: str, n: int) -> dict[str, int]:
    """Look at what the corpus has for a file, which must be refused, then change it n times."""
    path = home_of(name, scratch)
    read(path)  # what is imported late is not counted
    data, seen = (path / name).read_bytes(), {"refused": 0, "read": 0}
    for stored in sorted(CORPUS.glob(f"*-{name}")):
        assert look(path, name, stored.read_bytes()) is not None, stored

    @settings(
        max_examples=n, suppress_health_check=list(HealthCheck), deadline=None, database=None,
        derandomize=n < 1000, phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False,
    )  # fmt: skip
    @given(content=changed(name, data))
    def fuzz(content):
        seen["read" if look(path, name, content) is None else "refused"] += 1

    fuzz()
    return seen


def main(scratch: Path, n: int, names: list[str]) -> int:
    """Say what became of the changes; 1 and the first content that is mishandled, or 0."""
    logging.disable()
    make(scratch)
    try:
        results = {name: fuzzed(scratch, name, n) for name in names}
    except Exception:  # noqa: BLE001
        sys.stderr.write(traceback.format_exc())
        return 1
    sys.stdout.write(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
