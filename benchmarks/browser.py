"""How long a reader waits for the browser of 65,536 latents: first paint, table, search, order.

`python -m benchmarks.browser [--latents N] [--rounds N] [--record]` writes an example folder of
that size, opens it from the disk in headless Chromium and times it.
Each round starts with an empty memory; the operating system's file cache is warm.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.browser_example import example_site
from benchmarks.chromium import Chromium
from benchmarks.rows import append, surroundings
from sae.browser import write_site

QUERIES = ("r", "river", "river letter", "parliament sugar", "mentions of comet", "zzzz", "e")
PAINT = """new Promise(done => {
  const known = performance.getEntriesByName('first-contentful-paint')[0];
  if (known) return done(known.startTime);
  new PerformanceObserver((list) => {
    const found = list.getEntriesByName('first-contentful-paint')[0];
    if (found) done(found.startTime);
  }).observe({type: 'paint', buffered: true});
})"""
SHOWN = """new Promise(done => {
  const look = () => %s ? requestAnimationFrame(() => setTimeout(() => done(performance.now())))
    : setTimeout(look, 1);
  look();
})"""
TYPED = """(async () => {
  const field = document.getElementById('search');
  const began = performance.now();
  field.value = %r;
  field.dispatchEvent(new Event('input'));
  const found = performance.now();
  await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
  return [found - began, performance.now() - began];
})()"""
SORTED = """(async () => {
  const began = performance.now();
  document.querySelector('thead button').click();
  const found = performance.now();
  await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
  return [found - began, performance.now() - began];
})()"""


def measure(page: Path, rounds: int, latent: int = 40_000) -> dict[str, Any]:
    """Milliseconds: medians and maxima over rounds, the search's over its queries as well.

    The latent must be one of those that have examples.
    """
    results: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        results.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory() as profile:
        reader = Chromium(Path(profile))
        for _ in range(rounds):
            for name, address, there in (
                ("overview", "#overview", "document.querySelector('h1')"),
                ("table", "#d0/table", "document.querySelectorAll('tbody tr').length > 9"),
                (
                    "latent",
                    f"#d0/latent/{latent}",
                    "document.querySelectorAll('.token').length > 9",
                ),
            ):
                reader.call("Page.navigate", url="about:blank")
                reader.call("Page.navigate", url=page.as_uri() + address)
                add(f"{name} drawn", reader.run(SHOWN % there))
                add(f"{name} first paint", reader.run(PAINT))
            reader.load(page, "#d0/table")
            began = time.perf_counter()
            reader.run("router.dictionaries.get('d0').searchable().then(() => null)")
            add("search text read", 1000 * (time.perf_counter() - began))
            for query in QUERIES:
                seconds_until, drawn_after = reader.run(TYPED % query)
                add("search", seconds_until)
                add("search, drawn", drawn_after)
            reader.run(TYPED % "")
            _, sorted_after = reader.run(SORTED)
            add("sort, drawn", sorted_after)
        reader.close()
    return {
        name: {"median": round(statistics.median(values), 1), "max": round(max(values), 1)}
        for name, values in results.items()
    }


def main() -> None:
    """Write the folder, measure, append."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="an example that is there already")
    parser.add_argument("--record", action="store_true", help="append to results/browser.jsonl")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        page = asked.folder and asked.folder / "index.html"
        began = time.perf_counter()
        page = page or write_site(example_site(asked.latents), Path(made) / "site")
        seconds = None if asked.folder else round(time.perf_counter() - began, 1)
        size = sum(file.stat().st_size for file in page.parent.rglob("*") if file.is_file())
        result = measure(page, asked.rounds, asked.latents * 3 // 5)
    row = {"case": "browser", "latents": asked.latents, "folder_mb": round(size / 1e6, 1),
           "write_s": seconds, "rounds": asked.rounds, "ms": result}  # fmt: skip
    if asked.record:
        append("browser", [surroundings() | row])
    for name, values in result.items():
        print(f"{name:22} {values['median']:8.1f} ms, at most {values['max']:.1f}")


if __name__ == "__main__":
    main()
