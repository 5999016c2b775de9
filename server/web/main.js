// The page: which parts are on the screen, and the keys that work everywhere.
import { html, render, useEffect, useState } from "/web/preact.js";
import { isAnswering, stop } from "/web/answer.js";
import { call, key } from "/web/api.js";
import { chats } from "/web/chats.js";
import { Conversation } from "/web/conversation.js";
import { Dialog, KeyDialog, SettingsDialog } from "/web/dialogs.js";
import { Engine } from "/web/engine.js";
import { feed } from "/web/feed.js";
import { number } from "/web/format.js";
import { Icon, IconButton } from "/web/icons.js";
import { Sidebar } from "/web/sidebar.js";
import { useMedia, useStore } from "/web/store.js";

const THEMES = { auto: "light", light: "dark", dark: "auto" };
const THEME_ICONS = { auto: "auto", light: "sun", dark: "moon" };

function App() {
  const hasSidebar = useMedia("(min-width: 760px)");
  const hasRoom = useMedia("(min-width: 1180px)");
  const [dialog, setDialog] = useState(null);
  const [isPanelOpen, setPanelOpen] = useState(true);
  const [view, setView] = useState("chat");
  const { status, refusals } = useStore(feed);
  const [model, reload] = useModel(status);
  const close = () => setDialog(null);
  const isEngineOnly = view === "engine" && !hasRoom;

  useEffect(() => {
    if (refusals > 0) setDialog("key");
  }, [refusals]);
  useEffect(() => {
    const press = (event) => {
      if (event.key === "Escape" && isAnswering() && !document.querySelector("dialog[open]")) stop();
      if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        if (isAnswering()) stop();
        chats.begin();
      }
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  }, []);
  const toggleEngine = () => {
    if (hasRoom) setPanelOpen(!isPanelOpen);
    else setView(view === "chat" ? "engine" : "chat");
  };
  const usesKey = () => {
    close();
    reload();
    feed.retry();
  };
  const isShown = hasRoom ? isPanelOpen : isEngineOnly;
  return html`<div class=${`shell ${hasRoom && isPanelOpen ? "with-panel" : ""}`}>
    <a class="skip" href="#prompt" onClick=${skip}>Skip to the message field</a>
    <${Header}
      model=${model}
      isEngineShown=${isShown}
      onMenu=${hasSidebar ? null : () => setDialog("menu")}
      onEngine=${toggleEngine}
      onKey=${() => setDialog("key")}
    />
    ${hasSidebar && html`<${Sidebar} onPick=${() => setView("chat")} />`}
    <main>
      <${Banner} />
      ${isEngineOnly
        ? html`<${Engine} />`
        : html`<${Conversation}
            model=${model}
            onSettings=${() => setDialog("settings")}
            onKey=${() => setDialog("key")}
          />`}
    </main>
    ${hasRoom && isPanelOpen && html`<aside><${Engine} /></aside>`}
    ${dialog === "settings" && html`<${SettingsDialog} onClose=${close} />`}
    ${dialog === "key" && html`<${KeyDialog} onClose=${close} onKey=${usesKey} />`}
    ${dialog === "menu" &&
    html`<${Dialog} title="Conversations" name="menu" onClose=${close}>
      <${Sidebar}
        onPick=${() => {
          setView("chat");
          close();
        }}
      />
    <//>`}
  </div>`;
}

function skip(event) {
  event.preventDefault();
  document.getElementById("prompt")?.focus();
}

function Header({ model, isEngineShown, onMenu, onEngine, onKey }) {
  const [theme, setTheme] = useState(window.jaxserveTheme.read());
  const turn = () => {
    const next = THEMES[theme];
    window.jaxserveTheme.set(next);
    setTheme(next);
  };
  return html`<header class="top">
    ${onMenu && html`<${IconButton} icon="menu" label="Conversations" onClick=${onMenu} />`}
    <span class="brand"><img src="/web/icon.svg" alt="" width="26" height="26" />jaxserve</span>
    ${model &&
    html`<p class="model" title=${`Context: ${number(model.max_model_len)} tokens`}>
      <span class="unseen">Model: </span>${model.id}
    </p>`}
    <span class="gap"></span>
    ${key.read() && html`<${IconButton} icon="key" label="API key" onClick=${onKey} />`}
    <${IconButton}
      icon=${THEME_ICONS[theme]}
      label=${`Colours: ${theme}. Change to ${THEMES[theme]}`}
      onClick=${turn}
    />
    <button
      type="button"
      class="engine-button"
      aria-pressed=${isEngineShown ? "true" : "false"}
      onClick=${onEngine}
    >
      <${Icon} name="layers" />Engine<${Pulse} />
    </button>
  </header>`;
}

/** What the engine does, in a word, beside the button that shows it. */
function Pulse() {
  const { status, picture } = useStore(feed);
  const running = picture?.requests.running ?? 0;
  const isFine = status === "live" || status === "polling";
  return html`<span class="pulse" data-status=${isFine && running ? "busy" : status}>
    ${isFine ? (running ? `${running} running` : "idle") : ""}
  </span>`;
}

/** What is wrong with the server as a whole, if something is. */
function Banner() {
  const { status, progress } = useStore(feed);
  const told = {
    lost: "The server does not answer. This page keeps trying.",
    dead: "The engine has stopped. The server must be restarted.",
    loading: "The server is loading its model.",
  }[status];
  if (!told) return null;
  const retry = status === "lost";
  return html`<div class="banner" role="alert" data-status=${status}>
    <p>${told}</p>
    ${status === "loading" && progress && html`<${Loading} progress=${progress} />`}
    ${retry && html`<button type="button" class="quiet" onClick=${() => feed.retry()}>Try now</button>`}
  </div>`;
}

function Loading({ progress }) {
  const { what, done, total } = progress;
  return html`<label class="loading">
    ${what}<progress max=${total || 1} value=${total ? done : undefined}></progress>
  </label>`;
}

/** The model that is served; asked for whenever the server comes back. */
function useModel(status) {
  const [model, setModel] = useState(null);
  const load = async () => {
    try {
      const response = await call("/v1/models");
      setModel((await response.json()).data[0]);
    } catch {
      // the banner or the key dialog says so
    }
  };
  useEffect(() => {
    if (status === "live" || status === "polling") load();
  }, [status]);
  return [model, load];
}

render(html`<${App} />`, document.getElementById("app"));
