// Nodes. Texts of the data enter the page as text nodes only, never as markup.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element; attributes starting with "on" are listeners, with "--" style properties. */
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
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(3).filter((child) => child !== null && child !== undefined));
  return node;
}

/** A text from the data: isolated, so that right-to-left text in it moves nothing around it. */
function said(text, tag = "bdi") {
  return el(tag, { class: "said" }, text);
}

let headings = 0;

/** A part of a view with its heading. */
function section(heading, attributes = {}, ...children) {
  const id = `heading-${(headings += 1)}`;
  return el(
    "section",
    { "aria-labelledby": id, ...attributes },
    el("h2", { id }, heading),
    ...children,
  );
}

/** A bordered box of a latent's page; `aside` says what is in it in a few words. */
function box(heading, aside, ...children) {
  const id = `heading-${(headings += 1)}`;
  const note = aside ? el("span", { class: "aside" }, ` ${aside}`) : null;
  return el(
    "section",
    { class: "box", "aria-labelledby": id },
    el("h2", { id }, heading, note),
    ...children,
  );
}

function empty(text) {
  return el("p", { class: "empty" }, text);
}

/** Names and values as a list. */
function facts(pairs) {
  const items = pairs.map(([name, value]) =>
    el("div", {}, el("dt", {}, said(name)), el("dd", {}, said(value))),
  );
  return items.length ? el("dl", { class: "facts" }, items) : null;
}

/** A bar behind or beside a number, `share` of its place long; the number itself stands there. */
function meter(share, className = "") {
  const kept = Math.min(1, Math.max(0, share || 0));
  return el("span", { class: `meter ${className}`, "aria-hidden": "true", "--share": kept });
}

/** A select whose options are [value, text]. */
function choice(label, options, value, onchange) {
  const items = options.map(([key, text]) =>
    el("option", { value: key, selected: key === value }, text),
  );
  const select = el("select", { onchange: (event) => onchange(event.target.value) }, items);
  return el("label", { class: "field" }, el("span", {}, label), select);
}

function button(text, attributes, onclick) {
  return el("button", { type: "button", ...attributes, onclick }, text);
}

/** Says something to a screen reader without showing it. */
function announce(text) {
  document.getElementById("said").textContent = text;
}

// ---- the note that follows the pointer or the focus

const tip = el("div", { id: "tip", role: "tooltip", hidden: true });
let tipAnchor = null;

function showTip(x, y, ...lines) {
  tipAnchor = null;
  tip.replaceChildren(...lines.map((line) => el("div", {}, line)));
  tip.hidden = false;
  placeTip(x, y);
}

function placeTip(x, y) {
  const { width, height } = tip.getBoundingClientRect();
  const above = y - height - 14;
  const left = Math.min(x + 12, document.documentElement.clientWidth - width - 8);
  tip.style.setProperty("left", `${Math.max(8, left)}px`);
  tip.style.setProperty("top", `${above > 4 ? above : y + 20}px`);
}

/** The same beside a node, for those who come by keyboard. */
function showTipAt(node, ...lines) {
  const { left, top } = node.getBoundingClientRect();
  showTip(left, top, ...lines);
  tipAnchor = node;
}

/** After scrolling the pointer is elsewhere, but what has the focus keeps its note. */
function moveTip() {
  if (!tipAnchor) return hideTip();
  const { left, top } = tipAnchor.getBoundingClientRect();
  return placeTip(left, top);
}

function hideTip() {
  tip.hidden = true;
}
