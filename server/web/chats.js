// The conversations, kept in this browser and nowhere else.
//
// One entry of localStorage per conversation, and a list of them. When there is no room, the oldest
// go. `chats.state` is {list, chat}: titles newest first, and the conversation on the screen.
import { Store } from "/web/store.js";

const LIST = "jaxserve.chats";
const PREFIX = "jaxserve.chat.";
const MAX_CHATS = 200;
const MAX_TITLE = 60;
const SAVE_EVERY_MS = 1000;

class Chats extends Store {
  #timer = null;

  constructor() {
    super({ list: read(LIST) ?? [], chat: empty() });
    const id = location.hash.slice(1);
    if (id) this.open(id);
  }

  /** Begin a conversation; it is kept once it has a message. */
  begin() {
    this.saveNow();
    this.set({ chat: empty() });
    go("");
  }

  open(id) {
    this.saveNow();
    const chat = read(PREFIX + id);
    if (!chat) {
      this.set({ list: this.state.list.filter((entry) => entry.id !== id), chat: empty() });
      go("");
      return;
    }
    for (const message of chat.messages) {
      if (message.status === "streaming") message.status = "stopped"; // the page was left
    }
    this.set({ chat });
    go(id);
  }

  remove(id) {
    localStorage.removeItem(PREFIX + id);
    const list = this.state.list.filter((entry) => entry.id !== id);
    write(LIST, list);
    this.set(id === this.state.chat.id ? { list, chat: empty() } : { list });
    if (id === location.hash.slice(1)) go("");
  }

  removeAll() {
    for (const { id } of this.state.list) localStorage.removeItem(PREFIX + id);
    localStorage.removeItem(LIST);
    this.set({ list: [], chat: empty() });
    go("");
  }

  /** The conversation was changed in place. */
  changed(chat) {
    this.touch();
    if (chat !== this.state.chat) return save(chat, this.state.list);
    this.#timer ??= setTimeout(() => this.saveNow(), SAVE_EVERY_MS);
  }

  saveNow() {
    clearTimeout(this.#timer);
    this.#timer = null;
    const { chat, list } = this.state;
    if (chat.messages.length === 0) return;
    const kept = save(chat, list);
    if (kept !== list) this.set({ list: kept });
    if (location.hash.slice(1) !== chat.id) go(chat.id);
  }
}

function empty() {
  return { id: crypto.randomUUID?.() ?? `c${Date.now()}`, title: "", messages: [] };
}

/** Write a conversation down; returns the list of those that are kept now. */
function save(chat, list) {
  const first = chat.messages.find((message) => message.role === "user");
  chat.title = (first?.content ?? "").replace(/\s+/g, " ").trim().slice(0, MAX_TITLE) || "Untitled";
  const entry = { id: chat.id, title: chat.title, at: Date.now() };
  let kept = [entry, ...list.filter((other) => other.id !== chat.id)];
  for (const { id } of kept.slice(MAX_CHATS)) localStorage.removeItem(PREFIX + id);
  kept = kept.slice(0, MAX_CHATS);
  while (!write(PREFIX + chat.id, chat) && kept.length > 1) {
    localStorage.removeItem(PREFIX + kept.pop().id);
  }
  write(LIST, kept);
  return kept;
}

function go(id) {
  history.replaceState(null, "", id ? `#${id}` : location.pathname);
}

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false; // no room, or storage is off
  }
}

export const chats = new Chats();
addEventListener("pagehide", () => chats.saveNow());
