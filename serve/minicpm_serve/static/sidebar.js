// The list of conversations: open, rename, delete (and take the deletion back). On a narrow screen it is a drawer.

import { element } from "./markdown.js";
import { iconButton, toast } from "./view.js";

const narrow = matchMedia("(max-width: 760px)");
const at = (id) => document.getElementById(id);

/** `on` has: open(conversation), create(), rename(conversation, title), remove(conversation), restore(conversation). */
export function setUp(on) {
  at("new").onclick = () => {
    close();
    on.create();
  };
  at("sidebar-open").onclick = open;
  at("sidebar-close").onclick = close;
  at("backdrop").onclick = close;
  at("sidebar").addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !narrow.matches || event.defaultPrevented) return;
    event.preventDefault();
    close();
  });
  narrow.addEventListener("change", close);
  close();

  return function show(conversations, current) {
    const focused = at("conversations").contains(document.activeElement);
    at("conversations").replaceChildren(...conversations.map((one) => row(one, one.id === current.id, on)));
    if (focused) (at("conversations").querySelector("[aria-current]") ?? at("new")).focus();
  };
}

function open() {
  at("sidebar").inert = false;
  at("main").inert = true;
  at("backdrop").hidden = false;
  at("sidebar").classList.add("open");
  at("sidebar-open").setAttribute("aria-expanded", "true");
  at("sidebar-close").focus();
}

export function close() {
  const wasOpen = at("sidebar").classList.contains("open");
  at("main").inert = false;
  at("sidebar").classList.remove("open");
  at("sidebar").inert = narrow.matches;
  at("backdrop").hidden = true;
  at("sidebar-open").setAttribute("aria-expanded", "false");
  if (wasOpen) at("sidebar-open").focus();
}

function row(conversation, isCurrent, on) {
  const name = element("button", { type: "button", className: "name", onclick: () => (close(), on.open(conversation)) }, conversation.title);
  if (isCurrent) name.setAttribute("aria-current", "true");
  const item = element("li", {}, name);
  item.append(
    iconButton("edit", `Rename “${conversation.title}”`, () => rename(item, conversation, on)),
    iconButton("delete", `Delete “${conversation.title}”`, () => {
      on.remove(conversation);
      toast("Conversation deleted", "Undo", () => on.restore(conversation));
    }),
  );
  return item;
}

function rename(item, conversation, on) {
  const field = element("input", { type: "text", value: conversation.title, maxLength: 120, "aria-label": "Name of the conversation" });
  let done = false;
  const finish = (title) => {
    if (done) return;
    done = true;
    on.rename(conversation, title.trim() || conversation.title);
  };
  field.onkeydown = (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter") finish(field.value);
    else if (event.key === "Escape") finish(conversation.title);
    else return;
    event.preventDefault();
  };
  field.onblur = () => finish(field.value);
  item.replaceChildren(field);
  field.select();
}
