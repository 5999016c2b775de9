// How answers are sampled, and the system prompt; kept in this browser. Empty: the server decides.
import { Store } from "/web/store.js";

const NAME = "jaxserve.settings";

/** Every number that can be set: its field in the API, its bounds, and what it does. */
export const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05,
    help: "0 always takes the likeliest token; higher is more varied." },
  { name: "top_p", label: "Top-p", min: 0.01, max: 1, step: 0.01,
    help: "Keep the likeliest tokens that together reach this probability." },
  { name: "top_k", label: "Top-k", min: 0, max: 1000, step: 1,
    help: "Keep this many of the likeliest tokens; 0 keeps all." },
  { name: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01,
    help: "Drop tokens less likely than this share of the likeliest." },
  { name: "max_tokens", label: "Longest answer", min: 1, max: 1000000, step: 1,
    help: "In tokens." },
  { name: "seed", label: "Seed", min: 0, max: 4294967295, step: 1,
    help: "The same seed gives the same answer again." },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.01,
    help: "Above 1 makes tokens that have been seen less likely." },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1,
    help: "Subtracted once for tokens of the answer so far." },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1,
    help: "Subtracted for each time a token was used." },
];

class Settings extends Store {
  constructor() {
    let kept = {};
    try {
      kept = JSON.parse(localStorage.getItem(NAME)) ?? {};
    } catch {
      // none, or storage is off
    }
    super({ system: "", values: {}, ...kept });
  }

  change(change) {
    this.set(change);
    try {
      localStorage.setItem(NAME, JSON.stringify(this.state));
    } catch {
      // they hold for this page only
    }
  }

  /** What is set, as fields of a request. */
  sampling() {
    return { ...this.state.values };
  }

  /** What is set, in a few words. */
  summary() {
    const { system, values } = this.state;
    const told = FIELDS.filter(({ name }) => name in values).map(
      ({ name, label }) => `${label.toLowerCase()} ${values[name]}`,
    );
    if (system) told.unshift("system prompt");
    return told.join(", ") || "model defaults";
  }
}

export const settings = new Settings();
