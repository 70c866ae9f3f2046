// Elements, figures as text, the table's columns, and what is chosen on the page. Text of others goes through textContent and
// Plot only, never through innerHTML.
let data = JSON.parse(document.getElementById("data").textContent);

function el(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else if (name === "style") for (const [property, v] of Object.entries(value)) made.style.setProperty(property, v);
    else if (name in made && typeof value !== "string") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== ""));
  return made;
}

const text = (name, i) => { const c = data.table.texts[name]; return c.values[c.at[i]]; };
const number = (name, i) => { const c = data.table.numbers[name]; return c === undefined ? null : c[i]; };
const has = (name) => data.table.numbers[name] !== undefined;

// Three significant digits at least, no more decimals than help.
function show(value, unit) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const digits = Number.isInteger(value) && size >= 100 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : size >= 0.1 ? 3 : size === 0 ? 0 : 4;
  const told = value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  return unit ? `${told} ${unit}` : told;
}
const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : word.endsWith("s") ? "es" : "s"}`;
const minute = (moment) => moment.slice(0, 16).replace("T", " ");
// What tells two names apart is often their end: the middle goes.
const fold = (told, room) => (told.length > room ? `${told.slice(0, Math.ceil(room * 0.6) - 1)}…${told.slice(-Math.floor(room * 0.4))}` : told);
// May be broken after / and -, where a person would.
const breakable = (told) => told.split(/(?<=[/-])/).flatMap((part, k) => (k ? [el("wbr"), part] : [part]));
const distinct = (values) => [...new Set(values)];

const WORDS = { VALID: "VALID", warned: "VALID", INVALID: "INVALID", failed: "failed" };
const rankable = (i) => ["VALID", "warned"].includes(text("verdict", i));

// Okabe and Ito's palette, told apart with any colour vision; lightened where the paper is dark.
const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#a8478d", "#8a6d00", "#3b8fb8", "#5c636b"];
const DARK = ["#56b4e9", "#ff9d57", "#3fd0a4", "#e59ccb", "#f0e442", "#9ad4f5", "#a0a8b2"];
const dark = matchMedia("(prefers-color-scheme: dark)");
const palette = () => (dark.matches ? DARK : LIGHT);
const colour = (scheme) => palette()[Math.max(0, data.schemes.indexOf(scheme)) % LIGHT.length];
const SYMBOLS = { onnxruntime: "circle", litert: "square", "tflite-runtime": "triangle" };
const DASHES = { onnxruntime: null, litert: "6 3", "tflite-runtime": "2 3" };

const chosen = {
  filters: { model: "", target: "", batch_id: "", scheme: "", runtime: "", verdict: "", text: "" },
  sort: { key: null, down: false }, limit: 25, open: new Set(), x: "p50", y: "top1", run: null, profile: null, group: null, variant: null,
};
let shown = [];

// The shortest names that tell these rows apart: more is added only where a name would stand twice.
function namer(rows) {
  const labels = rows.map((i) => text("label", i)), prefix = (labels[0] ?? "").split("/")[0] + "/";
  const same = labels.length > 1 && labels.every((told) => told.startsWith(prefix));
  const names = new Map(rows.map((i, k) => [i, same ? labels[k].slice(prefix.length) : labels[k]]));
  if (distinct(rows.map((i) => text("target", i))).length > 1) for (const i of rows) names.set(i, `${text("target", i)}: ${names.get(i)}`);
  const oneDay = distinct(rows.map((i) => text("started", i).slice(0, 10))).length === 1;
  const moment = (i) => minute(text("started", i)).slice(oneDay ? 11 : 5);
  const more = [(i) => text("runtime", i), (i) => text("provider", i), (i) => count(number("threads", i), "thread"), (i) => text("model", i), (i) => text("plan", i), moment, (i) => text("run", i)];
  for (const field of more) {
    const called = d3.group(rows, (i) => names.get(i));
    for (const twins of called.values()) {
      if (twins.length > 1 && distinct(twins.map(field)).length > 1) for (const i of twins) names.set(i, `${names.get(i)} · ${field(i)}`);
    }
  }
  return (i) => names.get(i);
}

// What is drawn is drawn when it comes near the window: a page of many runs opens at once.
const pending = new Map();
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
}, { rootMargin: "600px" });
function draw(holder) {
  near.unobserve(holder);
  const act = pending.get(holder);
  if (act === undefined) return;
  pending.delete(holder);
  holder.replaceChildren(...[act(Math.max(260, Math.floor(holder.clientWidth)))].flat());
  holder.dataset.drawn = "yes";
}
function later(holder, act) {
  delete holder.dataset.drawn;
  pending.set(holder, act);
  near.unobserve(holder);
  near.observe(holder);
}
addEventListener("beforeprint", () => { for (const holder of [...pending.keys()]) draw(holder); });

const common = (width) => ({ width, style: { background: "transparent", color: "inherit", fontSize: "12px", fontFamily: "inherit", overflow: "visible" } });
const LOG = { type: "log", ticks: 4, tickFormat: (d) => String(d) };
const TIP = { fill: "var(--card)", stroke: "var(--line)", textPadding: 10, fontSize: 12 };
const soft = (...told) => el("p", { class: "soft" }, ...told);
const empty = (told, command) => el("div", { class: "empty" }, el("p", {}, told), command ? el("pre", {}, el("code", {}, command)) : null);

function key(rows, lines) {
  const box = el("div", { class: "key" });
  for (const scheme of data.schemes.filter((s) => rows.some((i) => text("scheme", i) === s))) {
    box.append(el("span", { style: { "--c": colour(scheme) } }, el("i", {}), scheme));
  }
  const runtimes = distinct(rows.map((i) => text("runtime", i)));
  const marks = lines ? { onnxruntime: "—", litert: "– –", "tflite-runtime": "···" } : { onnxruntime: "●", litert: "■", "tflite-runtime": "▲" };
  if (runtimes.length > 1) for (const r of runtimes) box.append(el("span", {}, el("b", {}, marks[r] ?? "●"), r));
  return box;
}

function select(label, options, value, act) {
  const made = el("select", { "aria-label": label, on: { change: () => act(made.value) } }, options.map(([v, told]) => el("option", { value: v, selected: v === value }, told)));
  return el("label", { class: "pick" }, el("span", {}, label), made);
}
