// The live view of the engine: requests, speed, the tiers as tanks, plans, and what went wrong.
import { Fragment, html } from "/web/preact.js";
import { feed } from "/web/feed.js";
import { number, short } from "/web/format.js";
import { Bar, Legend, colorOf } from "/web/sources.js";
import { Spark } from "/web/spark.js";
import { useStore } from "/web/store.js";
import { Pipe, Tank } from "/web/tank.js";

const STATUS = {
  connecting: "Connecting",
  live: "Live",
  polling: "Every 5 seconds",
  lost: "No answer; trying again",
  locked: "A key is needed",
  loading: "The model is loading",
  dead: "The engine has stopped",
};

export function Engine() {
  const { status, picture, rates, series } = useStore(feed);
  return html`<section class="engine" aria-labelledby="engine-title" data-status=${status}>
    <header class="engine-head">
      <h2 id="engine-title">Engine</h2>
      <p class="status" data-status=${status} role="status">${STATUS[status]}</p>
    </header>
    ${picture === null
      ? html`<p class="hint">Nothing to show yet.</p>`
      : html`<div class="engine-grid">
          <div class="engine-column">
            <${Now} picture=${picture} rates=${rates} series=${series} />
            <${Tiers} picture=${picture} rates=${rates} />
          </div>
          <div class="engine-column">
            <${Prompts} picture=${picture} />
            <${Decisions} picture=${picture} />
            <${Counters} picture=${picture} />
          </div>
        </div>`}
  </section>`;
}

function Now({ picture, rates, series }) {
  const { running, waiting, max_running } = picture.requests;
  const speed = running && rates.decode ? (series.at(-2)?.decode ?? rates.decode) : 0;
  return html`<section class="card now" aria-label="Now">
    <div class="figures">
      <${Figure} value=${number(running)} label="running" name="running"
        note=${`of ${number(max_running)}`} />
      <${Figure} value=${number(waiting)} label="waiting" name="waiting" />
      <${Figure} value=${short(speed)} label="tokens/s" name="speed" />
    </div>
    <${Spark}
      series=${series}
      title="Tokens per second"
      lines=${[
        { name: "prompt", read: (entry) => entry.prefill, color: "line-soft" },
        { name: "generated", read: (entry) => entry.decode, color: "line-main" },
      ]}
    />
    <${Spark}
      series=${series}
      title="Requests"
      lines=${[
        { name: "waiting", read: (entry) => entry.waiting, color: "line-soft" },
        { name: "running", read: (entry) => entry.running, color: "line-main" },
      ]}
    />
  </section>`;
}

function Figure({ value, label, note, name }) {
  return html`<p class="figure" data-figure=${name}>
    <strong>${value}</strong><span>${label}</span>${note && html`<small>${note}</small>`}
  </p>`;
}

function Prompts({ picture }) {
  const { looked_up, cached } = picture.prompt_tokens ?? { looked_up: 0, cached: {} };
  const names = (picture.tiers ?? []).map((tier) => tier.name);
  const parts = names.map((name) => ({
    name,
    count: cached[name] ?? 0,
    color: colorOf(name, names),
  }));
  const found = parts.reduce((sum, part) => sum + part.count, 0);
  parts.push({ name: "computed", count: Math.max(0, looked_up - found), color: "src-computed" });
  return html`<section class="card" aria-label="Where prompt tokens came from">
    <h3>Where prompt tokens came from</h3>
    <${Bar} parts=${parts} label="Prompt tokens since the start" />
    <${Legend} parts=${parts} />
  </section>`;
}

const CHOICES = [
  ["load", "Loaded", "src-store0"],
  ["split", "Split", "src-host"],
  ["recompute", "Recomputed", "src-computed"],
];

function Decisions({ picture }) {
  const decisions = picture.decisions ?? {};
  const parts = CHOICES.map(([name, label, color]) => ({
    name: label,
    count: decisions[name] ?? 0,
    color,
  }));
  if (!parts.some(({ count }) => count > 0) && (picture.tiers ?? []).length < 2) return null;
  return html`<section class="card" aria-label="Load or compute">
    <h3>Load or compute</h3>
    <p class="hint">What was decided about prompts whose blocks were in a lower tier.</p>
    <${Bar} parts=${parts} label="Decisions" />
    <${Legend} parts=${parts} />
  </section>`;
}

function Counters({ picture }) {
  const rejected = Object.values(picture.rejected_records ?? {}).reduce((sum, n) => sum + n, 0);
  const rows = [
    ["Failed their check", rejected],
    ["Saves dropped", picture.dropped_saves ?? 0],
    ["Preemptions", picture.preemptions ?? 0],
    ["Tokens computed twice", picture.recomputed_tokens ?? 0],
  ];
  return html`<section class="card" aria-label="Since the start">
    <h3>Since the start</h3>
    <dl class="counters">
      ${rows.map(
        ([label, count]) => html`<div key=${label} class=${count ? "is-set" : ""}>
          <dt>${label}</dt><dd>${number(count)}</dd>
        </div>`,
      )}
    </dl>
  </section>`;
}

function Tiers({ picture, rates }) {
  const tiers = picture.tiers ?? [];
  const names = tiers.map((tier) => tier.name);
  return html`<section class="card tiers" aria-label="KV cache by tier">
    <h3>KV cache by tier</h3>
    ${tiers.map(
      (tier, index) => html`<${Fragment} key=${tier.name}>
        ${index > 0 && html`<${Pipe} ...${flows(tier, rates)} from=${index === 1 ? "device" : "host"}
          to=${tier.name} />`}
        <${Tank}
          tier=${tier}
          color=${colorOf(tier.name, names)}
          pages=${index === 0 ? sum(picture.pages) : null}
        />
      <//>`,
    )}
    ${tiers.length === 1 &&
    html`<p class="hint">
      Nothing is below the device. Start the server with <code>--kv-host-bytes</code> and
      <code>--kv-store</code> to keep more.
    </p>`}
  </section>`;
}

function flows(tier, rates) {
  if (!tier.store) return { down: rates.saved ?? 0, up: rates.loaded ?? 0 };
  const store = rates.stores?.[tier.name];
  return { down: store?.written ?? 0, up: store?.read ?? 0 };
}

/** The pages of all KV groups together. */
function sum(groups) {
  const total = { in_use: 0, cached: 0, free: 0 };
  for (const group of groups ?? []) {
    for (const name of Object.keys(total)) total[name] += group[name];
  }
  return total;
}
