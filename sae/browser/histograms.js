// Histograms and the curve of completeness.
"use strict";

/** Counts of latents by density; `extent` and `most` are shared by all dictionaries. */
function densityChart(dictionary, extent, most) {
  const { edges, counts, log10 } = dictionary.density_histogram;
  const height = 200;
  const shownEdge = (edge) => number(log10 ? 10 ** edge : edge);
  const dense = (edge) => (log10 ? 10 ** edge : edge) >= dictionary.dense_above * 0.999;
  const label = `Histogram of the densities of the latents of ${dictionary.name}`;
  return figure("Latents by density", label, height, (image, width) => {
    const x = linearScale(extent, [FRAME.left, width - FRAME.right]);
    const y = linearScale([0, most], [height - FRAME.bottom, FRAME.top]);
    const rough = roundTicks(...extent, Math.max(2, Math.floor(width / 60)));
    const xTicks = log10 ? rough.filter(Number.isInteger) : rough;
    const xText = (edge) => (log10 ? `10${raised(edge)}` : tick(edge));
    const yTicks = roundTicks(0, most, 4);
    drawAxes(image, width, height, {
      x,
      y,
      xTicks,
      yTicks,
      xText,
      xLabel: "density (share of rows)",
    });
    const bars = counts.map((count, i) => ({
      from: x(edges[i]),
      to: x(edges[i + 1]),
      count,
      className: dense(edges[i]) ? "dense" : "",
      lines: [
        [`${number(count)} latents`],
        [`density ${shownEdge(edges[i])} to ${shownEdge(edges[i + 1])}`],
      ],
    }));
    drawBars(image, height, y, bars);
  });
}

/** A latent's activations in equal steps from 0 to its maximum, with the borders of the fifths. */
function activationChart(counts, maximum) {
  const height = 150;
  const most = Math.max(...counts);
  const least = Math.min(...counts.filter((count) => count > 0));
  const log = most / least > 50; // otherwise the few strong activations would not be seen
  const label = `Histogram of activations from 0 to ${number(maximum)}: ${counts.join(", ")} rows`;
  const caption = log ? "rows, logarithmic" : "rows";
  return figure(caption, label, height, (image, width) => {
    const x = linearScale([0, maximum], [FRAME.left, width - FRAME.right]);
    const range = [height - FRAME.bottom, FRAME.top];
    const y = log ? logScale([0.5, most], range) : linearScale([0, most], range);
    const yTicks = log ? logTicks(1, most).slice(0, 5) : roundTicks(0, most, 3);
    const xTicks = [0, 1, 2, 3, 4, 5].map((fifth) => (fifth * maximum) / 5);
    drawAxes(image, width, height, {
      x,
      y,
      xTicks,
      yTicks,
      xLabel: "activation, in fifths of the maximum",
    });
    const edge = (i) => (i / counts.length) * maximum;
    const bars = counts.map((count, i) => ({
      from: x(edge(i)),
      to: x(edge(i + 1)),
      count: log ? Math.max(count, 0.5) : count,
      lines: [
        [`${number(count)} rows`],
        [`activation ${number(edge(i))} to ${number(edge(i + 1))}`],
      ],
    }));
    drawBars(image, height, y, bars);
  });
}

/** Which share of concepts has a latent, by how often the concept stands in the corpus. */
function completenessChart(found) {
  const height = 230;
  const points = found.points.filter(([frequency]) => frequency > 0);
  const frequencies = points.map(([frequency]) => frequency);
  const extent = [Math.min(...frequencies), Math.max(...frequencies)];
  const label = `Completeness: share of concepts with a latent by their frequency; ${points
    .map(([frequency, share]) => `${number(frequency)}: ${percent(share)}`)
    .join(", ")}`;
  return figure("Completeness: concepts that have a latent", label, height, (image, width) => {
    const x = logScale(extent, [FRAME.left + 8, width - FRAME.right - 8]);
    const y = linearScale([0, 1], [height - FRAME.bottom, FRAME.top]);
    const axes = {
      x,
      y,
      xTicks: logTicks(...extent),
      yTicks: [0, 0.25, 0.5, 0.75, 1],
      yText: percent,
    };
    drawAxes(image, width, height, { ...axes, xLabel: "frequency in the corpus" });
    if (found.f50 !== null && found.slope !== null) drawLogistic(image, x, y, extent, found);
    for (const point of points) image.append(completenessDot(point, x, y));
  });
}

/** share = 1 / (1 + exp(-slope * ln(frequency / f50))) */
function drawLogistic(image, x, y, [low, high], { f50, slope }) {
  const at = (i) => low * (high / low) ** (i / 48);
  const share = (frequency) => 1 / (1 + Math.exp(-slope * Math.log(frequency / f50)));
  const path = Array.from(
    { length: 49 },
    (_, i) => `${i ? "L" : "M"}${x(at(i)).toFixed(1)} ${y(share(at(i))).toFixed(1)}`,
  ).join("");
  image.append(svg("path", { class: "line series-0", d: path }));
}

function completenessDot([frequency, share, n], x, y) {
  const lines = [[`${percent(share)} of ${n ?? "–"} concepts`], [`frequency ${number(frequency)}`]];
  const note = (event) => showTip(event.clientX, event.clientY, ...lines);
  const place = { cx: x(frequency), cy: y(share), r: 3 + Math.min(5, Math.sqrt(n ?? 1) / 2) };
  return svg("circle", {
    class: "point-dot",
    ...place,
    onpointermove: note,
    onpointerleave: hideTip,
  });
}
