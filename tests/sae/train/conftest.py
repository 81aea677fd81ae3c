import datetime
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from sae.architecture import BatchTopK, Gated, JumpReLU, ReLU, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.config import L0, L1, Adam, AuxK, DictionaryConfig
from sae.train.step import TrainStep

D_IN, D_SAE, BATCH = 13, 53, 101
LOSSES = {
    "topk": {"activation": TopK(k=3), "auxk": AuxK(), "dead_after_tokens": 4 * BATCH},
    "batchtopk": {"activation": BatchTopK(k=3)},
    "relu": {
        "activation": ReLU(),
        "l1": L1(coefficient=0.3),
        "unit_norm": False,
        "decoder_norm": 0.1,
    },
    "jumprelu": {
        "activation": JumpReLU(threshold=0.1, bandwidth=0.3),
        "l0": L0(coefficient=0.1, threshold_lr=3e-2),
    },
    "gated": {"activation": Gated(), "l1": L1(coefficient=0.3)},
}


@pytest.fixture(scope="session")
def planted() -> Callable[[int], list[torch.Tensor]]:
    """Batches (101, 13) of sparse mixes of 29 planted directions, far from the origin."""

    def batches(n: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        atoms = torch.randn(29, D_IN, generator=generator)
        out = []
        for _ in range(n):
            fires = torch.rand(BATCH, 29, generator=generator) < 0.07
            sizes = torch.rand(BATCH, 29, generator=generator) + 0.5
            out.append((fires * sizes) @ atoms + 3.0)
        return out

    return batches


def child(work: Callable[[], object], report: Path) -> int:
    """Run something in a forked process that never returns here; return its id."""
    with warnings.catch_warnings():
        # Only this thread goes on in the child, which touches none of what the others hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process:
        return process
    try:
        work()
    except BaseException as problem:  # noqa: BLE001
        report.write_text(traceback.format_exc())
        os._exit(int(problem.code) if isinstance(problem, SystemExit) else 1)
    os._exit(0)


@pytest.fixture
def in_processes(tmp_path: Path) -> Callable[[int, Callable[[], object]], dict[int, Path]]:
    """Start `work()` in n processes as torchrun does; their ids, and where a failure is told."""

    def run(n: int, work: Callable[[], object]) -> dict[int, Path]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def one(rank: int) -> None:
            os.environ.update(
                TORCHELASTIC_RUN_ID="test",
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(n),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            work()

        said = [tmp_path / f"said-{port}-{rank}.txt" for rank in range(n)]
        return {child(lambda r=r: one(r), said[r]): said[r] for r in range(n)}

    return run


@pytest.fixture
def in_ranks(tmp_path: Path) -> Callable[..., list[dict[str, torch.Tensor]]]:
    """Call `work()` in n processes of one gloo group; what each returns, in their order."""

    def run(n: int, work: Callable[[], dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        folder = tmp_path / f"ranks-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()

        def one(rank: int) -> None:
            timeout = datetime.timedelta(seconds=60)
            store = f"file://{folder}/store"
            dist.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=n, timeout=timeout
            )
            found = {name: t.detach().contiguous() for name, t in work().items()}
            save_file(found, folder / f"{rank}.safetensors")
            dist.destroy_process_group()

        children = [child(lambda r=r: one(r), folder / f"{r}.txt") for r in range(n)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in children]
        said = "\n".join(path.read_text() for path in sorted(folder.glob("*.txt")))
        assert codes == [0] * n, said
        return [load_file(folder / f"{rank}.safetensors") for rank in range(n)]

    return run


@pytest.fixture(scope="session")
def entry() -> Callable[..., DictionaryConfig]:
    """Entries of `saes:` by kind, of 53 latents, and with what else they are given."""

    def made(kind: str, **fields) -> DictionaryConfig:
        return DictionaryConfig(**{
            "d_sae": D_SAE,
            **LOSSES[kind],
            "optimizer": Adam(lr=1e-2),
            **fields,
        })

    return made


@pytest.fixture(scope="session")
def step_of() -> Callable[..., TrainStep]:
    """A TrainStep from a config, on fresh weights."""

    def made(config: DictionaryConfig, seed: int = 0, total: int = 60) -> TrainStep:
        autoencoder = SparseAutoencoder(config.architecture(D_IN, 0.5))
        generator = torch.Generator().manual_seed(seed)
        initialise(autoencoder, generator, decoder_norm=config.decoder_norm)
        return TrainStep(autoencoder, config, total)

    return made


@pytest.fixture(scope="session")
def resumed() -> Callable[[TrainStep, TrainStep], TrainStep]:
    """Give a step the state of another one, as a checkpoint would."""

    def made(to: TrainStep, of: TrainStep) -> TrainStep:
        to.load_state_dict({k: v.clone() for k, v in of.state_dict().items()})
        return to

    return made
