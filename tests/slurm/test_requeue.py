"""Jobs of a real SLURM with two nodes, on this machine alone: requeued, in arrays, refused.

Debian: apt-get install slurmctld slurmd slurm-client munge
"""

import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import sae
from tests.tiny import cache_record

PROGRAMS = {
    "munged": "munge", "mungekey": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd",
    "sbatch": "slurm-client", "scontrol": "slurm-client", "scancel": "slurm-client",
}  # fmt: skip
N_REQUEUES = 4
CONFIG = """
ClusterName=tests
SlurmctldHost={name}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={path}/munge.socket
CredType=cred/munge
SlurmctldPort={controller}
SlurmctldPidFile={path}/slurmctld.pid
SlurmdPidFile={path}/slurmd-%n.pid
SlurmctldLogFile={path}/slurmctld.log
SlurmdLogFile={path}/slurmd-%n.log
StateSaveLocation={path}/state
SlurmdSpoolDir={path}/spool-%n
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
JobRequeue=1
ReturnToService=2
NodeName=one NodeHostname={name} NodeAddr=127.0.0.1 Port={one} CPUs={cpus} State=UNKNOWN
NodeName=two NodeHostname={name} NodeAddr=127.0.0.1 Port={two} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=one,two Default=YES MaxTime=60 State=UP
"""
HERE = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=50")
"""What this machine has not, or lets nobody wait for."""

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def free_port() -> int:
    with socket.socket() as result:
        result.bind(("127.0.0.1", 0))
        return result.getsockname()[1]


