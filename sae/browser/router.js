// Addresses: #overview, #d0/table?q=river, #d0/latent/193, #d0/pictures, #c0/pair/193, #prompt.
"use strict";

const router = {
  data: null,
  server: null,
  dictionaries: new Map(),
  view: null,
  turn: 0,
  fresh: false,
};
const scrolled = new Map();

/** What an address asks for; anything may stand there. */
function readRoute(hash) {
  const [path, query = ""] = hash.replace(/^#/, "").split(/\?(.*)/s);
  const [head, kind = "", item = ""] = path.split("/");
  const route = { hash, head, kind, params: new URLSearchParams(query), item: null };
  if (/^\d{1,9}$/.test(item)) route.item = Number(item);
  route.dictionary = router.dictionaries.get(head) ?? null;
  route.comparison = router.data.comparisons.find((one) => one.id === head) ?? null;
  return route;
}

/** The function that makes the view of a route. */
function viewOf(route) {
  const { head, kind, item, dictionary, comparison } = route;
  if (head === "" || head === "overview") return overviewView;
  if (dictionary && kind === "table") return tableView;
  if (dictionary && kind === "latent" && item !== null && item < dictionary.d_sae)
    return latentPage;
  if (dictionary?.kind === "image" && kind === "pictures") return galleryView;
  if (comparison) return compareView;
  if (head === "prompt" && readers().length) return promptView;
  return nowhereView;
}

/** The dictionaries that the server can read a text with. */
function readers() {
  const ids = router.server?.prompt ? router.server.dictionaries : [];
  return ids.map((id) => router.dictionaries.get(id)).filter(Boolean);
}

async function nowhereView(route) {
  const back = el("a", { href: "#overview" }, "To the overview");
  const address = el("code", {}, said(visible(route.hash.slice(0, 200))));
  const node = el(
    "div",
    {},
    el("h1", { tabindex: "-1" }, "Nothing is here"),
    el("p", {}, "This folder has no page ", address, ". ", back, "."),
  );
  return { title: "Nothing is here", node };
}

/** Shows what the address says. */
async function follow() {
  const turn = (router.turn += 1);
  const route = readRoute(location.hash);
  const view = await viewOf(route)(route).catch(failedView);
  if (turn !== router.turn) return; // the reader has gone on
  hideTip();
  router.view?.close?.();
  const first = router.view === null;
  router.view = view;
  router.route = route;
  document.getElementById("page").replaceChildren(view.node);
  document.title = `${view.title} · ${router.data.title}`;
  drawBar(route);
  view.shown?.();
  scrollTo(0, router.fresh || first ? 0 : (scrolled.get(location.hash) ?? 0));
  router.fresh = false;
  const target = router.focusSearch ? "#search" : "h1";
  router.focusSearch = false;
  if (!first) view.node.querySelector(target)?.focus({ preventScroll: true });
}

function failedView(error) {
  const node = el(
    "div",
    {},
    el("h1", { tabindex: "-1" }, "This cannot be shown"),
    el("p", { role: "alert" }, said(error.message)),
  );
  return { title: "This cannot be shown", node };
}

/** Follows a link of ours: to the top of the new page; back and forward return to where one was. */
function startRouter() {
  history.scrollRestoration = "manual";
  addEventListener(
    "click",
    (event) => {
      if (event.target.closest?.("a[href^='#']")) router.fresh = true;
    },
    { capture: true },
  );
  addEventListener("scroll", () => scrolled.set(router.route?.hash, scrollY), { passive: true });
  addEventListener("hashchange", follow);
  return follow();
}

function goTo(hash) {
  router.fresh = true;
  location.hash = hash;
}
