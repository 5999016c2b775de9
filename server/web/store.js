// State that components watch: an object, who listens, and a hook.
import { useEffect, useState } from "/web/preact.js";

export class Store {
  #listeners = new Set();
  #isScheduled = false;

  constructor(state) {
    this.state = state;
  }

  /** Merge a change in, and tell the listeners at once. */
  set(change) {
    this.state = { ...this.state, ...change };
    this.#tell();
  }

  /** Something inside the state was changed in place: tell the listeners once per frame. */
  touch() {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    requestAnimationFrame(() => {
      this.#isScheduled = false;
      this.state = { ...this.state };
      this.#tell();
    });
  }

  subscribe(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  #tell() {
    for (const listener of this.#listeners) listener(this.state);
  }
}

/** The state of a store; the component is drawn again when it changes. */
export function useStore(store) {
  const [state, setState] = useState(store.state);
  useEffect(() => {
    setState(store.state);
    return store.subscribe(setState);
  }, [store]);
  return state;
}

/** Whether a media query holds, now and later. */
export function useMedia(query) {
  const [matches, setMatches] = useState(() => matchMedia(query).matches);
  useEffect(() => {
    const media = matchMedia(query);
    const listen = () => setMatches(media.matches);
    listen();
    media.addEventListener("change", listen);
    return () => media.removeEventListener("change", listen);
  }, [query]);
  return matches;
}
