"use strict";
// The page of `sala serve`: documents, questions, answers, and the passages that were read for them.

const $ = (id) => document.getElementById(id);
const state = { chat: false, name: "", documents: [], chosen: new Set(), known: new Set(), reading: new Map(), turns: [], asking: null, shown: null };
const CHARACTERS_A_PAGE = 4000;

// requests

async function call(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...(options.headers || {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) $("key-form").hidden = false;
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body && body.error ? body.error.message : `the server answered ${response.status}`);
  }
  return response;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const say = (text) => { $("message").textContent = text; };
const count = (number) => number.toLocaleString("en");
const size = (bytes) => bytes < 2 ** 30 ? `${(bytes / 2 ** 20).toFixed(0)} MiB` : `${(bytes / 2 ** 30).toFixed(1)} GiB`;

// documents

async function refresh() {
  const [models, listed, status] = await Promise.all(
    ["/v1/models", "/documents", "/status"].map((path) => call(path).then((response) => response.json())));
  $("key-form").hidden = true;
  const model = models.data[0];
  state.chat = model.chat;
  state.name = model.id;
  $("model").textContent = `${model.id}, up to ${count(model.max_model_len)} tokens`;
  $("memory").textContent = `${size(status.kept_bytes + status.running_bytes)} of ${size(status.total_bytes)} used`;
  $("kept").textContent = listed.kept ? "Read documents are kept on this machine for tomorrow."
    : "Documents are gone when the server stops (start it with --documents to keep them).";
  state.documents = listed.documents;
  for (const { name, read } of listed.documents) {
    // what is new is asked about; what somebody unchecked stays unchecked
    if (read && !state.known.has(name)) { state.known.add(name); state.chosen.add(name); }
  }
  drawDocuments();
}

function drawDocuments() {
  const focused = document.activeElement && document.activeElement.id;
  $("list").replaceChildren(...state.documents.map(drawDocument));
  if (focused && $(focused)) $(focused).focus();
}

function drawDocument(entry) {
  const { name } = entry, reading = state.reading.get(name);
  const box = make("input", { type: "checkbox", id: `use ${name}`, checked: state.chosen.has(name), disabled: !entry.read });
  box.addEventListener("change", () => box.checked ? state.chosen.add(name) : state.chosen.delete(name));
  const row = make("li", {}, box, " ", make("label", { htmlFor: box.id, textContent: name }));
  if (reading) {
    const bar = make("progress", { max: reading.total || 1, value: reading.read || 0 });
    bar.setAttribute("aria-label", `Reading ${name}`);
    const left = reading.seconds_left == null ? "" : `, ${Math.ceil(reading.seconds_left)} s left`;
    const told = reading.total ? `${count(reading.read)} of ${count(reading.total)} tokens, ${count(Math.round(reading.tokens_per_s))} tokens/s${left}` : "starting";
    const halt = make("button", { type: "button", textContent: "Stop reading" });
    halt.addEventListener("click", () => reading.abort.abort());
    row.append(bar, make("p", { className: "small", textContent: told }), halt);
    return row;
  }
  const facts = entry.read ? `${count(entry.tokens)} tokens read${entry.saved ? ", kept" : ""}` : `${count(entry.characters)} characters, not read`;
  row.append(make("p", { className: "small", textContent: facts }));
  const show = make("button", { type: "button", textContent: "Show" }), drop = make("button", { type: "button", textContent: "Remove" });
  show.setAttribute("aria-label", `Show ${name}`);
  drop.setAttribute("aria-label", `Remove ${name}`);
  show.addEventListener("click", () => showText(name).catch((error) => say(error.message)));
  drop.addEventListener("click", () => remove(name).catch((error) => say(error.message)));
  const buttons = make("div", { className: "row" }, show, drop);
  if (!entry.read) {
    const again = make("button", { type: "button", textContent: "Read" });
    again.setAttribute("aria-label", `Read ${name}`);
    again.addEventListener("click", () => read(name).catch((error) => say(error.message)));
    buttons.prepend(again);
  }
  row.append(buttons);
  return row;
}

async function remove(name) {
  await call(`/documents/${encodeURIComponent(name)}`, { method: "DELETE" });
  state.chosen.delete(name);
  state.known.delete(name);
  if (state.shown === name) closeText();
  await refresh();
}

