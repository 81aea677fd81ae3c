// The parts above the latent browser: header, results, curves, steering, dictionaries.

function header(data) {
  const facts = data.facts.map(([name, value]) =>
    el("div", {}, el("dt", {}, said(name)), el("dd", {}, said(value))),
  );
  return el(
    "header",
    {},
    el("h1", {}, said(data.title)),
    data.subtitle ? el("p", { class: "subtitle" }, said(data.subtitle)) : null,
    facts.length ? el("dl", { class: "facts" }, facts) : null,
  );
}

function cautions(data) {
  if (!data.cautions.length) return null;
  return el(
    "aside",
    { class: "caution", "aria-label": "Cautions" },
    data.cautions.map((text) => el("p", {}, said(text))),
  );
}

// ---- results

const NUMERIC = /^[-−+±]?[\d.,]+\s*(%|[a-z]{1,3})?(\s*[±(–-].*)?$|^[–—-]$/i;

function results({ columns, rows, note }) {
  if (!rows.length) return section("results", "Results", empty("This run recorded no results."));
  const numeric = columns.map((_, i) => i > 0 && rows.every((row) => NUMERIC.test(row[i].trim())));
  const head = columns.map((name, i) =>
    el(
      "th",
      { scope: "col", role: "columnheader", class: numeric[i] ? "number" : null },
      said(name),
    ),
  );
  const body = rows.map((row) =>
    el(
      "tr",
      { role: "row" },
      row.map((text, i) => resultCell(text, columns[i], i, numeric[i])),
    ),
  );
  return section(
    "results",
    "Results",
    el(
      "div",
      { class: "table-frame", tabindex: "0", role: "region", "aria-labelledby": "results-heading" },
      el(
        "table",
        { role: "table" },
        el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, head)),
        el("tbody", { role: "rowgroup" }, body),
      ),
    ),
    note ? el("p", { class: "note" }, said(note)) : null,
  );
}

function resultCell(text, column, index, numeric) {
  if (index === 0) return el("th", { scope: "row", role: "rowheader" }, said(text));
  return el(
    "td",
    { role: "cell", class: numeric ? "number" : null, "data-column": column },
    said(text),
  );
}

// ---- training

const N_COLORS = 8;

function training(curves) {
  const metrics = [...new Set(curves.flatMap((curve) => Object.keys(curve.values)))];
  const charts = metrics.map((metric) => {
    const series = curves.map((curve, i) => ({
      name: curve.name,
      color: i % N_COLORS,
      points: pointsOf(curve, metric),
    }));
    return lineChartOrNote(
      metric,
      series.filter((one) => one.points.length),
    );
  });
  if (!charts.length)
    return section("training", "Training", empty("This run recorded no training curves."));
  const legend = curves.map((curve, i) => el("li", {}, swatch(i % N_COLORS), said(curve.name)));
  return section(
    "training",
    "Training",
    el("ul", { class: "legend" }, legend),
    el("div", { class: "charts" }, charts),
  );
}

function lineChartOrNote(metric, series) {
  if (series.length) return lineChart(metric, series);
  return el(
    "figure",
    {},
    el("figcaption", {}, said(metric)),
    empty("No finite value was recorded."),
  );
}

function pointsOf(curve, metric) {
  const values = Object.hasOwn(curve.values, metric) ? curve.values[metric] : [];
  return values.map((value, i) => [curve.steps[i], value]).filter(([, value]) => value !== null);
}

// ---- steering

function steering(examples, linkTo) {
  if (!examples.length)
    return section("steering", "Steering", empty("This run has no steering example."));
  return section(
    "steering",
    "Steering",
    examples.map((example) => steeringCard(example, linkTo)),
  );
}

function steeringCard(example, linkTo) {
  const name = [said(example.dictionary), ` · latent ${example.latent}`];
  const side = (title, text, className) =>
    el(
      "div",
      { class: `side ${className}` },
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
    el(
      "header",
      {},
      el("h3", {}, said(example.label || "(no label)")),
      el(
        "p",
        { class: "meta" },
        linkTo(example.dictionary, example.latent, name),
        ` · turned to ${number(example.strength)} `,
        said(example.unit),
      ),
    ),
    el(
      "div",
      { class: "sides" },
      side("As it is", example.base, "base"),
      side("Steered", example.steered, "steered"),
    ),
  );
}

// ---- dictionaries

function dictionaries(pages) {
  if (!pages.length)
    return section("dictionaries", "Dictionaries", empty("This run made no dictionary."));
  const filled = pages.filter((page) => page.density_histogram.counts.some((count) => count > 0));
  const extent = (log10) => {
    const edges = filled
      .filter((page) => page.density_histogram.log10 === log10)
      .flatMap((page) => page.density_histogram.edges);
    return [Math.min(...edges), Math.max(...edges)];
  };
  const most = Math.max(...filled.flatMap((page) => page.density_histogram.counts));
  return section(
    "dictionaries",
    "Dictionaries",
    el(
      "div",
      { class: "charts" },
      pages.map((page) => {
        const histogram = page.density_histogram;
        const label = `Histogram of the densities of the latents of ${page.name}`;
        return el(
          "article",
          { class: "card" },
          el("h3", {}, said(page.name)),
          page.summary ? el("p", { class: "meta" }, said(page.summary)) : null,
          el(
            "dl",
            { class: "counts" },
            countOf("latents", page.d_sae),
            countOf("alive", page.n_live),
            countOf("dead", page.n_dead),
            countOf("rows measured", page.n_rows),
          ),
          filled.includes(page)
            ? densityChart(histogram, extent(histogram.log10), most, label)
            : empty("No latent fired, so there is no density to show."),
        );
      }),
    ),
  );
}

function countOf(name, value) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, whole.format(value)));
}
