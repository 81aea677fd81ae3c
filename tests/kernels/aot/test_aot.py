"""Every kernel is compiled for A100 and H100, without either, and what came out is checked."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SNAPSHOT = Path(__file__).with_name("snapshot.json")
SCRIPT = Path(__file__).parents[3] / "benchmarks" / "compile_all_kernels.py"
MAX_SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10}
MAY_SPILL = {"latent_adam_ width=16384 norm=unit: latent_adam": 64}
"""The widest rows that are supported, with 32 columns a thread, may spill a little."""
REGENERATE = (
    "if that is meant, write the report anew: "
    "TRITON_INTERPRET=0 python benchmarks/compile_all_kernels.py tests/kernels/aot/snapshot.json"
)
EVIDENCE = {
    "group_max": ["LDG.128"],
    "bound": ["LDG.128"],
    "pick": ["LDG.128"],
    "product": ["LDGSTS.128", "STG.128", "tensor cores"],
    "weighted_rows": ["LDG.128", "STG.128"],
    "row_products": ["LDG.128"],
    "decode_mse": ["LDG.128"],
    "segments": ["LDGSTS.128", "STG.128", "tensor cores"],
    "finish": ["LDG.128", "STG.128"],
    "sums": ["LDG"],
    "latent_adam": ["LDG.128", "STG.128"],
}
"""Kernel -> instructions that its code must have."""


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """What the compiler makes of the kernels, in a process where they are not interpreted."""
    place = tmp_path_factory.mktemp("aot")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(place / "cache")}
    command = [sys.executable, str(SCRIPT), str(place / "report.json")]
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((place / "report.json").read_text())


@pytest.fixture(scope="session")
def kernels(report):
    """(architecture, call, kernel) -> its row of the report."""
    return {
        (*re.fullmatch(r"(sm_\d+) (.*): (\w+)(?: \d+)?", name).groups(), name): row
        for name, row in report["kernels"].items()
    }


@pytest.mark.timeout(600)
def test_each_kernel_is_compiled_for_both_architectures(kernels):
    for arch in ("sm_80", "sm_90"):
        assert {kernel for a, _, kernel, _ in kernels if a == arch} == set(EVIDENCE)


def test_another_k_or_batch_compiles_nothing(report):
    assert [name for name in report["kernels"] if "annealed" in name] == []


def test_no_kernel_spills(kernels):
    spilling = {f"{call}: {kernel}": row["spill"] for (_, call, kernel, _), row in kernels.items()}
    assert {n: count for n, count in spilling.items() if count > MAY_SPILL.get(n, 0)} == {}


def test_shared_memory_fits_the_device(kernels):
    for (arch, *_, name), row in kernels.items():
        assert row["shared"] <= MAX_SHARED[arch], name


def test_the_registers_of_a_program_fit_a_multiprocessor(kernels):
    for (*_, name), row in kernels.items():
        assert row["registers"] * row["warps"] * 32 <= 65536, name


def test_kernels_use_the_instructions_that_they_are_made_for(kernels):
    for (arch, _, kernel, name), row in kernels.items():
        for instruction in EVIDENCE[kernel]:
            units = {"sm_80": "HMMA", "sm_90": "HGMMA"}[arch]
            assert row[units if instruction == "tensor cores" else instruction] > 0, name


def test_the_report_is_that_of_the_snapshot(report):
    snapshot = json.loads(SNAPSHOT.read_text())
    # Registers and instructions are another compiler's to choose; that nothing spills, fits and
    # uses the tensor cores is asserted above for every version.
    if report["triton"] != snapshot["triton"]:
        pytest.skip(f"the snapshot is of triton {snapshot['triton']}, not {report['triton']}")
    now, then = report["kernels"], snapshot["kernels"]
    assert now.keys() == then.keys(), f"other kernels than in the snapshot; {REGENERATE}"
    changed = [f"{name}: {then[name]} -> {now[name]}" for name in now if now[name] != then[name]]
    assert not changed, "\n".join(["kernels are not those of the snapshot", *changed, REGENERATE])
