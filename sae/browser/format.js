// Numbers and tokens as they are to be read.
"use strict";

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const brief = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 3 });
const missing = (value) => value === null || value === undefined || Number.isNaN(value);
const minus = (text) => text.replace("-", "−");

/** Three significant digits; grouped where large, a power of ten where tiny. */
function number(value) {
  if (missing(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return minus(whole.format(value));
  if (size < 1e-4) {
    const exponent = Math.floor(Math.log10(size));
    return minus(`${Number((value / 10 ** exponent).toPrecision(2))} × 10${raised(exponent)}`);
  }
  return minus(String(Number(value.toPrecision(3))));
}

/** A measured quantity: always three digits, so that a column of them lines up. */
function measured(value) {
  if (missing(value)) return "–";
  const plain = Math.abs(value) >= 0.01 && Math.abs(value) < 1000;
  return plain ? minus(value.toPrecision(3)) : number(value);
}

/** With its sign, as for what a token adds or takes away. */
function signed(value) {
  return missing(value) ? "–" : `${value > 0 ? "+" : ""}${measured(value)}`;
}

/** For the ticks of an axis. */
function tick(value) {
  return Math.abs(value) >= 1000 ? brief.format(value) : number(value);
}

function percent(share) {
  if (missing(share)) return "–";
  if (share === 0) return "0 %";
  // What is short of all is not shown as all.
  const short = share > 0.99 && share < 1;
  return short
    ? `${Math.floor(1000 * share) / 10} %`
    : `${number(Number((100 * share).toPrecision(2)))} %`;
}

function raised(exponent) {
  return String(exponent).replace(/./g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit] ?? "⁻");
}

function score(value) {
  return missing(value) ? "–" : minus(value.toFixed(3));
}

/** A value of a column, by the column's kind. */
function shown(kind, value) {
  if (missing(value)) return "–";
  return { share: percent, score, count: number }[kind]?.(value) ?? measured(value);
}

// ---- tokens

const SPECIAL = { "\n": "↵", "\r": "␍", "\t": "⇥" };
const INVISIBLE =
  /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]/gu;

/** A token with what cannot be seen made visible: a newline as ↵, a control character by number. */
function visible(token) {
  return token.replace(INVISIBLE, (character) => SPECIAL[character] ?? `‹${codePoint(character)}›`);
}

function codePoint(character) {
  return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

/** A token that stands alone: its outer spaces are shown as a mark. */
function chip(token, className = "") {
  const [, before, core, after] = /^( *)(.*?)( *)$/s.exec(token);
  const mark = (spaces) =>
    spaces ? el("span", { class: "space" }, "␣".repeat(spaces.length)) : null;
  return el("span", { class: `chip ${className}` }, mark(before), visible(core), mark(after));
}
