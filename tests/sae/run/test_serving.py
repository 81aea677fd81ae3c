"""The browser in a notebook's cell: its address answers, may be framed, and ends."""

import re
import urllib.request
from urllib.error import URLError

import pytest

from benchmarks.browser_example import example_site
from sae.browser import write_site
from sae.config import ConfigError
from sae.run import show
from sae.run.page import BrowserInCell


@pytest.fixture
def page(tmp_path):
    return write_site(example_site(n_latents=31), tmp_path / "pages")


def test_a_cell_frames_an_address_that_answers_until_it_is_closed(page):
    shown = show(page)
    html = shown._repr_html_()
    (url,) = re.findall(r'<iframe src="(http://127\.0\.0\.1:\d+/)"', html)
    assert f'height="{shown.height}"' in html
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.read() == page.read_bytes()
        assert "frame-ancestors" not in answer.headers["Content-Security-Policy"]
    assert url in repr(shown)
    shown.close()
    with pytest.raises(URLError):
        urllib.request.urlopen(url, timeout=10)


def test_the_folder_does_as_well_and_what_is_neither_is_one_line(page, tmp_path):
    shown = show(page.parent, height=300)
    assert isinstance(shown, BrowserInCell)
    assert 'height="300"' in shown._repr_html_()
    shown.close()
    with pytest.raises((ConfigError, ValueError)) as error:
        show(tmp_path / "nothing")
    assert "\n" not in str(error.value)