async function read(name) {
  const progress = { abort: new AbortController() };
  state.reading.set(name, progress);
  drawDocuments();
  try {
    const response = await call(`/documents/${encodeURIComponent(name)}/read`, { method: "POST", signal: progress.abort.signal });
    for await (const event of events(response)) {
      Object.assign(progress, event);
      drawDocuments();
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  } finally {
    state.reading.delete(name);
    await refresh();
  }
}

async function take(files) {
  say("");
  for (const { name, file } of files) {
    try {
      await call(`/documents/${encodeURIComponent(name)}`, { method: "PUT", body: file, headers: { "Content-Type": "text/plain" } });
      await refresh();
      await read(name);
    } catch (error) {
      say(error.message);
    }
  }
}

// a path becomes a name, which has no slash
const named = (path, file) => ({ name: path.replace(/^\/+/, "").replaceAll("/", " - ").replace(/^\.+/, ""), file });

async function dropped(items) {
  const found = [];
  const walk = async (entry) => {
    if (entry.isFile) {
      if (!entry.name.startsWith(".")) found.push(named(entry.fullPath, await new Promise((done, fail) => entry.file(done, fail))));
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      const batch = await new Promise((done, fail) => reader.readEntries(done, fail));
      if (!batch.length) return;
      for (const child of batch) await walk(child);
    }
  };
  for (const entry of [...items].map((item) => item.webkitGetAsEntry()).filter(Boolean)) await walk(entry);
  await take(found);
}

// questions

function drawTurn(turn) {
  const box = make("article", { className: "turn" });
  box.append(make("p", { className: "who", textContent: "You" }), make("p", { className: "said", textContent: turn.question }));
  box.append(make("p", { className: "who", textContent: state.name }));
  turn.thoughts = make("p", { className: "said thought", textContent: turn.reasoning, hidden: !turn.reasoning });
  turn.place = make("p", { className: "said", textContent: turn.answer });
  turn.extra = make("div");
  box.append(turn.thoughts, turn.place, turn.extra);
  $("turns").append(box);
  drawEvidence(turn);
}

function drawEvidence(turn) {
  turn.extra.replaceChildren();
  if (turn.note) turn.extra.append(make("p", { className: "small", textContent: turn.note }));
  if (!turn.evidence || !turn.evidence.length) return;
  const list = make("ol", { className: "evidence" });
  list.setAttribute("aria-label", "Passages that were read most for this answer");
  for (const passage of turn.evidence) {
    const short = passage.text.trim().replace(/\s+/g, " ").slice(0, 160);
    const text = `${(100 * passage.share).toFixed(0)} %${passage.document ? `, ${passage.document}` : ""}: ${short}`;
    const button = make("button", { type: "button", textContent: text, disabled: !passage.document });
    button.addEventListener("click", () => showText(passage.document, turn.evidence, passage).catch((error) => say(error.message)));
    list.append(make("li", {}, button));
  }
  turn.extra.append(make("p", { className: "small", textContent: "Read most for this answer:" }), list);
}

function keep() {
  const turns = state.turns.map(({ question, answer, reasoning, evidence, note }) => ({ question, answer, reasoning, evidence, note }));
  try {
    sessionStorage.setItem("turns", JSON.stringify(turns));
  } catch {
    sessionStorage.removeItem("turns");  // too long to keep over a reload
  }
}

function request(question) {
  const shared = { documents: [...state.chosen].filter((name) => state.documents.some((entry) => entry.name === name && entry.read)).sort(),
    max_tokens: Number($("length").value), stream: true, stream_options: { include_usage: true }, evidence: true };
  if (!state.chat) return ["/v1/completions", { ...shared, prompt: question }];
  const messages = state.turns.flatMap((turn) => [{ role: "user", content: turn.question }, { role: "assistant", content: turn.answer }]);
  return ["/v1/chat/completions", { ...shared, messages: [...messages, { role: "user", content: question }] }];
}

async function ask(question) {
  say("");
  const [path, body] = request(question);
  const turn = { question, answer: "", reasoning: "", evidence: [], note: "" };
  state.turns.push(turn);
  drawTurn(turn);
  state.asking = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  const started = performance.now();
  try {
    const response = await call(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal: state.asking.signal });
    for await (const event of events(response)) {
      for (const choice of event.choices) {
        turn.answer += choice.delta ? choice.delta.content || "" : choice.text;
        turn.reasoning += (choice.delta && choice.delta.reasoning_content) || "";
      }
      turn.place.textContent = turn.answer;
      turn.thoughts.textContent = turn.reasoning;
      turn.thoughts.hidden = !turn.reasoning;
      if (event.evidence) turn.evidence = event.evidence[0];
      if (event.usage) turn.note = usageNote(event.usage, (performance.now() - started) / 1000);
    }
  } catch (error) {
    if (error.name === "AbortError") turn.note = "stopped";
    else say(error.message);
  } finally {
    state.asking = null;
    $("send").disabled = false;
    $("stop").disabled = true;
    drawEvidence(turn);
    keep();
    refresh().catch((error) => say(error.message));
  }
}

