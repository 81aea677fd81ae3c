"""A dataset that is streamed from a hub which fails: the same records, or one line in time."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from tests.faults.hub import N_FILES, PER_FILE, Hub, text

READ = """
import json, sys
from activations_cache import documents
from activations_cache.checks import MonosemaError
from activations_cache.config import TextSource
documents.PAUSE_S = 0.02
buffer = int(sys.argv[2]) or None
n = int(sys.argv[1])
source = TextSource(path="dataset://org/name", n_documents=n, shuffle_buffer=buffer)
try:
    print(json.dumps([record["text"] for record in documents.dataset_rows(source)]))
except MonosemaError as error:
    sys.exit(f"refused: {error}")
"""


def read(hub: Hub, home, n: int, buffer: int = 0) -> subprocess.CompletedProcess[str]:
    """Read the records in a process of its own, which knows no other hub and has no cache."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    command = [sys.executable, "-c", READ, str(n), str(buffer)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=170
    )


@pytest.fixture
def hub_that_fails(request):
    with Hub(request.param, seed=3) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


@pytest.mark.parametrize("hub_that_fails", [0.1], indirect=True)
def test_faults_change_no_record(hub_that_fails, tmp_path, figure):
    n = N_FILES * PER_FILE
    done = read(hub_that_fails, tmp_path, n)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == [text(number) for number in range(n)]
    faults = hub_that_fails.faults
    assert all(faults.values()), faults
    # A stream that broke goes on in the file where it was: no file is read twice from its start.
    assert hub_that_fails.n_requests < 2 * N_FILES
    figure(
        "R11",
        f"{sum(faults.values())} faults in {hub_that_fails.n_requests} requests of a stream: the "
        f"same {n} records",
    )


@pytest.mark.parametrize("hub_that_fails", [1.0], indirect=True)
def test_a_hub_that_only_fails_is_one_line_within_a_minute(hub_that_fails, tmp_path, figure):
    began = time.monotonic()
    done = read(hub_that_fails, tmp_path, 9)
    seconds = time.monotonic() - began
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("refused: dataset://org/name must be ")
    assert "Traceback" not in done.stderr
    assert seconds < 60
    figure("R11", f"a hub that only fails: one line after {seconds:.0f} s")


@pytest.mark.parametrize("hub_that_fails", [0.05], indirect=True)
def test_a_shuffled_stream_has_one_order_whatever_fails(hub_that_fails, tmp_path):
    n = N_FILES * PER_FILE
    found = [read(hub_that_fails, tmp_path / home, n, buffer=50) for home in ("one", "other")]
    assert [done.returncode for done in found] == [0, 0], found[0].stderr[-3000:]
    one, other = (json.loads(done.stdout) for done in found)
    in_order = [text(number) for number in range(n)]
    assert one == other != in_order
    assert sorted(one) == sorted(in_order)
    # Records of all files come early: the files are shuffled, and not only neighbours mixed.
    early = {in_order.index(record) // PER_FILE for record in one[: n // 4]}
    assert max(early) - min(early) > N_FILES // 2
