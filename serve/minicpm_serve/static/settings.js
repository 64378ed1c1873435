// The settings dialog: how the model samples, the system prompt, and the API key where the server asks for one.

import { DEFAULTS, loadKey, loadSettings, saveKey, saveSettings } from "./store.js";

const at = (id) => document.getElementById(id);
const field = (name) => at(`set-${name}`);

/** Wire the dialog up; `keyChanged` runs when it closes with another key than before. */
export function setUp(keyChanged) {
  const dialog = at("settings");
  const settings = loadSettings();
  let key = loadKey();

  for (const name of Object.keys(DEFAULTS)) {
    field(name).addEventListener("input", () => {
      settings[name] = field(name).value;
      saveSettings(settings);
      showRange(name);
    });
  }
  for (const range of dialog.querySelectorAll("[data-for]")) {
    range.addEventListener("input", () => {
      const number = at(range.dataset.for);
      number.value = range.value;
      number.dispatchEvent(new Event("input"));
    });
  }
  const showAll = () => {
    for (const [name, value] of Object.entries(settings)) if (name in DEFAULTS) field(name).value = value;
    for (const name of Object.keys(DEFAULTS)) showRange(name);
  };
  at("settings-reset").onclick = () => {
    Object.assign(settings, DEFAULTS);
    saveSettings(settings);
    showAll();
  };
  for (const button of dialog.querySelectorAll("[data-close]")) button.onclick = () => dialog.close();
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => {
    const given = field("key").value.trim();
    if (given === key) return;
    key = given;
    saveKey(key);
    keyChanged();
  });
  field("key").value = key;
  at("key-field").onsubmit = (event) => {
    event.preventDefault();
    dialog.close();
  };
  at("settings-open").onclick = () => dialog.showModal();
  at("key-field").hidden = !key;
  showAll();

  return {
    key: () => key,
    system: () => settings.system.trim(),
    /** The request's sampling parameters; what is left empty is the server's to choose. */
    sampling() {
      const given = {};
      for (const [name, value] of Object.entries(settings)) {
        if (name in DEFAULTS && name !== "system" && String(value).trim() !== "" && Number.isFinite(Number(value))) given[name] = Number(value);
      }
      return given;
    },
    askForKey() {
      at("key-field").hidden = false;
      if (!dialog.open) dialog.showModal();
      field("key").select();
      field("key").focus();
    },
  };
}

function showRange(name) {
  const range = at(`range-${name}`);
  if (range) range.value = field(name).value === "" ? DEFAULTS[name] : field(name).value;
}
