// Puts the page together: the bar on top and the view that the address asks for.
"use strict";

function drawBar(route) {
  const current = route.dictionary ?? router.dictionaries.values().next().value;
  const links = [["#overview", "Overview", ["", "overview"].includes(route.head)]];
  if (current) {
    const here = route.dictionary !== null;
    links.push([tableHash(current), "Latents", here && route.kind !== "pictures"]);
    if (current.kind === "image")
      links.push([`#${current.id}/pictures`, "Pictures", route.kind === "pictures"]);
  }
  for (const comparison of router.data.comparisons.slice(0, 1))
    links.push([`#${comparison.id}`, "Compare", route.comparison !== null]);
  if (readers().length) links.push(["#prompt", "Prompt", route.head === "prompt"]);
  const items = links.map(([href, text, on]) =>
    el("li", {}, el("a", { href, "aria-current": on ? "page" : null }, text)),
  );
  document
    .getElementById("bar")
    .replaceChildren(
      el("a", { class: "run", href: "#overview" }, said(router.data.title)),
      el("nav", { "aria-label": "Views" }, el("ul", {}, items)),
      el(
        "div",
        { class: "bar-tools" },
        dictionarySelect(current, route),
        themeSwitch(),
        helpButton(),
      ),
    );
}

function dictionarySelect(current, route) {
  const all = [...router.dictionaries.values()];
  if (all.length < 2) return null;
  const go = (id) => {
    const same = route.kind === "pictures" && router.dictionaries.get(id).kind === "image";
    goTo(`#${id}/${same ? "pictures" : "table"}`);
  };
  const options = all.map((one) => [one.id, visible(one.name)]);
  return choice("Dictionary", options, current.id, go);
}

function themeSwitch() {
  const names = { auto: "◐ auto", light: "○ light", dark: "● dark" };
  const set = () => {
    setTheme(THEMES[(THEMES.indexOf(currentTheme()) + 1) % THEMES.length]);
    node.textContent = names[currentTheme()];
  };
  const node = button(
    names[currentTheme()],
    { class: "quiet theme", title: "Colours: auto, light, dark" },
    set,
  );
  return node;
}

function helpButton() {
  return button("?", { class: "quiet", title: "Keyboard", "aria-label": "Keyboard" }, showKeys);
}

/** To the content; the address stays. */
function skipBar(event) {
  event.preventDefault();
  document.querySelector("#page h1")?.focus();
}

async function start() {
  router.data = await load("index");
  router.server = await load("server").catch(() => null);
  for (const about of router.data.dictionaries)
    router.dictionaries.set(about.id, new Dictionary(about));
  document.body.append(tip);
  document.getElementById("skip").addEventListener("click", skipBar);
  addEventListener("keydown", onKey);
  addEventListener("scroll", moveTip, { passive: true });
  await startRouter();
}

start().catch((error) => {
  const text = `This page cannot be shown: ${error.message}`;
  document
    .getElementById("page")
    .replaceChildren(el("p", { class: "notice", role: "alert" }, text));
  throw error;
});
