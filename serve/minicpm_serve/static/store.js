// Conversations and settings, kept in this browser's localStorage: one entry for each, so that saving one is cheap.

const PREFIX = "minicpm-edge/";
const CONVERSATION = `${PREFIX}conversation/`;

export const DEFAULTS = { system: "", temperature: "0.7", top_p: "0.95", top_k: "40", min_p: "0.05", max_tokens: "", seed: "" };

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null; // storage is off, or the entry is broken: as if it were not there
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

const isMessage = (message) =>
  message && ["user", "assistant"].includes(message.role) && typeof message.content === "string";
const isConversation = (value) =>
  value && typeof value.id === "string" && typeof value.title === "string" && Array.isArray(value.messages) && value.messages.every(isMessage);

/** All conversations, the one used last in front. */
export function conversations() {
  const keys = [];
  try {
    for (let index = 0; index < localStorage.length; index += 1) keys.push(localStorage.key(index));
  } catch {
    return [];
  }
  const found = keys.filter((key) => key.startsWith(CONVERSATION)).map(read).filter(isConversation);
  return found.sort((a, b) => (b.updated ?? 0) - (a.updated ?? 0));
}

export function newConversation() {
  return { id: `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`, title: "", updated: Date.now(), messages: [] };
}

/** False when the browser's storage is full or off. */
export function save(conversation) {
  return write(CONVERSATION + conversation.id, conversation);
}

export function remove(conversation) {
  try {
    localStorage.removeItem(CONVERSATION + conversation.id);
  } catch {}
}

/** Whether a `storage` event of another tab is about conversations. */
export const concernsConversations = (event) => event.key === null || event.key.startsWith(CONVERSATION);

export const loadSettings = () => ({ ...DEFAULTS, ...read(`${PREFIX}settings`) });
export const saveSettings = (settings) => write(`${PREFIX}settings`, settings);
export const loadKey = () => read(`${PREFIX}key`) ?? "";
export const saveKey = (key) => write(`${PREFIX}key`, key);
export const loadCurrent = () => read(`${PREFIX}current`);
export const saveCurrent = (id) => write(`${PREFIX}current`, id);
