// Nodes, numbers and strings. Texts of the data enter the page as text nodes only, never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element; attributes starting with "on" are listeners, those with "--" style properties. */
function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children.flat(2).filter((child) => child !== null && child !== undefined));
  return node;
}

/** A text from the data: isolated, so that right-to-left text in it moves nothing around it. */
function said(text, tag = "bdi") {
  return el(tag, { class: "said" }, text);
}

/** A heading with its section. */
function section(id, heading, ...children) {
  return el(
    "section",
    { id, "aria-labelledby": `${id}-heading` },
    el("h2", { id: `${id}-heading` }, heading),
    ...children,
  );
}

function empty(text) {
  return el("p", { class: "empty" }, text);
}

// ---- numbers

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const brief = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 3 });

/** Three significant digits; grouped where large, a power of ten where tiny. */
function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return whole.format(value).replace("-", "−");
  if (size < 1e-4) {
    const exponent = Math.floor(Math.log10(size));
    return `${Number((value / 10 ** exponent).toPrecision(2))} × 10${raised(exponent)}`.replace(
      "-",
      "−",
    );
  }
  return String(Number(value.toPrecision(3))).replace("-", "−");
}

/** A measured quantity: always three digits, so that a column of them lines up. */
function measured(value) {
  const plain = Math.abs(value) >= 0.01 && Math.abs(value) < 1000;
  return plain ? value.toPrecision(3).replace("-", "−") : number(value);
}

/** For the ticks of an axis. */
function tick(value) {
  return Math.abs(value) >= 1000 ? brief.format(value) : number(value);
}

function percent(share) {
  return share === 0 ? "0 %" : `${number(Number((100 * share).toPrecision(2)))} %`;
}

function raised(exponent) {
  return String(exponent).replace(/./g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit] ?? "⁻");
}

function score(value) {
  return value === null ? "–" : value.toFixed(3);
}

// ---- tokens

const SPECIAL = { "\n": "↵", "\r": "␍", "\t": "⇥" };
const INVISIBLE =
  /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]/gu;

/** A token with what cannot be seen made visible: a newline as ↵, a control character by its number. */
function visible(token) {
  return token.replace(INVISIBLE, (character) => SPECIAL[character] ?? `‹${codePoint(character)}›`);
}

function codePoint(character) {
  return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

/** A token that stands alone: its outer spaces are shown as a mark. */
function chip(token, className) {
  const [, before, core, after] = /^( *)(.*?)( *)$/s.exec(token);
  const mark = (spaces) =>
    spaces ? el("span", { class: "space" }, "␣".repeat(spaces.length)) : null;
  return el("li", { class: `chip ${className}` }, mark(before), visible(core), mark(after));
}

/** The bytes of a base64 text. */
function unpack(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/** The numbers in bytes that carry 7 bits each, lowest first; all but a number's last have the high bit. */
function numbersIn(bytes) {
  const numbers = [];
  let [number, place] = [0, 1];
  for (const byte of bytes) {
    number += (byte & 127) * place;
    place *= 128;
    if (byte > 127) continue;
    numbers.push(number);
    [number, place] = [0, 1];
  }
  return numbers;
}

// ---- the note that follows the pointer

const tip = el("div", { id: "tip", hidden: "" });

function showTip(x, y, ...lines) {
  tip.replaceChildren(...lines.map((line) => el("div", {}, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const above = y - height - 14;
  const left = Math.min(x + 12, document.documentElement.clientWidth - width - 8);
  tip.style.setProperty("left", `${Math.max(8, left)}px`);
  tip.style.setProperty("top", `${above > 4 ? above : y + 20}px`);
}

function hideTip() {
  tip.hidden = true;
}
