"""What a notebook shows: whole HTML, no scripts, every text escaped, and the objects' figures."""

from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

from sae import notebook
from sae.architecture import SAEConfig, TopK
from sae.autoencoder import Latents, SparseAutoencoder, initialise
from sae.browser import ResultTable
from sae.run.context import FactTable, Section
from sae.run.steering import LatentSweep, SteeredText
from sae.steer.generation import Generation
from sae.steer.steering import Steering
from sae.steer.sweep import CELLS, LATENT, RANDOM, Point, Sweep

HOSTILE = "<script>alert(1)</script> & \"'"


class Cells(HTMLParser):
    """Texts by the tag that they stand in; refuses tags that are left open, and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        assert tag != "script"
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1], []).append(data)


def shown(result: object) -> dict[str, list[str]]:
    return Cells(result._repr_html_()).texts  # pyright: ignore[reportAttributeAccessIssue]


def point(arm: str, strength: float, kl: float) -> Point:
    return Point(
        arm=arm, strength=strength, target_gain=0.5, target_share=0.1, kl_neutral=kl,
        top1_agreement=0.9, perplexity=12.0, repeated=0.7, is_loop=True, n_moved=2.0,
        read_back=strength, n_tokens=5, text=HOSTILE,
    )  # fmt: skip


SWEEP = Sweep(
    points=tuple(point(arm, *at) for arm in (LATENT, RANDOM) for at in ((1.0, 0.1), (2.0, 9.0))),
    max_kl=0.3, perplexity_base=10.0, base="base",
)  # fmt: skip
RESULTS = {
    "table": ResultTable(("", HOSTILE), ((HOSTILE, "1"),), HOSTILE),
    "section": Section(HOSTILE, ResultTable(("a",), ((HOSTILE,),), "")),
    "facts": FactTable(HOSTILE, [(HOSTILE, HOSTILE)], HOSTILE),
    "steered": SteeredText(HOSTILE, HOSTILE, HOSTILE, 3, 2, 0.25),
    "generation": Generation(
        prompt=HOSTILE, text=HOSTILE, prompt_tokens=(1,), tokens=(2,), max_new_tokens=1
    ),
    "sweep": SWEEP,
    "latent's sweep": LatentSweep(3, SWEEP, "latent 3", HOSTILE, [HOSTILE]),
}


@pytest.mark.parametrize("name", RESULTS)
def test_texts_are_shown_as_they_are(name):
    texts = [text for of_tag in shown(RESULTS[name]).values() for text in of_tag]
    assert any(HOSTILE in text or repr(HOSTILE) in text for text in texts)


def test_a_long_table_is_cut_and_says_so():
    rows = tuple((str(n), "x") for n in range(notebook.MOST_ROWS + 1_234))
    texts = shown(ResultTable(("n", "x"), rows, "a note"))
    assert len(texts["td"]) == 2 * notebook.MOST_ROWS
    assert texts["small"] == ["1,234 more rows; a note"]


def test_a_dictionary_says_what_it_is_and_what_was_counted():
    dictionary = SparseAutoencoder(SAEConfig(d_in=7, d_sae=23, activation=TopK(k=3)))
    initialise(dictionary, torch.Generator().manual_seed(0))
    facts = shown(dictionary)
    assert dict(zip(facts["th"], facts["td"], strict=True)) == {
        "activation": "TopK(kind='topk', k=3)", "latents": "23", "width": "7 -> 7",
        "statistics": "none; `sae evaluate` counts them",
    }  # fmt: skip
    fired = torch.zeros(23, dtype=torch.int64)
    fired[:20] = 150
    dictionary.stats = SimpleNamespace(n_rows=1000, n_fired=fired, max_activation=fired.float())
    dictionary.provenance = {"model": {"path": HOSTILE}, "rows": 5000}
    facts = shown(dictionary.at("model.layers.1:out"))
    known = dict(zip(facts["th"], facts["td"], strict=True))
    assert known["statistics"] == "L0 3.0 of 23, 3 silent on 1,000 rows"
    assert (known["reads"], known["model"]) == ("model.layers.1:out", HOSTILE)
    assert known["trained on"] == "5,000 rows"


def test_latents_show_the_strongest_with_their_figures():
    values = torch.tensor([[2.0, 0.0], [1.0, 5.0], [3.0, 0.0]])
    indices = torch.tensor([[4, 0], [4, 9], [0, 0]])
    texts = shown(Latents(values, indices))
    assert texts["b"] == ["Latents of 3 rows: 1.3 fire in a row, 3 in any"]
    assert texts["td"] == [
        *("9", "1", "5", "5"), *("0", "1", "3", "3"), *("4", "2", "2", "1.5"),
    ]  # fmt: skip
    in_axes = Latents(values.view(3, 1, 2), indices.view(3, 1, 2))
    assert shown(in_axes)["td"] == texts["td"]
    for none in (torch.zeros(4, 0), torch.zeros(0, 3)):
        assert "td" not in shown(Latents(none, none.long()))


def test_steering_shows_on_how_many_tokens_it_ran(causal_model):
    point = next(n for n, _ in causal_model.named_modules() if n.endswith((".layers.0", ".h.0")))
    width = causal_model.config.hidden_size
    dictionary = SparseAutoencoder(SAEConfig(d_in=width, d_sae=9, activation=TopK(k=3)))
    initialise(dictionary, torch.Generator().manual_seed(0))
    from sae.steer import Edit

    edit = Edit(dictionary.at(f"{point}:out"), latent=4, add="1x norm")
    with torch.no_grad(), Steering(causal_model, [edit]) as steering:
        causal_model(torch.tensor([[1, 2, 3, 4]]))
    cells = shown(steering)["td"]
    assert cells[1:4] == ["4", "3", "3"]
    assert "latent 4" in cells[0]


def test_a_sweep_shows_each_strength_and_the_verdict():
    texts = shown(SWEEP)
    assert len(texts["td"]) == len(SWEEP.points) * len(CELLS)
    assert texts["small"][0].startswith("the largest strength with KL <= 0.3 is 1, which loops")
    drawn = RESULTS["latent's sweep"]._repr_html_()
    assert "data:image/png;base64,iVBOR" in drawn
