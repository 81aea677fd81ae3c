"""What the libraries themselves save, encode and decode, where they are installed: `make peers`."""

import json

import pytest
import torch

import sae
from sae.architecture import BatchTopK, Gated, JumpReLU, ReLU, SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder
from sae.pretrained.export import export

D, F, D_OUT, K = 17, 61, 11, 5
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]
KINDS = {
    "relu": ReLU(), "topk": TopK(k=K), "batchtopk": BatchTopK(k=K), "jumprelu": JumpReLU(),
    "gated": Gated(),
}  # fmt: skip


@pytest.fixture
def x():
    return torch.randn(29, D, generator=torch.Generator().manual_seed(3)) * 2 + 0.5


def fill(module):
    """Random parameters; thresholds that some rows pass."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            size = 0.3 if parameter.dim() == 2 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
            if "threshold" in name:
                parameter.abs_().add_(0.3)
    return module


def differs(got, wanted):
    return float((got - wanted.double()).abs().max() / wanted.double().abs().max())


def agrees(path, x, acts, x_hat):
    dictionary = sae.load(path, allow_pt=True).double()
    with torch.no_grad():
        assert differs(dictionary(x.double()), x_hat) < 1e-6
        assert differs(dictionary.encode_dense(x.double()), acts) < 1e-6


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_saelens(tmp_path, x, architecture, norm):
    registry = pytest.importorskip("sae_lens.registry").SAE_CLASS_REGISTRY
    kind, config = registry[architecture]
    given = {"d_in": D, "d_sae": F, "normalize_activations": norm, "apply_b_dec_to_input": True}
    given |= {"k": K, "rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    theirs = fill(kind(config(**given))).eval()
    theirs.save_model(tmp_path)
    with torch.no_grad():
        agrees(tmp_path, x, theirs.encode(x), theirs(x))


@pytest.mark.parametrize("skip", ["", "skip_"])
@pytest.mark.parametrize("kind", ["", "jumprelu_"])
def test_saelens_transcoders(tmp_path, x, kind, skip):
    registry = pytest.importorskip("sae_lens.registry").SAE_CLASS_REGISTRY
    made, config = registry[f"{kind}{skip}transcoder"]
    theirs = fill(made(config(d_in=D, d_sae=F, d_out=D_OUT, apply_b_dec_to_input=False))).eval()
    theirs.save_model(tmp_path)
    with torch.no_grad():
        agrees(tmp_path, x, theirs.encode(x), theirs(x))


@pytest.mark.parametrize(
    "form", [{}, {"transcode": True}, {"transcode": True, "skip_connection": True}]
)
def test_sparsify(tmp_path, x, form):
    sparsify = pytest.importorskip("sparsify")
    theirs = fill(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(k=K, num_latents=F, **form)))
    theirs.save_to_disk(tmp_path)
    with torch.no_grad():
        result = theirs.encode(x)
        acts = torch.zeros(len(x), F).scatter_(1, result.top_indices, result.top_acts)
        y = theirs.decode(result.top_acts, result.top_indices)
        agrees(tmp_path, x, acts, y if theirs.W_skip is None else y + x @ theirs.W_skip.mT)


@pytest.mark.parametrize(
    ("module", "kind", "arguments"),
    [
        ("dictionary", "AutoEncoder", ()),
        ("dictionary", "AutoEncoderNew", ()),
        ("dictionary", "GatedAutoEncoder", ()),
        ("dictionary", "JumpReluAutoEncoder", ()),
        ("trainers.top_k", "AutoEncoderTopK", (K,)),
        ("trainers.batch_top_k", "BatchTopKSAE", (K,)),
        ("trainers.matryoshka_batch_top_k", "MatryoshkaBatchTopKSAE", (K, [20, 41])),
    ],
)
def test_dictionary_learning(tmp_path, x, module, kind, arguments):
    result = pytest.importorskip(f"dictionary_learning.{module}")
    theirs = fill(getattr(result, kind)(D, F, *arguments))
    if arguments:
        theirs.threshold.fill_(0.9)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    record = {"dict_class": kind, "activation_dim": D, "dict_size": F, "k": K}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": record, "buffer": {}}))
    with torch.no_grad():
        acts = theirs.encode(x)
        agrees(tmp_path, x, acts, theirs.decode(acts))


def ours(kind, **form):
    return fill(SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, activation=KINDS[kind], **form)))


def trained(made):
    """A BatchTopK whose threshold is known."""
    if isinstance(made.config.activation, BatchTopK):
        made.threshold.fill_(0.7)
    return made


@pytest.mark.parametrize("to", ["saelens", "saebench"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_we_write_is_read_by_saelens(tmp_path, x, kind, to):
    theirs = pytest.importorskip("sae_lens").SAE
    made = trained(ours(kind, gate_by_decoder_norm=kind == "topk"))
    export(made, tmp_path, to, {"hook_name": "blocks.0.hook_resid_post", "model_name": "gpt2"})
    with torch.no_grad():
        assert differs(made.double()(x.double()), theirs.load_from_disk(tmp_path)(x)) < 1e-6


def test_what_we_write_is_read_by_sparsify(tmp_path, x):
    made = ours("topk")
    export(made, tmp_path, "sparsify")
    theirs = pytest.importorskip("sparsify").SparseCoder.load_from_disk(tmp_path)
    with torch.no_grad():
        result = theirs.encode(x)
        y = theirs.decode(result.top_acts, result.top_indices)
        assert differs(made.double()(x.double()), y) < 1e-6


@pytest.mark.parametrize(
    ("kind", "module", "name", "arguments"),
    [
        ("relu", "dictionary", "AutoEncoder", {}),
        ("gated", "dictionary", "GatedAutoEncoder", {}),
        ("jumprelu", "dictionary", "JumpReluAutoEncoder", {}),
        ("topk", "trainers.top_k", "AutoEncoderTopK", {"k": K}),
        ("batchtopk", "trainers.batch_top_k", "BatchTopKSAE", {"k": K}),
    ],
)
def test_what_we_write_is_read_by_dictionary_learning(tmp_path, x, kind, module, name, arguments):
    theirs = getattr(pytest.importorskip(f"dictionary_learning.{module}"), name)
    made = trained(ours(kind))
    export(made, tmp_path, "dictionary_learning")
    read = theirs.from_pretrained(str(tmp_path / "ae.pt"), **arguments)
    with torch.no_grad():
        assert differs(made.double()(x.double()), read(x)) < 1e-6


@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_circuit_tracer_reads_a_set_that_is_written_for_it(tmp_path, x, kind):
    library = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")
    config = SAEConfig(
        d_in=D, d_sae=F, activation=KINDS[kind], b_in="none", skip=kind == "jumprelu"
    )
    dictionary = fill(SparseAutoencoder(config))
    site = {**PLACES, "hook_name": "blocks.0.mlp.hook_in", "hook_name_out": "blocks.0.hook_mlp_out"}
    export(dictionary, tmp_path, "circuit_tracer", site)
    transcoders = library.load_transcoder_set(
        {0: str(tmp_path / "layer_0.safetensors")}, "scan", "mlp.hook_in", "hook_mlp_out",
        device=torch.device("cpu"), lazy_encoder=False, lazy_decoder=False,
    )  # fmt: skip
    theirs = transcoders.transcoders[0]
    with torch.no_grad():
        acts = theirs.encode(x)
        assert differs(acts, dictionary.encode_dense(x)) < 1e-6
        assert differs(theirs.decode(acts, x), dictionary(x)) < 1e-6


PLACES = {
    "hook_name": "blocks.5.mlp.hook_in", "hook_name_out": "blocks.5.hook_mlp_out",
    "model_name": "meta-llama/Llama-3.2-1B", "context_size": "128", "training_tokens": "1000",
    "model_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("norm", ["none", "layer_norm", "rms"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_saelens_reads_transcoders_that_are_written_for_it(tmp_path, x, kind, skip, norm):
    theirs = pytest.importorskip("sae_lens").SAE
    config = SAEConfig(
        d_in=D, d_sae=F, d_out=D_OUT, activation=KINDS[kind], b_in="none", skip=skip,
        input_norm=norm, undo_norm=norm == "none",
    )  # fmt: skip
    dictionary = fill(SparseAutoencoder(config))
    export(dictionary, tmp_path, "saelens", PLACES)
    read = theirs.load_from_disk(tmp_path)
    with torch.no_grad():
        assert differs(read(x), dictionary(x)) < 1e-6
        assert differs(read.encode(x), dictionary.encode_dense(x)) < 1e-6
    metadata = read.cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == (PLACES["model_name"], PLACES["hook_name"])
    assert metadata.hook_name_out == PLACES["hook_name_out"]
    assert (metadata.context_size, metadata.training_tokens) == (128, 1000)
    assert metadata.model_from_pretrained_kwargs == {"dtype": "bfloat16"}
