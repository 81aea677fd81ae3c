// Line charts and histograms as SVG, drawn at the width they have, so that their text keeps its size.

const FRAME = { left: 46, right: 14, top: 10, bottom: 38 };

/** A figure that draws itself again whenever its width changes. */
function figure(caption, label, height, draw) {
  const image = svg("svg", { role: "img", "aria-label": label, height });
  const node = el("figure", {}, el("figcaption", {}, caption), image);
  let drawn = 0;
  new ResizeObserver(() => {
    const width = Math.floor(node.clientWidth);
    if (width === drawn || width < 80) return;
    drawn = width;
    image.setAttribute("viewBox", `0 0 ${width} ${height}`);
    image.setAttribute("width", width);
    image.replaceChildren();
    draw(image, width, height);
  }).observe(node);
  return node;
}

// ---- scales

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

// ---- axes

function drawAxes(image, width, height, axes) {
  const { x, y, xTicks, yTicks, xText = tick, yText = tick, xLabel } = axes;
  const bottom = height - FRAME.bottom;
  for (const value of yTicks) {
    const at = y(value);
    image.append(
      svg("line", { class: "grid", x1: FRAME.left, x2: width - FRAME.right, y1: at, y2: at }),
      svg(
        "text",
        { class: "tick", x: FRAME.left - 7, y: at + 4, "text-anchor": "end" },
        yText(value),
      ),
    );
  }
  image.append(
    svg("line", { class: "axis", x1: FRAME.left, x2: width - FRAME.right, y1: bottom, y2: bottom }),
  );
  for (const value of xTicks) {
    const at = x(value);
    image.append(
      svg("line", { class: "axis", x1: at, x2: at, y1: bottom, y2: bottom + 4 }),
      svg(
        "text",
        { class: "tick", x: at, y: bottom + 16, "text-anchor": at > width - 30 ? "end" : "middle" },
        xText(value),
      ),
    );
  }
  const middle = (FRAME.left + width - FRAME.right) / 2;
  image.append(
    svg("text", { class: "axis-label", x: middle, y: height - 5, "text-anchor": "middle" }, xLabel),
  );
}

// ---- curves

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
    ticks: roundTicks(from, high + pad, 8),
    log: false,
  };
}

/** One metric of all dictionaries against the rows seen; a series is {name, color, points: [[x, y]]}. */
function lineChart(metric, series) {
  const height = 250;
  const points = series.flatMap((one) => one.points);
  const steps = points.map(([step]) => step);
  const axis = valueAxis(
    points.map(([, value]) => value),
    [height - FRAME.bottom, FRAME.top],
  );
  const last = series.map((one) => `${one.name} ${number(one.points.at(-1)[1])}`).join(", ");
  const caption = [
    said(metric),
    axis.log ? el("span", { class: "aside" }, " logarithmic scale") : null,
  ];
  const extent = [Math.min(...steps), Math.max(...steps)];
  return figure(
    caption,
    `${metric} against rows seen; last values: ${last}`,
    height,
    (image, width) => {
      const x = linearScale(extent, [FRAME.left, width - FRAME.right]);
      const xTicks = roundTicks(...extent, Math.max(2, Math.floor(width / 85)));
      drawAxes(image, width, height, {
        x,
        y: axis.scale,
        xTicks,
        yTicks: axis.ticks,
        xLabel: "rows seen",
      });
      for (const one of series) image.append(...drawSeries(one, x, axis.scale));
      readOut(image, width, height, extent, x, series);
    },
  );
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

function readOut(image, width, height, extent, x, series) {
  const rule = svg("line", {
    class: "rule",
    y1: FRAME.top,
    y2: height - FRAME.bottom,
    visibility: "hidden",
  });
  image.append(rule);
  image.onpointermove = (event) => {
    const share =
      (event.clientX - image.getBoundingClientRect().left - FRAME.left) /
      (width - FRAME.left - FRAME.right);
    const wanted = extent[0] + Math.min(1, Math.max(0, share)) * (extent[1] - extent[0]);
    const near = series.map((one) => nearest(one.points, wanted));
    rule.setAttribute("x1", x(near[0][0]));
    rule.setAttribute("x2", x(near[0][0]));
    rule.setAttribute("visibility", "visible");
    const lines = series.map((one, i) => [
      swatch(one.color),
      said(one.name),
      ` ${number(near[i][1])}`,
    ]);
    showTip(event.clientX, event.clientY, [`${whole.format(near[0][0])} rows`], ...lines);
  };
  image.onpointerleave = () => {
    rule.setAttribute("visibility", "hidden");
    hideTip();
  };
}

function nearest(points, wanted) {
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

// ---- histograms

/** Counts of latents by density; `extent` and `most` are shared by all dictionaries of the page. */
function densityChart({ edges, counts, log10 }, extent, most, label) {
  const height = 210;
  const text = (edge) => (log10 ? `10${raised(edge)}` : tick(edge));
  const shown = (edge) => number(log10 ? 10 ** edge : edge);
  return figure("Latents by density", label, height, (image, width) => {
    const x = linearScale(extent, [FRAME.left, width - FRAME.right]);
    const y = linearScale([0, most], [height - FRAME.bottom, FRAME.top]);
    const rough = roundTicks(...extent, Math.max(2, Math.floor(width / 60)));
    const xTicks = log10 ? rough.filter(Number.isInteger) : rough;
    const xLabel = "density (share of rows)";
    drawAxes(image, width, height, {
      x,
      y,
      xTicks,
      yTicks: roundTicks(0, most, 4),
      xText: text,
      xLabel,
    });
    counts.forEach((count, i) => {
      const [from, to] = [x(edges[i]), x(edges[i + 1])];
      const tall = height - FRAME.bottom - y(count);
      const note = (event) =>
        showTip(
          event.clientX,
          event.clientY,
          [`${number(count)} latents`],
          [`density ${shown(edges[i])} to ${shown(edges[i + 1])}`],
        );
      image.append(
        svg("rect", {
          class: "bar",
          x: from + 0.5,
          width: Math.max(0.5, to - from - 1),
          y: y(count),
          height: tall,
        }),
        svg("rect", {
          class: "bar-area",
          x: from,
          width: to - from,
          y: FRAME.top,
          height: height - FRAME.top - FRAME.bottom,
          onpointermove: note,
          onpointerleave: hideTip,
        }),
      );
    });
  });
}

/** A latent's activations in equal steps from 0 to its maximum. */
function activationBars(counts, maximum) {
  const most = Math.max(...counts);
  const least = Math.min(...counts.filter((count) => count > 0));
  const log = most / least > 50; // otherwise the few strong activations would not be seen
  const share = (count) =>
    count === 0 ? 0 : log ? Math.log1p(count) / Math.log1p(most) : count / most;
  const bars = counts.map((count, i) => {
    const bounds = `activation ${number((i / counts.length) * maximum)} to ${number(((i + 1) / counts.length) * maximum)}`;
    const note = (event) =>
      showTip(event.clientX, event.clientY, [`${number(count)} rows`], [bounds]);
    return el("span", {
      class: "column",
      "--tall": share(count),
      onpointermove: note,
      onpointerleave: hideTip,
    });
  });
  const label = `Histogram of activations from 0 to ${number(maximum)}: ${counts.join(", ")} rows`;
  return el(
    "div",
    { class: "columns-frame" },
    el("div", { class: "columns", role: "img", "aria-label": label }, bars),
    el(
      "div",
      { class: "columns-axis" },
      el("span", {}, "0"),
      el("span", {}, log ? "activation (logarithmic counts)" : "activation"),
      el("span", {}, measured(maximum)),
    ),
  );
}
