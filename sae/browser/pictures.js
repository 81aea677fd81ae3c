// Pictures with the activations of their patches over them, and a gallery of latents by pictures.
"use strict";

function heatSwitch() {
  const set = (on) => document.documentElement.classList.toggle("without-heat", !on);
  set(true);
  const input = el("input", {
    type: "checkbox",
    checked: true,
    onchange: (event) => set(event.target.checked),
  });
  return el("label", { class: "check" }, input, " heat map");
}

/** One picture: the heat of every patch, an outline around the strongest, the value in figures. */
function pictureItem(example, scale) {
  const { image, fires, peak } = example;
  const value = measured(fires.get(peak) ?? 0);
  const name = visible(image.name || `picture ${image.id}`);
  return el(
    "li",
    {},
    el(
      "figure",
      {},
      heatPicture(example, scale, `${name}: strongest activation ${value}`),
      el(
        "figcaption",
        {},
        el("b", { class: "figures" }, value),
        " ",
        el("span", { class: "file" }, said(name)),
      ),
    ),
  );
}

function heatPicture({ image, fires, peak }, scale, label) {
  const [rows, columns] = image.grid;
  const heat = el("canvas", { class: "heat", width: columns, height: rows, "aria-hidden": "true" });
  const mark = el("span", { class: "patch", "aria-hidden": "true" });
  const node = el(
    "div",
    {
      class: "picture",
      tabindex: "0",
      role: "img",
      "aria-label": label,
      "--ratio": image.width / image.height,
    },
    el("img", {
      src: `data/images/${Number(image.id)}.jpg`,
      alt: "",
      loading: "lazy",
      width: image.width,
      height: image.height,
    }),
    heat,
    mark,
  );
  paintHeat(heat, columns, rows, fires, scale);
  outline(mark, peak, rows, columns);
  const tell = (patch, show) => {
    outline(mark, patch, rows, columns);
    const at = `row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;
    show([`activation ${measured(fires.get(patch) ?? 0)}`], [at]);
  };
  let at = peak;
  node.addEventListener("pointermove", (event) => {
    const { left, top, width, height } = node.getBoundingClientRect();
    const cell = (share, n) => Math.min(n - 1, Math.max(0, Math.floor(share * n)));
    at =
      cell((event.clientY - top) / height, rows) * columns +
      cell((event.clientX - left) / width, columns);
    tell(at, (...lines) => showTip(event.clientX, event.clientY, ...lines));
  });
  const rest = () => {
    at = peak;
    hideTip();
    outline(mark, peak, rows, columns);
  };
  node.addEventListener("pointerleave", rest);
  node.addEventListener("blur", rest);
  node.addEventListener(
    "focus",
    () => node.matches(":focus-visible") && tell(at, (...lines) => showTipAt(node, ...lines)),
  );
  node.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[
      event.key
    ];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    const row = Math.min(rows - 1, Math.max(0, Math.floor(at / columns) + by[0]));
    at = row * columns + Math.min(columns - 1, Math.max(0, (at % columns) + by[1]));
    tell(at, (...lines) => showTipAt(node, ...lines));
  });
  return node;
}

/** One canvas pixel per patch, enlarged by the page: a veil that lifts where the latent fires, so
    that its strength is told by brightness to every eye, and a warm tint. */
function paintHeat(canvas, columns, rows, fires, scale) {
  const paint = canvas.getContext("2d");
  for (let patch = 0; patch < rows * columns; patch += 1) {
    const level = Math.min(1, (fires.get(patch) ?? 0) / scale);
    const veil = 0.5 * (1 - level);
    const tint = 0.34 * level;
    paint.fillStyle = `rgb(16 20 26 / ${veil.toFixed(3)})`;
    paint.fillRect(patch % columns, Math.floor(patch / columns), 1, 1);
    paint.fillStyle = `rgb(255 150 20 / ${tint.toFixed(3)})`;
    paint.fillRect(patch % columns, Math.floor(patch / columns), 1, 1);
  }
}

function outline(mark, patch, rows, columns) {
  mark.style.setProperty("left", `${((patch % columns) / columns) * 100}%`);
  mark.style.setProperty("top", `${(Math.floor(patch / columns) / rows) * 100}%`);
  mark.style.setProperty("width", `${100 / columns}%`);
  mark.style.setProperty("height", `${100 / rows}%`);
}

// ---- the gallery: the strongest pictures of many latents at once

const PAGE = 24;
const PICTURES = 4;

async function galleryView(route) {
  const dictionary = await route.dictionary.ready();
  const found = lastFound.get(dictionary.id) ?? { rows: defaultRows(dictionary) };
  const rows = [...found.rows].filter((row) => dictionary.status[row] > 1);
  const pages = Math.max(1, Math.ceil(rows.length / PAGE));
  const page = Math.min(pages, Math.max(1, Number(route.params.get("page")) || 1));
  const shownRows = rows.slice((page - 1) * PAGE, page * PAGE);
  const latents = await Promise.all(shownRows.map((row) => dictionary.latent(row)));
  const link = (to, text) =>
    to < 1 || to > pages ? null : el("a", { href: `#${dictionary.id}/pictures?page=${to}` }, text);
  const node = el(
    "div",
    { class: "gallery-view" },
    el("h1", { tabindex: "-1" }, "Pictures of ", said(dictionary.name)),
    el(
      "p",
      { class: "meta" },
      `The strongest pictures of ${whole.format(rows.length)} latents, in the order of the `,
      el("a", { href: tableHash(dictionary, found.address) }, "table"),
      ".",
    ),
    el("div", { class: "box-tools" }, heatSwitch()),
    el(
      "ol",
      { class: "gallery" },
      latents.filter(Boolean).map((latent) => galleryItem(dictionary, latent)),
    ),
    el(
      "nav",
      { class: "pages", "aria-label": "Pages" },
      link(page - 1, "← previous"),
      el("span", {}, `page ${page} of ${pages}`),
      link(page + 1, "next →"),
    ),
  );
  return { title: `Pictures of ${dictionary.name}`, node };
}

function galleryItem(dictionary, latent) {
  const seen = latent.examples.filter(({ image }) => image).slice(0, PICTURES);
  const scale =
    Math.max(latent.max_activation ?? 0, ...seen.flatMap(({ fires }) => [...fires.values()])) || 1;
  return el(
    "li",
    { class: "card" },
    el(
      "h2",
      {},
      el(
        "a",
        { href: latentHash(dictionary, latent.latent) },
        said(visible(latent.label || "(no label)")),
      ),
      el("span", { class: "aside" }, ` #${latent.latent} · max ${measured(latent.max_activation)}`),
    ),
    el(
      "ol",
      { class: "pictures small" },
      seen.map((example) => pictureItem(example, scale)),
    ),
  );
}
