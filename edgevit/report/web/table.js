// Filters, and the table they are of.
const FILTERS = [["model", "model"], ["target", "target"], ["batch_id", "batch"], ["scheme", "scheme"], ["runtime", "runtime"]];
const COLUMNS = [
  { key: "p50", title: "p50", unit: "ms", low: "p50_low", high: "p50_high", absent: "p50_absent" },
  { key: "p90", title: "p90", unit: "ms", low: "p90_low", high: "p90_high", absent: "p90_absent" },
  { key: "speedup", title: "× fp32", unit: "", absent: "speedup_absent", more: true },
  { key: "peak", title: "peak", unit: "MB", absent: "peak_absent" },
  { key: "file", title: "file", unit: "MB" },
  { key: "top1", title: "top-1", unit: "%", error: true, absent: "top1_absent", more: true },
  { key: "energy", title: "energy", unit: "mJ", absent: "energy_absent", only: true },
  { key: "retention", title: "retention", unit: "%", only: true, more: true },
];
const REST = [
  ["p99", "p99", "ms", "p99_absent"], ["first", "first inference", "ms"], ["init", "init time", "ms"], ["rate", "throughput", "images/s"],
  ["agreement", "agrees with fp32", "%", "agreement_absent"], ["gross", "energy, gross", "mJ", "gross_absent"], ["hottest", "hottest", "°C"],
  ["n", "samples", ""], ["processes", "processes", ""], ["batch", "batch", ""], ["images", "images scored", ""],
];

function refilter() {
  const f = chosen.filters, words = f.text.toLowerCase().split(/\s+/).filter(Boolean);
  shown = d3.range(data.table.count).filter((i) =>
    FILTERS.every(([name]) => f[name] === "" || text(name, i) === f[name]) &&
    (f.verdict === "" || (f.verdict === "VALID" ? rankable(i) : text("verdict", i) === f.verdict)) &&
    words.every((w) => `${text("label", i)} ${text("target", i)} ${text("model", i)} ${text("board", i)} ${text("runtime", i)} ${text("version", i)} ${text("provider", i)} ${text("plan", i)} ${text("run", i)} ${text("artifact", i)} ${text("bundle", i)} ${text("reasons", i)}`.toLowerCase().includes(w)));
  const { key: by, down } = chosen.sort;
  if (by !== null) {
    const value = data.table.texts[by] ? (i) => text(by, i) : (i) => number(by, i);
    // What is absent stays at the end, whichever way the rest is sorted.
    shown = d3.sort(shown, (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return down ? d3.descending(x, y) : d3.ascending(x, y);
    });
  }
}

function filters(act) {
  const bar = el("form", { class: "filters", on: { submit: (e) => e.preventDefault() } });
  const pick = (name, told, options) => {
    // What is served may not have any more what was chosen.
    if (!options.some(([v]) => v === chosen.filters[name])) chosen.filters[name] = "";
    if (options.length < 2) return null;
    return select(told, [["", "all"], ...options], chosen.filters[name], (v) => { chosen.filters[name] = v; act(); });
  };
  const rows = d3.range(data.table.count);
  for (const [name, told] of FILTERS) {
    const made = pick(name, told, d3.sort(distinct(rows.map((i) => text(name, i))).filter(Boolean)).map((v) => [v, v]));
    if (made) bar.append(made);
  }
  const verdicts = pick("verdict", "verdict", ["VALID", "INVALID", "failed"].filter((v) => rows.some((i) => WORDS[text("verdict", i)] === v)).map((v) => [v, v]));
  if (verdicts) bar.append(verdicts);
  const box = el("input", { type: "search", placeholder: "any word: name, digest, reason", "aria-label": "text", value: chosen.filters.text });
  let waits = 0;
  box.addEventListener("input", () => { clearTimeout(waits); waits = setTimeout(() => { chosen.filters.text = box.value; act(); }, 150); });
  bar.append(el("label", { class: "pick wide" }, el("span", {}, "text"), box), el("output", { id: "count" }));
  const clear = el("button", { type: "button", on: { click: () => { for (const name of Object.keys(chosen.filters)) chosen.filters[name] = ""; rebuild(); } } }, "clear");
  bar.append(clear);
  return bar;
}

