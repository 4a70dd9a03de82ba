"use strict";

// Colours for code. Everything becomes text nodes and spans with a class, never HTML.

const KEYWORDS = new Set(
  ("and as assert async await break case class const continue def del do elif else enum except export extends false finally fn for " +
    "from func function global if impl import in interface is lambda let match mut namespace new nil none not null or package pass " +
    "private pub public raise return self static struct super switch template this throw true try type typedef union use using var " +
    "void where while with yield int float double bool char string auto include define select insert update").split(" "),
);

const TOKEN = new RegExp(
  [
    String.raw`(?<comment>#(?!include|define)[^\n]*|//[^\n]*|/\*[\s\S]*?(?:\*/|$))`,
    String.raw`(?<string>[rbfRBF]{0,2}(?:"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?)|` +
      "`(?:\\\\.|[^`\\\\])*`?)",
    String.raw`(?<decor>@[A-Za-z_][\w.]*)`,
    String.raw`(?<number>\b(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b)`,
    String.raw`(?<word>[A-Za-z_]\w*)`,
  ].join("|"),
  "g",
);

function highlight(code, into) {
  const pieces = [];
  let end = 0;
  for (const match of code.matchAll(TOKEN)) {
    const kind = Object.keys(match.groups).find((name) => match.groups[name] !== undefined);
    const shown = kind === "word" ? wordKind(code, match) : kind;
    if (!shown) continue;
    if (match.index > end) pieces.push(code.slice(end, match.index));
    const span = document.createElement("span");
    span.className = `tok-${shown}`;
    span.textContent = match[0];
    pieces.push(span);
    end = match.index + match[0].length;
  }
  pieces.push(code.slice(end));
  into.replaceChildren(...pieces);
}

function wordKind(code, match) {
  if (KEYWORDS.has(match[0].toLowerCase())) return "keyword";
  return code[match.index + match[0].length] === "(" ? "name" : "";
}

// A text with ``` fences as paragraphs and blocks of code; only the last one changes while text arrives.
class Answer {
  constructor(element, plain) {
    this.element = element;
    this.plain = plain; // the whole text is code
    this.text = "";
    this.shown = 0;
    element.replaceChildren();
  }

  show(text) {
    this.text = text;
    const parts = this.plain ? [{ code: true, text }] : split(text);
    for (let index = Math.max(0, this.shown - 1); index < parts.length; index++) {
      const part = parts[index];
      let node = this.element.children[index];
      if (!node || (node.tagName === "PRE") !== part.code) {
        const made = document.createElement(part.code ? "pre" : "div");
        if (node) node.replaceWith(made);
        else this.element.append(made);
        node = made;
      }
      if (part.code && part.text.length < 50000) highlight(part.text, node);
      else if (part.code) node.textContent = part.text;
      else paragraph(part.text, node);
    }
    while (this.element.children.length > parts.length) this.element.lastChild.remove();
    this.shown = parts.length;
  }
}

// Words between single backticks look like code.
function paragraph(text, into) {
  const pieces = text.split(/`([^`\n]+)`/).map((piece, index) => {
    if (index % 2 === 0) return piece;
    return Object.assign(document.createElement("code"), { textContent: piece });
  });
  into.replaceChildren(...pieces);
}

function split(text) {
  const parts = [];
  let rest = text;
  while (rest) {
    const open = rest.match(/(^|\n)```[^\n`]*(\n|$)/);
    if (!open) {
      parts.push({ code: false, text: rest });
      break;
    }
    if (open.index > 0) parts.push({ code: false, text: rest.slice(0, open.index) });
    rest = rest.slice(open.index + open[0].length);
    const close = rest.match(/(^|\n)```[^\S\n]*(\n|$)/);
    parts.push({ code: true, text: close ? rest.slice(0, close.index) : rest });
    rest = close ? rest.slice(close.index + close[0].length) : "";
  }
  return parts;
}
