"""Training from a cache by several processes: one result, and nobody waits for the dead."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from activations_cache.shared_text import require_launched
from activations_cache.testing import synthetic_plan, write_synthetic
from monosema.checks import MonosemaError
from sae import pretrained
from sae.architecture import BatchTopK, TopK
from sae.train.config import AuxK, DictionaryConfig, TrainConfig
from sae.train.fit import train
from sae.train.launch import requeue
from sae.train.module import SAEModule

SAES = {
    "topk": DictionaryConfig(d_sae=30, activation=TopK(k=3), auxk=AuxK(), dead_after_tokens=303),
    "batchtopk": DictionaryConfig(d_sae=22, activation=BatchTopK(k=2)),
}
CONFIG = TrainConfig(saes=SAES, batch=101, epochs=2, precision="fp32", log_every=5)
ENDLESS = TrainConfig(saes=SAES, batch=101, epochs=999, precision="fp32", rank_timeout_seconds=3.0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    plan = synthetic_plan({"a.1:out": 7}, n_examples=119, dtype="float32")
    return write_synthetic(tmp_path_factory.mktemp("cache") / "cache", plan)


def ends(processes):
    """Exit codes and last lines of what each said, in their order."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    return codes, [p.read_text().splitlines()[-1] if p.exists() else "" for p in processes.values()]


def stops_at(n_rows):
    """A progress that sends this process SIGTERM once."""

    def report(done, total, unit):
        if done == n_rows:
            os.kill(os.getpid(), signal.SIGTERM)

    return report


def begins(path):
    return lambda done, total, unit: path.write_text("begun") if done == 303 else None


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_goes_on_with_other_processes_after_sigterm(cache, tmp_path, in_processes):
    """Two share the rows, two the latents, three the rows: the same dictionaries as of one."""
    train(cache, CONFIG, tmp_path / "one")
    path = tmp_path / "several"
    first = in_processes(2, lambda: train(cache, CONFIG, path, progress=stops_at(5 * 101)))
    codes, said = ends(first)
    assert codes == [143, 143], said
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["step-00000005"]
    parts = dataclasses.replace(CONFIG, latent_shards=2)
    second = in_processes(2, lambda: train(cache, parts, path, progress=stops_at(11 * 101)))
    codes, said = ends(second)
    assert codes == [143, 143], said
    codes, said = ends(in_processes(3, lambda: train(cache, CONFIG, path)))
    assert codes == [0, 0, 0], said
    assert len(list((path / "logs" / "csv").iterdir())) == 3
    for name in SAES:
        ours, theirs = (pretrained.load(tmp_path / p / name) for p in ("several", "one"))
        for key, tensor in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], tensor, rtol=1e-6, atol=1e-6)


def test_each_process_reads_its_own_rows(cache, tmp_path, in_processes, monkeypatch):
    original = SAEModule.step

    def step(self, x):
        with (tmp_path / f"rows-{os.environ['RANK']}").open("a") as file:
            file.write(f"{x.tolist()}\n")
        return original(self, x)

    monkeypatch.setattr(SAEModule, "step", step)
    codes, said = ends(in_processes(2, lambda: train(cache, CONFIG, tmp_path / "run")))
    assert codes == [0, 0], said
    parts = [(tmp_path / f"rows-{rank}").read_text().splitlines() for rank in (0, 1)]
    order = cache.batches(batch=101, seed=0, epochs=2)
    for first, second, batch in zip(*parts, order, strict=True):
        assert json.loads(first) + json.loads(second) == batch.x.tolist()


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGKILL, 5), (signal.SIGSTOP, 5)])
def test_a_dead_rank_ends_the_others_in_time(cache, tmp_path, in_processes, number, seconds):
    """A killed one is seen at once, a stopped one when its 3 s are over, and 2 more at most."""
    begun = tmp_path / "begun"
    first, second = processes = in_processes(
        2, lambda: train(cache, ENDLESS, tmp_path / "run", progress=begins(begun))
    )
    wait_for(begun)
    os.kill(second, number)
    since = time.monotonic()
    codes, said = ends({first: processes[first]})
    assert time.monotonic() - since < seconds
    os.kill(second, signal.SIGKILL)
    os.waitpid(second, 0)
    assert codes == [1]
    assert "RankError: all 2 ranks must take part in every step, got no answer" in said[0]


