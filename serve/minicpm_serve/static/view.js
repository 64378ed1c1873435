// How messages look: a list item each, with its text, what can be done with it, and what went wrong.

import { element, render } from "./markdown.js";

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export function setIcon(button, name) {
  button.querySelector("use").setAttribute("href", `#i-${name}`);
}

export function iconButton(name, label, onclick) {
  return element("button", { type: "button", className: "icon-button small", title: label, "aria-label": label, onclick }, icon(name));
}

/** Put `text` on the clipboard; the button shows that it worked. */
async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyBySelection(text); // plain http beyond localhost has no clipboard API
  }
  setIcon(button, "check");
  say("Copied");
  setTimeout(() => setIcon(button, "copy"), 1600);
}

function copyBySelection(text) {
  const field = element("textarea", { value: text, className: "hidden" });
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

export function copyButton(label, text) {
  const button = iconButton("copy", label, () => copy(text(), button));
  return button;
}

/** Tell a screen reader. */
export function say(text) {
  document.getElementById("status").textContent = text;
}

function codeBlock(text, language) {
  const name = language || "text";
  const head = element("figcaption", {}, element("span", {}, name), copyButton("Copy the code", () => text));
  const pre = element("pre", { tabIndex: 0, "aria-label": `Code, ${name}`, role: "region" }, element("code", {}, text));
  return element("figure", { className: "code" }, head, pre);
}

/** One message. `actions` are {edit} for the user's, {regenerate} for the model's; either may be missing. */
export function messageItem(message, actions) {
  const body = element("div", { className: "body", dir: "auto" });
  const item = element("li", { className: `message ${message.role}` }, element("span", { className: "hidden" }, message.role === "user" ? "You" : "The model"), body);
  if (message.role === "user") body.textContent = message.content;
  else render(body, message.content, codeBlock);
  const tools = element("div", { className: "tools" }, copyButton("Copy", () => message.content));
  if (actions.edit) tools.append(iconButton("edit", "Edit and ask again", actions.edit));
  if (actions.regenerate) tools.append(iconButton("again", "Answer again", actions.regenerate));
  if (message.role === "assistant") tools.append(element("span", { className: "figures" }, figures(message)));
  item.append(tools);
  return item;
}

/** Show more of an answer while it streams, or the dots of one that has not begun. */
export function updateAnswer(item, message) {
  const body = item.querySelector(".body");
  body.classList.toggle("waiting", !message.content);
  render(body, message.content, codeBlock);
  item.querySelector(".figures").textContent = figures(message);
}

function figures({ tokens, seconds, ended }) {
  const parts = [];
  if (tokens) parts.push(`${tokens} ${tokens === 1 ? "token" : "tokens"}`);
  if (tokens && seconds > 0.05) parts.push(`${(tokens / seconds).toFixed(tokens / seconds < 10 ? 1 : 0)} a second`);
  if (ended === "length") parts.push("cut at the limit");
  if (ended === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

/** A line below the conversation: what failed, and what to do about it. */
export function problem(text, label, act) {
  const button = label ? element("button", { type: "button", className: "quiet", onclick: act }, label) : null;
  return element("li", { className: "problem", role: "alert" }, element("span", {}, text), button);
}

let toastTimer = 0;

/** A passing note at the foot of the page, perhaps with one thing to do about it. */
export function toast(text, label, act) {
  const box = document.getElementById("toast");
  const hide = () => box.classList.remove("shown");
  const run = () => {
    hide();
    act();
  };
  box.replaceChildren(element("span", {}, text));
  if (label) box.append(element("button", { type: "button", onclick: run }, label));
  box.classList.add("shown");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(hide, 7000);
}
