"""Files mapped one behind the other."""

import mmap
import resource
import subprocess
import sys

import numpy as np
import pytest

from activations_cache.arrays import AddressSpace


def written(path, values):
    path.write_bytes(values.tobytes())
    return path.open("rb")


@pytest.mark.parametrize(("n_rows", "width"), [(7, 3), (4099, 5), (2048, 2), (1, 1)])
def test_rows_of_all_files_are_one_array(tmp_path, n_rows, width):
    rng = np.random.default_rng(0)
    space = AddressSpace(5, (n_rows, width), np.dtype("<u2"))
    chunks = {slot: rng.integers(1, 2**16, (n_rows, width), np.uint16) for slot in (4, 0, 3)}
    for slot, chunk in chunks.items():
        with written(tmp_path / str(slot), chunk) as file:
            space.map(slot, file)
    for slot, chunk in chunks.items():
        assert (space.slot(slot) == chunk).all()
        last = slot * space.stride + n_rows - 1
        assert (space.rows[last] == chunk[-1]).all()


def test_a_slot_without_a_file_reads_as_zeros():
    space = AddressSpace(3, (11, 2), np.dtype(np.int8))
    assert not space.slot(1).any()


def test_arrays_cannot_be_written_and_outlive_the_space(tmp_path):
    space = AddressSpace(2, (13,), np.dtype(np.int64))
    with written(tmp_path / "a", np.arange(13)) as file:
        space.map(1, file)
    result = space.slot(1)
    del space
    assert result.tolist() == list(range(13))
    with pytest.raises(ValueError, match="read-only"):
        result[0] = 1


def test_a_file_that_cannot_be_mapped_is_named(tmp_path):
    space = AddressSpace(1, (17,), np.dtype(np.int8))
    with (
        written(tmp_path / "empty", np.empty(0, np.int8)) as file,
        pytest.raises(OSError, match="empty"),
    ):
        space.map(0, file)


def test_room_costs_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    AddressSpace(1009, (2**20, 64), np.dtype("<u2"))  # 126 GiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**14


def test_too_little_address_space_is_said():
    code = (
        "import resource, numpy as np\n"
        "from activations_cache.arrays import AddressSpace\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))\n"
        "AddressSpace(1009, (2**20, 64), np.dtype('<u2'))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    last = result.stderr.splitlines()[-1]
    assert "must be free to map 1009 shards" in last
    assert "ulimit -v" in last


def test_the_page_is_what_files_begin_at():
    space = AddressSpace(2, (3, 1), np.dtype(np.int8))
    assert space.stride == mmap.ALLOCATIONGRANULARITY
