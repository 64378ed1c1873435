// A safe subset of Markdown, built node by node. Text of the model only ever becomes text nodes: there is no innerHTML
// anywhere, HTML in an answer is shown as written, and links lead to http, https or mailto alone.

export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node && name !== "role") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const TABLE_RULE = /^ {0,3}\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MAX_DEPTH = 8;

/**
 * Show `text` in `container`. Called again with more text, it keeps the blocks that have not changed, so that
 * selections survive while an answer streams and long answers stay fast.
 */
export function render(container, text, codeBlock) {
  const blocks = split(text.replace(/\r\n?/g, "\n").split("\n"));
  const shown = container.rendered ?? [];
  let same = 0;
  while (same < shown.length && same < blocks.length && shown[same] === blocks[same].source) same += 1;
  while (container.childNodes.length > same) container.lastChild.remove();
  for (const block of blocks.slice(same)) container.append(build(block, codeBlock, 0));
  container.rendered = blocks.map((block) => block.source);
}

/** Lines → blocks {kind, lines, source, …}. */
function split(lines) {
  const blocks = [];
  let index = 0;
  while (index < lines.length) {
    if (!lines[index].trim()) {
      index += 1;
      continue;
    }
    const block = next(lines, index);
    block.source = `${block.kind}\n${lines.slice(index, block.end).join("\n")}`;
    blocks.push(block);
    index = block.end;
  }
  return blocks;
}

function next(lines, start) {
  const line = lines[start];
  const fence = FENCE.exec(line);
  if (fence) return fenced(lines, start, fence);
  const heading = HEADING.exec(line);
  if (heading) return { kind: "heading", level: heading[1].length, text: heading[2], end: start + 1 };
  if (RULE.test(line)) return { kind: "rule", end: start + 1 };
  if (QUOTE.test(line)) {
    const end = runOf(lines, start, (other) => QUOTE.test(other));
    return { kind: "quote", lines: lines.slice(start, end).map((other) => other.replace(QUOTE, "")), end };
  }
  if (ITEM.test(line)) return list(lines, start);
  if (line.includes("|") && start + 1 < lines.length && lines[start + 1].includes("-") && TABLE_RULE.test(lines[start + 1])) {
    const end = runOf(lines, start + 2, (other) => other.includes("|"));
    return { kind: "table", head: line, align: lines[start + 1], rows: lines.slice(start + 2, end), end };
  }
  const end = runOf(lines, start + 1, (other) => other.trim() && !interrupts(other) && !ITEM.test(other));
  return { kind: "paragraph", text: lines.slice(start, end).join("\n"), end };
}

const interrupts = (line) => [FENCE, HEADING, QUOTE, RULE].some((pattern) => pattern.test(line));

function runOf(lines, start, matches) {
  let end = start;
  while (end < lines.length && matches(lines[end])) end += 1;
  return end;
}

function fenced(lines, start, [, mark, language]) {
  const closes = (line) => line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], "");
  let end = start + 1;
  while (end < lines.length && !closes(lines[end])) end += 1;
  return { kind: "code", language, text: lines.slice(start + 1, end).join("\n"), end: Math.min(end + 1, lines.length) };
}

/** A list, each item with the lines that belong to it, without their indent. */
function list(lines, start) {
  const [, indent, marker] = ITEM.exec(lines[start]);
  const ordered = /\d/.test(marker);
  const items = [];
  let index = start;
  while (index < lines.length) {
    const item = ITEM.exec(lines[index]);
    if (item && item[1].length <= indent.length + 1 && /\d/.test(item[2]) === ordered) {
      items.push([lines[index].slice(item[0].length)]);
    } else if (!lines[index].trim()) {
      const after = runOf(lines, index, (line) => !line.trim());
      if (after >= lines.length || !continues(lines[after], indent, ordered)) break;
      items.at(-1).push("");
    } else if (lines[index].search(/\S/) > indent.length || (!item && lines[index - 1].trim() && !interrupts(lines[index]))) {
      items.at(-1).push(lines[index].replace(new RegExp(`^\\s{0,${indent.length + marker.length + 1}}`), ""));
    } else {
      break;
    }
    index += 1;
  }
  return { kind: "list", ordered, first: ordered ? Number.parseInt(marker, 10) : 1, items, end: index };
}

