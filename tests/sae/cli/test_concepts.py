"""`sae concepts`: where sets come from, what is tested, and what is refused."""

import json

import pytest
import torch

from activations_cache.checks import silent
from sae import run
from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder, initialise
from sae.pretrained import load, save
from sae.run import concept_sets as module
from sae.run.concept_sets import BOTTLENECK, FILE, concept_sets
from sae.run.config import ConceptsRequest
from sae.run.finding import token_of
from sae.steer.attribution import logit_difference, metric_at
from sae.steer.search import mean_rows
from tests.sae.run.test_jobs import as_json, command

HOOK = "model.layers.1:out"
PROMPTS = ["Aba cede", "Deba acab", "Ceda bade", "Bace daba"]


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory, tiny_model, tiny_model_config):
    path = tmp_path_factory.mktemp("concepts") / "mine"
    made = SparseAutoencoder(SAEConfig(d_in=23, d_sae=29, activation=ReLU()))
    initialise(made, torch.Generator().manual_seed(1))
    model = {**tiny_model.identity, "path": tiny_model_config.path}
    save(made, path, {"hook_point": HOOK, "model": model})
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two concepts as files and one as a folder; a file of other texts."""
    root = tmp_path_factory.mktemp("sets")
    (root / "concepts" / "folder").mkdir(parents=True)
    for i in range(6):
        (root / "concepts" / "folder" / f"{i}.txt").write_text(f"bade {'cab ' * i} daba")
    (root / "concepts" / "ones.txt").write_text("\n".join(f"aba {'aba ' * i}" for i in range(1, 9)))
    twos = "\n\n".join(f"cede deca {'ba ' * i}" for i in range(1, 7))
    (root / "concepts" / "twos.txt").write_text(twos)
    words = ["aba", "cede", "dab", "bece", "ca", "ed"]
    texts = [f"{a} {b} {c}" for a in words for b in words for c in words]
    (root / "others.txt").write_text("\n".join(texts))
    return root


def test_the_command_gives_the_numbers_of_the_function(dictionary, sets, capsys):
    given = [f"--prompt={prompt}" for prompt in PROMPTS]
    others = sets / "others.txt"
    assert command(
        "concepts", dictionary, "--concepts", sets / "concepts", *given, "--target", "a",
        "--out", sets / "out", "sets=8", f"random={others}", "against=b",
    ) == 0  # fmt: skip
    result = run.concepts(
        dictionary, concepts=str(sets / "concepts"), prompts=PROMPTS, target="a", against="b",
        sets=8, random=str(others),
    )  # fmt: skip
    record = json.loads((sets / "out" / FILE).read_text())
    assert record == as_json(result.record)
    assert list(result.stream) == list(result.latents) == ["folder", "ones", "twos"]
    assert (result.n_texts, result.n_prompts) == (6, 4)
    for one in (*result.stream.values(), *result.latents.values()):
        assert 2 / 9 <= one.p <= 1
        assert not one.significant
    shown = " ".join(capsys.readouterr().out.split())
    assert "with 8 random sets no concept can be significant, it takes sets=119" in shown


def test_a_concept_that_the_answer_moves_along_is_found(dictionary, sets, monkeypatch):
    """The gradients are planted: they point from other texts to those of one concept."""
    others = (sets / "others.txt").read_text().splitlines()[:50]
    ones = (sets / "concepts" / "ones.txt").read_text().splitlines()

    def planted(placed, loaded, prompts, request, report):
        read = (loaded.model, loaded.tokenizer, placed)
        sides = [mean_rows(*read, texts, 1, report) for texts in (ones, others)]
        towards = (a.mean(dim=0) - b.mean(dim=0) for a, b in zip(*sides, strict=True))
        return tuple(direction.expand(7, -1) for direction in towards)

    monkeypatch.setattr(module, "_gradients", planted)
    fast = lambda a, b: torch.nn.functional.normalize(a.mean(0) - b.mean(0), dim=0)  # noqa: E731
    monkeypatch.setattr("sae.evaluate.concepts.concept_vector", fast)
    only = sets / "only"
    only.mkdir()
    (only / "ones.txt").write_text("\n".join(ones))
    result = run.concepts(
        dictionary, concepts=str(only), prompts=PROMPTS, target="a", sets=20, sides="greater",
        random=str(sets / "others.txt"),
    )  # fmt: skip
    for tested in (result.stream["ones"], result.latents["ones"]):
        assert (tested.score, tested.p, tested.significant) == (1.0, 1 / 21, True)


def test_gradients_are_of_moving_all_positions(dictionary, tiny_model):
    placed = load(dictionary).requires_grad_(False)
    request = ConceptsRequest(concepts="x", prompts=("Aba cede",), target="a")
    stream, latents = module._gradients(placed, tiny_model, ["Aba cede"], request, silent)
    direction = torch.randn(23, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([tiny_model.tokenizer("Aba cede")["input_ids"]])
    moved = torch.zeros(2, ids.shape[1], 23)
    moved[0, 1:], moved[1, 1:] = 1e-3 * direction, -1e-3 * direction
    metric = logit_difference(token_of(tiny_model, "a"))
    up, down = metric_at(tiny_model.model, placed, ids.expand(2, -1), metric, moved)[0].tolist()
    assert float(stream[0] @ direction) == pytest.approx((up - down) / 2e-3, rel=0.02)
    assert torch.allclose(latents[0], placed.dec_rows @ stream[0], atol=1e-5)


def test_records_name_their_concepts_in_a_field(tmp_path):
    records = [{"t": f"text {i}", "c": "odd" if i % 2 else "even"} for i in range(5)]
    path = tmp_path / "sets.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    sets = concept_sets(path, "t", "c")
    assert sets == {"even": ["text 0", "text 2", "text 4"], "odd": ["text 1", "text 3"]}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (("--prompt", "Aba"), "prompts must hold at least 2 texts, got 1"),
        (
            ("--prompt", "Aba", "--prompt", "Dab", "sets=40"),
            "random must hold 240 texts for 40 set",
        ),
        (("--prompt", "Aba", "--prompt", "Dab", "sets=3"), "sets must be at least 4, got 3"),
        (("--prompt", "Aba", "--prompt", "Dab", "level=1.5"), "level must be above 0 and below 1"),
        ((), "prompts must hold at least two texts"),
    ],
)
def test_wrong_requests_are_one_line(dictionary, sets, capsys, changed, problem):
    code = command(
        "concepts", dictionary, "--concepts", sets / "concepts", "--target", "a",
        f"random={sets / 'others.txt'}", "sets=5", *changed,
    )  # fmt: skip
    assert code in {1, 2}
    [line] = capsys.readouterr().err.splitlines()
    assert problem in line


def test_a_concept_of_one_text_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("alone\n\n")
    with pytest.raises(ValueError, match="concept 'one' must have at least 2 texts, got 1"):
        concept_sets(tmp_path)
    (tmp_path / "one.txt").unlink()
    with pytest.raises(ValueError, match=r"concepts must hold NAME\.txt, NAME/ or records"):
        concept_sets(tmp_path)
    with pytest.raises(FileNotFoundError):
        concept_sets(tmp_path / "nowhere.jsonl")


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """Texts with two concepts, whose answer is whether they have one of them and not both."""
    path = tmp_path_factory.mktemp("answered") / "records.jsonl"
    fillers = ["aba", "cede", "dab", "bece", "ca", "ed"]
    records = []
    for i, (a, b) in enumerate((a, b) for a in fillers for b in fillers):
        for first in (True, False):
            for second in (True, False):
                has = {"first": first, "second": second}
                words = f"{a} {'ffff ' * first}{b} {'1999 ' * second}{a}{i % 3}"
                names = [name for name, value in has.items() if value]
                records.append({
                    "text": words, "answer": "yes" if first != second else "no",
                    "concepts": has if i % 2 else names,
                })  # fmt: skip
    path.write_text("\n".join(map(json.dumps, [*records, records[0]])))
    return path


def test_a_bottleneck_by_command_is_that_of_the_function(dictionary, answered, tmp_path, capsys):
    given = ("concepts", dictionary, "--bottleneck", answered, "--out", tmp_path, "head=tree")
    assert command(*given, "k=7") == 0
    result = run.bottleneck(dictionary, records=str(answered), head="tree", k=7)
    assert json.loads((tmp_path / BOTTLENECK).read_text()) == as_json({
        **result._asdict(),
        "arms": [{**a._asdict(), "figures": a.figures} for a in result.arms],
    })
    assert (result.names, result.n_repeated) == (("first", "second"), 1)
    assert (result.n_fitted, result.n_held_out) == (101, 43)
    arms = {(arm.head, arm.place): arm.figures for arm in result.arms}
    assert set(arms) == {
        (head, place) for head in ("bottleneck", "embedding") for place in ("stream", "latents")
    }
    for (head, place), figures in arms.items():
        assert len(figures.accuracy) == 3
        assert figures.control[0] == figures.accuracy[0]
        if head == "bottleneck":  # true concepts decide the answer, those of others do not
            assert figures.accuracy[-1] == 1.0, place
        assert figures.control[-1] < 0.8
    assert "2 concepts" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (['{"text": "a"}'], ":1 must be a record with text, answer and concepts"),
        (["", "nonsense"], ":2 must be a record"),
        (
            ['{"text": "aba b", "answer": 1, "concepts": []}'] * 9,
            "got 0 concepts and 1 answers in 1 texts",
        ),
        (['{"text": " ", "answer": 1, "concepts": ["x"]}'], ":1 must be a record"),
        (
            [f'{{"text": "aba {i}", "answer": {i % 2}, "concepts": ["x"]}}' for i in range(9)],
            "concept 'x' in the texts to fit on must have both classes, got 6 positive of 6",
        ),
    ],
)
def test_records_that_are_none_cost_one_line(dictionary, tmp_path, capsys, lines, problem):
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(lines))
    assert command("concepts", dictionary, "--bottleneck", path) == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.startswith("error: ")
    assert problem in shown


def test_a_bottleneck_takes_no_options_of_tcav(dictionary, answered, capsys):
    assert command("concepts", dictionary, "--bottleneck", answered, "--target", "a") == 2
    assert "target must be absent beside --bottleneck" in capsys.readouterr().err
