// Training curves: one metric of all dictionaries against the rows seen.
"use strict";

const N_SERIES = 8;

function trainingSection(curves) {
  const names = [...new Set(curves.flatMap((curve) => curve.metrics.map(([metric]) => metric)))];
  if (!names.length) return null;
  const legend = curves.map((curve, i) => el("li", {}, swatch(i % N_SERIES), said(curve.name)));
  return section(
    "Training",
    { id: "training" },
    el("ul", { class: "legend" }, legend),
    el(
      "div",
      { class: "charts" },
      names.map((metric) => metricChart(metric, curves)),
    ),
  );
}

function metricChart(metric, curves) {
  const series = curves.map((curve, i) => ({
    name: curve.name,
    color: i % N_SERIES,
    points: pointsOf(curve, metric),
  }));
  const filled = series.filter((one) => one.points.length);
  if (filled.length) return lineChart(metric, filled);
  const caption = el("figcaption", {}, said(metric));
  return el("figure", {}, caption, empty("No finite value was recorded."));
}

function pointsOf(curve, metric) {
  const [, values] = curve.metrics.find(([one]) => one === metric) ?? [metric, []];
  return values.map((value, i) => [curve.steps[i], value]).filter(([, value]) => value !== null);
}

/** A series is {name, color, points: [[x, y]]}. */
function lineChart(metric, series) {
  const height = 250;
  const points = series.flatMap((one) => one.points);
  const steps = points.map(([step]) => step);
  const values = points.map(([, value]) => value);
  const axis = valueAxis(values, [height - FRAME.bottom, FRAME.top]);
  const last = series.map((one) => `${one.name} ${number(one.points.at(-1)[1])}`).join(", ");
  const aside = axis.log ? el("span", { class: "aside" }, " logarithmic scale") : null;
  const extent = [Math.min(...steps), Math.max(...steps)];
  const label = `${metric} against rows seen; last values: ${last}`;
  return figure([said(metric), aside], label, height, (image, width) => {
    const x = linearScale(extent, [FRAME.left, width - FRAME.right]);
    const xTicks = roundTicks(...extent, Math.max(2, Math.floor(width / 85)));
    const axes = { x, y: axis.scale, xTicks, yTicks: axis.ticks, xLabel: "rows seen" };
    drawAxes(image, width, height, axes);
    for (const one of series) image.append(...drawSeries(one, x, axis.scale));
    readOut(image, width, height, { extent, x, series });
  });
}

function drawSeries({ points, color }, x, y) {
  const path = points
    .map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`)
    .join("");
  const [step, value] = points.at(-1);
  return [
    svg("path", { class: `line series-${color}`, d: path }),
    svg("circle", { class: `dot series-${color}`, cx: x(step), cy: y(value), r: 3 }),
  ];
}

/** The values under the pointer. */
function readOut(image, width, height, { extent, x, series }) {
  const across = { y1: FRAME.top, y2: height - FRAME.bottom };
  const rule = svg("line", { class: "rule", visibility: "hidden", ...across });
  image.append(rule);
  image.onpointermove = (event) => {
    const from = image.getBoundingClientRect().left + FRAME.left;
    const share = (event.clientX - from) / (width - FRAME.left - FRAME.right);
    const wanted = extent[0] + Math.min(1, Math.max(0, share)) * (extent[1] - extent[0]);
    const near = series.map((one) => closest(one.points, wanted));
    rule.setAttribute("x1", x(near[0][0]));
    rule.setAttribute("x2", x(near[0][0]));
    rule.setAttribute("visibility", "visible");
    const line = (one, i) => [swatch(one.color), said(one.name), ` ${number(near[i][1])}`];
    const head = `${whole.format(near[0][0])} rows`;
    showTip(event.clientX, event.clientY, [head], ...series.map(line));
  };
  image.onpointerleave = () => {
    rule.setAttribute("visibility", "hidden");
    hideTip();
  };
}

function closest(points, wanted) {
  return points.reduce((best, point) =>
    Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted) ? point : best,
  );
}

function swatch(color) {
  return svg(
    "svg",
    { class: "swatch", width: 22, height: 10, "aria-hidden": "true" },
    svg("line", { class: `line series-${color}`, x1: 1, x2: 21, y1: 5, y2: 5 }),
  );
}
