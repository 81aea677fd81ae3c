// One latent: its label and score, how it fires, the words and tokens it goes with, its contexts.

/** The fields of one latent, with its strings looked up. */
function latentAt(dictionary, row, data) {
  const fields = Object.entries(dictionary.latents).map(([field, column]) => [field, column[row]]);
  const latent = Object.fromEntries(fields);
  const text = (i) => data.strings[i];
  const contexts = latent.contexts.map(([tokens, activations, peak, source]) => ({
    tokens: numbersIn(unpack(tokens)).map(text),
    levels: unpack(activations),
    peak,
    source: text(source),
  }));
  return {
    ...latent,
    contexts,
    promoted: latent.promoted.map(text),
    suppressed: latent.suppressed.map(text),
  };
}

/** What the list says of a latent. */
function latentLine(dictionary, row) {
  const columns = dictionary.latents;
  const auc = columns.auc[row];
  return [
    el("span", { class: "line-label" }, said(columns.label[row] || "(no label)")),
    el(
      "span",
      {
        class: "line-score",
        title: auc === null ? "not scored: too few examples" : "label score (AUC)",
      },
      score(auc),
    ),
    el(
      "span",
      { class: "line-meta" },
      `#${columns.latent[row]} · ${percent(columns.density[row])}`,
      columns.kind[row] ? [" · ", said(columns.kind[row])] : [],
    ),
  ];
}

function latentView(latent, dictionary) {
  return el(
    "article",
    { class: "latent" },
    el(
      "header",
      {},
      el(
        "p",
        { class: "meta latent-top" },
        said(dictionary.name),
        ` · latent ${latent.latent}`,
        latent.kind ? [" · ", said(latent.kind), " explainer"] : [],
      ),
      el("h3", {}, said(latent.label || "(no label)")),
    ),
    el("div", { class: "measures" }, scoreBox(latent), firingBox(latent)),
    contextsBox(latent),
    el(
      "div",
      { class: "associations" },
      wordsBox(latent),
      tokensBox("Promoted tokens", "logit lens", latent.promoted, "promoted"),
      tokensBox("Suppressed tokens", "logit lens", latent.suppressed, "suppressed"),
    ),
  );
}

function box(heading, aside, ...children) {
  return el(
    "section",
    { class: "box" },
    el("h4", {}, heading, aside ? el("span", { class: "aside" }, ` ${aside}`) : null),
    ...children,
  );
}

// ---- measures

function scoreBox(latent) {
  if (latent.auc === null) {
    return box(
      "Label score",
      "AUC",
      el("p", { class: "figure" }, "–"),
      empty("Not scored: too few examples on which it fires."),
    );
  }
  const known = latent.auc_low !== null && latent.auc_high !== null;
  const interval = known ? `${score(latent.auc_low)} to ${score(latent.auc_high)}` : "unknown";
  return box(
    "Label score",
    "AUC",
    el(
      "p",
      { class: "figure" },
      score(latent.auc),
      known ? el("span", { class: "aside" }, ` ${interval}`) : null,
    ),
    el(
      "div",
      {
        class: "interval",
        role: "img",
        "aria-label": `Score ${score(latent.auc)}, interval ${interval}; chance is 0.5`,
      },
      el("span", { class: "chance" }),
      known
        ? el("span", { class: "range", "--low": latent.auc_low, "--high": latent.auc_high })
        : null,
      el("span", { class: "point", "--at": latent.auc }),
    ),
    el(
      "div",
      { class: "interval-axis", "aria-hidden": "true" },
      el("span", {}, "0"),
      el("span", {}, "0.5 is chance"),
      el("span", {}, "1"),
    ),
    latent.status === "insufficient" ? empty("Few examples: read the score with care.") : null,
  );
}

function firingBox(latent) {
  if (latent.density === 0) return box("Activations", "", empty("It never fired on these rows."));
  const every = latent.density < 0.5 ? `, 1 row in ${whole.format(1 / latent.density)}` : "";
  const total = latent.histogram.reduce((sum, count) => sum + count, 0);
  return box(
    "Activations",
    "zeros left out",
    el(
      "p",
      { class: "figure" },
      percent(latent.density),
      el(
        "span",
        { class: "aside" },
        ` of rows${every} · largest ${measured(latent.max_activation)}`,
      ),
    ),
    total
      ? activationBars(latent.histogram, latent.max_activation)
      : empty("No histogram was recorded."),
  );
}

// ---- words and tokens

function wordsBox(latent) {
  if (!latent.words.length) return box("Associated words", "", empty("No word stands out."));
  const most = Math.max(...latent.words.map(([, weight]) => Math.abs(weight))) || 1;
  return box(
    "Associated words",
    "by weight",
    el(
      "ol",
      { class: "words" },
      latent.words.map(([word, weight]) =>
        el(
          "li",
          {},
          el("span", { class: "word" }, el("bdi", {}, visible(word))),
          el("span", { class: "meter", "aria-hidden": "true", "--share": Math.abs(weight) / most }),
          el("span", { class: "weight" }, measured(weight)),
        ),
      ),
    ),
  );
}

function tokensBox(heading, aside, tokens, className) {
  if (!tokens.length) return box(heading, aside, empty("None was recorded."));
  return box(
    heading,
    aside,
    el(
      "ul",
      { class: "chips" },
      tokens.map((token) => chip(token, className)),
    ),
  );
}

// ---- contexts

function contextsBox(latent) {
  if (!latent.contexts.length) {
    return box(
      "Top contexts",
      "",
      empty(
        latent.density === 0 ? "None: it never fired." : "No context was kept for this latent.",
      ),
    );
  }
  const lines = latent.contexts.map((context) => contextLine(context, latent.scale));
  return box(
    "Top contexts",
    "shaded by activation; the peak is underlined",
    el("ol", { class: "contexts" }, lines),
  );
}

function contextLine({ tokens, levels, peak, source }, scale) {
  const value = (i) => (levels[i] / 255) * scale;
  const spans = tokens.map((token, i) => {
    const classes = ["token", levels[i] ? "lit" : "", i === peak ? "peak" : ""]
      .filter(Boolean)
      .join(" ");
    return el(
      "span",
      { class: classes, "data-i": i, "--level": levels[i] ? (levels[i] / 255).toFixed(3) : null },
      visible(token),
    );
  });
  const note = (event) => {
    const span = event.target.closest("[data-i]");
    if (!span) return hideTip();
    const i = Number(span.dataset.i);
    return showTip(
      event.clientX,
      event.clientY,
      [el("bdi", { class: "kept" }, visible(tokens[i]))],
      [`activation ${measured(value(i))}`],
    );
  };
  return el(
    "li",
    {},
    el("span", { class: "peak-value", title: "activation at the peak" }, measured(value(peak))),
    el(
      "p",
      {
        class: "reading",
        dir: "auto",
        onpointerover: note,
        onpointerdown: note,
        onpointerleave: hideTip,
      },
      spans,
    ),
    source ? el("span", { class: "source" }, said(source)) : null,
  );
}
