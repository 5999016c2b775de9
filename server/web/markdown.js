// Model output as page content. It is hostile until proven otherwise: HTML in it is shown as text,
// images are not loaded, only http, https and mailto links work, and what is left goes through
// DOMPurify, which alone may make markup here (the page's Content-Security-Policy says so).
import { html, useMemo, useState } from "/web/preact.js";
import { Marked } from "/web/vendor/marked.js";
import { copy } from "/web/clipboard.js";
import { Icon } from "/web/icons.js";

const TAGS =
  "p br hr h3 h4 h5 h6 ul ol li blockquote pre code em strong del a table thead tbody tr th td";
const CONFIG = {
  ALLOWED_TAGS: TAGS.split(" "),
  ALLOWED_ATTR: ["href", "start", "align", "target", "rel"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_TRUSTED_TYPE: true,
};
const MAX_CHARS = 200_000;

const escape = (text) =>
  text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ text, href }) => escape(`[image: ${text || href}]`),
    heading({ tokens, depth }) {
      const level = Math.min(depth + 2, 6); // the page itself has the first two
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

let isHooked = false;

function clean(dirty) {
  const purify = window.DOMPurify;
  if (!isHooked) {
    isHooked = true;
    purify.addHook("afterSanitizeAttributes", (node) => {
      if (node.tagName !== "A") return;
      node.setAttribute("target", "_blank");
      node.setAttribute("rel", "noopener noreferrer nofollow");
    });
  }
  return purify.sanitize(dirty, CONFIG);
}

/** An answer. Blocks that are complete are not drawn again while the rest still comes. */
export function Markdown({ text }) {
  const tokens = useMemo(() => lex(text), [text]);
  return html`<div class="markdown">
    ${tokens.map((token, index) =>
      token.type === "code"
        ? html`<${Code} key=${index} text=${token.text} language=${token.lang} />`
        : html`<${Block} key=${index} token=${token} />`,
    )}
  </div>`;
}

function lex(text) {
  if (text.length > MAX_CHARS) return [{ type: "code", text, lang: "", raw: text }];
  return marked.lexer(text).filter((token) => token.type !== "space" && token.type !== "def");
}

function Block({ token }) {
  const content = useMemo(() => clean(marked.parser([token])), [token.raw]);
  return html`<div class="block" dangerouslySetInnerHTML=${{ __html: content }}></div>`;
}

function Code({ text, language }) {
  const [isCopied, setCopied] = useState(false);
  const take = async () => {
    setCopied(await copy(text));
    setTimeout(() => setCopied(false), 1600);
  };
  const name = (language ?? "").match(/^[\w+#.-]{1,20}/)?.[0] ?? "";
  return html`<figure class="code">
    <figcaption>
      <span>${name || "text"}</span>
      <button type="button" class="quiet" onClick=${take}>
        <${Icon} name=${isCopied ? "check" : "copy"} />${isCopied ? "Copied" : "Copy"}
      </button>
    </figcaption>
    <pre tabindex="0" aria-label=${`Code, ${name || "text"}`}><code>${text}</code></pre>
  </figure>`;
}
