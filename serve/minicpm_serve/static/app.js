// The page: which conversation is open, what is being answered, and everything the two need to tell the user.

import * as api from "./api.js";
import * as settingsDialog from "./settings.js";
import * as sidebar from "./sidebar.js";
import * as store from "./store.js";
import { element } from "./markdown.js";
import { messageItem, problem, say, setIcon, toast, updateAnswer } from "./view.js";

const at = (id) => document.getElementById(id);
const SUGGESTIONS = ["Explain how rain forms, in three sentences", "Write a short poem about a quiet harbour", "Give me five names for a small bakery"];
const SECONDS_BETWEEN_CALLS = 3;
const THEMES = { auto: "as the system", light: "light", dark: "dark" };

let model = null;
let current = store.newConversation();
let answering = null; // {conversation, message, item, controller} while an answer is being written
const settings = settingsDialog.setUp(connect);
const showList = sidebar.setUp({ open: openConversation, create: () => openConversation(store.newConversation()), rename, remove, restore });

// --- the conversation on the screen ---------------------------------------------------------------------------------

function openConversation(conversation) {
  if (answering && answering.conversation.id === conversation.id) conversation = answering.conversation;
  current = conversation;
  store.saveCurrent(current.id);
  show();
  scrollToEnd();
  at("text").focus({ preventScroll: matchMedia("(pointer: coarse)").matches });
}

function show() {
  at("title").textContent = current.title || "New conversation";
  document.title = current.title ? `${current.title} – minicpm-edge` : "minicpm-edge";
  at("empty").hidden = current.messages.length > 0;
  const items = current.messages.map((message, index) => {
    if (answering?.message === message) return answering.item;
    const last = index === current.messages.length - 1;
    return messageItem(message, {
      edit: message.role === "user" && (() => edit(index)),
      regenerate: message.role === "assistant" && last && regenerate,
    });
  });
  at("messages").replaceChildren(...items);
  if (!answering && current.messages.at(-1)?.role === "user") at("messages").append(problem("There is no answer to this yet.", "Answer", regenerate));
  showList(store.conversations(), current);
  showSend();
}

function keep(conversation) {
  conversation.updated = Date.now();
  if (!store.save(conversation)) toast("This browser's storage is full or off: the conversation is not kept.");
}

function rename(conversation, title) {
  const target = [current, answering?.conversation].find((one) => one?.id === conversation.id) ?? conversation;
  target.title = title;
  store.save(target);
  show();
}

function remove(conversation) {
  if (answering?.conversation.id === conversation.id) stop();
  store.remove(conversation);
  if (conversation.id === current.id) openConversation(store.conversations()[0] ?? store.newConversation());
  else show();
}

function restore(conversation) {
  store.save(conversation);
  openConversation(conversation);
}

function edit(index) {
  stop();
  at("text").value = current.messages[index].content;
  current.messages.length = index;
  if (index) keep(current);
  show();
  fitComposer();
  at("text").focus();
}

// --- asking and answering -------------------------------------------------------------------------------------------

function send() {
  const text = at("text").value.trim();
  if (!text || answering) return;
  at("text").value = "";
  fitComposer();
  current.title ||= text.split("\n")[0].slice(0, 60);
  current.messages.push({ role: "user", content: text });
  keep(current);
  answer();
}

/** Answer the last question again. The answer there is comes back if nothing better does. */
function regenerate() {
  if (answering) return;
  answer(current.messages.at(-1)?.role === "assistant" ? current.messages.pop() : null);
}

function stop() {
  answering?.controller.abort();
}

async function answer(previous = null) {
  const conversation = current;
  const message = { role: "assistant", content: "", tokens: 0, seconds: 0, ended: null };
  const task = { conversation, message, item: messageItem(message, {}), controller: new AbortController() };
  answering = task;
  conversation.messages.push(message);
  task.item.setAttribute("aria-busy", "true");
  updateAnswer(task.item, message);
  show();
  scrollToEnd();
  say("The model is answering");
  let failure = null;
  try {
    await write(task);
    say(message.content.slice(0, 1000) || "The answer is empty");
  } catch (error) {
    if (error.name === "AbortError") {
      message.ended = "stopped";
      say("Stopped");
    } else failure = error;
  }
  answering = null;
  if (!message.content) conversation.messages.splice(-1, 1, ...(previous ? [previous] : []));
  // Deleted while it was being answered: stays deleted.
  if (store.conversations().some((one) => one.id === conversation.id)) keep(conversation);
  if (conversation !== current) return showList(store.conversations(), current);
  const following = isAtEnd();
  show();
  if (failure) explain(failure);
  if (following) scrollToEnd();
}

