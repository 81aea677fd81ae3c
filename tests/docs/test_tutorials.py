"""The tutorials that the site shows with their outputs: each runs, cell by cell, and shows them."""

import json
import re

import pytest

PRINTED = {
    "train_on_a_model": r"learned: FVU 0\.\d+.*\nfrozen: FVU ",
    "gemma_scope_and_steer": r"2x norm: 'the sister was in the garden",
    "explain_and_browse": r"\d+ of 48 latents scored, AUC 0\.\d\d; \d+% beat their null",
    "concepts": r"garden: score [01]\.\d\d, chance 0\.\d\d, p 0\.\d{3}\nhorse: score ",
    "images_with_words": r"latent \d+: \w+, \w+, \w+, AUC 0\.\d\d\n(.*\n)+gap between texts",
    "similarity": r"relative search of a rotated copy: 1\.00\nmatching of a rotated copy: 0\.",
}
SHOWN = {
    "train_on_a_model": ["learned", "BatchTopK(kind=", "fire in a row"],
    "gemma_scope_and_steer": ["JumpReLU(kind=", "latent 7", "the largest strength with KL"],
    "explain_and_browse": ["TopK(kind=", "silent on", "random", "Labels, the best first",
                           "near latent 3", "<iframe src="],
    "concepts": ["garden", "significant", "integrated gradients"],
    "images_with_words": ["exchanged", "neurons", "latents"],
    "similarity": ["data:image/png;base64", "without the first", "nats per token above"],
}  # fmt: skip


def test_these_are_the_executed_ones(site):
    assert set(site.EXECUTED) == set(PRINTED)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PRINTED)
def test_a_tutorial_runs_and_shows_what_it_promises(name, site, repository, tmp_path):
    script = (repository / "examples" / f"{name}.py").read_text()
    cells = site.executed(script, tmp_path)
    outputs = [cell.output for cell in cells]
    assert re.search(PRINTED[name], "".join(output.printed for output in outputs))
    shown = [output.shown for output in outputs if output.is_html]
    assert len(shown) >= 3
    for words in SHOWN[name]:
        assert any(words in html for html in shown), words
    page = site.tutorial(script, cells)
    assert page.count("```python") == sum(bool(cell.code) for cell in cells)
    assert "127.0.0.1:" not in page
    assert ('src="browse/index.html"' in page) == (name == "explain_and_browse")
    made = json.loads(json.dumps(site.notebook(script, cells)))
    assert "127.0.0.1:" not in str(made)
    kinds = [cell["cell_type"] for cell in made["cells"]]
    assert kinds.count("code") == page.count("```python")
    assert len({cell["id"] for cell in made["cells"]}) == len(kinds)
    assert sum(len(cell.get("outputs", ())) for cell in made["cells"]) >= 4


def test_a_cell_shows_its_last_value_and_what_it_printed(site, tmp_path):
    script = '"""T."""\n\n# %%\n# Words.\nx = 2\nprint("a")\nx + 1\n\n# %%\nx = 5\n'
    first, second = site.executed(script, tmp_path)
    assert (first.text, first.code) == ("Words.", 'x = 2\nprint("a")\nx + 1')
    assert first.output == ("a\n", "3", False)
    assert second.output == ("", "", False)
    assert "```\na\n```\n\n```\n3\n```" in site.tutorial(script, [first, second])
