// The conversation on the screen: its messages, the place to write, and what follows the newest text.
import { html, useEffect, useLayoutEffect, useRef, useState } from "/web/preact.js";
import { ask, isAnswering, stop } from "/web/answer.js";
import { chats } from "/web/chats.js";
import { Composer } from "/web/composer.js";
import { number } from "/web/format.js";
import { Icon } from "/web/icons.js";
import { Answer, UserMessage } from "/web/message.js";
import { useStore } from "/web/store.js";

const NEAR_PX = 80;
const SUGGESTIONS = {
  "jaxserve-embedded": [
    "Tell a story about Bela.",
    "What is 17 + 25?",
    "Read this text. The fox walked near the river. Remember that the code of Tamiro is 48213. " +
      "Nobody found the lamp near the mill. Question: What is the code of Tamiro?",
  ],
  "": [
    "Explain what a KV cache is to a curious child.",
    "Write a haiku about waiting.",
    "Compare TCP and UDP in a table.",
  ],
};

export function Conversation({ model, onSettings, onKey }) {
  const { chat } = useStore(chats);
  const [said, setSaid] = useState("");
  const scroller = useRef(null);
  const composer = useRef(null);
  const [isAtEnd, follow, toEnd] = useFollowing(scroller, chat);

  const send = async (text) => {
    toEnd();
    setSaid("Answering.");
    const message = await ask(chat, text);
    if (message) setSaid(outcome(message));
  };
  const again = () => {
    if (isAnswering()) return;
    if (chat.messages.at(-1)?.role === "assistant") chat.messages.pop();
    composer.current?.focus();
    send();
  };
  const edit = (index, text) => {
    if (isAnswering()) return;
    chat.messages.splice(index);
    composer.current?.focus();
    send(text);
  };
  const isBusy = isAnswering();
  return html`<section class="conversation" aria-label="Conversation">
    <div class="scroller" ref=${scroller} onScroll=${follow}>
      <div class="messages">
        ${chat.messages.length === 0
          ? html`<${Welcome} model=${model} onPick=${send} />`
          : chat.messages.map((message, index) =>
              message.role === "user"
                ? html`<${UserMessage}
                    key=${`${chat.id}-${index}`}
                    message=${message}
                    canEdit=${!isBusy}
                    onEdit=${(text) => edit(index, text)}
                  />`
                : html`<${Answer}
                    key=${`${chat.id}-${index}`}
                    message=${message}
                    isLast=${index === chat.messages.length - 1}
                    isBusy=${isBusy}
                    onAgain=${again}
                    onKey=${onKey}
                  />`,
            )}
      </div>
    </div>
    ${!isAtEnd &&
    html`<button type="button" class="to-end" onClick=${toEnd}>
      <${Icon} name="down" />Newest
    </button>`}
    <p class="unseen" role="status" aria-live="polite">${said}</p>
    <${Composer}
      area=${composer}
      isBusy=${isBusy}
      onSend=${send}
      onStop=${stop}
      onSettings=${onSettings}
      chatId=${chat.id}
    />
  </section>`;
}

function outcome(message) {
  if (message.status === "failed") return ""; // the alert says it
  if (message.status === "stopped") return "Stopped.";
  const { usage } = message;
  return usage ? `Answer finished, ${number(usage.completion)} tokens.` : "Answer finished.";
}

function Welcome({ model, onPick }) {
  const suggestions = SUGGESTIONS[model?.id] ?? SUGGESTIONS[""];
  return html`<div class="welcome">
    <h1>What shall we <em>ask</em>?</h1>
    <p>
      ${model
        ? html`<b>${model.id}</b> answers here. Conversations stay in this browser.`
        : "Conversations stay in this browser."}
    </p>
    <ul>
      ${suggestions.map(
        (text) => html`<li key=${text}>
          <button type="button" onClick=${() => onPick(text)}>${text}</button>
        </li>`,
      )}
    </ul>
  </div>`;
}

/** Stay at the end while text comes, unless the reader has scrolled up. */
function useFollowing(scroller, chat) {
  const [isAtEnd, setAtEnd] = useState(true);
  const follow = () => {
    const { scrollTop, scrollHeight, clientHeight } = scroller.current;
    setAtEnd(scrollHeight - scrollTop - clientHeight < NEAR_PX);
  };
  const toEnd = () => {
    setAtEnd(true);
    scroller.current.scrollTop = scroller.current.scrollHeight;
  };
  useLayoutEffect(() => {
    if (isAtEnd) scroller.current.scrollTop = scroller.current.scrollHeight;
  });
  useEffect(toEnd, [chat.id]);
  return [isAtEnd, follow, toEnd];
}
