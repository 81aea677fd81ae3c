"""Every file in configs/ trains, shrunk to 53 latents over rows of width 13."""

import dataclasses
from pathlib import Path

import pytest
import torch

from sae.architecture import SAEConfig, Slice
from sae.autoencoder import SparseAutoencoder, initialise
from sae.config import load
from sae.run.config import RunConfig
from sae.train.config import DictionaryConfig
from sae.train.optim_config import Tied
from sae.train.step import TrainStep

CONFIGS = Path(__file__).parents[3] / "configs"
D_IN, D_OUT, D_SAE, STEPS = 13, 7, 53, 30
SMALL = {
    "d_sae": D_SAE,
    "dead_after_tokens": 404,
    "optimizer.lr": 1e-2,
    "activation.k": 3,
    "l1.coefficient": 0.3,
    "tanh.coefficient": 0.3,
    "l0.coefficient": 0.1,
    "l0.target": 3.0,
    "control.target": 3.0,
    "matryoshka.ends": [2, 7, 29],
    "matryoshka.ks": [1, 2],
    "refine.until": 0.1,
}
"""What is made small where an entry has it."""
FILES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
SOURCES = {
    "anthropic_2024_04": "April 2024",
    "anthropic_2025_01": "January 2025",
    "batchtopk": "2412.06410",
    "cross_layer": "Lindsey et al. 2025",
    "crosscoder": "October 2024",
    "default": "2503.17547",
    "end_to_end": "2503.17272",
    "gated": "2404.16014",
    "jumprelu_gemma_scope": "2408.05147",
    "kinds": "2407.14435",
    "matryoshka_batchtopk": "2503.17547",
    "msae_clip": "2502.20578",
    "openai_topk_auxk": "2406.04093",
    "transcoder_skip": "2501.18823",
}
OF_THEIR_OWN = {
    "cross_layer": (
        "model.layers.15.mlp:out",
        *(f"model.layers.{layer}.mlp:in" for layer in (14, 15, 16)),
        "model.layers.14.mlp:out",
        "model.layers.16.mlp:out",
    ),
    "crosscoder": ("model.layers.15:out", "model.layers.7:out", "model.layers.23:out"),
    "transcoder_skip": ("model.layers.15.mlp:out", "model.layers.15.mlp:in"),
}
"""Recipes of several hook points, which the demo's cache has not."""


def entries(file: str) -> dict[str, DictionaryConfig]:
    """The dictionaries of a recipe, shrunk by overrides as a user writes them."""
    whole = load(RunConfig, CONFIGS / f"{file}.yaml").train.saes
    overrides = []
    for name, entry in whole.items():
        for path, value in SMALL.items():
            part = entry
            for key in path.split("."):
                part = getattr(part, key, None)
            if part is not None:
                overrides.append(f"train.saes.{name}.{path}={value}")
        if entry.cross_layer:
            overrides.append(f"train.saes.{name}.d_sae={D_SAE - D_SAE % len(entry.inputs)}")
    return dict(load(RunConfig, CONFIGS / f"{file}.yaml", overrides).train.saes)


ENTRIES = {f"{file}:{name}": entry for file in FILES for name, entry in entries(file).items()}
LEARNED = {name: entry for name, entry in ENTRIES.items() if not entry.cross_layer}
"""Those of which a part may be frozen."""
every_entry = pytest.mark.parametrize("config", ENTRIES.values(), ids=ENTRIES)


def step_of(config: DictionaryConfig, seed: int = 0, precision: str = "fp32") -> TrainStep:
    made = SparseAutoencoder(form(config))
    width = made.config.width_out
    mean = torch.full((width,), 3.0) if config.input_norm == "none" else None
    generator = torch.Generator().manual_seed(seed)
    initialise(made, generator, mean=mean, decoder_norm=config.decoder_norm)
    return TrainStep(made, config, STEPS, precision=precision)


