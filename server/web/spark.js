// Small time series: areas over the last two minutes, newest at the right.
import { html } from "/web/preact.js";
import { SPAN_S } from "/web/feed.js";
import { short } from "/web/format.js";

const WIDTH = 300;
const HEIGHT = 56;

/**
 * `lines`: [{name, read, color}], the first is drawn at the back. The newest second is still being
 * counted, so it is left out.
 */
export function Spark({ series, lines, title }) {
  const shown = series.slice(0, -1);
  const end = shown.at(-1)?.second ?? 0;
  const peak = Math.max(0, ...lines.flatMap(({ read }) => shown.map(read)));
  const told = lines.map(({ name, read }) => {
    const now = shown.length ? read(shown.at(-1)) : 0;
    return `${name} ${short(now)} now, ${short(Math.max(0, ...shown.map(read)))} at most`;
  });
  return html`<figure class="spark">
    <figcaption>
      <h3>${title}</h3>
      <span>${peak > 0 ? `peak ${short(peak)}` : ""}</span>
    </figcaption>
    <svg
      viewBox=${`0 0 ${WIDTH} ${HEIGHT}`}
      preserveAspectRatio="none"
      role="img"
      aria-label=${`${title}, last two minutes: ${told.join("; ")}`}
    >
      <line class="grid" x1="0" x2=${WIDTH} y1=${HEIGHT - 0.5} y2=${HEIGHT - 0.5} />
      ${lines.map(({ name, read, color }) => {
        const points = shown.map((entry) => [
          WIDTH - (WIDTH * (end - entry.second)) / SPAN_S,
          HEIGHT - 1 - ((HEIGHT - 3) * read(entry)) / (peak || 1),
        ]);
        return html`<g key=${name} class=${color}>
          <path class="area" d=${area(points)} />
          <path class="line" d=${line(points)} />
        </g>`;
      })}
    </svg>
    <p class="keys">
      ${lines
        .toReversed()
        .map(({ name, color }) => html`<span key=${name} class=${color}><i></i>${name}</span>`)}
      <span class="span">2 minutes</span>
    </p>
  </figure>`;
}

function line(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

function area(points) {
  if (points.length === 0) return "";
  const last = points.at(-1)[0].toFixed(1);
  return `${line(points)}L${last} ${HEIGHT}L${points[0][0].toFixed(1)} ${HEIGHT}Z`;
}
