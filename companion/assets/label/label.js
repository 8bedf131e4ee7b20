"use strict";
// Whatever a person or a model wrote goes in by textContent and never as HTML.

const $ = (id) => document.getElementById(id);
const KEYS = {
  1: "first", ArrowLeft: "first", 2: "second", ArrowRight: "second",
  0: "tie", t: "tie", s: "skip", u: "undo", r: "again",
};
const SAID = { first: "The first is better.", second: "The second is better.", tie: "A tie." };
// A key that bounces must not judge a pair that nobody has seen yet.
const PAUSE = 250;

let view = null;
let busy = false;

function show(id, on) { $(id).hidden = !on; }

function put(id, turns) {
  const box = $(id);
  box.replaceChildren();
  for (const turn of turns) {
    if (turn.role && (turns.length > 1 || (id === "prompt" && turn.role !== "user"))) {
      const role = document.createElement("p");
      role.className = "role";
      role.textContent = turn.role;
      box.append(role);
    }
    const text = document.createElement("p");
    text.dir = "auto";
    text.textContent = turn.text;
    box.append(text);
  }
}

function fail(error) {
  const box = $("error");
  box.replaceChildren();
  box.className = "error";
  const what = document.createElement("p");
  what.textContent = error.message;
  box.append(what);
  if (error.cure) {
    const cure = document.createElement("p");
    cure.textContent = `What helps: ${error.cure}`;
    box.append(cure);
  }
}

function clear() { $("error").replaceChildren(); $("error").className = ""; }

async function ask(path, body) {
  const settings = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(path, settings);
  } catch {
    throw Object.assign(new Error("The command does not answer, so nothing was recorded."),
      { cure: "start it again; what was judged before is in its file" });
  }
  const said = await answer.json();
  if (!answer.ok) {
    throw Object.assign(new Error(said.error), { cure: said.cure, status: answer.status });
  }
  return said;
}

function name() { return sessionStorage.getItem("annotator"); }

function draw(next) {
  view = next;
  const known = next.annotator !== null;
  show("name", !known);
  show("who", known);
  show("other", known && !next.fixed);
  for (const id of ["progress", "bar-of-keys", "more"]) show(id, known);
  show("pair", known && next.pair !== null);
  show("done", known && next.pair === null);
  if (!known) { $("annotator").focus(); return; }
  $("who").textContent = next.annotator;
  $("bar").max = next.total;
  $("bar").value = next.judged;
  $("count").textContent = `${next.judged} of ${next.total} judged` +
    (next.skipped ? `, ${next.skipped} skipped` : "");
  $("undo").disabled = !next.can_undo;
  for (const button of document.querySelectorAll("[data-choice]")) {
    button.disabled = next.pair === null;
  }
  if (next.pair !== null) {
    put("prompt", next.pair.prompt);
    put("first", next.pair.first);
    put("second", next.pair.second);
    document.body.dataset.pair = next.pair.id;
    delete document.body.dataset.ready;
    setTimeout(() => { document.body.dataset.ready = next.pair.id; }, PAUSE);
    window.scrollTo(0, 0);
    $("asked").focus({ preventScroll: true });
  } else {
    delete document.body.dataset.pair;
    $("left").textContent = next.skipped
      ? `You judged ${next.judged} pairs and skipped ${next.skipped}. A skipped pair has no row.`
      : `You judged all ${next.judged} pairs. You can close this page, and end the command.`;
    show("again", next.skipped > 0);
    $("more").open = true;
    figures();
    $("end").focus();
  }
}

async function figures() {
  if (!$("more").open) return;
  try {
    const said = await ask("api/figures");
    $("figures").replaceChildren(...said.lines.map((line) => {
      const item = document.createElement("p");
      item.textContent = line;
      return item;
    }));
  } catch (error) { fail(error); }
}

async function load() {
  const own = name();
  const query = own === null ? "" : `?annotator=${encodeURIComponent(own)}`;
  try {
    draw(await ask(`api/view${query}`));
    clear();
  } catch (error) {
    if (error.status === 400 && own !== null) {  // another's page now, or a name of old
      sessionStorage.removeItem("annotator");
      await load();
      fail(error);
      return;
    }
    fail(error);
  }
}

async function act(what) {
  if (busy || view === null || view.annotator === null) return;
  const judging = what !== "undo" && what !== "again";
  if (judging && (view.pair === null || document.body.dataset.ready !== view.pair.id)) return;
  if (what === "again" && !(view.pair === null && view.skipped)) return;
  if (what === "undo" && !view.can_undo) return;
  busy = true;
  const body = { annotator: view.annotator };
  if (judging) Object.assign(body, { id: view.pair.id, choice: what });
  try {
    const next = await ask(judging ? "api/judge" : `api/${what}`, body);
    clear();
    $("state").textContent = {
      undo: "Taken back: judge this pair again.", again: "", skip: "Skipped: no row is written.",
    }[what] ?? `Saved: ${SAID[what]}`;
    draw(next);
    figures();
  } catch (error) {
    if (error.status === 409) { await load(); }
    fail(error);
  } finally { busy = false; }
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest?.("input")) return;
  const what = KEYS[event.key] ?? KEYS[event.key.toLowerCase()];
  if (what === undefined) return;
  event.preventDefault();
  if (!event.repeat) act(what);
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => act(button.dataset.choice));
}
$("undo").addEventListener("click", () => act("undo"));
$("again").addEventListener("click", () => act("again"));
$("more").addEventListener("toggle", figures);
$("other").addEventListener("click", () => { sessionStorage.removeItem("annotator"); load(); });
$("name").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("annotator", $("annotator").value.trim().replace(/\s+/g, " "));
  load();
});
load();
