"""A job of a real SLURM, on this machine alone: it is signalled, requeued, and goes on.

Debian: apt-get install slurmctld slurmd slurm-client munge
"""

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
SlurmdPort={node}
SlurmctldPidFile={path}/slurmctld.pid
SlurmdPidFile={path}/slurmd.pid
SlurmctldLogFile={path}/slurmctld.log
SlurmdLogFile={path}/slurmd.log
StateSaveLocation={path}/state
SlurmdSpoolDir={path}/spool
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
JobRequeue=1
ReturnToService=2
NodeName={name} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={name} Default=YES MaxTime=60 State=UP
"""
SCRIPT = """#!/bin/bash
#SBATCH --requeue
#SBATCH --open-mode=append
exec srun --kill-on-bad-exit=1 {python} -m sae.cli train "$@"
"""

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
    for folder in (path, path / "state", path / "spool"):
        folder.mkdir(mode=0o755)
    subprocess.run([places["mungekey"], "-c", "-k", key], check=True)
    ports = {"controller": free_port(), "node": free_port()}
    name = socket.gethostname().partition(".")[0]
    text = CONFIG.format(path=path, name=name, cpus=os.cpu_count(), **ports)
    (path / "slurm.conf").write_text(text)
    monkeypatch.setenv("SLURM_CONF", str(path / "slurm.conf"))
    files = [f"--{kind}-file={path}/munge.{kind}" for kind in ("pid", "log", "seed")]
    munge = [
        places["munged"], "-F", "--force", f"--key-file={key}", *files,
        f"--socket={path}/munge.socket",
    ]  # fmt: skip
    commands = [munge, [places["slurmctld"], "-D"], [places["slurmd"], "-D", "-N", name]]
    processes = []
    try:
        for command in commands:
            with (path / f"{Path(command[0]).name}.out").open("wb") as out:
                processes.append(subprocess.Popen(command, stdout=out, stderr=out))
            time.sleep(1)
        until(lambda: "State=IDLE" in said("scontrol", "show", "node"), path, "an idle node")
        yield path
    finally:
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


def config_of(path: Path, name: str, model: Path, text: Path) -> Path:
    entry = {"d_sae": 41, "activation": {"kind": "topk", "k": 5}, "dead_after_tokens": 500}
    record = {
        "output": str(path / name),
        "cache": cache_record(model, text, 2003),
        "train": {
            "batch": 127, "epochs": 800, "precision": "fp32", "saes": {"topk": entry},
            "checkpoint_seconds": 3600,
        },
    }  # fmt: skip
    (path / f"{name}.yaml").write_text(json.dumps(record))
    return path / f"{name}.yaml"


def newest(output: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    results = [int(p.parent.name[5:13]) for p in output.glob("train/checkpoints/*/manifest.json")]
    return max(results, default=0)


def test_a_job_is_requeued_each_time_and_ends_with_the_same_bits(
    cluster, tmp_path, tiny_model_dir, tiny_text, figure
):
    output = tmp_path / "run"
    script = cluster / "job.sh"
    script.write_text(SCRIPT.format(python=sys.executable))
    log = cluster / "job.log"
    config = config_of(tmp_path, "run", tiny_model_dir, tiny_text)
    command = ["sbatch", "--parsable", f"--output={log}", f"--chdir={tmp_path}", script, config]
    job = said(*map(str, command)).strip()
    assert job.isdecimal(), cluster
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
    assert "Traceback" not in log.read_text()
    whole = config_of(tmp_path, "whole", tiny_model_dir, tiny_text)
    subprocess.run([sys.executable, "-m", "sae.cli", "train", str(whole)], check=True)
    ours, theirs = (
        sae.load(tmp_path / name / "train" / "topk").state_dict() for name in ("run", "whole")
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    figure("T3", f"SLURM: {N_REQUEUES} of {N_REQUEUES} jobs requeued at SIGUSR1, the same bits")
