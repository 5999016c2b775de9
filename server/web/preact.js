// What the vendored bundle leaves out.
export * from "/web/vendor/htm-preact.js";

/** Children without an element around them. */
export function Fragment({ children }) {
  return children;
}
