// One tier of the KV cache as a tank: how full, what was found in it, what flows, what is wrong.
import { html } from "/web/preact.js";
import { bytes, number, percent, plural, seconds } from "/web/format.js";

/**
 * `levels`: what fills it, lowest first: [{name, share, tone}] with shares of its size.
 * A tier without a bound shows no level, only what is in it.
 */
function Vessel({ levels, color, isBounded }) {
  return html`<div class=${`vessel ${color} ${isBounded ? "" : "unbounded"}`} aria-hidden="true">
    ${levels.map(
      ({ name, share, tone }) =>
        html`<span key=${name} class=${tone} style=${{ height: `${100 * share}%` }}></span>`,
    )}
  </div>`;
}

export function Tank({ tier, color, pages }) {
  const isBounded = tier.max_bytes > 0;
  const used = isBounded ? tier.num_bytes / tier.max_bytes : 0;
  const levels = pages ? pageLevels(pages) : [{ name: "used", share: used, tone: "full" }];
  const size = isBounded
    ? `${bytes(tier.num_bytes)} of ${bytes(tier.max_bytes)}`
    : `${bytes(tier.num_bytes)}, no bound`;
  return html`<article class="tank" aria-label=${`Tier ${tier.name}`} data-tier=${tier.name}>
    <${Vessel} levels=${levels} color=${color} isBounded=${isBounded} />
    <div class="tank-text">
      <h3>
        <i class=${color} aria-hidden="true"></i>${tier.name}
        ${isBounded && html`<span class="share">${percent(tier.num_bytes, tier.max_bytes)}</span>`}
      </h3>
      <p class="size">${size}${!tier.is_known && html` <em>(last known)</em>`}</p>
      ${pages && html`<p class="size">${pagesOf(pages)}</p>`}
      <dl>
        <div><dt>Tokens found here</dt><dd>${number(tier.hit_tokens)}</dd></div>
        <div><dt>Blocks kept</dt><dd>${number(tier.num_blocks)}</dd></div>
        ${tier.num_evicted > 0 &&
        html`<div><dt>Evicted</dt><dd>${number(tier.num_evicted)}</dd></div>`}
        ${tier.num_pinned > 0 &&
        html`<div><dt>Pinned</dt><dd>${number(tier.num_pinned)}</dd></div>`}
        ${tier.store && html`<${StoreRows} store=${tier.store} tier=${tier} />`}
      </dl>
      <${Troubles} tier=${tier} />
    </div>
  </article>`;
}

function pagesOf({ in_use, cached, free }) {
  return `${number(in_use)} pages in use · ${number(cached)} cached · ${number(free)} free`;
}

function pageLevels({ in_use, cached, free }) {
  const total = Math.max(1, in_use + cached + free);
  return [
    { name: "in use", share: in_use / total, tone: "full" },
    { name: "cached", share: cached / total, tone: "half" },
  ];
}

function StoreRows({ store }) {
  const speed = store.load_bytes_per_s > 0 && `${bytes(store.load_bytes_per_s)}/s`;
  return html`
    <div><dt>Read, written</dt>
      <dd>${bytes(store.bytes_read)} · ${bytes(store.bytes_written)}</dd></div>
    ${speed && html`<div><dt>Read speed</dt><dd>${speed}</dd></div>`}
    ${store.get_p99_s && html`<div><dt>99 % of reads within</dt>
      <dd>${seconds(store.get_p99_s)}</dd></div>`}
    ${store.queued > 0 && html`<div><dt>Calls waiting</dt><dd>${number(store.queued)}</dd></div>`}
  `;
}

function Troubles({ tier }) {
  const { store } = tier;
  const told = [];
  if (store && store.load_breaker !== "closed") told.push(`reads paused (${store.load_breaker})`);
  if (store && store.write_breaker !== "closed") {
    told.push(`writes paused (${store.write_breaker})`);
  }
  if (store?.failures) told.push(plural(store.failures, "failed call"));
  if (store?.dropped_writes) told.push(plural(store.dropped_writes, "dropped write"));
  if (tier.lost_blocks) told.push(plural(tier.lost_blocks, "block") + " did not come");
  if (told.length === 0) return null;
  return html`<p class="trouble">${told.join(" · ")}</p>`;
}

/** What moves between two tanks now. */
export function Pipe({ down, up, from, to }) {
  const label = `From ${from} to ${to} ${bytes(down)} per second, back ${bytes(up)}`;
  return html`<div class="pipe" role="img" aria-label=${label}>
    <span class=${down > 0 ? "flow down is-moving" : "flow down"}></span>
    <span class=${up > 0 ? "flow up is-moving" : "flow up"}></span>
    <span class=${down > 0 ? "rate is-moving" : "rate"}>↓ ${bytes(Math.round(down))}/s</span>
    <span class=${up > 0 ? "rate is-moving" : "rate"}>↑ ${bytes(Math.round(up))}/s</span>
  </div>`;
}
