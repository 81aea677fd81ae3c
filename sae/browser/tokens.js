// Texts with values on their tokens. A value is told by shade, by the weight of a line under the
// token, and in figures: on hover, on focus, or beside every token where the reader asks for it.
"use strict";

/**
 * A text whose tokens have values, as {tokens, values: Map place -> value, scale, peak, unit}.
 * One token of it is a tab stop; the arrow keys go on to the others that have a value.
 */
function tokenText({ tokens, values, scale, peak, unit = "activation", onpick = null }) {
  const spans = tokens.map((token, i) =>
    tokenSpan(token, i, { value: values.get(i), scale, peak, unit, onpick }),
  );
  const stop = spans[peak]?.matches(".lit")
    ? spans[peak]
    : spans.find((span) => span.matches(".lit"));
  stop?.setAttribute("tabindex", "0");
  const note = (event) => {
    const span = event.target.closest("[data-i]");
    if (!span || (event.type === "focusin" && !span.matches(":focus-visible"))) return hideTip();
    const i = Number(span.dataset.i);
    const lines = [
      [el("bdi", { class: "exact" }, visible(tokens[i]))],
      [`${unit} ${valueText(values.get(i) ?? 0, unit)}`],
    ];
    return event.type === "focusin"
      ? showTipAt(span, ...lines)
      : showTip(event.clientX, event.clientY, ...lines);
  };
  const listeners = {
    onpointerover: note,
    onpointerdown: note,
    onpointerleave: hideTip,
    onfocusin: note,
    onfocusout: hideTip,
  };
  return el("p", { class: "reading", dir: "auto", onkeydown: moveToken, ...listeners }, spans);
}

function valueText(value, unit) {
  return unit === "effect" ? signed(value) : measured(value);
}

function tokenSpan(token, i, { value, scale, peak, unit, onpick }) {
  const has = value !== undefined && value !== 0;
  const level = has ? Math.min(1, Math.abs(value) / scale) : 0;
  const weight = has ? 1 + Math.min(2, Math.floor(level * 3)) : 0;
  const classes = ["token"];
  if (has) classes.push("lit", `weight-${weight}`, value < 0 ? "negative" : "positive");
  if (i === peak) classes.push("peak");
  if (onpick) classes.push("pick");
  const attributes = { class: classes.join(" "), "data-i": i };
  if (has) {
    Object.assign(attributes, {
      "--level": level.toFixed(3),
      role: "mark",
      tabindex: "-1",
      "data-value": valueText(value, unit),
    });
    attributes["aria-description"] = `${unit} ${valueText(value, unit)}`;
  }
  if (onpick) Object.assign(attributes, { onclick: () => onpick(i), tabindex: "0" });
  return el("span", attributes, visible(token), /\n$/.test(token) ? "\u200b" : null);
}

/** The arrow keys go along the tokens of one text that have a value. */
function moveToken(event) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
  const all = [...event.currentTarget.querySelectorAll(".lit, .pick")];
  const next = all[all.indexOf(event.target) + by];
  event.preventDefault();
  event.stopPropagation();
  next?.focus();
}

/** A switch for the figures beside the tokens. */
function valuesSwitch() {
  const set = (on) => {
    document.documentElement.classList.toggle("with-values", on);
    remember("values", on ? "on" : "off");
  };
  const on = remembered("values", "off") === "on";
  set(on);
  const input = el("input", {
    type: "checkbox",
    checked: on,
    onchange: (event) => set(event.target.checked),
  });
  return el("label", { class: "check" }, input, " values");
}

// ---- examples, by the fifth of the range in which their peak lies

const FIFTHS = ["lowest fifth", "second fifth", "middle fifth", "fourth fifth", "highest fifth"];

function examplesBox(latent) {
  const { examples, status } = latent;
  if (!examples.length) {
    const why =
      status === "dead"
        ? "None: it never fired on these rows."
        : "No example was kept of this latent.";
    return box("Examples", "", empty(why));
  }
  const pictures = examples.some((example) => example.image);
  const scale =
    Math.max(latent.max_activation ?? 0, ...examples.flatMap(({ fires }) => [...fires.values()])) ||
    1;
  const fifths = [4, 3, 2, 1, 0].filter((fifth) => examples.some((one) => one.fifth === fifth));
  const groups = fifths.map((fifth) => {
    const those = examples.filter((one) => one.fifth === fifth);
    return fifthGroup(fifth, those, { scale, maximum: latent.max_activation, pictures });
  });
  const what = pictures
    ? "the outline marks the strongest patch"
    : "shaded and underlined by activation; the peak is bold";
  const tool = pictures ? heatSwitch() : valuesSwitch();
  const node = box("Examples", what, el("div", { class: "box-tools" }, tool), groups);
  node.classList.add("examples-box");
  return node;
}

function fifthGroup(fifth, examples, { scale, maximum, pictures }) {
  const edge = (i) => measured((i / 5) * (maximum ?? scale));
  const marks = [0, 1, 2, 3, 4].map((i) => el("i", { class: i <= fifth ? "on" : "" }));
  const heading = el(
    "h3",
    {},
    el("span", { class: "fifth", "aria-hidden": "true" }, marks),
    FIFTHS[fifth],
    el("span", { class: "aside" }, ` ${edge(fifth)} to ${edge(fifth + 1)}`),
  );
  const items = examples.map((example) =>
    pictures ? pictureItem(example, scale) : textItem(example, scale),
  );
  return el(
    "div",
    { class: "fifth-group", id: `fifth-${fifth}` },
    heading,
    el("ol", { class: pictures ? "pictures" : "contexts" }, items),
  );
}

function textItem({ tokens, fires, peak, source }, scale) {
  return el(
    "li",
    {},
    el(
      "span",
      { class: "peak-value", title: "activation at the peak" },
      measured(fires.get(peak) ?? 0),
    ),
    tokenText({ tokens, values: fires, scale, peak }),
    source ? el("span", { class: "source" }, said(visible(source))) : null,
  );
}

// ---- attributions: signed, so that sign and size are told by more than colour

function attributionsBox({ attributions }) {
  if (!attributions.length) return null;
  const items = attributions.map(({ tokens, values, target, effect, note }) => {
    const scale = Math.max(...values.map(Math.abs)) || 1;
    const places = new Map(values.map((value, i) => [i, value]));
    const peak = values.reduce(
      (best, value, i) => (Math.abs(value) > Math.abs(values[best]) ? i : best),
      0,
    );
    return el(
      "li",
      {},
      el(
        "p",
        { class: "meta" },
        "towards ",
        chip(target),
        missing(effect) ? null : [" together ", el("b", { class: "figures" }, signed(effect))],
        note ? [" · ", said(note)] : null,
      ),
      tokenText({ tokens, values: places, scale, peak, unit: "effect" }),
    );
  });
  return box(
    "Attribution",
    "what the latent adds to a prediction; dotted lines take away",
    el("ol", { class: "attributions" }, items),
  );
}
