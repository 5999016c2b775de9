// Line icons, drawn for this page on a grid of 20.
import { html } from "/web/preact.js";

const PATHS = {
  plus: "M10 4v12M4 10h12",
  send: "M10 16V4M5 9l5-5 5 5",
  stop: "M6 6h8v8H6z",
  copy: "M7 7h9v9H7zM4 13V4h9",
  check: "M4 10.5l4 4 8-9",
  edit: "M4 16l1-4 8.5-8.5 3 3L8 15z",
  again: "M16 10a6 6 0 1 1-1.8-4.3M16 3v3.5h-3.5",
  trash: "M4 6h12M8 6V4h4v2M6 6l1 10h6l1-10",
  menu: "M3 6h14M3 10h14M3 14h14",
  close: "M5 5l10 10M15 5L5 15",
  tune: "M3 6h7M14 6h3M3 14h3M10 14h7M10 4v4M6 12v4",
  sun: "M10 6.5a3.5 3.5 0 1 0 0 7 3.5 3.5 0 0 0 0-7zM10 2v2M10 16v2M2 10h2M16 10h2"
    + "M4.3 4.3l1.4 1.4M14.3 14.3l1.4 1.4M4.3 15.7l1.4-1.4M14.3 5.7l1.4-1.4",
  moon: "M16 11.5A6.5 6.5 0 0 1 8.5 4a6.5 6.5 0 1 0 7.5 7.5z",
  auto: "M10 3a7 7 0 1 0 0 14zM10 3a7 7 0 0 1 0 14",
  layers: "M3 5h14M3 10h9M3 15h12",
  chat: "M3 4h14v9H9l-4 4v-4H3z",
  down: "M10 4v12M5 11l5 5 5-5",
  key: "M12.5 3a4.5 4.5 0 1 0 0 9 4.5 4.5 0 0 0 0-9zM9.3 10.7L3 17M5 15l2 2",
  chevron: "M7 5l5 5-5 5",
};

export function Icon({ name }) {
  return html`<svg class="icon" viewBox="0 0 20 20" aria-hidden="true">
    <path d=${PATHS[name]} />
  </svg>`;
}

/** A button that is only an icon; `label` is its name and its hint. */
export function IconButton({ icon, label, ...rest }) {
  return html`<button type="button" class="icon-button" aria-label=${label} title=${label} ...${rest}>
    <${Icon} name=${icon} />
  </button>`;
}