def program(name: str) -> str:
    """The path of a program; where it is missing, the test fails and says how to get it."""
    place = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if place is None:
        pytest.fail(f"{name} must be installed, got none: apt-get install {PROGRAMS[name]}")
    return place


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Iterator[Path]:
    """A controller and a node, ended by their own processes' ids."""
    places = {name: program(name) for name in PROGRAMS}
    path, key = tmp_path / "slurm", tmp_path / "slurm" / "munge.key"
    for folder in (path, path / "state", path / "spool-one", path / "spool-two"):
        folder.mkdir(mode=0o755)
    subprocess.run([places["mungekey"], "-c", "-k", key], check=True)
    ports = {name: free_port() for name in ("controller", "one", "two")}
    name = socket.gethostname().partition(".")[0]
    text = CONFIG.format(path=path, name=name, cpus=os.cpu_count(), **ports)
    (path / "slurm.conf").write_text(text)
    monkeypatch.setenv("SLURM_CONF", str(path / "slurm.conf"))
    files = [f"--{kind}-file={path}/munge.{kind}" for kind in ("pid", "log", "seed")]
    munge = [
        places["munged"], "-F", "--force", f"--key-file={key}", *files,
        f"--socket={path}/munge.socket",
    ]  # fmt: skip
    nodes = [[places["slurmd"], "-D", "-N", node] for node in ("one", "two")]
    commands = [munge, [places["slurmctld"], "-D"], *nodes]
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # the nodes have names that nobody resolves
    monkeypatch.setenv("PROCESSES", "1")
    processes = []
    try:
        for command in commands:
            with (path / f"{Path(command[0]).name}{len(processes)}.out").open("wb") as out:
                processes.append(subprocess.Popen(command, stdout=out, stderr=out))
            time.sleep(1)

        def idle() -> bool:
            return said("scontrol", "show", "node").count("State=IDLE") == 2

        until(idle, path, "two idle nodes")
        yield path
    finally:
        said("scancel", "--signal=KILL", "--full", "--state=RUNNING", f"--user={getpass.getuser()}")
        time.sleep(1)  # what a failed test leaves must not go on
        for process in reversed(processes):
            process.terminate()
            process.wait(timeout=30)


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def until(holds, path: Path, what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            logs = {p.name: p.read_text()[-900:] for p in path.glob("*.[lo][ou][gt]")}
            pytest.fail(f"{what} must come within {seconds:.0f} s; {logs}")
        time.sleep(0.2)


def facts(job: str) -> dict[str, str]:
    """What SLURM says of a job."""
    return dict(re.findall(r"(\w+)=(\S*)", said("scontrol", "show", "job", job)))


def submit(*arguments: object) -> str:
    """Give SLURM a job; its id."""
    job = said("sbatch", "--parsable", *HERE, *map(str, arguments)).strip()
    assert job.isdecimal(), arguments
    return job


def config_of(path: Path, name: str, model: Path, text: Path) -> Path:
    entry = {"d_sae": 41, "activation": {"kind": "topk", "k": 5}, "dead_after_tokens": 500}
    entry["grid"] = {"activation.k": [3, 5]}
    record = {
        "output": str(path / name),
        "cache": cache_record(model, text, 2003),
        "train": {
            "batch": 127, "epochs": 120, "precision": "fp32", "saes": {"topk": entry},
            "checkpoint_seconds": 3600,
        },
    }  # fmt: skip
    (path / f"{name}.yaml").write_text(json.dumps(record))
    return path / f"{name}.yaml"


def newest(output: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    results = [int(p.parent.name[5:13]) for p in output.glob("train/checkpoints/*/manifest.json")]
    return max(results, default=0)


@pytest.mark.parametrize("file", ["slurm.sbatch", "slurm_torchrun.sbatch"])
def test_a_job_of_two_nodes_is_requeued_each_time_and_ends_with_the_same_bits(
    cluster, tmp_path, tiny_model_dir, tiny_text, repository, figure, file
):
    script, log = repository / "configs" / "cluster" / file, cluster / "job.log"
    config = config_of(tmp_path, "run", tiny_model_dir, tiny_text)
    nodes = ("--nodes=2", "--ntasks-per-node=1", f"--output={log}", f"--chdir={tmp_path}", script)
    job = submit(*nodes, config)
    output = tmp_path / "run"
    steps, curves = [0], output / "train" / "logs" / "csv"
    for number in range(N_REQUEUES):
        before = len(list(curves.glob("*")))
        until(lambda n=before: len(list(curves.glob("*"))) > n, cluster, "a training")
        time.sleep(0.5)
        subprocess.run(["scancel", "--signal=USR1", job], check=True)
        until(lambda n=number: facts(job)["Restarts"] == str(n + 1), cluster, "a requeue")
        until(lambda: facts(job)["JobState"] in ("PENDING", "RUNNING"), cluster, "its state")
        steps.append(newest(output))
        subprocess.run(["scontrol", "update", f"job={job}", "starttime=now"], check=False)
    assert steps == sorted(set(steps)), steps  # each run went on from the one before, and saved
    until(lambda: facts(job)["JobState"] == "COMPLETED", cluster, "the end", seconds=300)
    whole = submit(*nodes, config, f"output={tmp_path / 'whole'}")
    until(lambda: facts(whole)["JobState"] == "COMPLETED", cluster, "the other", seconds=300)
    for name in ("topk-k3", "topk-k5"):
        ours, theirs = (
            sae.load(tmp_path / run / "train" / name).state_dict() for run in ("run", "whole")
        )
        assert all(ours[key].equal(theirs[key]) for key in theirs)
    figure("T3", f"SLURM, {file}, 2 nodes: {N_REQUEUES} of {N_REQUEUES} requeued, the same bits")


def test_an_array_makes_a_cache_and_a_grid_and_compares_them(
    cluster, tmp_path, tiny_model_dir, tiny_text, repository
):
    script = repository / "configs" / "cluster" / "array.sbatch"
    config = config_of(tmp_path, "run", tiny_model_dir, tiny_text)
    array = (f"--output={cluster}/%A_%a.log", f"--chdir={tmp_path}", script)
    cache = submit("--array=1-2", *array, "cache", config)
    train = submit("--array=1-2", f"--dependency=afterok:{cache}", *array, "train", config,
                   "train.epochs=2")  # fmt: skip
    last = submit("--array=1", f"--dependency=afterok:{train}", *array, "compare", tmp_path / "run")
    until(lambda: facts(last).get("JobState") == "COMPLETED", cluster, "the table", seconds=300)
    output = tmp_path / "run"
    assert sorted(path.name for path in output.glob("part-*/train/topk-*")) == [
        "topk-k3",
        "topk-k5",
    ]
    compared = next((output / "compare").glob("*.json")).read_text()
    assert all(name in compared for name in ("topk-k3", "topk-k5"))
    assert not (output / "part-1-of-2" / "cache").exists()


def test_tasks_that_are_not_asked_for_per_node_are_one_line(
    cluster, tmp_path, tiny_model_dir, tiny_text
):
    config = config_of(tmp_path, "run", tiny_model_dir, tiny_text)
    command = ["srun", "-N1", "-n2", "--overcommit", "--job-name=x", sys.executable, "-m",
               "sae.cli", "train", str(config)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "error: tasks of SLURM must be asked for per node, got --ntasks=2" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
