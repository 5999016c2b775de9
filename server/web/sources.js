// Where prompt tokens came from, as a bar and a legend. The colours go from hot to cold: the further
// a tier is from the device, the colder.
import { html } from "/web/preact.js";
import { number, percent, plural } from "/web/format.js";

/** The class that colours a tier; stores beyond the third share a colour. */
export function colorOf(name, names) {
  if (name === "device" || name === "host" || name === "computed") return `src-${name}`;
  const stores = names.filter((other) => other !== "device" && other !== "host");
  return `src-store${Math.min(Math.max(stores.indexOf(name), 0), 2)}`;
}

/** Parts of a whole: [{name, count, color}], those of count 0 left out of the bar. */
export function Bar({ parts, label }) {
  const total = parts.reduce((sum, part) => sum + part.count, 0);
  const told = parts.map(({ name, count }) => `${name} ${number(count)}`).join(", ");
  return html`<div class="bar" role="img" aria-label=${`${label}: ${told}`}>
    ${parts
      .filter(({ count }) => count > 0)
      .map(
        ({ name, count, color }) =>
          html`<span
            key=${name}
            class=${color}
            style=${{ flexGrow: count / total }}
            title=${`${name}: ${number(count)} (${percent(count, total)})`}
          ></span>`,
      )}
  </div>`;
}

export function Legend({ parts }) {
  const total = parts.reduce((sum, part) => sum + part.count, 0);
  return html`<ul class="legend">
    ${parts.map(
      ({ name, count, color }) => html`<li key=${name}>
        <i class=${color} aria-hidden="true"></i>
        <span>${name}</span>
        <b>${number(count)}</b>
        <small>${percent(count, total)}</small>
      </li>`,
    )}
  </ul>`;
}

/** The prompt of one answer: {prompt, cached, sources} as `answer.js` keeps it. */
export function partsOfPrompt(usage, names) {
  const sources = Object.entries(usage.sources).filter(([, count]) => count > 0);
  const known = sources.reduce((sum, [, count]) => sum + count, 0);
  if (usage.cached > known) sources.push(["cache", usage.cached - known]);
  const parts = sources.map(([name, count]) => ({
    name,
    count,
    color: name === "cache" ? "src-device" : colorOf(name, names),
  }));
  const computed = usage.prompt - Math.max(usage.cached, known);
  return [...parts, { name: "computed", count: computed, color: "src-computed" }];
}

export function describePrompt(usage, parts) {
  const from = parts
    .filter(({ count }) => count > 0)
    .map(({ name, count }) =>
      name === "computed" ? `${number(count)} computed` : `${number(count)} from ${name}`,
    );
  return `${plural(usage.prompt, "prompt token")}: ${from.join(", ")}`;
}
