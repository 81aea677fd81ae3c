// The keyboard: it works on every view, but never takes a key from a field that is being written in.
"use strict";

const KEYS = [
  ["←  →", "previous, next latent of the list"],
  ["↑  ↓", "move through the table"],
  ["Enter", "open the latent"],
  ["/", "search"],
  ["Esc", "clear the search; back to the table"],
  ["o", "overview"],
  ["?", "this help"],
];

function onKey(event) {
  if (event.defaultPrevented || event.altKey || event.ctrlKey || event.metaKey) return;
  if (document.querySelector("dialog[open]")) return;
  const writing = event.target.matches?.("input, textarea, select");
  if (writing && event.key !== "Escape") return;
  const act = actionOf(event.key, router.route, router.view);
  if (!act) return;
  event.preventDefault();
  act();
}

function actionOf(key, route, view) {
  const dictionary = route?.dictionary ?? router.dictionaries.values().next().value;
  const actions = {
    "/": dictionary && (() => searchFrom(dictionary)),
    Escape: escapeOf(route),
    ArrowLeft: view?.step && (() => view.step(-1)),
    ArrowRight: view?.step && (() => view.step(1)),
    ArrowDown: view?.rows && (() => view.rows.focusRow(view.rows.firstInView())),
    o: () => goTo("#overview"),
    "?": showKeys,
  };
  return Object.hasOwn(actions, key) ? actions[key] : null;
}

function escapeOf(route) {
  if (!tip.hidden) return hideTip;
  const { dictionary, kind } = route ?? {};
  if (!dictionary || kind !== "latent") return null;
  return () => goTo(tableHash(dictionary, lastFound.get(dictionary.id)?.address ?? ""));
}

/** To the search field of this view or, where there is none, to that of the table. */
function searchFrom(dictionary) {
  const field = document.getElementById("search");
  if (field) {
    field.focus();
    field.select();
    return;
  }
  router.focusSearch = true;
  goTo(tableHash(dictionary));
}

function showKeys() {
  const lines = KEYS.map(([key, what]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, what)]);
  const dialog = el(
    "dialog",
    { "aria-labelledby": "keys-heading", onclose: () => dialog.remove() },
    el("h2", { id: "keys-heading" }, "Keyboard"),
    el("dl", { class: "keys" }, lines),
    button("Close", { class: "quiet" }, () => dialog.close()),
  );
  document.body.append(dialog);
  dialog.showModal();
}
