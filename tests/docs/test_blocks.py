"""What the documents show runs as it stands, or a comment above it says why not."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer
import yaml

import benchmarks.rows
from sae.architecture import TopK
from sae.cli.main import app
from sae.config import config_file, load, recipes
from sae.run.config import CacheRunConfig, RunConfig
from sae.train import TrainStep
from sae.train.config import DictionaryConfig

ROOT = Path(benchmarks.rows.__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md",
         "benchmarks/README.md")] + sorted((ROOT / "docs").glob("*.md"))  # fmt: skip
FENCE = re.compile(r"(?:<!-- not run: (.+?) -->\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CONFIGS = {"run": RunConfig, "train": RunConfig, "cache": CacheRunConfig, "evaluate": RunConfig,
           "explain": RunConfig, "steer": RunConfig, "browse": RunConfig}  # fmt: skip


class Block(NamedTuple):
    page: Path
    language: str
    text: str
    reason: str
    """Why it is not run; empty where it is."""


def blocks() -> list[Block]:
    return [
        Block(page, language, text, reason or "")
        for page in PAGES
        for reason, language, text in FENCE.findall(page.read_text())
    ]


def named(block: Block) -> str:
    same = [b for b in blocks() if b.page == block.page]
    return f"{block.page.relative_to(ROOT)}-{same.index(block)}"


def of(language: str) -> list[Block]:
    return [block for block in blocks() if block.language == language and not block.reason]


def test_the_blocks_are_found_and_those_that_do_not_run_say_why():
    assert len(of("python")) >= 6
    assert len(of("yaml")) >= 1
    assert {block.language for block in blocks()} <= {"python", "yaml", ""}
    assert all(len(block.reason.split()) >= 3 for block in blocks() if block.reason)


@pytest.fixture
def given(demo_config) -> dict:
    """What a page has as known: names that its text explains."""
    training = {
        "TrainStep": TrainStep,
        "config": DictionaryConfig(d_sae=131, activation=TopK(k=32)),
        "total_steps": 3,
        "batches": [torch.ones(31, 37), torch.eye(37), -torch.ones(31, 37)],
    }
    return {"README.md": training, "docs/cache.md": {"config": demo_config}}


# It means the state after the optimiser's step, which docs/training.md says is the right one.
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual:UserWarning")
@pytest.mark.parametrize(
    "page", sorted({block.page for block in of("python")}), ids=lambda page: page.name
)
def test_python_runs_from_top_to_bottom(page, demo, given, monkeypatch):
    monkeypatch.chdir(demo)
    names = given.get(str(page.relative_to(ROOT)), {})
    for number, block in enumerate(b for b in of("python") if b.page == page):
        before = {*names}
        exec(compile(block.text, f"{page.name}, block {number}", "exec"), names)
        assert names.keys() > before


@pytest.mark.parametrize("block", of("yaml"), ids=named)
def test_yaml_is_a_config(block, tmp_path):
    (tmp_path / "config.yaml").write_text(block.text)
    assert yaml.safe_load(block.text)
    load(CacheRunConfig, tmp_path / "config.yaml")


def commands() -> list[str]:
    """Lines of blocks, fenced or indented, that begin by a program of this project."""
    results = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        lines = re.findall(
            r"^(?:    )?((?:\.venv/bin/)?sae |make |python )(.+)$", text, re.MULTILINE
        )
        results += [program.removeprefix(".venv/bin/") + rest for program, rest in lines]
    return sorted(set(results))


def test_there_are_commands():
    assert len(commands()) > 30


@pytest.mark.parametrize("line", commands())
def test_a_command_is_one(line):
    program, *words = shlex.split(line, comments=True)
    words = [word.strip("[]") for word in words]
    match program:
        case "make":
            rules = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert words[0] in rules
        case "python":
            name = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
            assert "*" in name or (ROOT / name).exists() or name == "pytest.py"
        case _:
            check_sae(words)


def check_sae(words: list[str]) -> None:
    """The command exists, has these options, and takes these overrides."""
    command, name = typer.main.get_command(app), words[0]
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    if hasattr(command, "commands"):  # `sae cache CONFIG` leaves a word out
        command = command.commands["build"]
    known = {option for parameter in command.params for option in parameter.opts}
    known |= {o for parameter in command.params for o in parameter.secondary_opts}
    passed_on = command.context_settings.get("ignore_unknown_options", False)
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert passed_on or options <= known
    if words and (words[0].startswith("configs/") or words[0] in recipes()) and name in CONFIGS:
        file = config_file(words[0]) if words[0] in recipes() else ROOT / words[0]
        load(CONFIGS[name], file, [word for word in words[1:] if "=" in word])
