// A table of any number of rows that keeps only those in view in the page.
"use strict";

const SPARE = 10; // rows drawn above and below the window

/**
 * Columns are {id, name, note, kind: "name"|"number", cell(row) -> children, sorted: "asc"|"desc"|null};
 * the first link of a row is what arrows and Enter go by.
 */
class RowTable {
  constructor({ label, columns, onSort }) {
    this.columns = columns;
    this.onSort = onSort;
    this.rows = [];
    this.head = el("tr", { role: "row" });
    this.body = el("tbody", { role: "rowgroup", onkeydown: (event) => this.onKey(event) });
    this.node = el(
      "table",
      { class: "rows", role: "table", "aria-label": label, "--columns": columns.length },
      el("thead", { role: "rowgroup" }, this.head),
      this.body,
    );
    const draw = () => this.node.isConnected && this.draw();
    this.listener = new AbortController();
    addEventListener("scroll", draw, { passive: true, signal: this.listener.signal });
    addEventListener("resize", draw, { signal: this.listener.signal });
  }

  close() {
    this.listener.abort();
  }

  /** Shows rows, sorted by the column `id` (sign 1 or -1). */
  show(rows, [id, sign]) {
    this.rows = rows;
    this.node.setAttribute("aria-rowcount", rows.length + 1);
    this.head.replaceChildren(...this.columns.map((column) => this.heading(column, id, sign)));
    this.drawn = null;
    this.draw();
  }

  heading(column, id, sign) {
    const on = column.id === id;
    const sorted = on ? (sign > 0 ? "ascending" : "descending") : null;
    const mark = el(
      "span",
      { class: "sort-mark", "aria-hidden": "true" },
      on ? (sign > 0 ? "▲" : "▼") : "",
    );
    const by = button([said(column.name), mark], { title: column.note || null }, () =>
      this.onSort(column.id, on ? -sign : (column.first ?? -1)),
    );
    return el(
      "th",
      { scope: "col", role: "columnheader", class: column.kind, "aria-sort": sorted },
      by,
    );
  }

  height() {
    return matchMedia("(max-width: 900px)").matches ? 74 : 36; // rows.css has the same numbers
  }

  draw() {
    const tall = this.height();
    const top = this.body.getBoundingClientRect().top;
    const at = (y) => Math.min(this.rows.length, Math.max(0, y));
    const first = at(Math.floor(-top / tall) - SPARE);
    const last = at(Math.ceil((innerHeight - top) / tall) + SPARE);
    const key = `${first} ${last} ${tall}`;
    if (key === this.drawn) return;
    this.drawn = key;
    const active = this.body.contains(document.activeElement)
      ? document.activeElement.closest("tr")?.ariaRowIndex
      : null;
    const shownRows = Array.from(this.rows.slice(first, last), (row, i) =>
      this.line(row, first + i),
    );
    this.body.replaceChildren(
      this.space(first * tall),
      ...shownRows,
      this.space((this.rows.length - last) * tall),
    );
    if (active) this.linkAt(Number(active) - 2)?.focus({ preventScroll: true });
  }

  space(height) {
    const row = el("tr", { class: "space-row", "aria-hidden": "true" }, el("td", {}));
    row.style.setProperty("height", `${height}px`);
    return row;
  }

  line(row, at) {
    const cells = this.columns.map((column) => {
      const attributes = { class: column.kind, "data-column": column.name };
      if (column.header)
        return el("th", { scope: "row", role: "rowheader", ...attributes }, column.cell(row));
      return el("td", { role: "cell", ...attributes }, column.cell(row));
    });
    return el("tr", { role: "row", "aria-rowindex": at + 2 }, cells);
  }

  /** The place of the first row that the heading does not cover. */
  firstInView() {
    const head = this.node.tHead.getBoundingClientRect().bottom;
    return Math.max(0, Math.ceil((head - this.body.getBoundingClientRect().top) / this.height()));
  }

  linkAt(at) {
    return this.body.querySelector(`[aria-rowindex="${at + 2}"] a`);
  }

  /** Moves the focus to the link of the row at that place, scrolling to it. */
  focusRow(at) {
    if (!this.rows.length) return;
    const wanted = Math.min(this.rows.length - 1, Math.max(0, at));
    const tall = this.height();
    const head = this.node.tHead.getBoundingClientRect().bottom;
    const y = this.body.getBoundingClientRect().top + wanted * tall;
    if (y < head) scrollBy(0, y - head - 4);
    else if (y + tall > innerHeight) scrollBy(0, y + tall - innerHeight + 4);
    this.draw();
    this.linkAt(wanted)?.focus({ preventScroll: true });
  }

  onKey(event) {
    const page = Math.max(1, Math.floor(innerHeight / this.height()) - 4);
    const moves = {
      ArrowUp: -1,
      ArrowDown: 1,
      PageUp: -page,
      PageDown: page,
      Home: -Infinity,
      End: Infinity,
    };
    if (!Object.hasOwn(moves, event.key) || event.altKey || event.ctrlKey || event.metaKey) return;
    const row = event.target.closest("tr[aria-rowindex]");
    if (!row) return;
    event.preventDefault();
    event.stopPropagation();
    this.focusRow(Number(row.ariaRowIndex) - 2 + moves[event.key]);
  }
}
