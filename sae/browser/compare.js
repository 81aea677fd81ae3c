// Two dictionaries side by side: the nearest latent in the other, latents without one, and splits.
"use strict";

const SIDES = [
  ["all", "all"],
  ["none", "no counterpart"],
  ["splits", "two or more in the other"],
];

/** A comparison read from one side: `of` is the dictionary whose latents are gone through. */
async function readComparison({ id, a, b, note }, side) {
  const file = await load(id);
  const turned = side === "b";
  const names = turned ? [b, a] : [a, b];
  const [of, to] = await Promise.all(names.map((one) => router.dictionaries.get(one).ready()));
  const nearest = integers(turned ? file.in_a : file.in_b);
  const cosine = floats(turned ? file.in_a_cosine : file.in_b_cosine);
  const back = integers(turned ? file.in_b : file.in_a);
  const backCosine = floats(turned ? file.in_b_cosine : file.in_a_cosine);
  const children = Array.from({ length: of.d_sae }, () => []);
  back.forEach((parent, child) => {
    if (parent >= 0 && backCosine[child] >= file.least)
      children[parent].push([child, backCosine[child]]);
  });
  for (const those of children) those.sort((x, y) => y[1] - x[1]);
  return {
    id,
    side,
    of,
    to,
    nearest,
    cosine,
    children,
    least: file.least,
    chance: file.chance,
    note,
  };
}

function pairHash({ id, side }, latent) {
  return `#${id}/pair/${latent}${side === "b" ? "?of=b" : ""}`;
}

async function compareView(route) {
  const side = route.params.get("of") === "b" ? "b" : "a";
  const pair = await readComparison(route.comparison, side);
  if (route.kind === "pair" && route.item !== null && route.item < pair.of.d_sae)
    return pairView(pair, route.item);
  const view = new CompareTable(pair);
  const other = `#${pair.id}${side === "a" ? "?of=b" : ""}`;
  const node = el(
    "div",
    { class: "compare-view" },
    el("h1", { tabindex: "-1" }, said(pair.of.name), " beside ", said(pair.to.name)),
    pair.note ? el("p", { class: "subtitle" }, said(pair.note)) : null,
    otherComparisons(pair.id),
    el(
      "p",
      { class: "meta" },
      el(
        "a",
        { href: other },
        "The other way round: ",
        said(pair.to.name),
        " beside ",
        said(pair.of.name),
      ),
    ),
    compareSummary(pair),
    view.bar,
    view.count,
    view.table.node,
  );
  return {
    title: `${pair.of.name} beside ${pair.to.name}`,
    node,
    rows: view.table,
    shown: () => view.refresh(),
    close: () => view.table.close(),
  };
}

function otherComparisons(id) {
  const name = (one) => visible(router.dictionaries.get(one)?.name ?? one);
  const options = router.data.comparisons.map((one) => [
    one.id,
    `${name(one.a)} beside ${name(one.b)}`,
  ]);
  return options.length > 1 ? choice("Comparison", options, id, (to) => goTo(`#${to}`)) : null;
}

function compareSummary(pair) {
  const known = [...pair.cosine].filter(
    (_, row) => pair.nearest[row] >= 0 && pair.of.status[row] > 1,
  );
  const found = known.filter((value) => value >= pair.least).length;
  const splits = pair.children.filter((those) => those.length > 1).length;
  const pairs = [
    [
      `with a counterpart (cosine ≥ ${score(pair.least)})`,
      `${whole.format(found)} (${percent(found / (known.length || 1))})`,
    ],
    ["without", whole.format(known.length - found)],
    ["split into two or more", whole.format(splits)],
    ["by chance, nearest below", missing(pair.chance) ? "–" : score(pair.chance)],
  ];
  return el(
    "div",
    { class: "card" },
    el(
      "dl",
      { class: "facts counts" },
      pairs.map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value))),
    ),
    known.length ? cosineChart(known, pair) : null,
  );
}

