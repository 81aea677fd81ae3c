// The prompt view: which latents fire where in a text. It needs the local server, which has the model.
"use strict";

async function promptView(route) {
  const wanted = router.dictionaries.get(route.params.get("dictionary"));
  const view = new PromptView(readers().includes(wanted) ? wanted : readers()[0]);
  await view.dictionary.ready();
  return { title: "Prompt", node: view.node };
}

class PromptView {
  constructor(dictionary) {
    this.dictionary = dictionary;
    const most = router.server.max_chars;
    this.text = el("textarea", {
      rows: "4",
      maxlength: most,
      dir: "auto",
      placeholder: "When she came home, she",
      onkeydown: (event) =>
        event.key === "Enter" && (event.ctrlKey || event.metaKey) && this.read(),
    });
    this.go = button("Read", { class: "strong" }, () => this.read());
    this.said = el("p", { class: "count", role: "status" });
    this.result = el("div", { class: "prompt-result" });
    const options = readers().map((one) => [one.id, visible(one.name)]);
    this.node = el(
      "div",
      { class: "prompt-view" },
      el("h1", { tabindex: "-1" }, "Which latents fire where"),
      el(
        "form",
        { class: "prompt-form", onsubmit: (event) => event.preventDefault() },
        el(
          "label",
          { class: "field" },
          el("span", {}, `Text, at most ${whole.format(most)} characters`),
          this.text,
        ),
        el(
          "div",
          { class: "prompt-tools" },
          options.length > 1
            ? choice("Dictionary", options, dictionary.id, (id) => goTo(`#prompt?dictionary=${id}`))
            : null,
          this.go,
          el("span", { class: "aside" }, "Ctrl + Enter"),
        ),
      ),
      this.said,
      this.result,
    );
  }

  async read() {
    const text = this.text.value;
    if (!text.trim()) return;
    this.go.disabled = true;
    this.said.textContent =
      "The model reads … the first text may take some seconds more, while it is loaded.";
    const found = await askServer(this.dictionary, text);
    this.go.disabled = false;
    this.said.textContent = found.error ?? "";
    if (found.error) return this.result.replaceChildren();
    this.found = found;
    this.latents = strongestLatents(found.fires);
    this.said.textContent = `${found.tokens.length} tokens, ${this.latents.length} latents`;
    if (found.skipped > 0) {
      const first = found.skipped === 1 ? "token was" : `${found.skipped} tokens were`;
      this.said.append(`; the first ${first} not trained on, so no latents are shown there`);
    }
    return this.show({});
  }

  /** The text shaded by one latent or, without one, by the strongest of each token. */
  show({ latent = null, token = null }) {
    const { tokens, fires } = this.found;
    const value = (all) =>
      latent === null ? all[0]?.[1] : all.find(([one]) => one === latent)?.[1];
    const values = new Map(fires.map((all, i) => [i, value(all)]).filter(([, one]) => one > 0));
    const scale = Math.max(...values.values()) || 1;
    const peak =
      token ?? [...values].reduce((best, one) => (one[1] > best[1] ? one : best), [0, -1])[0];
    const text = tokenText({ tokens, values, scale, peak, onpick: (i) => this.show({ token: i }) });
    const rows =
      token === null
        ? this.latents
        : fires[token].map(([one, most]) => ({ latent: one, most, at: token }));
    const heading = token === null ? "Strongest in the text" : ["On ", chip(tokens[token])];
    const all =
      latent === null && token === null
        ? null
        : button("Show all", { class: "quiet" }, () => this.show({}));
    const what =
      latent === null ? "shaded by each token's strongest latent" : `shaded by latent ${latent}`;
    this.result.replaceChildren(
      box("The text", what, el("div", { class: "box-tools" }, valuesSwitch(), all), text),
      box(heading, "", rows.length ? this.list(rows) : empty("No latent fires.")),
    );
  }

  list(rows) {
    const most = Math.max(...rows.map((row) => row.most));
    const item = ({ latent, most: value, at }) =>
      el(
        "li",
        {},
        el(
          "a",
          { href: latentHash(this.dictionary, latent) },
          said(visible(this.dictionary.label(latent) || `latent ${latent}`)),
        ),
        chip(this.found.tokens[at]),
        meter(value / most),
        el("span", { class: "figures" }, measured(value)),
        button(
          "Shade",
          { class: "quiet", "aria-label": `Shade the text by latent ${latent}` },
          () => this.show({ latent }),
        ),
      );
    return el("ol", { class: "words links prompt-list" }, rows.slice(0, 60).map(item));
  }
}

/** For every latent its largest activation and where: strongest first. */
function strongestLatents(fires) {
  const found = new Map();
  fires.forEach((all, at) => {
    for (const [latent, value] of all)
      if (value > (found.get(latent)?.most ?? 0)) found.set(latent, { latent, most: value, at });
  });
  return [...found.values()].sort((a, b) => b.most - a.most);
}

async function askServer(dictionary, text) {
  const encodable = text.replace(/[\ud800-\udfff]/gu, "\ufffd");
  const address = `api/prompt?dictionary=${dictionary.id}&text=${encodeURIComponent(encodable)}`;
  try {
    const answer = await fetch(address, { headers: { "X-Monosema": "1" } });
    return await answer.json();
  } catch (error) {
    return { error: `The server does not answer: ${error.message}` };
  }
}
