// One message of a conversation, and what can be done with it.
import { html, useEffect, useRef, useState } from "/web/preact.js";
import { copy } from "/web/clipboard.js";
import { feed } from "/web/feed.js";
import { number, seconds, short } from "/web/format.js";
import { Icon } from "/web/icons.js";
import { Markdown } from "/web/markdown.js";
import { Bar, describePrompt, partsOfPrompt } from "/web/sources.js";

export function UserMessage({ message, canEdit, onEdit }) {
  const [isEditing, setEditing] = useState(false);
  if (isEditing) {
    return html`<${Editor}
      text=${message.content}
      onCancel=${() => setEditing(false)}
      onSave=${(text) => {
        setEditing(false);
        onEdit(text);
      }}
    />`;
  }
  return html`<article class="message user" aria-label="You">
    <div class="said">${message.content}</div>
    <div class="tools">
      ${canEdit &&
      html`<button type="button" class="quiet" onClick=${() => setEditing(true)}>
        <${Icon} name="edit" />Edit
      </button>`}
    </div>
  </article>`;
}

function Editor({ text, onSave, onCancel }) {
  const [draft, setDraft] = useState(text);
  const area = useRef(null);
  useEffect(() => {
    area.current.focus();
    area.current.setSelectionRange(text.length, text.length);
  }, []);
  const submit = (event) => {
    event.preventDefault();
    if (draft.trim()) onSave(draft.trim());
  };
  const press = (event) => {
    if (event.key === "Escape") onCancel();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  };
  return html`<form class="message user editor" onSubmit=${submit}>
    <label class="unseen" for="editor">Edit your message</label>
    <textarea
      id="editor"
      ref=${area}
      rows="2"
      value=${draft}
      onInput=${(event) => setDraft(event.target.value)}
      onKeyDown=${press}
    ></textarea>
    <p class="hint">What follows is removed and answered anew.</p>
    <div class="tools">
      <button type="button" class="quiet" onClick=${onCancel}>Cancel</button>
      <button type="submit" class="primary small" disabled=${!draft.trim()}>Send</button>
    </div>
  </form>`;
}

export function Answer({ message, isLast, isBusy, onAgain, onKey }) {
  const { status, content, reasoning } = message;
  const isStreaming = status === "streaming";
  return html`<article
    class="message answer"
    aria-label="Answer"
    aria-busy=${isStreaming ? "true" : "false"}
    data-status=${status}
  >
    ${reasoning && html`<${Reasoning} text=${reasoning} isOpenEnded=${isStreaming && !content} />`}
    ${content && html`<${Markdown} text=${content} />`}
    ${isStreaming && !content && !reasoning && html`<p class="dots" aria-hidden="true"><i></i><i></i><i></i></p>`}
    ${status === "failed" && html`<${Failure} error=${message.error} onAgain=${onAgain} onKey=${onKey} />`}
    <${Facts} message=${message} />
    ${!isStreaming &&
    html`<div class="tools">
      ${content && html`<${CopyButton} text=${content} />`}
      ${isLast &&
      !isBusy &&
      html`<button type="button" class="quiet" onClick=${onAgain}>
        <${Icon} name="again" />Regenerate
      </button>`}
    </div>`}
  </article>`;
}

function CopyButton({ text }) {
  const [isCopied, setCopied] = useState(false);
  const take = async () => {
    setCopied(await copy(text));
    setTimeout(() => setCopied(false), 1600);
  };
  return html`<button type="button" class="quiet" onClick=${take}>
    <${Icon} name=${isCopied ? "check" : "copy"} />${isCopied ? "Copied" : "Copy"}
  </button>`;
}

function Reasoning({ text, isOpenEnded }) {
  return html`<details class="reasoning">
    <summary><${Icon} name="chevron" />${isOpenEnded ? "Thinking…" : "Reasoning"}</summary>
    <div class="thought">${text}</div>
  </details>`;
}

/** How fast it came, and where its prompt came from. */
function Facts({ message }) {
  const { usage, ttftS, tokensPerS, status, finish } = message;
  const names = (feed.state.picture?.tiers ?? []).map((tier) => tier.name);
  const facts = [];
  if (ttftS !== undefined) facts.push(["first token", seconds(ttftS)]);
  if (tokensPerS) facts.push(["speed", `${short(tokensPerS)} tokens/s`]);
  if (usage) facts.push(["length", `${number(usage.completion)} tokens`]);
  if (status === "stopped") facts.push(["", "stopped"]);
  if (finish === "length") facts.push(["", "cut at its longest"]);
  if (facts.length === 0) return null;
  const parts = usage && partsOfPrompt(usage, names);
  return html`<footer class="facts">
    ${usage &&
    html`<${Bar} parts=${parts} label="Prompt tokens" />
      <p class="provenance">${describePrompt(usage, parts)}</p>`}
    <dl>
      ${facts.map(
        ([name, value]) =>
          html`<div key=${value}>${name && html`<dt>${name}</dt>`}<dd>${value}</dd></div>`,
      )}
    </dl>
  </footer>`;
}

function Failure({ error, onAgain, onKey }) {
  const [left, setLeft] = useState(error.retryAfterS ?? 0);
  useEffect(() => {
    if (left <= 0) return;
    const timer = setTimeout(() => setLeft(left - 1), 1000);
    return () => clearTimeout(timer);
  }, [left]);
  return html`<div class="failure" role="alert">
    <p>${error.text}</p>
    ${error.status === 401
      ? html`<button type="button" class="primary small" onClick=${onKey}>Enter a key</button>`
      : html`<button type="button" class="primary small" onClick=${onAgain} disabled=${left > 0}>
          ${left > 0 ? `Try again in ${left} s` : "Try again"}
        </button>`}
  </div>`;
}
