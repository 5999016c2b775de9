// Numbers for people.
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(count) {
  let unit = 0;
  while (count >= 1000 && unit < UNITS.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? count : count.toPrecision(3)} ${UNITS[unit]}`;
}

export function number(value) {
  return Math.round(value).toLocaleString("en");
}

/** Few characters: 950, 12.4 k, 3.1 M. */
export function short(value) {
  if (value < 1000) return value < 10 && value % 1 ? value.toFixed(1) : String(Math.round(value));
  if (value < 1e6) return `${(value / 1e3).toPrecision(3)} k`;
  return `${(value / 1e6).toPrecision(3)} M`;
}

export function seconds(value) {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  return value < 100 ? `${value.toPrecision(2)} s` : `${Math.round(value)} s`;
}

export function plural(count, noun) {
  return `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/** A share of a whole as a percentage that never says 0 or 100 for what is only near it. */
export function percent(part, whole) {
  if (!whole) return "0 %";
  const share = (100 * part) / whole;
  if (share > 0 && share < 1) return "< 1 %";
  if (share > 99 && share < 100) return "> 99 %";
  return `${Math.round(share)} %`;
}
