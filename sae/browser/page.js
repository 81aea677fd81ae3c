// Reads the data and puts the page together.

function build(data) {
  for (const one of data.dictionaries) one.rows = (one.latents.latent ?? []).map((_, row) => row);
  const names = new Map(data.dictionaries.map((one) => [one.name, new Set(one.latents.latent)]));
  const browser = data.dictionaries.length ? new Browser(data) : null;
  const linkTo = (name, latent, children) => {
    if (!names.get(name)?.has(latent)) return children;
    return el("a", { href: hashOf(name, latent), onclick: () => browser.arrive() }, children);
  };
  const parts = [
    results(data.results),
    training(data.curves),
    steering(data.steering, linkTo),
    dictionaries(data.dictionaries),
    browser?.node,
  ].filter(Boolean);
  const nav = el(
    "nav",
    { "aria-label": "Parts of this page" },
    parts.map((part) => el("a", { href: `#${part.id}` }, part.querySelector("h2").textContent)),
  );
  document.title = data.title;
  document
    .getElementById("page")
    .replaceChildren(
      header(data),
      cautions(data) ?? "",
      nav,
      ...parts,
      el("footer", {}, "One file, no server: nothing on this page is read from the network."),
      tip,
    );
  if (!browser) return;
  if (browser.follow()) browser.arrive();
  else browser.open(browser.dictionary);
  addEventListener("hashchange", () => browser.follow() && browser.arrive());
  addEventListener("scroll", hideTip, { passive: true });
}

try {
  build(JSON.parse(document.getElementById("data").textContent));
} catch (error) {
  document
    .getElementById("page")
    .replaceChildren(
      el("p", { class: "notice", role: "alert" }, `This page cannot be shown: ${error.message}`),
    );
  throw error;
}
