// Scores of a label with their intervals and controls, as a table with a drawing in each row.
"use strict";

function scoresBox({ scores, status }) {
  if (!scores.length) {
    const why = {
      dead: "Not scored: it never fired.",
      insufficient: "Not scored: too few examples on which it fires.",
    };
    return box("Scores", "", empty(why[status] ?? "Not scored."));
  }
  const counted = scores.some(({ n }) => !missing(n));
  const names = [...new Set(scores.map(({ name }) => name))];
  const groups = names.map((name) => {
    const those = scores.filter((one) => one.name === name);
    return el(
      "tbody",
      {},
      those.map((one) => scoreRow(one, spanOf(those), counted)),
    );
  });
  const heads = ["score", "value", "interval", ...(counted ? ["n"] : [])].map((text, i) =>
    el("th", { scope: "col", class: i === 1 || i === 3 ? "number" : null }, text),
  );
  const table = el("table", { class: "scores" }, el("thead", {}, el("tr", {}, heads)), groups);
  return box(
    "Scores",
    "with intervals; hollow marks are controls, the dashed line is chance",
    table,
  );
}

/** The axis of a score: 0 to 1, or as far as its values reach. */
function spanOf(rows) {
  const values = rows
    .flatMap(({ value, low, high }) => [value, low, high])
    .filter((one) => !missing(one));
  return [Math.min(0, ...values), Math.max(1, ...values)];
}

function scoreRow({ name, value, low, high, floor, n, control, note }, span, counted) {
  const known = !missing(low) && !missing(high);
  const interval = known ? `${score(low)} to ${score(high)}` : "";
  const title = control
    ? [el("span", { class: "control" }, "control: "), said(control)]
    : said(name);
  return el(
    "tr",
    { class: control ? "is-control" : "" },
    el(
      "th",
      { scope: "row" },
      title,
      note ? el("span", { class: "score-note" }, said(note)) : null,
    ),
    el("td", { class: "number" }, score(value)),
    el(
      "td",
      { class: "interval-cell" },
      missing(value) ? null : intervalMark({ value, low, high, floor, known }, span),
      el("span", { class: "interval-text" }, interval),
    ),
    counted ? el("td", { class: "number" }, missing(n) ? "" : whole.format(n)) : null,
  );
}

function intervalMark({ value, low, high, floor, known }, [from, to]) {
  const at = (x) => (x - from) / (to - from || 1);
  return el(
    "span",
    { class: "interval", "aria-hidden": "true" },
    missing(floor) ? null : el("span", { class: "chance", "--at": at(floor) }),
    known ? el("span", { class: "range", "--low": at(low), "--high": at(high) }) : null,
    el("span", { class: "point", "--at": at(value) }),
  );
}
