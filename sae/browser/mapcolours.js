// The colours of the map's points and the legend that explains them.
"use strict";

const N_SHADES = 7;

/** A colour of colours.css as it is in the present theme. */
function colourOf(name) {
  const probe = document.getElementById("said");
  probe.style.setProperty("color", `var(${name})`);
  return getComputedStyle(probe).color;
}

/** {of(row), dim(row), legend} for the colouring that the map is set to. */
function pointColours(map) {
  return map.colour === "cluster" ? clusterColours(map) : shadeColours(map);
}

function clusterColours(map) {
  const names = map.dictionary.map.clusters;
  const other = colourOf("--faint");
  const colours = names.map((_, i) => (i < N_COLOURED ? colourOf(`--series-${i}`) : other));
  const pick = (i) => {
    if (map.only === i) return;
    map.only = i;
    map.draw();
  };
  const one = (text, i) => {
    const dot = el("span", { class: "dot-mark", "aria-hidden": "true", "--colour": colours[i] });
    const on = () => pick(map.only === i ? null : i);
    return button(
      [dot, said(visible(text))],
      { class: "cluster", "aria-pressed": String(map.only === i) },
      on,
    );
  };
  return {
    of: (row) => colours[map.cluster[row]] ?? other,
    dim: (row) => map.only !== null && map.cluster[row] !== map.only,
    legend: names.map(one),
  };
}

/** Darker (in the dark: lighter) is more; shares go by their logarithm. */
function shadeColours({ dictionary, colour }) {
  const column = dictionary.columns.find(({ id }) => id === colour);
  const read = column.kind === "share" ? (value) => Math.log10(value || NaN) : (value) => value;
  const values = dictionary.values.get(colour).map(read);
  const sorted = values.filter(Number.isFinite).sort();
  const [low, high] = [
    sorted[Math.floor(sorted.length * 0.01)] ?? 0,
    sorted[Math.ceil(sorted.length * 0.99) - 1] ?? 1,
  ];
  const shades = Array.from({ length: N_SHADES }, (_, i) => colourOf(`--shade-${i}`));
  const other = colourOf("--faint");
  const index = (value) =>
    Math.min(N_SHADES - 1, Math.max(0, Math.floor(((value - low) / (high - low || 1)) * N_SHADES)));
  const back = (value) => shown(column.kind, column.kind === "share" ? 10 ** value : value);
  const ramp = shades.map((shade) => el("span", { class: "shade", "--colour": shade }));
  const legend = el(
    "p",
    { class: "ramp" },
    said(column.name),
    ` ${back(low)} `,
    el("span", { class: "shades", "aria-hidden": "true" }, ramp),
    ` ${back(high)}`,
  );
  return {
    of: (row) => (Number.isFinite(values[row]) ? shades[index(values[row])] : other),
    dim: () => false,
    legend: [legend],
  };
}
