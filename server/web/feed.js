// The engine as it is now: follows the server's feed while the page is seen, and keeps two minutes.
import { ServerError, call, events, health } from "/web/api.js";
import { Store } from "/web/store.js";

const FIRST_WAIT_MS = 500;
const MAX_WAIT_MS = 10_000;
const POLL_MS = 5000;
const LOADING_MS = 700;
export const SPAN_S = 120;

/**
 * State: `status` is connecting, live, polling, lost, locked (a key is needed), loading or dead;
 * `picture` is the last one (see server/live.py), `rates` what changed per second since the one
 * before, `series` one entry per second, `progress` how far a model is that is being loaded,
 * `refusals` how often a key was missing or wrong.
 */
class Feed extends Store {
  #abort = null;
  #wake = null;

  constructor() {
    super({
      status: "connecting",
      picture: null,
      rates: {},
      series: [],
      progress: null,
      refusals: 0,
    });
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.#abort?.abort();
      else this.retry();
    });
    this.#run();
  }

  /** Ask again now, if it is waiting to. */
  retry() {
    this.#wake?.();
  }

  async #run() {
    let waitMs = FIRST_WAIT_MS;
    for (;;) {
      if (document.hidden) await this.#sleep(2 ** 31 - 1);
      this.#abort = new AbortController();
      try {
        await this.#follow(this.#abort.signal, () => (waitMs = FIRST_WAIT_MS));
        this.set({ status: "lost" }); // the server ended it: it stops
      } catch (error) {
        if (error.code === "too_many_watchers") {
          await this.#poll();
          continue;
        }
        if (error.name !== "AbortError") await this.#fail(error);
      }
      const { status } = this.state;
      if (status === "loading") waitMs = LOADING_MS;
      await this.#sleep(status === "locked" ? 2 ** 31 - 1 : waitMs);
      waitMs = Math.min(2 * waitMs, MAX_WAIT_MS);
    }
  }

  async #follow(signal, connected) {
    const response = await call("/v1/kv/stream", { signal });
    for await (const picture of events(response)) {
      connected();
      this.#take(picture, "live");
    }
  }

  async #fail(error) {
    const status = statusOf(error);
    const told = status === "loading" ? await health() : null;
    const refusals = this.state.refusals + (status === "locked" ? 1 : 0);
    this.set({
      status: told?.status === "draining" ? "lost" : status,
      progress: told?.progress,
      refusals,
    });
  }

  /** So many watch that there is no room for another: look now and then. */
  async #poll() {
    try {
      const response = await call("/v1/kv/stat");
      this.#take(await response.json(), "polling");
    } catch (error) {
      await this.#fail(error);
    }
    await this.#sleep(POLL_MS);
  }

  #take(picture, status) {
    const before = this.state.picture;
    const isSame = before && counterOf(picture) >= counterOf(before);
    const rates = isSame ? ratesOf(before, picture) : {};
    const series = isSame ? extend(this.state.series, picture, rates) : [];
    this.set({ status, picture, rates, series, progress: null });
  }

  #sleep(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}

function statusOf(error) {
  if (!(error instanceof ServerError)) return "lost";
  if (error.status === 401) return "locked";
  if (error.status === 503) return error.code === "engine_dead" ? "dead" : "loading";
  return error.code === "engine_dead" ? "dead" : "lost";
}

/** Grows while one server lives, and begins anew with the next one. */
function counterOf(picture) {
  return (picture.steps ?? 0) + (picture.tokens?.prefill ?? 0);
}

function ratesOf(before, now) {
  const spanS = Math.max(now.at_s - before.at_s, 1e-3);
  const rate = (read) => Math.max(0, ((read(now) ?? 0) - (read(before) ?? 0)) / spanS);
  const rates = {
    spanS,
    decode: rate((p) => p.tokens?.decode),
    prefill: rate((p) => p.tokens?.prefill),
    saved: rate((p) => p.moved_bytes?.device_to_host),
    loaded: rate((p) => p.moved_bytes?.host_to_device),
    stores: {},
  };
  for (const tier of now.tiers ?? []) {
    if (!tier.store) continue;
    const of = (name) => (p) => p.tiers?.find((one) => one.name === tier.name)?.store?.[name];
    rates.stores[tier.name] = {
      read: rate(of("bytes_read")),
      written: rate(of("bytes_written")),
    };
  }
  return rates;
}

/** Entries per second of the clock: rates are averaged within one, and spread over a gap. */
function extend(series, picture, rates) {
  const second = Math.floor(picture.at_s);
  const { running, waiting } = picture.requests;
  const kept = series.filter((entry) => entry.second > second - SPAN_S);
  const last = kept.at(-1);
  const { decode, prefill, spanS } = rates;
  if (last?.second === second) {
    const total = last.spanS + spanS;
    const mix = (old, value) => (old * last.spanS + value * spanS) / total;
    const entry = {
      second,
      spanS: total,
      decode: mix(last.decode, decode),
      prefill: mix(last.prefill, prefill),
      running: Math.max(last.running, running),
      waiting: Math.max(last.waiting, waiting),
    };
    return [...kept.slice(0, -1), entry];
  }
  const first = last ? Math.max(last.second + 1, second - Math.ceil(spanS)) : second;
  for (let at = first; at <= second; at++) {
    kept.push({ second: at, spanS: Math.min(spanS, 1), decode, prefill, running, waiting });
  }
  return kept;
}

export const feed = new Feed();
