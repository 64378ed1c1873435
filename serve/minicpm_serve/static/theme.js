// Runs before the first paint, so that a dark page never flashes light. "auto" follows the system.
"use strict";
(() => {
  const KEY = "minicpm-edge/theme";
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => {
    try {
      return localStorage.getItem(KEY) ?? "auto";
    } catch {
      return "auto"; // storage is off: the choice lasts as long as the page
    }
  };
  let choice = chosen();
  const apply = () => {
    const dark = choice === "dark" || (choice === "auto" && system.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
  };
  system.addEventListener("change", apply);
  apply();
  window.theme = {
    get: () => choice,
    set(next) {
      choice = next;
      apply();
      try {
        localStorage.setItem(KEY, next);
      } catch {}
    },
  };
})();
