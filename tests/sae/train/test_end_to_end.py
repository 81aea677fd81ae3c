"""End-to-end fine-tuning: the KL is the model's, and its gradient reaches the dictionary."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import activations_cache
from activations_cache.hooks import capture, edit
from activations_cache.testing import synthetic_plan, write_synthetic
from sae import load
from sae.architecture import BatchTopK, JumpReLU, ReLU, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.evaluate import EvaluateConfig, evaluate
from sae.train.config import Adam, DictionaryConfig, TrainConfig
from sae.train.end_to_end import EndToEndStep, require_contexts
from sae.train.fit import train
from sae.train.loss_config import L0, L1, Refine
from sae.train.optim_config import EndToEnd, Resample
from sae.train.step import TrainStep

HOOK, WIDTH, VOCAB, SKIP = "model.layers.0:out", 8, 37, 2
RELU = DictionaryConfig(
    d_sae=2 * WIDTH,
    activation=ReLU(),
    b_in="none",
    unit_norm=False,
    l1=L1(coefficient=0.0),
    optimizer=Adam(lr=3e-3, clip=None),
)


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=19, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=VOCAB, max_position_embeddings=64,
        initializer_range=0.5, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(5)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def tokens(seed: int = 0) -> torch.Tensor:
    ids = torch.randint(VOCAB, (11, 13), generator=torch.Generator().manual_seed(seed))
    ids[3, 7:] = -1
    return ids


def identity() -> SparseAutoencoder:
    made = SparseAutoencoder(RELU.architecture(WIDTH, 0.5))
    with torch.no_grad():
        for rows in (made.enc_rows, made.dec_rows):
            rows.copy_(torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]))
    return made


def test_a_dictionary_that_gives_back_what_it_reads_costs_nothing(model):
    step = EndToEndStep(TrainStep(identity(), RELU, 7), model, HOOK, skip_positions=SKIP)
    found = step(tokens())
    assert float(found.kl) == pytest.approx(0, abs=1e-5)
    assert float(found.rows.fvu) == pytest.approx(0, abs=1e-9)


def test_loss_and_gradients_are_those_of_the_definition(model):
    made = identity()
    with torch.no_grad():
        made.dec_rows += 0.3 * torch.randn(
            made.dec_rows.shape, generator=torch.Generator().manual_seed(1)
        )
    ids = tokens()
    mask = (ids >= 0) & (torch.arange(13) >= SKIP)
    with capture(model, [HOOK]) as run:
        stream = run(ids.clamp_min(0))[HOOK]
    x_hat = made(stream.flatten(0, 1)).view(stream.shape)
    new = torch.where(mask[..., None], x_hat, stream)
    base = model(input_ids=ids.clamp_min(0)).logits.log_softmax(-1)[mask]
    with edit(model, {HOOK: lambda _stream, _positions: new}):
        spliced = model(input_ids=ids.clamp_min(0)).logits.log_softmax(-1)[mask]
    kl = torch.nn.functional.kl_div(spliced, base, log_target=True, reduction="sum") / mask.sum()
    error = (0.5 * (x_hat - stream)[mask]).square().sum(dim=1).mean()
    grads = torch.autograd.grad(error + 0.7 * kl, [made.enc_rows, made.dec_rows, made.b_dec])
    step = TrainStep(made, RELU, 7)
    found = EndToEndStep(step, model, HOOK, coefficient=0.7, skip_positions=SKIP)(ids)
    torch.testing.assert_close(found.kl, kl.detach())
    torch.testing.assert_close(found.rows.loss, (error + 0.7 * kl).detach())
    assert float(kl.detach()) > 0.01
    for name, grad in zip(("enc_rows", "dec_rows", "b_dec"), grads, strict=True):
        torch.testing.assert_close(made.get_parameter(name).grad, grad, rtol=1e-3, atol=1e-5)


def test_the_kl_is_as_large_as_the_loss_on_rows_by_default(model):
    made = SparseAutoencoder(RELU.architecture(WIDTH, 0.5))
    initialise(made, torch.Generator().manual_seed(0))
    found = EndToEndStep(TrainStep(made, RELU, 7), model, HOOK)(tokens())
    alone = SparseAutoencoder(RELU.architecture(WIDTH, 0.5))
    initialise(alone, torch.Generator().manual_seed(0))
    fixed = EndToEndStep(TrainStep(alone, RELU, 7), model, HOOK, coefficient=0.0)(tokens())
    assert float(found.rows.loss) == pytest.approx(2 * float(fixed.rows.loss), rel=1e-5)


def test_a_model_that_would_learn_is_refused(model):
    other = torch.nn.Linear(3, 5)
    with pytest.raises(ValueError, match="model must have weights without gradients"):
        EndToEndStep(TrainStep(identity(), RELU, 7), other, HOOK)


def test_rows_that_a_cache_leaves_out_stay_the_models_own(model):
    ids = tokens()
    given = (torch.arange(13) >= SKIP).expand(11, 13)
    made = [
        EndToEndStep(TrainStep(identity(), RELU, 7), model, HOOK, skip_positions=skip)
        for skip in (SKIP, 0)
    ]
    one, other = made[0](ids), made[1](ids, given)
    assert float(one.kl) == float(other.kl)
    assert float(one.rows.loss) == float(other.rows.loss)


TOPK = DictionaryConfig(d_sae=61, activation=TopK(k=3), optimizer=Adam(lr=3e-3))
TUNED = replace(TOPK, end_to_end=EndToEnd(n_rows=6000, lr=1e-3, contexts=7))
CONFIG = TrainConfig(saes={"rows": TOPK, "tuned": TUNED}, batch=101, precision="fp32")


@pytest.fixture(scope="module")
def cache(tiny_cache_config, tmp_path_factory):
    config = replace(tiny_cache_config, hook_points=("model.layers.1:out",), n_rows=2003)
    return activations_cache.build(config, tmp_path_factory.mktemp("end") / "cache")


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    return train(cache, CONFIG, tmp_path_factory.mktemp("end") / "run")


def test_an_entry_that_ends_so_predicts_better_on_text_that_it_never_saw(
    cache, trained, tiny_model
):
    dictionaries = {name: load(path) for name, path in trained.items()}
    settings = EvaluateConfig(n_contexts=8, n_contexts_special=2)
    point = cache.hook_points[0]
    report = evaluate(dictionaries, cache, point, tiny_model.model, settings).report
    kl = {n: report.spliced(n).dictionaries[n].kl.value for n in dictionaries}
    assert kl["tuned"] < 0.95 * kl["rows"]
    record = json.loads((trained["tuned"] / "provenance.json").read_text())["end_to_end"]
    assert record["kl_last"] < record["kl_first"]
    assert record["steps"] == pytest.approx(6000 / (7 * 30), abs=1.5)
    assert "end_to_end" not in json.loads((trained["rows"] / "provenance.json").read_text())


def test_a_run_that_was_killed_in_its_end_gives_the_same_bits(cache, trained, tmp_path):
    def stop(done, _total, unit):
        if unit == "steps end to end" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cache, CONFIG, tmp_path / "run", progress=stop)
    assert not (tmp_path / "run" / "rows").exists()
    again = train(cache, CONFIG, tmp_path / "run")
    for name, path in trained.items():
        one, other = (load_file(p / "sae.safetensors") for p in (path, again[name]))
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "entry",
    [
        DictionaryConfig(d_sae=61, activation=BatchTopK(k=3), end_to_end=EndToEnd(n_rows=300)),
        DictionaryConfig(
            d_sae=61, activation=JumpReLU(threshold=0.1), l0=L0(threshold_lr=1e-2),
            end_to_end=EndToEnd(n_rows=300, coefficient=0.5),
        ),
        replace(RELU, d_sae=61, l1=L1(coefficient=0.1), end_to_end=EndToEnd(n_rows=300)),
    ],
    ids=["batchtopk", "jumprelu", "relu"],
)  # fmt: skip
def test_every_activation_may_end_so(cache, entry, tmp_path):
    found = train(cache, replace(CONFIG, saes={"a": entry}), tmp_path / "run")["a"]
    assert all(bool(t.isfinite().all()) for t in load_file(found / "sae.safetensors").values())


def test_what_has_no_contexts_of_a_model_is_refused_before_it_is_trained(
    tiny_cache_config, tmp_path
):
    plan = synthetic_plan({"model.layers.1:out": 7}, n_examples=61)
    rows = write_synthetic(tmp_path / "rows", plan)
    with pytest.raises(ValueError, match="rows must be of a language model's texts beside end_to"):
        train(rows, CONFIG, tmp_path / "run")
    text = replace(tiny_cache_config.text, attention="document")
    apart = replace(tiny_cache_config, text=text, n_rows=200, hook_points=("model.layers.1:out",))
    cache = activations_cache.build(apart, tmp_path / "apart")
    with pytest.raises(ValueError, match="apart must have attention 'context' beside end_to_end"):
        train(cache, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_several_processes_are_refused(cache):
    with pytest.raises(ValueError, match="processes must be 1 beside end_to_end, got 2"):
        require_contexts(cache, 2)


@pytest.mark.parametrize("name", ["refine", "resample"])
def test_what_has_a_schedule_of_its_own_does_not_end_so(name):
    value = {"refine": Refine(), "resample": Resample()}[name]
    with pytest.raises(ValueError, match=f"{name} must be absent beside end_to_end"):
        replace(TUNED, **{name: value})