function continues(line, indent, ordered) {
  const item = ITEM.exec(line);
  if (item && item[1].length <= indent.length + 1) return /\d/.test(item[2]) === ordered;
  return line.search(/\S/) > indent.length;
}

function build(block, codeBlock, depth) {
  switch (block.kind) {
    case "heading":
      // The page has h1 and h2 of its own, so the answer's headings begin below.
      return element(`h${Math.min(block.level + 2, 6)}`, {}, ...inline(block.text));
    case "rule":
      return element("hr");
    case "code":
      return codeBlock(block.text, block.language);
    case "quote":
      return element("blockquote", {}, ...nested(block.lines, codeBlock, depth));
    case "list": {
      const items = block.items.map((lines) => listItem(lines, codeBlock, depth));
      return block.ordered ? element("ol", { start: block.first }, ...items) : element("ul", {}, ...items);
    }
    case "table":
      return table(block);
    default:
      return element("p", {}, ...inline(block.text));
  }
}

function nested(lines, codeBlock, depth) {
  if (depth >= MAX_DEPTH) return inline(lines.join("\n"));
  return split(lines).map((block) => build(block, codeBlock, depth + 1));
}

function listItem(lines, codeBlock, depth) {
  const [first, ...others] = nested(lines, codeBlock, depth);
  // A plain item needs no paragraph around its text.
  const tight = first?.tagName === "P" ? [...first.childNodes] : first ? [first] : [];
  return element("li", {}, ...tight, ...others);
}

function table({ head, align, rows }) {
  const sides = cells(align).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "end") : "start"));
  const row = (line, tag) =>
    element("tr", {}, ...sides.map((side, column) => element(tag, { className: `align-${side}` }, ...inline(cells(line)[column] ?? ""))));
  const whole = element("table", {}, element("thead", {}, row(head, "th")), element("tbody", {}, ...rows.map((line) => row(line, "td"))));
  return element("div", { className: "table", tabIndex: 0, role: "region", "aria-label": "Table" }, whole);
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

// One alternative a construct. Emphasis must hug its text, so that 2 * 3 * 4 and snake_case_names stay as they are.
const INLINE = /(`+)(.+?)\1(?!`)|\\([\\`*_{}[\]()#+\-.!~|>])|!?\[([^\]\n]*)\]\(([^()\s]+)[^()\n]*\)|(\*\*|__)(?=\S)(.+?\S|\S)\6|(?<![\w*])\*(?=\S)([^*\n]*?[^\s*])\*(?!\*)|(?<!\w)_(?=\S)([^_\n]*?[^\s_])_(?!\w)|~~(?=\S)(.+?)~~|(https?:\/\/[^\s<>"'`]*[^\s<>"'`.,:;!?)\]*_])|(\n)/s;

function inline(text, depth = 0) {
  const nodes = [];
  let rest = text;
  for (let match = INLINE.exec(rest); match && depth < MAX_DEPTH; match = INLINE.exec(rest)) {
    if (match.index) nodes.push(rest.slice(0, match.index));
    nodes.push(span(match, depth + 1));
    rest = rest.slice(match.index + match[0].length);
  }
  if (rest) nodes.push(rest);
  return nodes;
}

function span(match, depth) {
  const [whole, , code, escaped, label, target, , strong, starred, underlined, struck, url] = match;
  if (code !== undefined) return element("code", {}, code.replace(/^ (.+) $/s, "$1"));
  if (escaped !== undefined) return escaped;
  if (target !== undefined) return link(target, inline(label || target, depth), whole);
  if (strong !== undefined) return element("strong", {}, ...inline(strong, depth));
  if (starred !== undefined) return element("em", {}, ...inline(starred, depth));
  if (underlined !== undefined) return element("em", {}, ...inline(underlined, depth));
  if (struck !== undefined) return element("s", {}, ...inline(struck, depth));
  if (url !== undefined) return link(url, [url], whole);
  return element("br");
}

function link(target, children, whole) {
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return whole;
  return element("a", { href: target, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}
