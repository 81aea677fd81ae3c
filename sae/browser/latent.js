// The page of one latent: what it seems to be, how well that holds, and what it was seen doing.
"use strict";

function defaultRows(dictionary) {
  return dictionary.find(readFilters(dictionary, new URLSearchParams()));
}

async function latentPage(route) {
  const dictionary = await route.dictionary.ready();
  const found = await dictionary.latent(route.item);
  const name = dictionary.label(route.item) || `latent ${route.item}`;
  const node = el(
    "article",
    { class: "latent" },
    latentHead(dictionary, route.item, found),
    found ? latentBody(dictionary, found) : empty("Nothing was kept of this latent."),
  );
  const step = (by) => {
    const to = neighbour(dictionary, route.item, by);
    if (to !== null) goTo(latentHash(dictionary, to));
  };
  return { title: `${name} · ${dictionary.name}`, node, step };
}

/** The latent that stands `by` places further on in what the table showed last. */
function neighbour(dictionary, latent, by) {
  const { rows } = listOf(dictionary, latent);
  return rows[rows.indexOf(latent) + by] ?? null;
}

function listOf(dictionary, latent) {
  const found = lastFound.get(dictionary.id);
  if (found?.rows.includes(latent)) return found;
  return { rows: defaultRows(dictionary), query: "", address: "" };
}

function latentHead(dictionary, latent, found) {
  const { rows, query, address } = listOf(dictionary, latent);
  const at = rows.indexOf(latent);
  const step = (by, text, label) => {
    const to = neighbour(dictionary, latent, by);
    if (to === null) return el("span", { class: "step off", "aria-hidden": "true" }, text);
    const keys = by < 0 ? "ArrowLeft" : "ArrowRight";
    return el(
      "a",
      {
        class: "step",
        href: latentHash(dictionary, to),
        "aria-label": label,
        title: label,
        "aria-keyshortcuts": keys,
      },
      text,
    );
  };
  const place = at < 0 ? "" : `${whole.format(at + 1)} of ${whole.format(rows.length)}`;
  const label = found?.label || dictionary.label(latent);
  const kind = found?.label_kind ? [" · ", said(found.label_kind)] : [];
  return el(
    "header",
    { class: "latent-head" },
    el(
      "nav",
      { class: "steps", "aria-label": "Other latents" },
      step(-1, "←", "Previous latent"),
      step(1, "→", "Next latent"),
      el(
        "a",
        { class: "place", href: tableHash(dictionary, address) },
        query ? [place, " for ", said(visible(query))] : place || "table",
      ),
    ),
    el("p", { class: "meta" }, said(dictionary.name), ` · latent ${latent}`, kind),
    el(
      "h1",
      { tabindex: "-1" },
      label ? said(visible(label)) : el("span", { class: "empty" }, "(no label)"),
    ),
    (found?.explanations ?? []).map(({ text, by }) =>
      el(
        "p",
        { class: "explanation" },
        said(visible(text)),
        by ? el("span", { class: "aside" }, " ", said(by)) : null,
      ),
    ),
  );
}

function latentBody(dictionary, latent) {
  const side = [scoresBox(latent), activationsBox(latent), commandBox(latent), wordsBox(latent)];
  const lens = tokensBox(latent);
  const relations = [
    latentsBox(dictionary, "Nearest latents", "cosine of the directions", latent.nearest, score),
    latentsBox(dictionary, "Fire together", "correlation over the rows", latent.cofiring, score),
  ];
  return el(
    "div",
    { class: "latent-body" },
    el("div", { class: "column measures" }, side),
    el("div", { class: "column seen" }, examplesBox(latent), attributionsBox(latent)),
    el("div", { class: "column relations" }, lens, relations),
  );
}

// ---- how it fires

function activationsBox(latent) {
  const { density, max_activation, n_fired, histogram } = latent;
  if (latent.status === "dead")
    return box("Activations", "", empty("It never fired on these rows."));
  const every = density > 0 && density < 0.5 ? `1 row in ${whole.format(1 / density)}` : null;
  const figures = [
    ["density", percent(density)],
    ["that is", every],
    ["rows", missing(n_fired) ? null : whole.format(n_fired)],
    ["largest", measured(max_activation)],
  ].filter(([, value]) => value !== null);
  const some = histogram.some((count) => count > 0);
  return box(
    "Activations",
    "zeros left out",
    facts(figures),
    some ? activationChart(histogram, max_activation) : empty("No histogram was recorded."),
  );
}

// ---- the command

function commandBox({ command }) {
  if (!command) return null;
  const code = el("code", {}, said(visible(command)));
  const copy = button("Copy", { class: "quiet copy" }, async () => {
    const done = await copyText(command, code);
    copy.textContent = done ? "Copied" : "Selected";
    announce(done ? "The command is copied" : "The command is selected; copy it with the keyboard");
    setTimeout(() => (copy.textContent = "Copy"), 2000);
  });
  copy.setAttribute("aria-label", "Copy the steering command");
  return box("Steer with it", "", el("div", { class: "command" }, code, copy));
}

/** True if the text is in the clipboard; else it is selected for the reader to copy. */
async function copyText(text, node) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    getSelection().selectAllChildren(node);
    return false;
  }
}

// ---- words, tokens, latents

function wordsBox({ words, label_kind: kind }) {
  if (!words.length) return null;
  const most = Math.max(...words.map(([, weight]) => Math.abs(weight))) || 1;
  const items = words.map(([word, weight]) =>
    el(
      "li",
      {},
      el("span", { class: "word" }, said(visible(word))),
      meter(Math.abs(weight) / most),
      el("span", { class: "figures" }, measured(weight)),
    ),
  );
  const what = kind === "class" || kind === "group" ? "Classes" : "Words";
  return box(`${what} it goes with`, "and their weights", el("ol", { class: "words" }, items));
}

function tokensBox({ promoted, suppressed }) {
  if (!promoted.length && !suppressed.length) return null;
  const values = [...promoted, ...suppressed].map(([, value]) => Math.abs(value ?? 0));
  const most = Math.max(...values) || 1;
  const item =
    (kind) =>
    ([token, value]) =>
      el(
        "li",
        {},
        chip(token, kind),
        missing(value)
          ? null
          : [meter(Math.abs(value) / most, kind), el("span", { class: "figures" }, signed(value))],
      );
  const weighed = values.some((value) => value > 0);
  const list = (heading, kind, tokens) =>
    el(
      "div",
      {},
      el("h3", {}, heading),
      tokens.length
        ? el("ol", { class: weighed ? "words" : "chips" }, tokens.map(item(kind)))
        : empty("None was recorded."),
    );
  return box(
    "Tokens it writes",
    "logit lens",
    el(
      "div",
      { class: "lens" },
      list("promoted +", "promoted", promoted),
      list("suppressed −", "suppressed", suppressed),
    ),
  );
}

function latentsBox(dictionary, heading, aside, pairs, text) {
  if (!pairs.length) return null;
  const items = pairs.map(([latent, value, rows]) =>
    el(
      "li",
      {},
      el(
        "a",
        { href: latentHash(dictionary, latent) },
        said(visible(dictionary.label(latent) || `latent ${latent}`)),
      ),
      meter(value),
      el("span", { class: "figures" }, text(value)),
      rows === undefined
        ? null
        : el("span", { class: "rows-together" }, `${whole.format(rows)} rows together`),
    ),
  );
  return box(heading, aside, el("ol", { class: "words links" }, items));
}
