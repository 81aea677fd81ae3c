"""The site's own code: links of the repository become links of the site, scripts become pages."""

import re

import pytest

SCRIPT = '''"""Do a thing.

More of it.
"""

# %%
# Some words
# on two lines.
x = 1

# %%
y = x
# A remark.
'''


def test_links_lead_to_the_pages_that_files_become(site):
    text = (
        "[a](../GLOSSARY.md) [b](../activations_cache/FORMAT.md#rows) [c](cache.md) "
        "[d](../configs/demo.yaml) [e](../examples/steer.py) [f](https://x.y/z.md) [g](gone.md)"
    )
    assert site.relinked(text, "index.md") == (
        "[a](glossary.md) [b](cache_format.md#rows) [c](cache.md) d [e](tutorials/steer.md) "
        "[f](https://x.y/z.md) [g](gone.md)"
    )


def test_links_of_files_from_other_folders_and_to_the_folder_above(site):
    assert site.relinked("[x](docs/cache.md)", "readme.md") == "[x](cache.md)"
    assert site.relinked("[x](../docs/cache.md)", "kernels.md") == "[x](cache.md)"
    assert site.relinked("[x](../docs/cache.md)", "tutorials/steer.md") == "[x](../cache.md)"


def test_pictures_are_where_the_site_has_them(site):
    picture = "![x](docs/pictures/overview.svg)"
    assert site.relinked(picture, "readme.md") == "![x](pictures/overview.svg)"
    assert site.relinked("![x](results/smollm2.png)", "results.md") == "![x](results/smollm2.png)"


def test_a_script_becomes_a_page(site):
    assert site.tutorial(SCRIPT) == (
        "# Do a thing\n\nMore of it.\n\nSome words\non two lines.\n\n```python\nx = 1\n```\n\n"
        "```python\ny = x\n# A remark.\n```\n"
    )


def test_every_public_module_is_in_the_reference_once(site, repository):
    pages = dict(site.api_pages())
    listed = [name for text in pages.values() for name in re.findall(r"^::: (\S+)$", text, re.M)]
    assert len(listed) == len(set(listed))
    assert {
        "sae.autoencoder",
        "sae.train.step",
        "sae_kernels.decode",
        "activations_cache.reader",
    } <= {*listed}
    assert not [name for name in listed if name.startswith("sae.cli") or "._" in name]
    assert "reference/sae.evaluate.scaling.md" in pages


@pytest.mark.parametrize("folder", [".", "docs", "kernels", "benchmarks", "activations_cache"])
def test_links_between_files_lead_somewhere(repository, folder):
    for page in (repository / folder).glob("*.md"):
        for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text()):
            at_site = page.parent.name == "docs" and target.startswith("reference/")
            assert at_site or (page.parent / target).exists(), f"{page}: {target}"
