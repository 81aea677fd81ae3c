// The table of latents: search, filters, order; all of it stands in the address.
"use strict";

const STATUSES = [
  ["", "all"],
  ["scored", "scored"],
  ["insufficient", "too rare to be scored"],
  ["live", "live, not scored"],
  ["dead", "dead"],
];

/** The rows that the table showed last, by dictionary: what "next latent" goes through. */
const lastFound = new Map();

function tableHash(dictionary, query = "") {
  return `#${dictionary.id}/table${query ? `?${query}` : ""}`;
}

function latentHash(dictionary, latent) {
  return `#${dictionary.id}/latent/${latent}`;
}

function defaultSort(dictionary) {
  const scores = dictionary.columns.find((column) => column.kind === "score");
  return [scores?.id ?? "density", -1];
}

/** Search, order and filters as an address says them; what cannot be read is left out. */
function readFilters(dictionary, params) {
  const ids = ["latent", "label", ...dictionary.columns.map((column) => column.id)];
  const sort = params.get("sort") ?? "";
  const id = sort.replace(/^-/, "");
  const filters = {
    query: params.get("q") ?? "",
    status: params.get("status") ?? "",
    sort: ids.includes(id) ? [id, sort.startsWith("-") ? -1 : 1] : defaultSort(dictionary),
    least: {},
    most: {},
  };
  for (const column of dictionary.columns) {
    const [least, most] = (params.get(`in.${column.id}`) ?? "").split("..");
    if (isNumber(least)) filters.least[column.id] = Number(least);
    if (isNumber(most)) filters.most[column.id] = Number(most);
  }
  return filters;
}

function isNumber(text) {
  return text !== undefined && text.trim() !== "" && Number.isFinite(Number(text));
}

function writeFilters(dictionary, { query, status, sort, least, most }) {
  const params = new URLSearchParams();
  if (query) params.set("q", query);
  if (status) params.set("status", status);
  if (sort.join() !== defaultSort(dictionary).join())
    params.set("sort", `${sort[1] < 0 ? "-" : ""}${sort[0]}`);
  for (const { id } of dictionary.columns)
    if (Object.hasOwn(least, id) || Object.hasOwn(most, id))
      params.set(`in.${id}`, `${least[id] ?? ""}..${most[id] ?? ""}`);
  return params.toString();
}

async function tableView(route) {
  const dictionary = await route.dictionary.ready();
  const view = new TableView(dictionary, readFilters(dictionary, route.params));
  return {
    title: `Latents of ${dictionary.name}`,
    node: view.node,
    rows: view.table,
    shown: () => view.refresh(),
    close: () => view.table.close(),
  };
}

class TableView {
  constructor(dictionary, filters) {
    this.dictionary = dictionary;
    this.filters = filters;
    this.count = el("p", { class: "count", role: "status" });
    this.table = new RowTable({
      label: "Latents",
      columns: latentColumns(dictionary),
      onSort: (id, sign) => this.change({ sort: [id, sign] }),
    });
    this.bar = this.filterBar();
    this.node = el(
      "div",
      {
        class: "table-view",
        onclick: (event) => event.target.closest("td a, th a") && this.write(),
      },
      el("h1", { tabindex: "-1" }, "Latents of ", said(dictionary.name)),
      this.bar,
      this.count,
      this.table.node,
    );
    if (filters.query) this.searchAll();
  }