def form(config: DictionaryConfig) -> SAEConfig:
    """Several hook points share the width; what is predicted is the last seven columns."""
    n = len(config.inputs)
    parts = [D_IN // max(n, 1)] * max(n - 1, 0)
    widths = [*parts, D_IN - sum(parts)]
    inputs = tuple(
        Slice(hook_point=p, width=w) for p, w in zip(config.inputs, widths, strict=False)
    )
    if not config.outputs:
        return config.architecture(D_IN, 0.5, inputs=inputs)
    n = len(config.outputs)
    widths = [D_OUT // n] * (n - 1)
    widths.append(D_OUT - sum(widths))
    places = zip(config.outputs, widths, strict=True)
    outputs = tuple(Slice(hook_point=p, width=w) for p, w in places)
    return config.architecture(
        D_IN, 0.5, d_out=D_OUT, output_scale=0.5, inputs=inputs, outputs=outputs
    )


def given(config: DictionaryConfig, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a step takes of planted rows."""
    return (x, x[:, -D_OUT:].contiguous()) if config.outputs else (x,)


@every_entry
def test_a_recipe_learns_and_a_resumed_run_of_it_is_bit_equal(config, planted):
    rows, whole = [given(config, x) for x in planted(STEPS)], step_of(config)
    metrics = [whole(*x) for x in rows]
    assert all(bool(m.finite) for m in metrics)
    first, last = (
        torch.stack([m.fvu for m in part]).mean() for part in (metrics[:3], metrics[-3:])
    )
    assert float(last) < 0.8 * float(first)
    assert float(metrics[-1].l0) > 0
    begun = step_of(config)
    for x in rows[:13]:
        begun(*x)
    resumed = step_of(config, seed=99)
    resumed.load_state_dict({k: v.clone() for k, v in begun.state_dict().items()})
    assert [float(resumed(*x).loss) for x in rows[13:]] == [float(m.loss) for m in metrics[13:]]
    states = [step.state_dict() for step in (resumed, whole)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@every_entry
def test_a_recipe_learns_as_much_with_products_in_bf16(config, planted):
    curves = []
    for precision in ("fp32", "bf16"):
        step = step_of(config, precision=precision)
        curves.append([float(step(*given(config, x)).fvu) for x in planted(10)])
        assert all(p.dtype == torch.float32 for p in step.autoencoder.parameters())
    assert abs(curves[0][-1] - curves[1][-1]) < 0.05 * curves[0][0]


@pytest.mark.parametrize("config", LEARNED.values(), ids=LEARNED)
def test_a_recipe_keeps_a_frozen_decoder_and_skips_rows_that_are_not_finite(config, planted):
    rows = [given(config, x) for x in planted(4)]
    step = step_of(dataclasses.replace(config, frozen="decoder", init=Tied()))
    decoder = step.autoencoder.dec_rows.detach().clone()
    encoder = step.autoencoder.enc_rows.detach().clone()
    for x in rows[:3]:
        step(*x)
    assert torch.equal(step.autoencoder.dec_rows, decoder)
    assert not torch.equal(step.autoencoder.enc_rows, encoder)
    before = {k: v.clone() for k, v in step.state_dict().items()}
    bad = rows[3][0].clone()
    bad[5, 7] = float("inf")
    assert not bool(step(bad, *rows[3][1:]).finite)
    after = step.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"n_steps"}


@pytest.mark.parametrize("file", sorted(SOURCES))
def test_a_recipe_names_its_source_and_shares_the_cache_of_the_demo(file):
    comment = (CONFIGS / f"{file}.yaml").read_text().split("output:")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert SOURCES[file] in " ".join(comment.split())
    one, demo = (load(RunConfig, CONFIGS / f"{name}.yaml") for name in (file, "demo"))
    own = OF_THEIR_OWN.get(file)
    like = demo.cache if own is None else dataclasses.replace(demo.cache, hook_points=own)
    assert one.cache == like
    assert one.cache_path == (f"{demo.output}/cache" if own is None else None)
    assert one.output == f"runs/{file}"


def test_every_file_is_known():
    assert set(FILES) == {*SOURCES, "demo", "demo_small", "demo_vision", "study"}
