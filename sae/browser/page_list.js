// The list of latents: order, filters, and a list box that keeps only the rows in view in the page.

const ROW = 60; // pixels; page.css has the same number

const ORDERS = [
  ["auc-down", "label score, best first", "auc", -1],
  ["auc-up", "label score, lowest first", "auc", 1],
  ["density-down", "density, highest first", "density", -1],
  ["density-up", "density, lowest first", "density", 1],
  ["max-down", "largest activation first", "max_activation", -1],
  ["number", "number", "latent", 1],
];
const DENSITIES = [0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1];

/** Rows (places in the dictionary's columns) that pass the filters, in order. */
function findRows(dictionary, strings, { query, order, density, kind }) {
  const columns = dictionary.latents;
  const texts = searchTexts(dictionary, strings);
  const terms = query.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = query.trim().replace(/^#/, "");
  const named = (row) => String(columns.latent[row]) === wanted;
  const passes = (row) =>
    columns.density[row] >= density &&
    (kind === "" || columns.kind[row] === kind) &&
    (named(row) || terms.every((term) => texts[row].includes(term)));
  const rows = dictionary.rows.filter(passes);
  const [, , field, sign] = ORDERS.find(([key]) => key === order);
  const value = (row) => columns[field][row];
  const missing = (row) => (value(row) === null ? 1 : 0); // the latents without a score come last, always
  rows.sort(
    (a, b) =>
      named(b) - named(a) ||
      missing(a) - missing(b) ||
      sign * (value(a) - value(b)) ||
      columns.latent[a] - columns.latent[b],
  );
  return rows;
}

/** What the search box looks through, one lower-case text per latent; made at the first search. */
function searchTexts(dictionary, strings) {
  const { label, kind, words, promoted, latent } = dictionary.latents;
  dictionary.texts ??= dictionary.rows.map((row) =>
    [
      `#${latent[row]}`,
      label[row],
      kind[row],
      ...words[row].map(([word]) => word),
      ...promoted[row].map((i) => strings[i]),
    ]
      .join("\n")
      .toLowerCase(),
  );
  return dictionary.texts;
}

/** A list box over many rows; `content(row)` makes a row's children, `onChoose(row)` hears choices. */
class RowList {
  constructor(label, content, onChoose) {
    this.content = content;
    this.onChoose = onChoose;
    this.rows = [];
    this.chosen = null;
    this.inner = el("div", { class: "rows", role: "presentation" });
    this.node = el(
      "div",
      {
        class: "list",
        role: "listbox",
        tabindex: "0",
        "aria-label": label,
        onscroll: () => this.draw(),
        onkeydown: (event) => this.onKey(event),
        onclick: (event) => this.onClick(event),
      },
      this.inner,
    );
    new ResizeObserver(() => this.draw()).observe(this.node);
  }

  show(rows) {
    this.rows = rows;
    this.node.scrollTop = 0;
    this.inner.style.setProperty("height", `${rows.length * ROW}px`);
    this.draw();
  }

  choose(row) {
    this.chosen = row;
    this.reveal();
    this.draw();
  }

  /** Scrolls so far that the chosen row is in view. */
  reveal() {
    const at = this.rows.indexOf(this.chosen) * ROW;
    const height = this.node.clientHeight;
    if (at < 0) return;
    if (at < this.node.scrollTop) this.node.scrollTop = at;
    else if (at + ROW > this.node.scrollTop + height) this.node.scrollTop = at + ROW - height;
  }

  draw() {
    const first = Math.max(0, Math.floor(this.node.scrollTop / ROW) - 4);
    const last = Math.min(
      this.rows.length,
      Math.ceil((this.node.scrollTop + this.node.clientHeight) / ROW) + 4,
    );
    const options = [];
    for (let at = first; at < last; at += 1) options.push(this.option(at));
    if (!this.rows.length) options.push(empty("No latent matches."));
    this.inner.replaceChildren(...options);
    const shown = options.find((option) => option.getAttribute("aria-selected") === "true");
    if (shown) this.node.setAttribute("aria-activedescendant", shown.id);
    else this.node.removeAttribute("aria-activedescendant");
  }

  option(at) {
    const row = this.rows[at];
    return el(
      "div",
      {
        class: "option",
        role: "option",
        id: `row-${row}`,
        "data-row": row,
        "--at": at,
        "aria-selected": String(row === this.chosen),
        "aria-setsize": this.rows.length,
        "aria-posinset": at + 1,
      },
      this.content(row),
    );
  }

  onClick(event) {
    const option = event.target.closest("[data-row]");
    if (option) this.onChoose(Number(option.dataset.row), true);
  }

  onKey(event) {
    const page = Math.max(1, Math.floor(this.node.clientHeight / ROW) - 1);
    const moves = {
      ArrowUp: -1,
      ArrowDown: 1,
      PageUp: -page,
      PageDown: page,
      Home: -Infinity,
      End: Infinity,
    };
    if (!Object.hasOwn(moves, event.key) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.move(moves[event.key]);
  }

  /** Chooses the row that stands `by` places further on; the first if none is chosen. */
  move(by) {
    if (!this.rows.length) return;
    const at = this.rows.indexOf(this.chosen);
    const next = at < 0 ? 0 : Math.min(this.rows.length - 1, Math.max(0, at + by));
    this.onChoose(this.rows[next], false);
  }
}
