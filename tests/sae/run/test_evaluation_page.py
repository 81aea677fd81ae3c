"""The page of an evaluation, and tables of seeds and of structure, from known figures."""

import pytest
import torch
from matplotlib.figure import Figure

from activations_cache.checks import silent
from sae.architecture import SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder
from sae.browser import ResultTable
from sae.evaluate.reconstruction import Reconstruction
from sae.evaluate.report import EvaluationReport, ParetoPoint
from sae.run.page import ParetoPanel, Series, draw, write_page
from sae.run.studies import noise_table, shortest, stability_table
from sae.run.tables import Section


def rebuilt(fvu: float, l0: float) -> Reconstruction:
    return Reconstruction(
        n_rows=7, fvu=fvu, fvu_uncentred=fvu, cosine=1.0, norm_ratio=1.0, relative_bias=1.0,
        l0=l0, l0_quantiles={},
    )  # fmt: skip


def report_of(**results: tuple[float, float]) -> EvaluationReport:
    """A report of dictionaries with these FVUs and L0s."""
    return EvaluationReport(
        hook_point="a:out", cache_fingerprint="", skip_positions=0, firing={}, substitution={},
        config={}, reconstruction={name: rebuilt(*figures) for name, figures in results.items()},
    )  # fmt: skip


def test_names_are_text_and_the_picture_is_inside(tmp_path):
    table = ResultTable(("a", "b"), (("<script>x</script>", "1 & 2"),), "note <b>")
    picture = tmp_path / "p.png"
    picture.write_bytes(b"\x89PNG")
    write_page(tmp_path / "x" / "page.html", "T<i>", [Section("S", table)] * 2, picture)
    page = (tmp_path / "x" / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert "<td>1 &amp; 2</td>" in page
    assert "<title>T&lt;i&gt;</title>" in page
    assert page.index("<table>") < page.index("base64,") < page.rindex("<table>")


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.12, 1.12), (0.45, 0.99), (0.33, 9.7), (0.11, 3.3), (0.002, 0.9), (4.0, 7e4)],
)
def test_figures_can_be_read_off_a_logarithmic_axis(low, high):
    axis = Figure().subplots()
    points = [ParetoPoint(l0=30.0, value=value, seed=0) for value in (low, high)]
    draw(axis, ParetoPanel("FVU", [Series("a", points, points)], {}), 31.0)
    within = [tick for tick in axis.get_yticks() if low / 1.2 <= tick <= 1.2 * high]
    assert len(within) >= 3
    assert min(within) <= 2.5 * low
    assert axis.get_yscale() == ("log" if high > 4 * low else "linear")


def test_noise_is_the_spread_over_seeds_and_sweeps_are_no_seeds():
    report = report_of(
        a=(0.1, 32.0), b=(0.2, 32.0), c=(0.3, 33.0), d=(0.4, 8.0), e=(0.5, 64.0)
    )  # fmt: skip
    table = noise_table({"seeds": ["a", "b", "c"], "sweep": ["d", "e"]}, report)
    ((recipe, n, l0, fvu, detectable),) = table.rows
    assert (recipe, n, l0, fvu) == ("seeds", "3", "32.3 ± 0.6", "0.2000 ± 0.1000")
    # (t_0.975 + t_0.8) at 4 degrees of freedom, times 0.1 sqrt(2 / 3)
    assert float(detectable) == pytest.approx((2.7764 + 0.9410) * 0.1 * (2 / 3) ** 0.5, abs=1e-4)
    assert noise_table({"one": ["a"]}, report) is None


def test_two_widths_have_no_stability():
    dictionaries = {
        str(d_in): SparseAutoencoder(SAEConfig(d_in=d_in, d_sae=7, activation=TopK(k=2)))
        for d_in in (3, 5)
    }
    assert stability_table({"g": ["3", "5"]}, dictionaries, silent) is None


def test_the_description_is_as_short_as_its_loss_allows():
    generator = torch.Generator().manual_seed(0)
    dictionary = SparseAutoencoder(SAEConfig(d_in=5, d_sae=5, activation=TopK(k=1)))
    with torch.no_grad():
        dictionary.enc_rows.copy_(torch.eye(5))
        dictionary.dec_rows.copy_(torch.eye(5))
    on = torch.randint(5, (997,), generator=generator)
    binary = torch.nn.functional.one_hot(on, 5).float()
    result = shortest(dictionary, binary)
    assert result.step == 0.5  # half the largest: 0 and 1 stay apart
    assert result.fvu == pytest.approx(0, abs=1e-9)
    assert result.bits == pytest.approx(5 * 0.7219, abs=0.05)  # five times H(1/5)
    graded = binary * torch.rand(997, 1, generator=generator)
    assert shortest(dictionary, graded).bits > result.bits
    assert shortest(dictionary, -binary).bits == 0.0  # nothing fires
