"use strict";
// Whatever a person or a server wrote goes in by textContent and never as HTML.

const EXAMPLES = [
  ["A right and a wrong answer", "Ana has 3 boxes with 4 pens each and buys 2. How many pens now?",
    "First 3 x 4 = 12 pens.\nThen 12 + 2 = 14 pens.\nAnswer: 14",
    "First 3 x 4 = 12 pens.\nThen 12 + 2 = 15 pens.\nAnswer: 15"],
  ["The same answer, short and long", "Ben has 5 bags with 2 apples each. How many apples?",
    "5 x 2 = 10 apples.\nAnswer: 10",
    "Good question!\nBen has 5 bags of apples.\nTo start we work out that 5 x 2 = 10 apples.\n" +
    "So now there are 10 apples. Answer: 10\nHave a nice day!"],
  ["Finished, and cut off", "Mona has 2 shelves with 4 cups each and finds 3. How many cups now?",
    "First 2 x 4 = 8 cups.\nThen 8 + 3 = 11 cups.\nAnswer: 11", "First 2 x 4 = 8 cups.\nThen 8 + 3",
    true],
  ["Empty: paste your own", "", "", ""],
];
const $ = (id) => document.getElementById(id);
const SIDES = ["a", "b"];
const SVG = "http://www.w3.org/2000/svg";
let token = "", model = null, reference = null, referenceVersion = null, shown = null, asked = 0;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children); // strings become text
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const number = (value, digits = 3) =>
  value === null || value === undefined ? "none" : value.toFixed(digits).replace("-", "−");
const percent = (p) =>
  p > 0 && p < 0.001 ? "below 0.1 %" : p < 1 && p > 0.999 ? "above 99.9 %" : `${(100 * p).toFixed(1)} %`;

class Refusal extends Error {
  constructor(what, cure, status) { super(what); this.cure = cure; this.status = status; }
}

async function ask(path, body) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let answer, told = null;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, cache: "no-store",
      credentials: "omit", body: body && JSON.stringify(body) });
  } catch {
    throw new Refusal("The server does not answer.", "See whether it still runs, then try again.");
  }
  try { told = await answer.json(); } catch { /* told below */ }
  if (answer.ok && told) return told;
  const error = (told && told.error) || {};
  throw new Refusal(error.message || `The server answered ${answer.status} without a word.`,
    error.cure || "Its log may say why.", answer.status);
}

function complain(error) {
  const box = $("error");
  box.replaceChildren();
  if (!error) return;
  $(error.status === 401 ? "unlock" : "ask").after(box);
  if (error.status === 401) {
    $("unlock").hidden = false;
    if (!token) { $("token").focus(); return; }
  }
  box.append(element("div", { class: "error" }, element("strong", {}, error.message),
    element("div", {}, error.cure ? `What helps: ${error.cure}` : "")));
  box.scrollIntoView({ block: "nearest" });
}

async function load() {
  const found = (await ask("v1/models")).data[0], about = await ask("v1/reference");
  [model, reference, referenceVersion] = [found, about.reference, about.reference_version];
  $("unlock").hidden = true;
  $("name").textContent = found.id;
  document.title = `${found.id}: companion serve`;
  const kind = { scalar: "one score a text", outcome: "a value for each token",
    process: "a value for each step" }[found.kind];
  $("facts").textContent = `Version ${found.model_version}, ${found.kind}${kind ? ` (${kind})` : ""}` +
    (found.max_length ? `, up to ${found.max_length} tokens a text` : "") +
    (found.exact ? ", exact" : "");
  $("notes").replaceChildren(...found.notes.map((note) => element("li", {}, note)));
}

async function start() {
  try { await load(); complain(); } catch (error) {
    $("facts").textContent = error.status === 401 ? "The model is shown once you give the token." :
      "The model is not known.";
    complain(error);
  }
}

// Drawing

function density(points) {
  // a smooth curve over the 101 quantiles: normal kernels, Silverman's width
  const n = points.length, mean = points.reduce((sum, x) => sum + x, 0) / n;
  const std = Math.sqrt(points.reduce((sum, x) => sum + (x - mean) ** 2, 0) / n);
  const middle = (points[Math.round(0.75 * (n - 1))] - points[Math.round(0.25 * (n - 1))]) / 1.34;
  const span = points[n - 1] - points[0] || 1;
  const width = Math.max(0.9 * Math.min(std, middle || std) * n ** -0.2, 0.01 * span);
  return (x) => points.reduce((sum, q) => sum + Math.exp(-(((x - q) / width) ** 2) / 2), 0);
}

function ticks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= rough) * power;
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push([i * step, step]);
  return found;
}

