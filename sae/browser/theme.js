// The choice between light and dark, made before the first paint; without one the system decides.
"use strict";

const THEMES = ["auto", "light", "dark"];

/** What this browser remembers; some forbid it to files. */
function remembered(name, otherwise) {
  try {
    return localStorage.getItem(`monosema.${name}`) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function remember(name, value) {
  try {
    localStorage.setItem(`monosema.${name}`, value);
  } catch {
    // It is then forgotten with the page.
  }
}

function setTheme(theme) {
  const root = document.documentElement;
  if (theme === "auto") root.removeAttribute("data-theme");
  else root.setAttribute("data-theme", theme);
  remember("theme", theme);
  dispatchEvent(new Event("themechange"));
}

function currentTheme() {
  return document.documentElement.getAttribute("data-theme") ?? "auto";
}

for (const theme of THEMES.slice(1))
  if (remembered("theme", "auto") === theme)
    document.documentElement.setAttribute("data-theme", theme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
  dispatchEvent(new Event("themechange")),
);
