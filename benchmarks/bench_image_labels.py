"""How well the latents of a finished run on images are told by its folders, beside untrained ones.

`sae bench image-labels RUN`: RUN is what `sae run` wrote, such as runs/demo-vision. Nothing is
computed again: the figures are those of its explain step. Shares have Wilson's interval over
latents, differences of shares Newcombe's; mean AUCs have intervals over images, and so have their
differences, which are of the same images. "strongest" is how much oftener the 5 strongest images of
a latent have its label than all images do. A difference counts where its interval leaves 0 out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.bench_labels import FROZEN, verdict
from benchmarks.rows import append, surroundings
from sae.run.images import rival_of

FIGURES = ("n_latents", "n_scored", "n_unlabelled", "n_insufficient", "n_dead", "beats_null",
        "beats_null_shuffled", "auc", "auc_all_live", "strongest", "control_auc", "best_of_class",
        "by_method", "n_images_explain", "n_images_score")  # fmt: skip


def main() -> None:
    """Read, print and append."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--record", action="store_true", help="append to results/")
    arguments = parser.parse_args()
    files = sorted((arguments.run / "explain").glob("*/summary.json"))
    labels = {file.parent.name: json.loads(file.read_text()) for file in files}
    if not labels:
        parser.error(
            f"{arguments.run} must hold explain/NAME/summary.json, got none; run `sae run`"
        )
    arms = dict(labels)
    for name, summary in labels.items():
        if not name.endswith(FROZEN):
            ours = summary["baselines"].items()
            arms |= {f"{kind}, as dense as {name}": result for kind, result in ours}
    print(table(arms))
    rows: list[dict[str, Any]] = [row_of(name, summary) for name, summary in arms.items()]
    for name in labels:
        rivals = {n: s for n, s in arms.items() if n.startswith(name + FROZEN) or n.endswith(name)}
        for rival in rivals if not name.endswith(FROZEN) else ():
            if rival != name:
                result = compared(labels[name], arms[rival])
                rows.append({
                    "case": "image labels: difference",
                    "arm": name,
                    "rival": rival,
                    **result,
                })
                for what, d in result.items():
                    ends = f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
                    print(f"{name} less {rival}: {what}: {ends}: {d['verdict']}")
    if arguments.record:
        about = {**surroundings(), "read_out": _read_out(files[0].parent)}
        print(append("image_labels", [{**about, **row} for row in rows]))


def _read_out(directory: Path) -> str:
    """How the latents of a run were read, which is the same for all of them."""
    return json.loads((directory / "origin.json").read_text())["read_out"]


def row_of(name: str, summary: dict[str, Any]) -> dict[str, Any]:
    """A row of the results."""
    figures = {key: summary[key] for key in FIGURES}
    return {"case": "image labels by folders", "arm": name, **figures}


def compared(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Differences of a dictionary and a rival, with a verdict in words."""
    rival = rival_of(ours, other)
    differences = {
        "share that beats its null": rival.share,
        "AUC": rival.auc,
        "strongest": rival.strongest,
    }
    return {what: {**d._asdict(), "verdict": verdict(d)} for what, d in differences.items()}


def table(arms: dict[str, dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| latents | live | labelled | beat their null | AUC | strongest | best of class |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, s in arms.items():
        share, n_live = s["beats_null"], s["n_latents"] - s["n_dead"]
        figures = [f"{share['value']:.3f} ±{(share['high'] - share['low']) / 2:.3f}"]
        for key in ("auc", "strongest", "best_of_class"):
            mean = s[key]
            figures.append(f"{mean['mean']:.3f} ±{(mean['high'] - mean['low']) / 2:.3f}")
        lines.append(f"| {name} | {n_live:,} | {s['n_scored']:,} | {' | '.join(figures)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
