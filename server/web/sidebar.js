// The list of conversations.
import { html, useState } from "/web/preact.js";
import { isAnswering, stop } from "/web/answer.js";
import { chats } from "/web/chats.js";
import { Icon, IconButton } from "/web/icons.js";
import { useStore } from "/web/store.js";

const DAY_MS = 86_400_000;

export function Sidebar({ onPick }) {
  const { list, chat } = useStore(chats);
  const leave = (then) => {
    if (isAnswering()) stop();
    then();
    onPick();
  };
  return html`<nav class="sidebar" aria-label="Conversations">
    <button type="button" class="new-chat" onClick=${() => leave(() => chats.begin())}>
      <${Icon} name="plus" />New chat
    </button>
    ${groups(list).map(
      ([name, entries]) => html`<section key=${name} aria-label=${name}>
        <h2>${name}</h2>
        <ul>
          ${entries.map(
            (entry) => html`<${Entry}
              key=${entry.id}
              entry=${entry}
              isCurrent=${entry.id === chat.id}
              onOpen=${() => leave(() => chats.open(entry.id))}
            />`,
          )}
        </ul>
      </section>`,
    )}
    ${list.length === 0 && html`<p class="hint">Your conversations will be listed here.</p>`}
  </nav>`;
}

function Entry({ entry, isCurrent, onOpen }) {
  const [isSure, setSure] = useState(false);
  return html`<li class=${isCurrent ? "is-current" : ""}>
    <button type="button" class="open" aria-current=${isCurrent ? "true" : undefined} onClick=${onOpen}>
      ${entry.title}
    </button>
    ${isSure
      ? html`<button
          type="button"
          class="quiet danger"
          onBlur=${() => setSure(false)}
          onClick=${() => chats.remove(entry.id)}
        >
          Delete
        </button>`
      : html`<${IconButton}
          icon="trash"
          label=${`Delete “${entry.title}”`}
          onClick=${() => setSure(true)}
        />`}
  </li>`;
}

function groups(list) {
  const today = new Date().setHours(0, 0, 0, 0);
  const named = [
    ["Today", list.filter(({ at }) => at >= today)],
    ["Last 7 days", list.filter(({ at }) => at < today && at >= today - 6 * DAY_MS)],
    ["Earlier", list.filter(({ at }) => at < today - 6 * DAY_MS)],
  ];
  return named.filter(([, entries]) => entries.length > 0);
}