function draw() {
  const box = $("drawn");
  box.replaceChildren();
  if (!shown || !reference) return;
  const q = reference.quantiles, at = (p) => q[Math.round((p / 100) * (q.length - 1))];
  const span = at(100) - at(0) || 1, scores = SIDES.map((side) => shown[side].raw);
  const known = scores.filter((x) => x !== null);
  const low = Math.max(Math.min(at(0), ...known), at(0) - span) - 0.16 * span;
  const high = Math.min(Math.max(at(100), ...known), at(100) + span) + 0.16 * span;
  const width = Math.max(240, $("result").clientWidth - 26), base = 170;
  const x = (value) => 4 + ((value - low) / (high - low)) * (width - 8);
  const words = SIDES.map((side, i) => `${side.toUpperCase()}: score ${number(scores[i])}` +
    (shown[side].percentile === null ? "" : `, percentile ${number(shown[side].percentile, 1)}`));
  const svg = shape("svg", { viewBox: `0 0 ${width} 234`, role: "img",
    "aria-label": `Both scores on the distribution of the reference scores. ${words.join(". ")}.` });
  const curve = density(q), spots = Array.from({ length: 161 }, (_, i) => low + (i * (high - low)) / 160);
  const heights = spots.map(curve), top = Math.max(...heights);
  const path = spots.map((s, i) => `${x(s).toFixed(1)},${(base - (heights[i] / top) * 110).toFixed(1)}`);
  svg.append(shape("path", { class: "density", d: `M${x(low)},${base}L${path.join("L")}L${x(high)},${base}Z` }));
  for (const [from, to, name] of [[5, 95, "outer"], [25, 75, "inner"]]) {
    svg.append(shape("rect", { class: name, x: x(at(from)), y: 205, height: 9,
      width: Math.max(1, x(at(to)) - x(at(from))) }));
  }
  svg.append(shape("rect", { class: "middle", x: x(at(50)) - 1.5, y: 202, width: 3, height: 15 }));
  let free = -1;
  for (const p of [50, 5, 95]) { // the median's word first, the others where there is room
    const place = Math.min(Math.max(x(at(p)), 10), width - 12);
    if (p === 50) free = place; else if (Math.abs(place - free) < 34) continue;
    svg.append(shape("text", { x: place, y: 230, "text-anchor": "middle" }, `${p} %`));
  }
  svg.append(shape("line", { class: "axis", x1: 0, x2: width, y1: base, y2: base }));
  for (const [value, step] of ticks(low, high, Math.max(3, width / 90))) {
    const place = x(value), digits = Math.max(0, -Math.floor(Math.log10(step)));
    svg.append(shape("line", { class: "axis", x1: place, x2: place, y1: base, y2: base + 5 }));
    if (place > 14 && place < width - 14) svg.append(
      shape("text", { x: place, y: base + 20, "text-anchor": "middle" }, number(value, digits)));
  }
  SIDES.forEach((side, i) => {
    if (scores[i] === null) return;
    const inside = Math.min(Math.max(scores[i], low), high), place = x(inside), y = 18 + 20 * i;
    const arrow = scores[i] > high ? " →" : scores[i] < low ? " ←" : "";
    const mark = shape("g", { "data-side": side, "data-score": scores[i], "data-x": place });
    mark.append(shape("line", { class: `${side} mark`, x1: place, x2: place, y1: y - 4, y2: base }));
    mark.append(side === "a" ? shape("circle", { class: side, cx: place, cy: base, r: 6 }) :
      shape("rect", { class: side, x: place - 5, y: base - 5, width: 10, height: 10 }));
    const share = shown[side].percentile, text = `${side.toUpperCase()} ${number(scores[i])}` +
      (share === null ? "" : `, percentile ${number(share, 0)}`) + arrow;
    const room = 8 * text.length, right = place + room < width; // to the right, where it fits there
    mark.append(shape("text", { class: side, y, "text-anchor": right ? "start" : "end",
      x: right ? place + 7 : Math.min(Math.max(place - 7, room), width) }, text));
    svg.append(mark);
  });
  box.append(svg, element("figcaption", {}, `The grey hill: how the scores of ${reference.n} reference ` +
    `texts (${reference.source}) are spread, smoothed from their percentiles; mean ${number(reference.mean)}, ` +
    `σ ${number(reference.std)}. The bar below holds 5 to 95 % of them, its dark part 25 to 75 %.`));
}

function cell(value, digits) {
  if (value === null || value === undefined) return "none";
  return element("data", { value }, number(value, digits));
}

function tabulate(answer) {
  const found = answer.comparisons[0], rows = [["raw score", (s) => cell(s.raw, 4)]];
  if (reference) rows.push(["percentile", (s) => cell(s.percentile, 1)], ["z", (s) => cell(s.z, 3)]);
  rows.push(["tokens", (s) => String(s.n_tokens)]);
  if (SIDES.some((side) => found[side].cut_tokens)) rows.push(["tokens cut", (s) => String(s.cut_tokens)]);
  if (SIDES.some((side) => found[side].warnings.length || found[side].reason)) {
    rows.push(["warnings", (s) => [...(s.reason ? [`no score: ${s.reason}`] : []), ...s.warnings].join("; ") || "none"]);
  }
  const head = element("thead", {}, element("tr", {}, element("td"),
    ...SIDES.map((side) => element("th", { scope: "col" }, side.toUpperCase()))));
  $("table").replaceChildren(head, element("tbody", {}, ...rows.map(([name, of]) => element("tr", {},
    element("th", { scope: "row" }, name),
    ...SIDES.map((side) => element("td", { "data-cell": `${name} ${side}` }, of(found[side])))))));
}

