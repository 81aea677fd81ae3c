"""`sae bench` finds the benchmarks, hands options on and gives their exit code back."""

import ast
import subprocess

import pytest
from typer.testing import CliRunner

from sae.cli import main
from sae.cli.main import app
from sae.config import ConfigError


@pytest.fixture
def called(monkeypatch):
    calls = []

    def call(command, cwd):
        calls.append((command[1:], cwd))
        return 7

    monkeypatch.setattr(subprocess, "call", call)
    return calls


def test_options_go_to_the_benchmark_and_its_code_comes_back(called):
    result = CliRunner().invoke(app, ["bench", "cache", "--rounds", "3", "--record"])
    assert result.exit_code == 7
    expected = ["-m", "benchmarks.bench_cache", "--rounds", "3", "--record"]
    assert called == [(expected, main.ROOT)]


def appends(tree):
    """Calls that write rows: `append` as a function."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    return [call for call in calls if call.func.id == "append"]


def is_record(test):
    return isinstance(test, ast.Attribute) and test.attr == "record"


@pytest.mark.parametrize(("has_gpu", "module"), [(True, "gpu_suite"), (False, "bench_cpu_step")])
def test_the_device_decides_what_auto_is(called, monkeypatch, has_gpu, module):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    CliRunner().invoke(app, ["bench", "auto"])
    assert called[0][0] == ["-m", f"benchmarks.{module}"]


def test_without_a_name_all_are_listed_and_nothing_runs(called):
    result = CliRunner().invoke(app, ["bench"])
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == list(main.MODULES)
    assert not called


def test_every_benchmark_is_listed_and_writes_rows_behind_record_alone():
    listed = {module for module, _ in main.MODULES.values()}
    for file in (main.ROOT / "benchmarks").glob("*.py"):
        tree = ast.parse(file.read_text())
        guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and is_record(n.test)]
        behind = sum(len(appends(statement)) for one in guarded for statement in one.body)
        assert behind == len(appends(tree)), file
        assert not appends(tree) or f"benchmarks.{file.stem}" in listed
    for module in listed:
        path = main.ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_an_unknown_benchmark_is_a_wrong_request(called):
    assert CliRunner().invoke(app, ["bench", "tpu"]).exit_code == 2
    assert not called


def test_an_installed_package_says_what_to_do(called, monkeypatch, tmp_path):
    monkeypatch.setattr(main, "ROOT", tmp_path)
    result = CliRunner().invoke(app, ["bench", "cpu"])
    assert isinstance(result.exception, ConfigError)
    assert "must run from a source checkout" in str(result.exception)
    assert not called
