// One dictionary: its table, its search text, its latents, and the rows that pass the filters.
"use strict";

const STATUS = ["", "dead", "insufficient", "scored", "live"];

class Dictionary {
  constructor(about) {
    Object.assign(this, about);
    this.about = about;
    this.orders = new Map();
  }

  /** Loads the columns; everything below needs them. */
  async ready() {
    this.table ??= this.readTable();
    return await this.table;
  }

  async readTable() {
    const parts = await Promise.all(
      Array.from({ length: this.n_tables }, (_, i) => load(`${this.id}/table/${i}`)),
    );
    this.labels = parts.flatMap((part) => part.labels);
    this.status = joined(
      Uint8Array,
      parts.map((part) => bytes(part.status)),
    );
    this.values = new Map(
      this.columns.map(({ id }, i) => [
        id,
        joined(
          Float32Array,
          parts.map((part) => floats(part.columns[i])),
        ),
      ]),
    );
    return this;
  }

  /** Loads the search text; without it only labels and numbers are searched. */
  async searchable() {
    this.search ??= this.readSearch();
    return await this.search;
  }

  async readSearch() {
    const parts = await Promise.all(
      Array.from({ length: this.n_tables }, (_, i) => load(`${this.id}/search/${i}`)),
    );
    this.lines = new Lines(parts.map((part) => part.text).join(""));
    return this;
  }

  /** One latent with its strings looked up, or null where nothing was kept of it. */
  async latent(wanted) {
    const part = Math.floor(wanted / this.size);
    if (!this.parts.includes(part)) return null;
    const file = await load(`${this.id}/latents/${part}`);
    const found = file.latents[wanted - file.first];
    return found ? withStrings(found, file.strings) : null;
  }

  label(latent) {
    return this.labels[latent] || "";
  }

  value(id, latent) {
    return this.values.get(id)[latent];
  }

  /** All rows by one column, what has no value last; made once. */
  order(id, sign) {
    const key = `${id} ${sign}`;
    if (!this.orders.has(key)) this.orders.set(key, this.sorted(id, sign));
    return this.orders.get(key);
  }

  sorted(id, sign) {
    const rows = Uint32Array.from(this.status.keys()).filter((row) => this.status[row] > 0);
    if (id === "latent") return sign > 0 ? rows : rows.reverse();
    if (id === "label")
      return rows.sort(
        byText(
          this.labels.map((text) => text.toLowerCase()),
          sign,
        ),
      );
    const keys = this.values
      .get(id)
      .map((value) => (Number.isNaN(value) ? Infinity : sign * value));
    return rows.sort((a, b) => keys[a] - keys[b] || a - b || 0);
  }

  /** The rows that pass, in order: {query, sort: [id, sign], status, least: {id: value}, most}. */
  find({ query, sort, status, least, most }) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const named = /^#?\d+$/.test(query.trim()) ? Number(query.trim().replace("#", "")) : -1;
    const hits = words.length ? this.matches(words) : null;
    const bounds = [
      ...Object.entries(least).map(
        ([id, bound]) =>
          (row) =>
            this.value(id, row) >= bound,
      ),
      ...Object.entries(most).map(
        ([id, bound]) =>
          (row) =>
            this.value(id, row) <= bound,
      ),
    ];
    const code = STATUS.indexOf(status);
    const passes = (row) =>
      (hits === null || hits[row] === 1) &&
      (code < 1 || this.status[row] === code) &&
      bounds.every((bound) => bound(row)) &&
      row !== named;
    const rows = this.order(...sort).filter(passes);
    return this.status[named] ? Uint32Array.from([named, ...rows]) : rows;
  }

  /** One byte per latent: 1 where every word stands in its text. */
  matches(words) {
    if (this.lines) return this.lines.matches(words);
    this.lowered ??= this.labels.map((text) => text.toLowerCase());
    return Uint8Array.from(this.lowered, (text) => words.every((word) => text.includes(word)));
  }
}

function joined(Kind, arrays) {
  if (arrays.length === 1) return arrays[0];
  const all = new Kind(arrays.reduce((sum, one) => sum + one.length, 0));
  let at = 0;
  for (const one of arrays) {
    all.set(one, at);
    at += one.length;
  }
  return all;
}

function byText(texts, sign) {
  const rank = (a, b) => (texts[a] < texts[b] ? -1 : texts[a] > texts[b] ? 1 : 0);
  const blank = (row) => (texts[row] === "" ? 1 : 0);
  return (a, b) => blank(a) - blank(b) || sign * rank(a, b) || a - b;
}

function withStrings(found, strings) {
  const text = (i) => strings[i];
  const examples = found.examples.map((example) => ({
    ...example,
    tokens: example.tokens.map(text),
    source: text(example.source) ?? "",
    fires: new Map(
      Array.from({ length: example.fires.length / 2 }, (_, i) => [
        example.fires[2 * i],
        example.fires[2 * i + 1],
      ]),
    ),
    image: example.image && { ...example.image, name: text(example.image.name) ?? "" },
  }));
  const weighed = (pairs) => pairs.map(([i, value]) => [text(i), value]);
  const attributions = found.attributions.map((one) => ({
    ...one,
    tokens: one.tokens.map(text),
    target: text(one.target) ?? "",
  }));
  return {
    ...found,
    examples,
    attributions,
    promoted: weighed(found.promoted),
    suppressed: weighed(found.suppressed),
  };
}

/** A text of one line per latent, searched as a whole: that is many times faster than line by line. */
class Lines {
  constructor(text) {
    this.text = text;
    this.starts = [0];
    for (let at = text.indexOf("\n"); at >= 0; at = text.indexOf("\n", at + 1))
      this.starts.push(at + 1);
  }

  matches(words) {
    const [first, ...others] = [...words].sort((a, b) => b.length - a.length);
    const hits = new Uint8Array(this.starts.length);
    let line = 0;
    for (
      let at = this.text.indexOf(first);
      at >= 0;
      at = this.text.indexOf(first, this.starts[line + 1])
    ) {
      while (line + 1 < this.starts.length && this.starts[line + 1] <= at) line += 1;
      if (line + 1 >= this.starts.length) break;
      const whole = others.length ? this.text.slice(this.starts[line], this.starts[line + 1]) : "";
      hits[line] = others.every((word) => whole.includes(word)) ? 1 : 0;
    }
    return hits;
  }
}
