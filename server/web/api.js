// What the page asks of the server. Every failure is a ServerError that says what a person can do.

const SESSION = "jaxserve.key";

export class ServerError extends Error {
  constructor(message, { status = 0, code = null, retryAfterS = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

export const key = {
  read() {
    try {
      return sessionStorage.getItem(SESSION) || localStorage.getItem(SESSION) || "";
    } catch {
      return "";
    }
  },
  /** Keep a key until the tab is closed, or on this device. */
  set(value, isKept) {
    sessionStorage.removeItem(SESSION);
    localStorage.removeItem(SESSION);
    if (value) (isKept ? localStorage : sessionStorage).setItem(SESSION, value);
  },
};

/** A response that is fine, or a ServerError. */
export async function call(path, { body, signal } = {}) {
  const headers = {};
  if (key.read()) headers.Authorization = `Bearer ${key.read()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

/** What the server is doing, {status, progress?}, whether or not it can serve; null: no answer. */
export async function health() {
  try {
    return await (await fetch("/health", { cache: "no-store" })).json();
  } catch {
    return null;
  }
}

async function failure(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // not ours: a proxy in between
  }
  const retryAfterS = Number(response.headers.get("Retry-After")) || null;
  return new ServerError(words(response.status, error), {
    status: response.status,
    code: error.code ?? null,
    retryAfterS,
  });
}

function words(status, error) {
  if (status === 401) return "This server wants an API key.";
  if (status === 429) return `The server has all the requests it can take. ${error.message ?? ""}`;
  if (status === 502 || status === 504) return "The proxy in front of the server got no answer.";
  if (error.message) return error.message;
  return status === 503 ? "The server is not ready yet." : `The server answered ${status}.`;
}

/**
 * The data of each server-sent event as JSON, until [DONE] or the end.
 * A stream that breaks off is a ServerError; one that was aborted an AbortError.
 */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue;
        const data = part.slice("data: ".length);
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(event.error.message, event.error);
        yield event;
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError("The connection broke off in the middle.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