function usageNote(usage, seconds) {
  const found = usage.prompt_tokens_details.cached_tokens;
  return `${count(usage.prompt_tokens)} tokens before the answer, ${count(found)} of them remembered; ${count(usage.completion_tokens)} written in ${seconds.toFixed(1)} s`;
}

// the text

async function showText(name, passages = [], target = null) {
  const text = await (await call(`/documents/${encodeURIComponent(name)}`)).text();
  // positions are of characters, and JavaScript counts halves of some
  const whole = /[\ud800-\udfff]/.test(text) ? Array.from(text) : text;
  const marks = passages.filter((passage) => passage.document === name).sort((a, b) => a.start - b.start);
  const pages = [];
  let goal = null;
  const cut = (start, end) => typeof whole === "string" ? whole.slice(start, end) : whole.slice(start, end).join("");
  for (let start = 0; start < whole.length; start += CHARACTERS_A_PAGE) {
    const end = Math.min(start + CHARACTERS_A_PAGE, whole.length), page = make("pre");
    let at = start;
    for (const passage of marks) {
      const from = Math.max(passage.start, at), to = Math.min(passage.end, end);
      if (from >= to) continue;
      const mark = make("mark", { textContent: cut(from, to) });
      page.append(cut(at, from), mark);
      if (passage === target && !goal) goal = mark;
      at = to;
    }
    page.append(cut(at, end));
    pages.push(page);
  }
  state.shown = name;
  $("text-title").textContent = name;
  $("pages").replaceChildren(...pages);
  $("text").hidden = false;
  document.querySelector("main").classList.add("with-text");
  (goal || $("pages")).scrollIntoView({ block: goal ? "center" : "nearest" });
  if (goal) { goal.tabIndex = -1; goal.focus({ preventScroll: true }); } else $("pages").scrollTop = 0;
}

function closeText() {
  state.shown = null;
  $("text").hidden = true;
  $("pages").replaceChildren();
  document.querySelector("main").classList.remove("with-text");
}

// what a person does

$("files").addEventListener("change", (event) => take([...event.target.files].map((file) => named(file.name, file))).then(() => { event.target.value = ""; }));
$("folder").addEventListener("change", (event) => take([...event.target.files].filter((file) => !file.name.startsWith(".")).map((file) => named(file.webkitRelativePath, file))));
for (const kind of ["dragenter", "dragover"]) $("drop").addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
for (const kind of ["dragleave", "drop"]) $("drop").addEventListener(kind, () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => { event.preventDefault(); dropped(event.dataTransfer.items).catch((error) => say(error.message)); });
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || state.asking) return;
  $("question").value = "";
  ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && state.asking) state.asking.abort(); });
$("stop").addEventListener("click", () => state.asking && state.asking.abort());
$("clear").addEventListener("click", () => { state.turns = []; $("turns").replaceChildren(); keep(); say(""); $("question").focus(); });
$("close").addEventListener("click", closeText);
$("key-form").addEventListener("submit", (event) => { event.preventDefault(); sessionStorage.setItem("key", $("key").value); refresh().catch((error) => say(error.message)); });
document.addEventListener("visibilitychange", () => { if (!document.hidden && !state.reading.size) refresh().catch((error) => say(error.message)); });
setInterval(() => { if (!document.hidden && !state.reading.size) refresh().catch((error) => say(error.message)); }, 5000);

refresh().then(() => say("")).catch((error) => say(error.message)).finally(() => {
  state.turns = JSON.parse(sessionStorage.getItem("turns") || "[]");
  state.turns.forEach(drawTurn);
});