def test_a_rank_that_never_comes_is_missed(cache, tmp_path, in_processes, monkeypatch):
    config = TrainConfig(saes=SAES, batch=101, precision="fp32", rank_timeout_seconds=1.0)

    def work():
        if os.environ["RANK"] == "0":
            train(cache, config, tmp_path / "run")

    codes, said = ends(in_processes(2, work))
    assert codes == [1, 0]
    assert "RankError: all 2 processes must meet at tcp://127.0.0.1" in said[0]


def test_more_shards_than_processes_are_refused(cache, tmp_path):
    config = TrainConfig(saes=SAES, batch=101, latent_shards=2)
    with pytest.raises(ValueError, match="latent_shards must divide the number of processes, 1"):
        train(cache, config, tmp_path)


def test_slurm_is_asked_to_start_the_job_again(tmp_path, monkeypatch, caplog):
    requeue()
    told = tmp_path / "told"
    command = tmp_path / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    requeue()
    assert told.read_text() == "requeue 1234\n"
    command.write_text("#!/bin/sh\necho no such job >&2; exit 1\n")
    requeue()
    assert "scontrol requeue 1234 failed: no such job" in caplog.text


def test_the_launch_files_are_shell_and_start_the_command(repository):
    folder = repository / "configs" / "cluster"
    files = sorted(folder.iterdir())
    names = ["array.sbatch", "one_node.sh", "slurm.sbatch", "slurm_torchrun.sbatch"]
    assert [f.name for f in files] == names
    for file in files:
        subprocess.run(["bash", "-n", str(file)], check=True)
        assert 'sae.cli train "$@"' in file.read_text() or file.name == "array.sbatch"
    for file in files:
        if file.suffix == ".sbatch":
            assert "\n#SBATCH --signal=USR1@120\n" in file.read_text()
            assert "\n##SBATCH --partition=" in file.read_text()


TASKS = {
    "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_JOB_NAME": "sae-train",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": None}, "the 2 tasks of a SLURM job must be started by srun"),
        ({"SLURM_NTASKS_PER_NODE": None}, "tasks of SLURM must be asked for per node, got --ntask"),
        ({"SLURM_JOB_NAME": "interactive"}, "2 tasks of SLURM must have a job name that is no sh"),
        ({"SLURM_JOB_NAME": "bash", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": None}, None),
        ({"SLURM_NTASKS_PER_NODE": None, "WORLD_SIZE": "2"}, None),
    ],
)
def test_tasks_that_cannot_meet_are_one_line(monkeypatch, change, message):
    for name, value in (TASKS | change).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    if message is None:
        require_launched()
        return
    with pytest.raises(MonosemaError) as refused:
        require_launched()
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_a_training_of_tasks_that_cannot_meet_ends_at_once(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(MonosemaError, match="must be started by srun"):
        train(cache, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_torchrun_trains_as_the_documentation_says(cache, tmp_path):
    """The launcher itself, with its own environment, on two processes."""
    script = tmp_path / "job.py"
    script.write_text(
        "import activations_cache\n"
        "from sae.architecture import TopK\n"
        "from sae.train.config import DictionaryConfig, TrainConfig\n"
        "from sae.train.fit import train\n"
        "saes = {'topk': DictionaryConfig(d_sae=30, activation=TopK(k=3))}\n"
        f"cache = activations_cache.open({str(cache.path)!r})\n"
        f"train(cache, TrainConfig(saes=saes, batch=101), {str(tmp_path / 'run')!r})\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*command, str(script)], check=True, timeout=150)
    assert pretrained.load(tmp_path / "run" / "topk").config.d_sae == 30
