// Labels on the map, written beside their points once the reader has zoomed in.
"use strict";

const MOST_IN_VIEW = 600; // with more points there is no room
const N_WRITTEN = 40;
const LONGEST = 30; // characters

/** Writes the labels of the points in view, the most frequent latents first, where there is room. */
function writeLabels(paint, { dictionary, size }, inView, gap) {
  if (inView.length > MOST_IN_VIEW) return;
  const density = dictionary.values.get("density");
  const often = [...inView].sort(([a], [b]) => (density[b] || 0) - (density[a] || 0));
  const taken = inView.map(([, x, y]) => [x - 5, y - 5, x + 5, y + 5]);
  const isFree = ([left, top, right, bottom]) =>
    top > 0 && right < size.width &&
    taken.every(([l, t, r, b]) => right < l || left > r || bottom < t || top > b);
  paint.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  paint.textBaseline = "middle";
  paint.fillStyle = colourOf("--ink");
  paint.globalAlpha = 0.85;
  let n = 0;
  for (const [row, x, y] of often) {
    const text = visible(dictionary.label(row) ?? "").replace(/^word: /, "");
    const short = text.length > LONGEST ? `${text.slice(0, LONGEST - 1)}…` : text;
    const box = [x + gap, y - 8, x + gap + paint.measureText(short).width, y + 8];
    if (!short || !isFree(box)) continue;
    paint.fillText(short, x + gap, y);
    taken.push(box);
    if ((n += 1) === N_WRITTEN) return;
  }
}
