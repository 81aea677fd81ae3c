"""`sae bench` finds the benchmarks, hands options on and gives their exit code back."""

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
    result = CliRunner().invoke(app, ["bench", "cache", "--rounds", "3", "--dry"])
    assert result.exit_code == 7
    expected = ["-m", "benchmarks.bench_cache", "--rounds", "3", "--dry"]
    assert called == [(expected, main.ROOT)]


@pytest.mark.parametrize(("has_gpu", "module"), [(True, "gpu_suite"), (False, "bench_cpu_step")])
def test_without_a_name_the_device_decides(called, monkeypatch, has_gpu, module):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    CliRunner().invoke(app, ["bench"])
    assert called[0][0] == ["-m", f"benchmarks.{module}"]


def test_every_benchmark_it_names_is_there():
    for module in main.MODULES.values():
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