function cosineChart(values, { least, chance }) {
  const n = 40;
  const low = Math.min(0, Math.floor(Math.min(...values) * 10) / 10);
  const counts = new Array(n).fill(0);
  for (const value of values)
    counts[Math.min(n - 1, Math.floor(((value - low) / (1 - low)) * n))] += 1;
  const most = Math.max(...counts);
  const edge = (i) => low + (i / n) * (1 - low);
  const height = 190;
  const label = `Histogram of the cosine with the nearest latent: ${counts.join(", ")}`;
  return figure(
    "Cosine with the nearest latent of the other; the dashed lines are chance and the least that counts",
    label,
    height,
    (image, width) => {
      const x = linearScale([low, 1], [FRAME.left, width - FRAME.right]);
      const y = linearScale([0, most], [height - FRAME.bottom, FRAME.top]);
      drawAxes(image, width, height, {
        x,
        y,
        xTicks: roundTicks(low, 1, 8),
        yTicks: roundTicks(0, most, 4),
        xLabel: "cosine",
      });
      drawBars(
        image,
        height,
        y,
        counts.map((count, i) => ({
          from: x(edge(i)),
          to: x(edge(i + 1)),
          count,
          lines: [
            [`${number(count)} latents`],
            [`cosine ${number(edge(i))} to ${number(edge(i + 1))}`],
          ],
        })),
      );
      for (const at of [least, chance].filter((value) => !missing(value)))
        image.append(
          svg("line", {
            class: "rule",
            x1: x(at),
            x2: x(at),
            y1: FRAME.top,
            y2: height - FRAME.bottom,
          }),
        );
    },
  );
}

class CompareTable {
  constructor(pair) {
    Object.assign(this, { pair, which: "all", query: "", sort: ["cosine", -1] });
    this.count = el("p", { class: "count", role: "status" });
    this.table = new RowTable({
      label: "Latents and their nearest in the other dictionary",
      columns: this.columns(),
      onSort: (id, sign) => {
        this.sort = [id, sign];
        this.refresh();
      },
    });
    const search = el("input", {
      type: "search",
      id: "search",
      placeholder: "river",
      "aria-keyshortcuts": "/",
      oninput: (event) => {
        this.query = event.target.value.toLowerCase();
        this.refresh();
      },
    });
    this.bar = el(
      "form",
      { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
      el(
        "label",
        { class: "field search" },
        el("span", {}, "Search labels ", el("kbd", {}, "/")),
        search,
      ),
      choice("Which", SIDES, this.which, (which) => {
        this.which = which;
        this.refresh();
      }),
    );
  }

  columns() {
    const { of, to, nearest, cosine, children } = this.pair;
    const name = (dictionary, row) => said(visible(dictionary.label(row) || `latent ${row}`));
    const twin = (row) =>
      nearest[row] < 0 ? el("span", { class: "empty" }, "none") : name(to, nearest[row]);
    return [
      { id: "latent", name: "latent", kind: "number id", first: 1, cell: (row) => `#${row}` },
      {
        id: "label",
        name: of.name,
        kind: "name",
        first: 1,
        header: true,
        cell: (row) => el("a", { href: pairHash(this.pair, row) }, name(of, row)),
      },
      { id: "twin", name: `nearest in ${to.name}`, kind: "name", first: 1, cell: twin },
      {
        id: "cosine",
        name: "cosine",
        kind: "number",
        cell: (row) => [el("span", {}, score(cosine[row])), meter(cosine[row])],
      },
      {
        id: "splits",
        name: "in the other",
        kind: "number",
        note: "Latents of the other whose nearest is this one",
        cell: (row) => String(children[row].length),
      },
    ];
  }

  refresh() {
    const { of, to, nearest, cosine, children, least } = this.pair;
    const [id, sign] = this.sort;
    const passes = {
      all: () => true,
      none: (row) => nearest[row] < 0 || cosine[row] < least,
      splits: (row) => children[row].length > 1,
    }[this.which];
    const text = (row) =>
      `${of.label(row)}\n${nearest[row] < 0 ? "" : to.label(nearest[row])}`.toLowerCase();
    const rows = of
      .order("latent", 1)
      .filter(
        (row) =>
          of.status[row] > 1 && passes(row) && (!this.query || text(row).includes(this.query)),
      );
    const key = {
      latent: (row) => row,
      label: (row) => of.label(row).toLowerCase(),
      twin: (row) => (nearest[row] < 0 ? "" : to.label(nearest[row]).toLowerCase()),
      cosine: (row) => (Number.isNaN(cosine[row]) ? -2 : cosine[row]),
      splits: (row) => children[row].length,
    }[id];
    const keys = new Map(Array.from(rows, (row) => [row, key(row)]));
    const rank = (x, y) => (x < y ? -1 : x > y ? 1 : 0);
    this.table.show(
      rows.sort((x, y) => sign * rank(keys.get(x), keys.get(y)) || x - y),
      this.sort,
    );
    this.count.textContent = `${whole.format(rows.length)} latents`;
  }
}