function table(act) {
  const columns = COLUMNS.filter((c) => !c.only || has(c.key));
  const targets = distinct(shown.map((i) => text("target", i))).length > 1, models = distinct(shown.map((i) => text("model", i))).length > 1;
  const heads = [{ key: "label", title: "variant", left: true }, ...(targets ? [{ key: "target", title: "target", left: true }] : []), ...(models ? [{ key: "model", title: "model", left: true }] : []), ...columns, { key: "verdict", title: "verdict", left: true }];
  const rows = shown.slice(0, chosen.limit);
  const again = d3.rollup(shown, (some) => new Set(some.map((i) => text("run", i))).size > 1, (i) => text("target", i));
  const made = el("table", {},
    el("thead", {}, el("tr", {}, heads.map((c) => head(c, act)))),
    el("tbody", {}, rows.flatMap((i) => row(i, columns, targets, models, heads.length, again.get(text("target", i))))));
  const parts = [el("div", { class: "scroll", tabindex: "0" }, made)];
  if (shown.length > rows.length) {
    parts.push(el("button", { class: "more", on: { click: () => { chosen.limit *= 4; act(); } } }, `${count(shown.length - rows.length, "more row")}`));
  }
  if (!rows.length) parts.push(empty("No measurement passes these filters."));
  const references = distinct(rows.map((i) => text("reference", i)).filter(Boolean));
  if (references.length) parts.push(soft(`× fp32: p50 of ${references.slice(0, 4).join(" or ")}${references.length > 4 ? " …" : ""} ÷ p50, of the same batch of runs, target and thread count. The small figures are 95 % intervals, and the standard error of top-1.`));
  parts.push(...data.scopes.map((told) => soft(told)));
  return parts;
}

function head(c, act) {
  const { key: by, down } = chosen.sort;
  const on = by === c.key;
  const turn = () => {
    chosen.sort = on && down !== Boolean(c.more) ? { key: null, down: false } : { key: c.key, down: on ? !down : Boolean(c.more) };
    act();
  };
  return el("th", { class: c.left ? (c.key === "label" ? "name" : "left") : "", "aria-sort": on ? (down ? "descending" : "ascending") : "none", scope: "col" },
    el("button", { "data-sort": c.key, on: { click: turn } }, c.title, c.unit ? el("small", {}, ` ${c.unit}`) : null, el("i", {}, on ? (down ? "▼" : "▲") : "")));
}

function row(i, columns, targets, models, span, again) {
  const toggle = () => { chosen.open.has(i) ? chosen.open.delete(i) : chosen.open.add(i); drawTable(); };
  const word = text("verdict", i), open = chosen.open.has(i);
  const cells = [
    el("td", { class: "name" }, el("button", { class: "open", "aria-expanded": String(open), on: { click: toggle } }, el("span", {}, breakable(text("label", i)))),
      el("small", {}, [text("runtime", i), text("version", i)].filter(Boolean).join(" "), ` · ${text("provider", i)} · ${count(number("threads", i), "thread")}`, again ? ` · ${text("plan", i)}, ${minute(text("started", i))}` : null)),
    targets ? el("td", { class: "left" }, text("target", i)) : null, models ? el("td", { class: "left" }, text("model", i)) : null,
    ...columns.map((c) => cell(i, c)),
    el("td", { class: `left ${word.toLowerCase()}` }, WORDS[word], word === "warned" ? el("small", {}, "with a warning") : null)];
  const line = el("tr", { "data-row": String(i), class: open ? "opened" : "" }, cells);
  return open ? [line, el("tr", { class: "more" }, el("td", { colspan: String(span) }, particulars(i)))] : [line];
}

function cell(i, c) {
  const value = number(c.key, i);
  if (value === null) return el("td", { class: "absent", title: c.absent ? text(c.absent, i) : null }, "–");
  const small = c.low && number(c.low, i) !== null ? `${show(number(c.low, i))}–${show(number(c.high, i))}` : c.error && number("top1_high", i) !== null ? `±${show(number("top1_high", i) - value)}` : null;
  return el("td", {}, show(value), small ? el("small", {}, small) : null);
}

// Everything known of one measurement; what is absent with its reason.
function particulars(i) {
  const lines = [];
  const told = text("reasons", i);
  if (told) lines.push([WORDS[text("verdict", i)] === "VALID" ? "warning" : text("verdict", i), told]);
  for (const c of COLUMNS) if (number(c.key, i) === null && c.absent && text(c.absent, i)) lines.push([`no ${c.title}`, text(c.absent, i)]);
  for (const [name, title, unit, absent] of REST) {
    const value = number(name, i);
    if (value !== null) lines.push([title, Number.isInteger(value) ? `${value.toLocaleString("en")} ${unit}`.trim() : show(value, unit)]);
    else if (absent && text(absent, i) && !lines.some(([, why]) => why === text(absent, i))) lines.push([`no ${title}`, text(absent, i)]);
  }
  if (text("interval_of", i)) lines.push(["95 % intervals", text("interval_of", i) === "processes" ? "hold for another process on this device" : "hold for this process alone: fewer than three were timed"]);
  lines.push(["board", text("board", i)], ["plan", `${text("plan", i)}, ${minute(text("started", i))} UTC`], ["run", text("run", i)]);
  if (text("artifact", i)) lines.push(["artifact sha256", text("artifact", i)], ["bundle", text("bundle", i)]);
  return el("dl", { class: "pairs" }, lines.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}
