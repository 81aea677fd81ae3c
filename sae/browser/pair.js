// One latent beside its counterparts in another dictionary.
"use strict";

async function pairView(pair, latent) {
  const { of, to, nearest, cosine, children } = pair;
  const others = children[latent].filter(([child]) => child !== nearest[latent]).slice(0, 8);
  const twins = nearest[latent] < 0 ? others : [[nearest[latent], cosine[latent]], ...others];
  const [here, there] = await Promise.all([
    of.latent(latent),
    Promise.all(twins.map(([row]) => to.latent(row))),
  ]);
  const cards = there.map((one, i) =>
    pairCard(to, twins[i][0], one, `cosine ${score(twins[i][1])}`),
  );
  const back = `#${pair.id}${pair.side === "b" ? "?of=b" : ""}`;
  const node = el(
    "div",
    { class: "compare-view" },
    el(
      "p",
      { class: "meta" },
      el("a", { href: back }, "← ", said(of.name), " beside ", said(to.name)),
    ),
    el("h1", { tabindex: "-1" }, said(visible(of.label(latent) || `latent ${latent}`))),
    el(
      "div",
      { class: "sides" },
      section(of.name, {}, pairCard(of, latent, here, "")),
      section(to.name, {}, cards.length ? cards : empty("No latent of the other is near.")),
    ),
  );
  const step = (by) => {
    const rows = of.order("latent", 1).filter((row) => of.status[row] > 1);
    const next = rows[rows.indexOf(latent) + by];
    if (next !== undefined) goTo(pairHash(pair, next));
  };
  return { title: `${of.label(latent) || latent} in both`, node, step };
}

function pairCard(dictionary, row, latent, aside) {
  const density = `density ${percent(dictionary.value("density", row))}`;
  const seen = latent?.examples.slice(0, 3) ?? [];
  const scale =
    Math.max(latent?.max_activation ?? 0, ...seen.flatMap(({ fires }) => [...fires.values()])) || 1;
  const item = (example) =>
    example.image ? pictureItem(example, scale) : textItem(example, scale);
  return el(
    "article",
    { class: "card" },
    el(
      "h3",
      {},
      el(
        "a",
        { href: latentHash(dictionary, row) },
        said(visible(dictionary.label(row) || `latent ${row}`)),
      ),
    ),
    el("p", { class: "meta" }, [`#${row}`, aside, density].filter(Boolean).join(" · ")),
    seen.length
      ? el("ol", { class: seen[0].image ? "pictures small" : "contexts" }, seen.map(item))
      : empty("No example was kept."),
  );
}
