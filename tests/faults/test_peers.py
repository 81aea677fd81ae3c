"""What the tools underneath do about the same faults: why this project has its own ways.

Each reproduces in seconds with the release that is installed; if one of these fails, a library has
mended it.
"""

import os
import random
import warnings

import lightning
import numpy as np
import pytest
import torch
import zarr


def array_at(path, **options):
    data = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = zarr.create_array(path, shape=data.shape, dtype="float16", **options)
        array[:] = data
    return data


def test_zarr_gives_wrong_numbers_after_a_flipped_bit(tmp_path, figure):
    data, made, silent, n = array_at(tmp_path / "a", chunks=(64, 16)), random.Random(0), 0, 100
    [chunk] = [p for p in (tmp_path / "a" / "c").rglob("*") if p.is_file()]
    whole = chunk.read_bytes()
    for _ in range(n):
        changed = bytearray(whole)
        changed[made.randrange(len(whole))] ^= 1 << made.randrange(8)
        chunk.write_bytes(changed)
        try:
            result = zarr.open_array(tmp_path / "a", mode="r")[:]
        except Exception:  # noqa: BLE001
            continue
        silent += not np.array_equal(result, data)
    assert silent > n / 2
    figure("P1", f"zarr {zarr.__version__}, default: {silent} of {n} flipped bits are numbers")


def test_zarr_reads_a_deleted_chunk_as_zeros(tmp_path, figure):
    array_at(tmp_path / "a", chunks=(16, 16))
    next(p for p in sorted((tmp_path / "a" / "c").rglob("*")) if p.is_file()).unlink()
    result = zarr.open_array(tmp_path / "a", mode="r")[:]
    assert not result[:16].any()
    assert result[16:].any()
    figure("P2", f"zarr {zarr.__version__}: a deleted chunk is read as zeros")


def n_lost(path, n):
    """Rows that two processes lost, each of which wrote every second row of one shard."""
    options = {"shape": (n, 4), "dtype": "float32", "chunks": (1, 4), "shards": (n, 4)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.create_array(path, **options)[:] = 0
    processes = []
    for rank in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            process = os.fork()
        if process == 0:
            code = 1
            try:
                array = zarr.open_array(path, mode="r+")
                for row in range(rank, n, 2):
                    array[row] = row + 1
                code = 0
            finally:
                os._exit(code)
        processes.append(process)
    assert [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in processes] == [0, 0]
    return int((zarr.open_array(path, mode="r")[:, 0] != np.arange(n) + 1).sum())


def test_two_writers_of_one_zarr_shard_lose_rows(tmp_path, figure):
    """A shard is read, changed and written whole: what another one wrote meanwhile is gone."""
    lost = 0
    for attempt in range(9):  # on a busy machine the second may begin when the first is done
        lost = lost or n_lost(tmp_path / str(attempt), 64)
    assert lost > 0
    figure("P3", f"zarr {zarr.__version__}: two writers of one shard lose {lost} of 64 rows")


@pytest.mark.filterwarnings("ignore")
def test_lightning_s_checkpoints_are_not_synced(tmp_path, monkeypatch, figure):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(1), fsync(descriptor)))

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def training_step(self, batch):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(4, 2)))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").stat().st_size > 0
    assert synced == []
    figure("P4", f"lightning {lightning.__version__}: 0 calls of fsync for a checkpoint")
