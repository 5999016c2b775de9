// What opens in front of the page: settings, and the API key. Native dialogs keep the focus inside.
import { html, useEffect, useRef, useState } from "/web/preact.js";
import { key } from "/web/api.js";
import { chats } from "/web/chats.js";
import { IconButton } from "/web/icons.js";
import { FIELDS, settings } from "/web/settings.js";
import { useStore } from "/web/store.js";

/** A modal dialog that is open for as long as it is drawn. */
export function Dialog({ title, name, onClose, children }) {
  const dialog = useRef(null);
  useEffect(() => {
    const opened = dialog.current;
    const before = document.activeElement;
    opened.showModal();
    return () => {
      if (opened.open) opened.close();
      before?.focus?.();
    };
  }, []);
  const press = (event) => {
    if (event.target === dialog.current) onClose(); // outside of what is in it
  };
  return html`<dialog
    ref=${dialog}
    class=${`dialog ${name}`}
    aria-labelledby=${`${name}-title`}
    onClose=${onClose}
    onClick=${press}
  >
    <div class="dialog-body">
      <header>
        <h2 id=${`${name}-title`}>${title}</h2>
        <${IconButton} icon="close" label="Close" onClick=${onClose} />
      </header>
      ${children}
    </div>
  </dialog>`;
}

export function SettingsDialog({ onClose }) {
  const { system, values } = useStore(settings);
  const put = (name, text, isValid) => {
    const { [name]: _, ...rest } = values;
    settings.change({
      values: text === "" || !isValid ? rest : { ...rest, [name]: Number(text) },
    });
  };
  return html`<${Dialog} title="Settings" name="settings" onClose=${onClose}>
    <div class="wide-field">
      <label for="system">System prompt</label>
      <textarea
        id="system"
        rows="4"
        value=${system}
        placeholder="None"
        onInput=${(event) => settings.change({ system: event.target.value })}
      ></textarea>
    </div>
    <div class="fields">
      ${FIELDS.map(
        ({ name, label, help, min, max, step }) => html`<div key=${name} class="number">
          <label for=${`set-${name}`}>${label}</label>
          <input
            id=${`set-${name}`}
            type="number"
            inputmode="decimal"
            min=${min}
            max=${max}
            step=${step}
            placeholder="default"
            value=${values[name] ?? ""}
            aria-describedby=${`help-${name}`}
            onChange=${(event) => put(name, event.target.value, event.target.validity.valid)}
          />
          <p class="hint" id=${`help-${name}`}>${help}</p>
        </div>`,
      )}
    </div>
    <footer>
      <button type="button" class="quiet" onClick=${() => settings.change({ system: "", values: {} })}>
        Back to the model's defaults
      </button>
      <${ForgetAll} />
      <button type="button" class="primary" onClick=${onClose}>Done</button>
    </footer>
  <//>`;
}

function ForgetAll() {
  const [isSure, setSure] = useState(false);
  const press = () => {
    if (isSure) chats.removeAll();
    setSure(!isSure);
  };
  return html`<button type="button" class=${isSure ? "quiet danger" : "quiet"} onClick=${press}>
    ${isSure ? "Really delete all conversations" : "Delete all conversations"}
  </button>`;
}

export function KeyDialog({ onClose, onKey }) {
  const [isKept, setKept] = useState(false);
  const [text, setText] = useState(key.read());
  const submit = (event) => {
    event.preventDefault();
    key.set(text.trim(), isKept);
    onKey();
  };
  return html`<${Dialog} title="API key" name="key" onClose=${onClose}>
    <form onSubmit=${submit}>
      ${key.read()
        ? html`<p role="alert">The server does not know the key that was sent.</p>`
        : html`<p>This server answers only those who send its key (<code>--api-key</code>).</p>`}
      <div class="wide-field">
        <label for="api-key">Key</label>
        <input
          id="api-key"
          type="password"
          autocomplete="off"
          value=${text}
          onInput=${(event) => setText(event.target.value)}
        />
      </div>
      <label class="tick">
        <input
          type="checkbox"
          checked=${isKept}
          onChange=${(event) => setKept(event.target.checked)}
        />
        Keep it in this browser; otherwise until the tab is closed
      </label>
      <footer><button type="submit" class="primary">Use this key</button></footer>
    </form>
  <//>`;
}
