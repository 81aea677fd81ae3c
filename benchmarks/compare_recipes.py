"""Keep a comparison of recipes: `compare.json` of `sae compare` becomes a row and two tables.

python -m benchmarks.compare_recipes runs/compare/compare.json --name smollm2 [--record]
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.rows import append, surroundings

FIGURES = (
    "L0", "FVU", "dead", "CE recovered, mean ablation", "Δ CE", "KL", "kNN accuracy",
    "linear accuracy",
)  # fmt: skip
SIGNS = {"tie": "=", "unknown": "?"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("compare", type=Path, help="compare.json")
    parser.add_argument("--name", required=True, help="of the row")
    parser.add_argument("--record", action="store_true", help="append the row to results/")
    arguments = parser.parse_args()
    record = json.loads(arguments.compare.read_text())
    result = of_groups(record)
    print(table(result))
    for figure, pairs in record["comparisons"].items():
        print(f"\n{figure}\n\n{verdicts(pairs)}")
    if arguments.record:
        row = {
            "name": arguments.name,
            "hook_point": record["report"]["hook_point"],
            "cache": record["report"]["cache_fingerprint"],
            "l0": record["l0"],
            "config": record["report"]["config"],
            "figures": result,
            "comparisons": record["comparisons"],
            "structure": record.get("structure", {}),
            **_as_it_is(record["report"]),
            **surroundings(),
        }
        print(append("compare_recipes", [row]))


def of_groups(record: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Every figure of every seed by group; a baseline is a group of its own."""
    groups: dict[str, dict[str, list[float]]] = {}
    for name in record["report"]["reconstruction"]:
        group = groups.setdefault(record["groups"].get(name, name), {})
        for figure, value in figures(record["report"], name).items():
            group.setdefault(figure, []).append(value)
    return groups


def figures(report: dict[str, Any], name: str) -> dict[str, float]:
    rebuilt = report["reconstruction"][name]
    results = {
        "L0": rebuilt["l0"],
        "FVU": rebuilt["fvu"],
        "dead": report["firing"][name]["dead_fraction"],
    }
    if effect := report["substitution"].get("intact", {}).get("dictionaries", {}).get(name):
        results |= {
            "CE recovered, mean ablation": effect["ce_recovered_mean"]["value"],
            "Δ CE": effect["ce_increase"]["value"],
            "KL": effect["kl"]["value"],
        }
    if spliced := (report.get("downstream") or {}).get("spliced", {}).get(name):
        results |= {
            "kNN accuracy": spliced["knn"]["value"],
            "linear accuracy": spliced["linear"]["value"],
        }
    return results


def table(results: dict[str, dict[str, list[float]]]) -> str:
    shown = [figure for figure in FIGURES if any(figure in of_one for of_one in results.values())]
    lines = [f"| | seeds | {' | '.join(shown)} |", "|---" * (len(shown) + 2) + "|"]
    for name, of_one in results.items():
        cells = (spread(of_one.get(figure, []), figure) for figure in shown)
        lines.append(f"| {name} | {len(of_one['FVU'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _as_it_is(report: dict[str, Any]) -> dict[str, Any]:
    """What the model tells without and with an ablation, where classes were told."""
    downstream = report.get("downstream")
    if not downstream:
        return {}
    keys_shown = ("n_train", "n_test", "n_classes")
    streams = {name: downstream["spliced"][name] for name in ("as it is", "zero", "mean")}
    return {"told": {**{key: downstream[key] for key in keys_shown}, **streams}}


def spread(values: list[float], figure: str) -> str:
    """Mean, and the standard deviation over seeds."""
    if not values:
        return ""
    digits = 1 if figure == "L0" else 4
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def verdicts(pairs: list[dict[str, Any]]) -> str:
    """Row against column: < and > where the difference is detectable, = for a tie."""
    names = list(dict.fromkeys(name for pair in pairs for name in (pair["a"], pair["b"])))
    sign = {}
    for pair in pairs:
        above = ">" if pair["difference"] > 0 else "<"
        sign[pair["a"], pair["b"]] = SIGNS.get(pair["verdict"], above)
        sign[pair["b"], pair["a"]] = {">": "<", "<": ">"}.get(
            sign[pair["a"], pair["b"]], sign[pair["a"], pair["b"]]
        )
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {name} | {' | '.join(sign.get((name, other), '') for other in names)} |"
        for name in names
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