function summarise(found) {
  const { margin, probability, why } = found, parts = [];
  if (probability !== null) parts.push(`P(A beats B) = ${percent(probability)}.`);
  if (margin !== null) parts.push(`A is ${number(Math.abs(margin))} ${margin < 0 ? "below" : "above"} B.`);
  if (probability === null) parts.push(`No probability that A beats B: ${why}.`);
  if (!reference) parts.push("No percentile: the model has no reference set." +
    (model.kind === "scalar" ? " So only the difference of two scores says something." : ""));
  $("summary").textContent = parts.join(" ");
}

function coloured(name, value, ...children) {
  const made = element(name, { class: "value", title: number(value) }, ...children);
  made.style.setProperty("--v", value);
  return made;
}

function stepsOf(side, text, found) {
  const box = element("div", { "data-steps": side }, element("h3", {},
    `${side.toUpperCase()}: ${model.kind === "outcome" ? "its tokens" : "its steps"}`));
  if (!found.values) { box.append(element("p", {}, `No values: ${found.reason}`)); return box; }
  const lines = text.split("\n").filter((line) => line.trim());
  const names = found.tokens && model.kind === "outcome" ? found.tokens :
    found.values.map((_, i) => (lines.length === found.values.length ? lines[i] : `step ${i + 1}`));
  const table = element("table", {}, element("thead", {}, element("tr", {},
    ...[model.kind === "outcome" ? "token" : "step", "value", ""].map((word) =>
      element(word ? "th" : "td", word ? { scope: "col" } : {}, word)))),
  element("tbody", {}, ...found.values.map((value, i) => element("tr", {},
    element("td", { class: "step" }, names[i]), element("td", {}, coloured("span", value, cell(value))),
    element("td", {}, i === found.first_error ? "first error" : "")))));
  const scroll = element("div", { class: "scroll", role: "region", tabindex: "0",
    "aria-label": `Values of ${side.toUpperCase()}` }, table);
  if (model.kind !== "outcome") { box.append(scroll); return box; }
  box.append(element("p", { class: "tokens" }, ...names.map((name, i) => coloured("span", found.values[i], name))),
    element("details", {}, element("summary", {}, "As a table"), scroll));
  return box;
}

async function steps(given) {
  const items = SIDES.map((side) => ({ prompt: given.prompt, completion: given[side],
    ...(given[`${side}_terminated`] === false ? { terminated: false } : {}) }));
  const { results } = await ask("v1/steps", { items, tokens: model.kind === "outcome",
    model_version: model.model_version });
  return [element("h2", {}, "Values"), element("p", { class: "soft" },
    "The closer to 1 (blue), the more likely right; the closer to 0 (orange), the more likely wrong."),
  element("div", { class: "sides" }, ...SIDES.map((side, i) => stepsOf(side, given[side], results[i])))];
}

async function compare(event) {
  event.preventDefault();
  const own = ++asked, given = { prompt: $("prompt").value };
  for (const side of SIDES) {
    given[side] = $(side).value;
    if ($(`${side}-cut`).checked) given[`${side}_terminated`] = false;
  }
  $("state").textContent = "Scoring …";
  try {
    if (!model) await load();
    const answer = await ask("v1/compare", { pairs: [given] });
    // another model, or another reference, than was shown
    if (answer.model_version !== model.model_version ||
      answer.reference_version !== referenceVersion) await load();
    const values = model.kind === "scalar" ? [] : await steps(given);
    if (own !== asked) return; // a later one is on its way
    complain();
    shown = answer.comparisons[0];
    $("result").hidden = false;
    $("said").textContent = "Scores";
    $("result").classList.remove("old");
    summarise(shown);
    tabulate(answer);
    draw();
    $("steps").replaceChildren(...values);
    $("state").textContent = `Scored by version ${answer.model_version}, request ${answer.id.slice(0, 8)}.`;
  } catch (error) {
    if (own !== asked) return;
    shown = null;
    $("result").hidden = true; // no old scores under a new text
    $("state").textContent = "";
    complain(error);
  }
}

function example() {
  const [, prompt, a, b, cut] = EXAMPLES[$("example").value];
  Object.entries({ prompt, a, b }).forEach(([id, text]) => { $(id).value = text; });
  $("a-cut").checked = false;
  $("b-cut").checked = Boolean(cut);
  changed();
}

function changed() {
  asked++; // an answer on its way is for another text
  if (shown) { $("result").classList.add("old"); $("said").textContent = "Scores of an earlier text"; }
  $("state").textContent = shown ? "The text has changed since these scores: compare again." : "";
}

EXAMPLES.forEach(([name], i) => $("example").append(element("option", { value: i }, name)));
example();
$("example").addEventListener("change", example);
$("ask").addEventListener("submit", compare);
$("ask").addEventListener("input", (event) => { if (event.target !== $("example")) changed(); });
$("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  start();
});
let drawnWidth = 0;
new ResizeObserver(([box]) => {
  if (Math.abs(box.contentRect.width - drawnWidth) > 1) { drawnWidth = box.contentRect.width; draw(); }
}).observe($("ask"));
start();