/** Let the model write into `task.message`. A conversation too long for the model loses its oldest turns. */
async function write(task) {
  const { conversation, message, controller } = task;
  const turns = conversation.messages.slice(0, -1).map(({ role, content }) => ({ role, content }));
  const system = settings.system() ? [{ role: "system", content: settings.system() }] : [];
  let forgotten = 0;
  for (;;) {
    try {
      const body = { model: model?.id, messages: [...system, ...turns], ...settings.sampling() };
      await stream(task, api.answer(body, { key: settings.key(), signal: controller.signal }));
      if (forgotten) toast("The beginning of this conversation no longer fits the model, so it answered without it.");
      return;
    } catch (error) {
      if (error.code !== "context_length_exceeded" || turns.length < 3) throw error;
      // A question and its answer; after a stopped answer there may be two questions in a row.
      forgotten += turns.splice(0, turns[1].role === "assistant" ? 2 : 1).length;
    }
  }
}

async function stream(task, chunks) {
  const { message, item } = task;
  let began = 0;
  let frame = 0;
  const draw = () => {
    frame = 0;
    const following = isAtEnd();
    updateAnswer(item, message);
    if (following && task.conversation === current) scrollToEnd();
  };
  try {
    for await (const { text, finish, usage } of chunks) {
      if (text) {
        began ||= performance.now();
        message.content += text;
        frame ||= requestAnimationFrame(draw);
      }
      message.seconds = began ? (performance.now() - began) / 1000 : 0;
      message.ended = finish ?? message.ended;
      message.tokens = usage?.completion_tokens ?? message.tokens;
    }
  } finally {
    cancelAnimationFrame(frame);
  }
}

function explain(error) {
  const list = at("messages");
  list.querySelector(".problem")?.remove();
  if (error instanceof api.Away) {
    list.append(problem(error.message, "Try again", regenerate));
    return watch();
  }
  if (error.status === 401) {
    settings.askForKey();
    list.append(problem("The server asks for an API key.", "Try again", regenerate));
  } else if (error.code === "context_length_exceeded") {
    list.append(problem("This message is too long for the model. Shorten it, or begin a new conversation."));
  } else {
    if (!(error instanceof api.Refused)) console.error(error);
    list.append(problem(`It did not work: ${error.message}.`, "Try again", regenerate));
  }
}

// --- the server -----------------------------------------------------------------------------------------------------

async function connect() {
  try {
    model = await api.model(settings.key());
  } catch (error) {
    if (error instanceof api.Away) return watch();
    if (error.status === 401) return settings.askForKey();
    return notice(`The server does not tell which model it has: ${error.message}.`);
  }
  notice("");
  at("model").textContent = model.id;
  at("model").title = `${model.id}, a context of ${model.context_length} tokens`;
  const here = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
  at("where").textContent = `${model.id} answers ${here ? "on this computer. Nothing you write leaves it." : `on ${location.hostname}.`}`;
}

let watching = false;

/** Say that the server is away, and call until it is back. */
async function watch() {
  if (watching) return;
  watching = true;
  notice("The server is not answering. Start it with ", element("code", {}, "minicpm-edge serve"), "; this page goes on by itself.");
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, SECONDS_BETWEEN_CALLS * 1000));
    if (await api.health().then(() => true, () => false)) break;
  }
  watching = false;
  notice("");
  connect();
}

function notice(...content) {
  at("notice").replaceChildren(...content.filter(Boolean));
  at("notice").hidden = !at("notice").hasChildNodes();
}

// --- the composer, scrolling, keys ----------------------------------------------------------------------------------

function showSend() {
  const busy = answering !== null;
  at("send").classList.toggle("stop", busy);
  at("send").setAttribute("aria-label", busy ? "Stop" : "Send");
  at("send").disabled = !busy && !at("text").value.trim();
  setIcon(at("send"), busy ? "stop" : "send");
}

function fitComposer() {
  const text = at("text");
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
  showSend();
}

const isAtEnd = () => at("scroll").scrollHeight - at("scroll").scrollTop - at("scroll").clientHeight < 60;

function scrollToEnd() {
  at("scroll").scrollTop = at("scroll").scrollHeight;
  at("latest").hidden = true;
}

at("scroll").addEventListener("scroll", () => (at("latest").hidden = isAtEnd()), { passive: true });
at("latest").onclick = () => {
  scrollToEnd();
  at("text").focus();
};
at("text").addEventListener("input", fitComposer);
at("text").addEventListener("keydown", (event) => {
  // While an input method composes, Enter chooses a character.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (answering) stop();
  else send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !at("settings").open && !event.defaultPrevented) stop();
});
window.addEventListener("storage", (event) => {
  if (store.concernsConversations(event)) showList(store.conversations(), current);
});

at("theme").onclick = () => {
  const names = Object.keys(THEMES);
  window.theme.set(names[(names.indexOf(window.theme.get()) + 1) % names.length]);
  showTheme();
};

function showTheme() {
  const name = window.theme.get() in THEMES ? window.theme.get() : "auto";
  setIcon(at("theme"), name);
  at("theme").setAttribute("aria-label", `Colours: ${THEMES[name]}`);
  at("theme").title = `Colours: ${THEMES[name]}`;
}

const suggest = (text) => {
  at("text").value = text;
  send();
};
at("suggestions").append(...SUGGESTIONS.map((text) => element("li", {}, element("button", { type: "button", onclick: () => suggest(text) }, text))));
showTheme();
openConversation(store.conversations().find((one) => one.id === store.loadCurrent()) ?? current);
fitComposer();
connect();
