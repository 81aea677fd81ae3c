// The overview: what was trained on what, and how good it is.
"use strict";

async function overviewView() {
  const { data } = router;
  const dictionaries = [...router.dictionaries.values()];
  const map = dictionaries.length ? mapSection(dictionaries) : null;
  const node = el(
    "div",
    { class: "overview" },
    el(
      "header",
      { class: "title" },
      el("h1", { tabindex: "-1" }, said(data.title)),
      data.subtitle ? el("p", { class: "subtitle" }, said(data.subtitle)) : null,
    ),
    el("div", { class: "about" }, facts(data.facts), cautions(data.cautions)),
    resultsSection(data.results),
    dictionariesSection(dictionaries),
    map,
    trainingSection(data.curves),
    completenessSection(dictionaries),
    comparisonsSection(data.comparisons),
    steeringSection(data.steering),
  );
  // The map's files are large: first what is read first.
  return { title: "Overview", node, shown: () => map && setTimeout(map.start) };
}

function cautions(texts) {
  if (!texts.length) return null;
  const items = texts.map((text) => el("li", {}, said(text)));
  return el("aside", { class: "caution", "aria-label": "Cautions" }, el("ul", {}, items));
}

// ---- results

const NUMERIC = /^[-−+±]?[\d.,]+\s*(%|[a-z]{1,3})?(\s*[±(–-].*)?$|^[–—-]?$/i;

function resultsSection(results) {
  if (!results?.rows.length) return null;
  const { columns, rows, note } = results;
  const numeric = columns.map((_, i) => i > 0 && rows.every((row) => NUMERIC.test(row[i].trim())));
  const kind = (i) => (numeric[i] ? "number" : null);
  const head = columns.map((text, i) =>
    el("th", { scope: "col", role: "columnheader", class: kind(i) }, said(text)),
  );
  const cell = (text, i) =>
    i === 0
      ? el("th", { scope: "row", role: "rowheader" }, said(text))
      : el("td", { role: "cell", class: kind(i), "data-column": columns[i] }, said(text));
  const body = rows.map((row) => el("tr", { role: "row" }, row.map(cell)));
  const table = el(
    "table",
    { role: "table", class: "results" },
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, head)),
    el("tbody", { role: "rowgroup" }, body),
  );
  const frame = el(
    "div",
    { class: "table-frame", tabindex: "0", role: "region", "aria-label": "Results" },
    table,
  );
  return section(
    "Results",
    { id: "results" },
    frame,
    note ? el("p", { class: "note" }, said(note)) : null,
  );
}

// ---- dictionaries

function dictionariesSection(dictionaries) {
  if (!dictionaries.length) return null;
  const filled = dictionaries.filter((one) =>
    one.density_histogram?.counts.some((count) => count > 0),
  );
  const edges = filled.flatMap((one) => one.density_histogram.edges);
  const extent = [Math.min(...edges), Math.max(...edges)];
  const most = Math.max(...filled.flatMap((one) => one.density_histogram.counts));
  const cards = dictionaries.map((one) =>
    dictionaryCard(one, filled.includes(one) ? densityChart(one, extent, most) : null),
  );
  return section("Dictionaries", { id: "dictionaries" }, el("div", { class: "charts" }, cards));
}

function dictionaryCard(dictionary, chart) {
  const { d_sae, n_live, n_dead, n_dense, n_rows, dense_above } = dictionary;
  const part = (count) => (d_sae ? ` (${percent(count / d_sae)})` : "");
  const filter = (query, text) => el("a", { href: tableHash(dictionary, query) }, text);
  const counts = [
    ["latents", whole.format(d_sae)],
    ["alive", whole.format(n_live) + part(n_live)],
    ["dead", n_dead ? filter("status=dead", whole.format(n_dead) + part(n_dead)) : "0"],
    [
      `dense (> ${percent(dense_above)})`,
      n_dense
        ? filter(`in.density=${dense_above}..`, whole.format(n_dense) + part(n_dense))
        : n_dense,
    ],
    ["rows measured", whole.format(n_rows)],
  ]
    .filter(([, value]) => !missing(value))
    .map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value)));
  return el(
    "article",
    { class: "card" },
    el("h3", {}, el("a", { href: tableHash(dictionary) }, said(dictionary.name))),
    dictionary.summary ? el("p", { class: "meta" }, said(dictionary.summary)) : null,
    el("dl", { class: "facts counts" }, counts),
    facts(dictionary.facts),
    chart ?? empty("No latent fired, so there is no density to show."),
  );
}

// ---- completeness, comparisons, steering

function completenessSection(dictionaries) {
  const measuredOnes = dictionaries.filter((one) => one.completeness?.points.length);
  if (!measuredOnes.length) return null;
  const card = (one) => {
    const found = one.completeness;
    const half = missing(found.f50)
      ? null
      : `Half of the concepts of frequency ${number(found.f50)}` +
        (missing(found.low) ? "" : ` (${number(found.low)} to ${number(found.high)})`) +
        " have a latent" +
        (missing(found.times_alive)
          ? "."
          : `; times the alive latents that is ${number(found.times_alive)}.`);
    return el(
      "article",
      { class: "card" },
      el("h3", {}, said(one.name)),
      completenessChart(found),
      half ? el("p", { class: "note" }, half) : null,
      found.note ? el("p", { class: "note" }, said(found.note)) : null,
    );
  };
  return section(
    "Completeness",
    { id: "completeness" },
    el("div", { class: "charts" }, measuredOnes.map(card)),
  );
}

function comparisonsSection(comparisons) {
  if (!comparisons.length) return null;
  const name = (id) => said(router.dictionaries.get(id)?.name ?? id);
  const item = ({ id, a, b, note }) =>
    el(
      "li",
      {},
      el("a", { href: `#${id}` }, name(a), " beside ", name(b)),
      note ? [" · ", said(note)] : null,
    );
  return section(
    "Comparisons",
    { id: "comparisons" },
    el("ul", { class: "plain-list" }, comparisons.map(item)),
  );
}

function steeringSection(examples) {
  if (!examples.length) return null;
  return section("Steering", { id: "steering" }, examples.map(steeringCard));
}

function steeringCard(example) {
  const dictionary = [...router.dictionaries.values()].find(
    (one) => one.name === example.dictionary,
  );
  const of = [said(example.dictionary), ` · latent ${example.latent}`];
  const link = dictionary ? el("a", { href: latentHash(dictionary, example.latent) }, of) : of;
  const side = (title, text, kind) =>
    el(
      "div",
      { class: `side ${kind}` },
      el("h4", {}, title),
      el(
        "p",
        { class: "reading", dir: "auto" },
        el("span", { class: "prompt" }, said(example.prompt, "span")),
        text ? said(text, "span") : el("em", { class: "empty" }, " (nothing was written)"),
      ),
    );
  return el(
    "article",
    { class: "card steering" },
    el("h3", {}, said(example.label || "(no label)")),
    el(
      "p",
      { class: "meta" },
      link,
      ` · turned to ${number(example.strength)} `,
      said(example.unit),
    ),
    el(
      "div",
      { class: "sides" },
      side("As it is", example.base, "base"),
      side("Steered", example.steered, "steered"),
    ),
  );
}
