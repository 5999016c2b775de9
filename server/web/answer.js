// One answer on its way: asks for it, writes it into its message as it comes, measures it.
import { ServerError, call, events } from "/web/api.js";
import { chats } from "/web/chats.js";
import { settings } from "/web/settings.js";

const OPEN = "<think>";
const CLOSE = "</think>";
/** An answer that came in one piece tells nothing about speed. */
const MIN_MEASURED_S = 0.02;

/** At most one answer is on its way on a page. */
let current = null;

export function isAnswering() {
  return current !== null;
}

/** Stop the answer that is on its way; what came so far stays. */
export function stop() {
  current?.abort();
}

/**
 * Add a message of the user, if there is one, and answer the conversation.
 * Returns when the answer has ended in whatever way; its message says how.
 */
export async function ask(chat, text) {
  if (current) return;
  if (text !== undefined) chat.messages.push({ role: "user", content: text });
  const message = { role: "assistant", content: "", reasoning: "", status: "streaming" };
  const messages = toSend(chat.messages);
  chat.messages.push(message);
  const abort = (current = new AbortController());
  chats.changed(chat);
  chats.saveNow();
  try {
    await receive(message, messages, abort.signal, () => chats.changed(chat));
    message.status = "done";
  } catch (error) {
    if (error.name === "AbortError") message.status = "stopped";
    else {
      message.status = "failed";
      message.error = describe(error);
    }
  } finally {
    current = null;
    chats.changed(chat);
  }
  return message;
}

function toSend(messages) {
  const { system } = settings.state;
  const sent = messages
    .filter((message) => message.content && message.status !== "failed")
    .map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...sent] : sent;
}

async function receive(message, messages, signal, changed) {
  const startMs = performance.now();
  let firstMs = null;
  let lastMs = null;
  const response = await call("/v1/chat/completions", {
    body: {
      messages,
      stream: true,
      stream_options: { include_usage: true },
      ...settings.sampling(),
    },
    signal,
  });
  let raw = "";
  for await (const event of events(response)) {
    if (event.usage) measure(message, event.usage, { startMs, firstMs, lastMs });
    const choice = event.choices?.[0];
    if (!choice) continue;
    if (choice.finish_reason) message.finish = choice.finish_reason;
    const thought = choice.delta?.reasoning ?? choice.delta?.reasoning_content ?? "";
    const text = choice.delta?.content ?? "";
    if (!thought && !text) continue;
    firstMs ??= performance.now();
    lastMs = performance.now();
    message.ttftS ??= (firstMs - startMs) / 1000;
    message.reasoning += thought;
    raw += text;
    Object.assign(message, message.reasoning && !raw.includes(OPEN) ? { content: raw } : fold(raw));
    changed();
  }
  changed();
}

/** A server that leaves thoughts in the text: what stands between the tags is no answer. */
function fold(raw) {
  const start = raw.trimStart();
  if (!start.startsWith(OPEN)) return { content: raw };
  const [thought, ...rest] = start.slice(OPEN.length).split(CLOSE);
  return { reasoning: thought.trim(), content: rest.join(CLOSE).trimStart() };
}

function measure(message, usage, { startMs, firstMs, lastMs }) {
  const details = usage.prompt_tokens_details ?? {};
  message.usage = {
    prompt: usage.prompt_tokens,
    completion: usage.completion_tokens,
    cached: details.cached_tokens ?? 0,
    sources: details.cached_tokens_by_source ?? {},
    decisions: details.load_decisions ?? [],
  };
  if (firstMs === null) return;
  message.ttftS = (firstMs - startMs) / 1000;
  const restS = (lastMs - firstMs) / 1000;
  if (usage.completion_tokens > 1 && restS >= MIN_MEASURED_S) {
    message.tokensPerS = (usage.completion_tokens - 1) / restS;
  }
}

function describe(error) {
  if (!(error instanceof ServerError)) {
    console.error(error);
    return { text: `This page failed: ${error.message}`, status: -1 };
  }
  const { status, code, retryAfterS } = error;
  return { text: error.message, status, code, retryAfterS };
}
