// Where one writes: Enter sends, Shift+Enter breaks the line, Escape stops an answer.
import { html, useLayoutEffect, useState } from "/web/preact.js";
import { Icon } from "/web/icons.js";
import { settings } from "/web/settings.js";
import { useStore } from "/web/store.js";

export function Composer({ area, isBusy, onSend, onStop, onSettings, chatId }) {
  const [draft, setDraft] = useState("");
  useStore(settings);
  useLayoutEffect(() => {
    // Before the page is seen: what one types at once must not be lost.
    setDraft("");
    if (matchMedia("(hover: hover)").matches) area.current.focus(); // no keyboard pops up on phones
  }, [chatId]);
  const canSend = draft.trim() !== "" && !isBusy;
  const submit = (event) => {
    event.preventDefault();
    if (!canSend) return;
    onSend(draft.trim());
    setDraft("");
    area.current.focus();
  };
  const press = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  };
  return html`<form class="composer" onSubmit=${submit}>
    <div class="field">
      <label class="unseen" for="prompt">Message</label>
      <textarea
        id="prompt"
        ref=${area}
        rows="1"
        placeholder="Write a message"
        value=${draft}
        onInput=${(event) => setDraft(event.target.value)}
        onKeyDown=${press}
        enterkeyhint="send"
      ></textarea>
      ${isBusy
        ? html`<button type="button" class="send" onClick=${onStop} aria-label="Stop" title="Stop (Esc)">
            <${Icon} name="stop" />
          </button>`
        : html`<button type="submit" class="send" disabled=${!canSend} aria-label="Send" title="Send (Enter)">
            <${Icon} name="send" />
          </button>`}
    </div>
    <div class="under">
      <button type="button" class="quiet" onClick=${onSettings}>
        <${Icon} name="tune" /><span class="unseen">Settings: </span>${settings.summary()}
      </button>
      <span class="hint keys-hint"><kbd>Enter</kbd> sends · <kbd>Shift</kbd>+<kbd>Enter</kbd> new line</span>
    </div>
  </form>`;
}
