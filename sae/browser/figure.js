// Figures as SVG, drawn at the width they have, so that their text keeps its size: scales and axes.
"use strict";

const FRAME = { left: 46, right: 14, top: 10, bottom: 38 };

/** A figure that draws itself again whenever its width changes. */
function figure(caption, label, height, draw) {
  const image = svg("svg", { role: "img", "aria-label": label, height });
  const node = el("figure", {}, el("figcaption", {}, caption), image);
  let drawn = 0;
  new ResizeObserver(() => {
    const width = Math.floor(node.clientWidth - parseFloat(getComputedStyle(node).paddingLeft) * 2);
    if (width === drawn || !(width >= 80)) return; // also while it is not in the page
    drawn = width;
    image.setAttribute("viewBox", `0 0 ${width} ${height}`);
    image.setAttribute("width", width);
    image.replaceChildren();
    draw(image, width, height);
  }).observe(node);
  return node;
}

function linearScale([low, high], [from, to]) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

function logScale([low, high], range) {
  const inner = linearScale([Math.log10(low), Math.log10(high)], range);
  return (value) => inner(Math.log10(value));
}

/** At most about `count` round numbers between low and high. */
function roundTicks(low, high, count) {
  const rough = (high - low || 1) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) =>
    Number(((first + i) * step).toPrecision(12)),
  );
}

/** Powers of ten between low and high, with their halves and fifths where there are few. */
function logTicks(low, high) {
  const exponents = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1)
    exponents.push(e);
  const inside = (ticks) => ticks.filter((value) => value >= low && value <= high);
  const fine = inside(exponents.flatMap((e) => [1, 2, 5].map((factor) => factor * 10 ** e)));
  return fine.length <= 7 ? fine : inside(exponents.map((e) => 10 ** e));
}

/** The axis that suits the values: logarithmic where they span more than a factor of ten. */
function valueAxis(values, range) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  if (low > 0 && high / low > 10) {
    const [from, to] = [low / 1.2, high * 1.2];
    return { scale: logScale([from, to], range), ticks: logTicks(from, to), log: true };
  }
  const pad = (high - low || Math.abs(high) || 1) * 0.05;
  const from = low >= 0 && low < 0.6 * high ? 0 : low - pad;
  return {
    scale: linearScale([from, high + pad], range),
    ticks: roundTicks(from, high + pad, 5),
    log: false,
  };
}

function drawAxes(image, width, height, axes) {
  const bottom = height - FRAME.bottom;
  for (const value of axes.yTicks)
    drawRow(image, width, axes.y(value), (axes.yText ?? tick)(value));
  image.append(
    svg("line", { class: "axis", x1: FRAME.left, x2: width - FRAME.right, y1: bottom, y2: bottom }),
  );
  for (const value of axes.xTicks)
    drawColumn(image, width, bottom, axes.x(value), (axes.xText ?? tick)(value));
  const middle = (FRAME.left + width - FRAME.right) / 2;
  const place = { class: "axis-label", x: middle, y: height - 5, "text-anchor": "middle" };
  image.append(svg("text", place, axes.xLabel));
}

function drawRow(image, width, at, text) {
  const place = { class: "tick", x: FRAME.left - 7, y: at + 4, "text-anchor": "end" };
  image.append(
    svg("line", { class: "grid", x1: FRAME.left, x2: width - FRAME.right, y1: at, y2: at }),
    svg("text", place, text),
  );
}

function drawColumn(image, width, bottom, at, text) {
  const anchor = at > width - 30 ? "end" : "middle";
  image.append(
    svg("line", { class: "axis", x1: at, x2: at, y1: bottom, y2: bottom + 4 }),
    svg("text", { class: "tick", x: at, y: bottom + 16, "text-anchor": anchor }, text),
  );
}

/** Bars over [from, to] in pixels, each with a note; the whole height of a bar's place can be met. */
function drawBars(image, height, y, bars) {
  for (const { from, to, count, lines, className } of bars) {
    const note = (event) => showTip(event.clientX, event.clientY, ...lines);
    const top = Math.min(y(count), height - FRAME.bottom);
    image.append(
      svg("rect", {
        class: `bar ${className ?? ""}`,
        x: from + 0.5,
        width: Math.max(0.5, to - from - 1),
        y: top,
        height: height - FRAME.bottom - top,
      }),
      svg("rect", {
        class: "bar-area",
        x: from,
        width: Math.max(0.5, to - from),
        y: FRAME.top,
        height: height - FRAME.top - FRAME.bottom,
        onpointermove: note,
        onpointerleave: hideTip,
      }),
    );
  }
}
