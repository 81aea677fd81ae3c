// The latent browser: its controls, and the address (#dictionary/latent) that follows the choice.

function hashOf(dictionary, latent) {
  return `#${encodeURIComponent(encodable(dictionary))}/${latent}`;
}

/** A name without lone surrogates, which no address can hold. */
function encodable(name) {
  return name.replace(/[\ud800-\udfff]/gu, "\ufffd");
}

/** The latent that the address names, as {name, latent}, or null: anything may stand there. */
function readHash() {
  const cut = location.hash.lastIndexOf("/");
  const latent = location.hash.slice(cut + 1);
  if (cut < 1 || !/^\d{1,9}$/.test(latent)) return null;
  try {
    return { name: decodeURIComponent(location.hash.slice(1, cut)), latent: Number(latent) };
  } catch {
    return null; // a broken escape sequence
  }
}

/** The latent browser: controls and list on the left, the chosen latent on the right. */
class Browser {
  constructor(data) {
    this.data = data;
    this.dictionary = data.dictionaries.find((one) => one.rows.length) ?? data.dictionaries[0];
    this.list = new RowList(
      "Latents",
      (row) => latentLine(this.dictionary, row),
      (row, byHand) => this.choose(row, byHand),
    );
    this.view = el("div");
    this.detail = el(
      "div",
      { class: "detail", role: "region", "aria-label": "The chosen latent" },
      this.steps(),
      this.view,
    );
    this.count = el("p", { class: "count", role: "status" });
    this.notice = el("p", { class: "notice", role: "status", hidden: "" });
    this.controls();
    this.node = section(
      "latents",
      "Latents",
      this.notice,
      el(
        "div",
        { class: "browser" },
        el("div", { class: "side-panel" }, this.switcher, this.form, this.count, this.list.node),
        this.detail,
      ),
    );
  }

  controls() {
    const refresh = () => this.refresh();
    const choice = (label, options, onchange) =>
      el(
        "select",
        { "aria-label": label, onchange },
        options.map(([value, text]) => el("option", { value }, text)),
      );
    this.switcher = el(
      "div",
      { class: "switch", role: "group", "aria-label": "Dictionary" },
      this.data.dictionaries.map((one) =>
        el(
          "button",
          {
            type: "button",
            onclick: () => {
              this.open(one);
              this.write();
            },
          },
          said(one.name),
        ),
      ),
    );
    this.search = el("input", {
      type: "search",
      placeholder: "Search label, word, number",
      "aria-label": "Search latents",
      autocomplete: "off",
      spellcheck: "false",
      oninput: refresh,
      onkeydown: (event) => this.onSearchKey(event),
    });
    this.order = choice("Order", ORDERS, refresh);
    this.density = choice(
      "Smallest density",
      DENSITIES.map((share) => [share, share ? `density ≥ ${percent(share)}` : "any density"]),
      refresh,
    );
    this.kind = choice("Explainer", [], refresh);
    this.form = el(
      "form",
      { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
      this.search,
      this.order,
      el("div", { class: "pair" }, this.density, this.kind),
    );
  }

  /** Down or Enter in the search box goes on into the list. */
  onSearchKey(event) {
    if (event.key !== "ArrowDown" && event.key !== "Enter") return;
    event.preventDefault();
    this.list.node.focus();
    if (this.list.rows.length && !this.list.rows.includes(this.list.chosen))
      this.choose(this.list.rows[0], false);
  }

  /** Shows a dictionary and its latent of that number, or the first of its list. */
  open(dictionary, latent = null) {
    this.dictionary = dictionary;
    this.data.dictionaries.forEach((one, i) =>
      this.switcher.children[i].setAttribute("aria-pressed", String(one === dictionary)),
    );
    const kinds = [...new Set(dictionary.latents.kind ?? [])].filter(Boolean).sort();
    this.kind.replaceChildren(
      el("option", { value: "" }, "any explainer"),
      ...kinds.map((kind) => el("option", { value: kind }, kind)),
    );
    this.kind.hidden = kinds.length < 2;
    this.list.chosen = null;
    const row = latent === null ? -1 : (dictionary.latents.latent?.indexOf(latent) ?? -1);
    this.notice.hidden = latent === null || row >= 0;
    if (!this.notice.hidden)
      this.notice.replaceChildren(
        `This page has no latent ${latent} of `,
        said(dictionary.name),
        ".",
      );
    if (row >= 0) this.clear();
    this.refresh();
    if (row >= 0) this.choose(row, false);
    else if (this.list.rows.length) this.show(this.list.rows[0]);
    else
      this.view.replaceChildren(
        empty(
          dictionary.rows.length
            ? "No latent is chosen."
            : "This dictionary has no latents to show.",
        ),
      );
  }

  clear() {
    this.search.value = "";
    this.density.value = "0";
    this.kind.value = "";
  }

  refresh() {
    const filters = {
      query: this.search.value,
      order: this.order.value,
      density: Number(this.density.value),
      kind: this.kind.value,
    };
    const rows = findRows(this.dictionary, this.data.strings, filters);
    this.list.show(rows);
    this.list.reveal();
    const all = this.dictionary.rows.length;
    this.count.replaceChildren(
      rows.length === all
        ? `${whole.format(all)} latents`
        : `${whole.format(rows.length)} of ${whole.format(all)} latents`,
    );
    if (rows.length < all) {
      this.count.append(
        " · ",
        el(
          "button",
          {
            type: "button",
            class: "plain",
            onclick: () => {
              this.clear();
              this.refresh();
              this.search.focus();
            },
          },
          "clear the filters",
        ),
      );
    }
  }

  /** Shows a latent and writes it into the address. */
  choose(row, byHand) {
    this.notice.hidden = true;
    this.show(row);
    this.write();
    const hidden = this.detail.getBoundingClientRect().top < 0;
    if (hidden || (byHand && this.stacked())) this.detail.scrollIntoView();
  }

  show(row) {
    hideTip();
    this.list.choose(row);
    this.view.replaceChildren(
      latentView(latentAt(this.dictionary, row, this.data), this.dictionary),
    );
  }

  /** Writes the chosen latent into the address; browsers allow few such changes per second. */
  write() {
    clearTimeout(this.writing);
    this.writing = setTimeout(() => {
      if (this.list.chosen === null) return;
      location.replace(
        hashOf(this.dictionary.name, this.dictionary.latents.latent[this.list.chosen]),
      );
    }, 150);
  }

  steps() {
    const step = (by, sign, label) =>
      el(
        "button",
        {
          type: "button",
          class: "step",
          "aria-label": label,
          title: label,
          onclick: () => this.list.move(by),
        },
        sign,
      );
    return el(
      "div",
      { class: "steps" },
      step(-1, "↑", "Previous latent of the list"),
      step(1, "↓", "Next latent of the list"),
    );
  }

  /** Whether the window is so narrow that the latent stands under the list. */
  stacked() {
    return this.detail.getBoundingClientRect().top >= this.list.node.getBoundingClientRect().bottom;
  }

  /** Scrolls to the chosen latent. */
  arrive() {
    (this.stacked() ? this.detail : this.node).scrollIntoView();
  }

  /** Follows the address; false where it names no latent. */
  follow() {
    const place = readHash();
    const dictionary =
      place && this.data.dictionaries.find((one) => encodable(one.name) === place.name);
    if (!dictionary) return false;
    const here =
      dictionary === this.dictionary &&
      dictionary.latents.latent?.[this.list.chosen] === place.latent;
    if (!here) this.open(dictionary, place.latent);
    return !here;
  }
}
