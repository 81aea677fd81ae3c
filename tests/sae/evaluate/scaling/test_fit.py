"""Laws with known exponents come back from their losses, and what cannot be known is said."""

import numpy as np
import pytest

from sae.evaluate.scaling import FinishedRun, draw, fit_laws
from sae.evaluate.scaling.runs import best_rates

E, A, a, B, b = 0.11, 5.0, 0.37, 60.0, 0.53
WIDTHS = (64, 256, 1024, 4096, 16384)
ROWS = (4_000, 16_000, 64_000, 256_000, 1_024_000)


def compute_runs(noise: float = 0.0, widths=WIDTHS) -> list[FinishedRun]:
    draw = np.random.default_rng(1)
    return [
        FinishedRun(
            d_sae=f,
            rows=s,
            k=7,
            loss=float((E + A * f**-a + B * s**-b) * np.exp(noise * draw.standard_normal())),
        )
        for f in widths
        for s in ROWS
    ]


def test_exponents_and_optimum_come_back_to_one_percent():
    laws = fit_laws(compute_runs(), n_resamples=23)
    law, optimum = laws.compute, laws.optimum
    assert law is not None
    assert optimum is not None
    known = {"E": E, "A": A, "a": a, "B": B, "b": b}
    known |= {"exponent of F*": b / (a + b), "exponent of S*": a / (a + b)}
    known["exponent of L* - E"] = -a * b / (a + b)
    assert {n: figure.value for n, figure in law.figures.items()} == pytest.approx(known, rel=0.01)
    c = float(np.median([run.compute for run in compute_runs()]))
    widths = np.geomspace(1e2, 1e7, 200_001)
    best = widths[np.argmin(E + A * widths**-a + B * (c / widths) ** -b)]
    assert optimum.compute == c
    assert optimum.d_sae.value == pytest.approx(best, rel=0.01)
    assert optimum.d_sae.value * optimum.rows.value == pytest.approx(c)
    assert optimum.loss == pytest.approx(E + A * best**-a + B * (c / best) ** -b, rel=1e-3)
    assert law.warnings == ()
    assert law.residual < 1e-6


def test_intervals_hold_the_truth_under_noise():
    law = fit_laws(compute_runs(noise=0.01), n_resamples=41).compute
    assert law is not None
    for name, truth in (("a", a), ("b", b), ("exponent of F*", b / (a + b))):
        figure = law.figures[name]
        assert figure.low < truth < figure.high, name
        assert figure.low < figure.value < figure.high
        assert figure.value == pytest.approx(truth, rel=0.1)
    assert law.residual == pytest.approx(0.01, rel=0.5)


def test_one_bad_run_decides_nothing():
    runs = compute_runs()
    runs[7] = FinishedRun(d_sae=runs[7].d_sae, rows=runs[7].rows, k=7, loss=3 * runs[7].loss)
    law = fit_laws(runs, n_resamples=2).compute
    assert law is not None
    assert law.figures["a"].value == pytest.approx(a, rel=0.03)
    assert law.figures["b"].value == pytest.approx(b, rel=0.03)


def test_an_optimum_outside_the_grid_is_said():
    law = fit_laws(compute_runs(widths=(16, 32, 64)), n_resamples=3).compute
    assert law is not None
    assert any("best width" in w and "extrapolated" in w for w in law.warnings)


def test_the_law_of_width_and_k_comes_back():
    truth = np.array([0.4, -0.3, -0.15, -0.02, -2.0, -0.1])
    runs = [
        FinishedRun(
            d_sae=n,
            k=k,
            rows=997,
            loss=float(
                np.exp(truth[:4] @ [1, np.log(k), np.log(n), np.log(k) * np.log(n)])
                + np.exp(truth[4:] @ [1, np.log(k)])
            ),
        )
        for n in (256, 1024, 4096, 16384, 65536)
        for k in (4, 8, 16, 32, 64)
    ]
    laws = fit_laws(runs, n_resamples=3)
    assert laws.compute is None
    assert laws.width is not None
    assert laws.width.loss(131_072, 128) == pytest.approx(
        float(
            np.exp(truth[:4] @ [1, np.log(128), np.log(2**17), np.log(128) * np.log(2**17)])
            + np.exp(truth[4:] @ [1, np.log(128)])
        ),
        rel=0.01,
    )
    assert laws.width.figures["beta_n"].value == pytest.approx(-0.15, rel=0.05)


def rate_runs(law=lambda c: 30 * c**-0.3, tried=(0.3, 1.0, 3.0)) -> list[FinishedRun]:
    return [
        FinishedRun(
            d_sae=f,
            rows=997,
            lr=law(f * 997) * times * 1.2,
            loss=0.2 + float(np.log(times * 1.2)) ** 2,
        )
        for f in (101, 499, 2003, 9973)
        for times in tried
    ]


def test_the_best_learning_rate_falls_with_compute_as_it_was_made_to():
    law = fit_laws(rate_runs()).rate
    assert law is not None
    assert law.exponent.value == pytest.approx(-0.3, abs=1e-6)
    assert law.exponent.low <= law.exponent.value <= law.exponent.high
    assert law.rate(1e9) == pytest.approx(30 * 1e9**-0.3)
    assert all(rate == pytest.approx(30 * c**-0.3) for c, rate in law.points)
    best_lr = {run.d_sae: run.lr for run in best_rates(rate_runs())}
    assert best_lr == {f: pytest.approx(1.2 * 30 * (f * 997) ** -0.3) for f in best_lr}
    assert len(best_lr) == 4


def test_a_best_rate_at_the_end_of_those_tried_gives_no_point():
    edge = [
        run for run in rate_runs() if run.d_sae != 101 or run.lr <= 1.3 * 30 * (101 * 997) ** -0.3
    ]
    more = [FinishedRun(d_sae=101, rows=997, lr=1e-3, loss=9.0)]
    law = fit_laws(edge + more).rate
    assert law is not None
    assert len(law.points) == 3
    assert "width 101 and 997 rows" in law.warnings[0]


def test_too_few_runs_are_refused_with_what_is_missing():
    with pytest.raises(ValueError, match=r"vary 3 widths.*got 5 of 1 widths"):
        fit_laws(compute_runs(widths=(64,)))


def test_a_picture_of_either_law_is_a_png_and_none_without_one(tmp_path):
    laws = fit_laws(compute_runs(), n_resamples=3)
    path = draw(laws, tmp_path / "law.png")
    assert path is not None
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert draw(fit_laws(rate_runs()), tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