  filterBar() {
    this.search = el("input", {
      type: "search",
      id: "search",
      value: this.filters.query,
      placeholder: "river, or 193",
      autocomplete: "off",
      spellcheck: "false",
      "aria-keyshortcuts": "/",
      onfocus: () => this.searchAll(),
      oninput: () => this.change({ query: this.search.value }),
      onkeydown: (event) => this.onSearchKey(event),
    });
    const bounds = this.dictionary.columns.map((column) => this.boundField(column));
    const chosen = Object.keys(this.filters.least).length + Object.keys(this.filters.most).length;
    return el(
      "form",
      { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
      el(
        "label",
        { class: "field search" },
        el("span", {}, "Search labels, words, tokens ", el("kbd", {}, "/")),
        this.search,
      ),
      choice("Which", STATUSES, this.filters.status, (status) => this.change({ status })),
      el(
        "details",
        { open: chosen > 0 },
        el("summary", {}, "Ranges"),
        el("div", { class: "bounds" }, bounds),
      ),
    );
  }

  /** From .. to of one column; shares are given in percent. */
  boundField({ id, name, kind }) {
    const unit = kind === "share" ? 100 : 1;
    const input = (side, label) => {
      const bound = this.filters[side][id];
      const change = (event) => {
        const { [id]: _, ...others } = this.filters[side];
        const text = event.target.value.replace("%", "");
        this.change({
          [side]: isNumber(text)
            ? { ...others, [id]: Number((Number(text) / unit).toPrecision(12)) }
            : others,
        });
      };
      const value = bound === undefined ? null : Number((bound * unit).toPrecision(6));
      return el("input", {
        type: "text",
        inputmode: "decimal",
        "aria-label": `${name} ${label}`,
        placeholder: label,
        value,
        oninput: change,
      });
    };
    return el(
      "fieldset",
      {},
      el("legend", {}, said(name), unit === 100 ? " in %" : ""),
      input("least", "at least"),
      input("most", "at most"),
    );
  }

  onSearchKey(event) {
    if (event.key === "ArrowDown") {
      event.preventDefault();
      this.table.focusRow(0);
    } else if (event.key === "Enter" && this.table.rows.length) {
      this.write();
      location.hash = latentHash(this.dictionary, this.table.rows[0]);
    } else if (event.key === "Escape") {
      event.stopPropagation();
      if (!this.search.value) return this.search.blur();
      this.search.value = "";
      this.change({ query: "" });
    }
    return undefined;
  }

  /** Searches the whole text from now on, once it is there. */
  async searchAll() {
    if (this.dictionary.lines) return;
    await this.dictionary.searchable();
    if (this.filters.query) this.refresh();
  }

  /** Takes new filters; the address follows in its own time, for browsers count such changes. */
  change(filters) {
    this.filters = { ...this.filters, ...filters };
    this.refresh();
    const top = this.node.getBoundingClientRect().top + scrollY;
    if (scrollY > top) scrollTo(0, 0);
    clearTimeout(this.writing);
    this.writing = setTimeout(() => this.node.isConnected && this.write(), 200);
  }

  write() {
    clearTimeout(this.writing);
    const query = writeFilters(this.dictionary, this.filters);
    history.replaceState(null, "", tableHash(this.dictionary, query));
  }

  refresh() {
    const rows = this.dictionary.find(this.filters);
    const address = writeFilters(this.dictionary, this.filters);
    lastFound.set(this.dictionary.id, { rows, query: this.filters.query, address });
    this.table.show(rows, this.filters.sort);
    const all = this.dictionary.order("latent", 1).length;
    const some = `${whole.format(rows.length)} of ${whole.format(all)} latents`;
    this.count.textContent = rows.length === all ? `${whole.format(all)} latents` : some;
    if (!rows.length) this.count.append(". Nothing passes: try fewer words or wider ranges.");
  }
}

function latentColumns(dictionary) {
  const label = (row) => {
    const text = dictionary.label(row);
    const words = text ? said(visible(text)) : el("span", { class: "empty" }, "(no label)");
    const dead = dictionary.status[row] === 1 ? el("span", { class: "tag" }, "dead") : null;
    return el("a", { href: latentHash(dictionary, row) }, words, dead);
  };
  const top = (id) =>
    dictionary.values.get(id).reduce((most, value) => (value > most ? value : most), 0);
  const figures = dictionary.columns.map((column) => {
    const scale = barScale(column, top(column.id));
    const cell = (row) => {
      const value = dictionary.value(column.id, row);
      return [
        el("span", {}, shown(column.kind, value)),
        missing(value) ? null : meter(scale(value)),
      ];
    };
    return { ...column, kind: "number", cell };
  });
  return [
    { id: "latent", name: "latent", kind: "number id", first: 1, cell: (row) => `#${row}` },
    { id: "label", name: "label", kind: "name", first: 1, header: true, cell: label },
    ...figures,
  ];
}

/** How long the bar under a number is: shares by their logarithm, scores from their floor. */
function barScale(column, most) {
  if (column.kind === "share") return (value) => (value > 0 ? 1 + Math.log10(value) / 5 : 0);
  const floor = column.kind === "score" ? (column.floor ?? 0) : 0;
  const high = column.kind === "score" ? 1 : most;
  return (value) => (value - floor) / (high - floor || 1);
}
