"""No name leads out of a directory: hook points, dictionaries, files of records, hub, server."""

import shutil
import threading
import urllib.error
import urllib.parse
import urllib.request
from http import HTTPStatus
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activations_cache import io, seals
from activations_cache.checks import MonosemaError
from activations_cache.journal import ShardRecord, require_types
from activations_cache.testing import synthetic_plan, write_synthetic
from sae.architecture import TopK
from sae.browser.server import BrowserServer
from sae.pretrained import hub
from sae.train.config import DictionaryConfig, TrainConfig
from sae.train.fit import train

PIECES = st.sampled_from([
    "..", ".", "/", "\\", "//", "a", "model", "0", ":out", ":in", "~", "-rf", "\0", "\n", " ",
    "%2e", "%2f", "\u2025", "\uff0e", "\u202e", "C:", "nul", ".hidden", "x" * 300,
    "checkpoints", "logs", "@main", "data", "index.js", "é", "\ud800",
])  # fmt: skip
names = st.lists(PIECES, max_size=6).map("".join) | st.text(max_size=20)
many = settings(
    max_examples=500, suppress_health_check=list(HealthCheck), deadline=None, derandomize=True
)
ENTRY = DictionaryConfig(d_sae=5, activation=TopK(k=2))


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A directory with one beside it; what may be written lies in `inside`."""
    monkeypatch.setattr(io, "fsync", lambda descriptor: None)
    inside = tmp_path / "root" / "inside"
    inside.mkdir(parents=True)
    (tmp_path / "root" / "secret.json").write_text("{}")
    monkeypatch.chdir(inside)
    before = around(inside)
    yield inside
    assert around(inside) == before


def around(inside: Path) -> list[tuple[Path, float]]:
    """All that lies beside a directory, with the times of its last change."""
    result = (p for p in inside.parents[1].rglob("*") if inside not in (p, *p.parents))
    return sorted((path, path.stat().st_mtime_ns) for path in result if path != inside.parent)


def test_hook_points(watched, figure):
    seen = {"refused": 0, "written": 0}

    @many
    @given(name=names | names.map(lambda name: f"model.{name}:out"))
    def check(name):
        try:
            write_synthetic(watched / "cache", synthetic_plan({name: 2}, n_examples=1))
        except MonosemaError:
            seen["refused"] += 1
        else:
            seen["written"] += 1
            shutil.rmtree(watched / "cache")
        assert {path.name for path in watched.iterdir()} <= {"cache"}

    check()
    assert seen["refused"] > 300
    figure("S8", f"500 names of hook points: {seen['refused']} refused, 0 led out")


def test_dictionaries(watched, figure):
    plan = synthetic_plan({"a:out": 3}, n_examples=9, dtype="float32")
    cache = write_synthetic(watched / "cache", plan)
    seen = {"refused": 0, "written": 0}

    @many
    @given(name=names)
    def check(name):
        try:
            config = TrainConfig(saes={name: ENTRY}, batch=100, precision="fp32")
        except MonosemaError:
            seen["refused"] += 1
            return
        seen["written"] += 1
        if seen["written"] <= 3:  # a name that is accepted is the name of a directory of its own
            made = train(cache, config, watched / "run")[name]
            assert made.parent == watched / "run"
            assert made.name not in ("checkpoints", "logs")

    check()
    assert seen["refused"] > 300
    figure("S8", f"500 names of dictionaries: {seen['refused']} refused, 0 led out")


@pytest.mark.parametrize("name", ["checkpoints", "logs", "-rf", "_", "x" * 101, ""])
def test_names_that_a_directory_of_results_cannot_have(name):
    with pytest.raises(MonosemaError, match="saes must have names of letters, digits, - and _"):
        TrainConfig(saes={name: ENTRY})


def test_files_of_records(watched, figure):
    listed = watched / "listed"
    seals.write(listed, {"a.json": b"{}"})
    seen = {"refused": 0, "inside": 0}

    @many
    @given(name=names)
    def check(name):
        entry = {"bytes": 2, "crc32c": io.crc32c(b"{}")}
        files = {name: entry}
        record = ShardRecord(
            shard=0, attempt=1, valid_rows=0, n_quarantined=0, hooks={}, files=files
        )
        try:
            require_types(record, "a journal")
        except MonosemaError:
            seen["refused"] += 1
        else:
            seen["inside"] += 1
            assert (listed / name).resolve().is_relative_to(listed)

    check()
    assert min(seen.values()) > 50
    figure("S8", f"500 names of files in journals: {seen['refused']} refused, 0 led out")


def test_names_of_the_hub(figure):
    seen = {"refused": 0, "taken": 0}

    @many
    @given(name=names | names.map(lambda name: f"org/{name}"))
    def check(name):
        try:
            address = hub.parsed(name)
        except FileNotFoundError:
            seen["refused"] += 1
            return
        seen["taken"] += 1
        for part in (*address.repo.split("/"), *address.subfolder.split("/")):
            assert part not in ("..", ".")
            assert not part.startswith("~")
        assert not Path(address.subfolder).is_absolute()

    check()
    assert seen["refused"] > 200
    figure("S8", f"500 names of the hub: {seen['refused']} refused, 0 led out")


def test_addresses_of_the_server(watched, figure):
    folder = watched / "site"
    seals.write(folder, {"index.html": b"<p>index", "data/a.js": b"a"})
    (watched.parent / "secret.js").write_text("secret")
    answers, bodies = set(), set()
    with BrowserServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        @settings(many, max_examples=300)
        @given(name=names.filter(lambda name: "\ud800" not in name))
        def check(name):
            address = f"{server.url}{urllib.parse.quote(name, safe='/%.:~')}"
            try:
                with urllib.request.urlopen(address, timeout=30) as answer:
                    bodies.add(answer.read())
                    answers.add(answer.status)
            except urllib.error.HTTPError as error:
                answers.add(error.code)

        try:
            check()
        finally:
            server.shutdown()
            thread.join()
    (watched.parent / "secret.js").unlink()
    assert answers == {HTTPStatus.OK, HTTPStatus.NOT_FOUND}
    assert bodies <= {b"<p>index", b"a"}
    figure("S8", "300 addresses of the server: what is in the folder, or 404")
