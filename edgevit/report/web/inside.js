// Inside a model: what its operators took, and which share of its multiply-adds are integers.
const KINDS = ["#0072b2", "#d55e00", "#009e73", "#a8478d", "#8a6d00", "#3b8fb8", "#7d8590"];
const KINDS_DARK = ["#56b4e9", "#ff9d57", "#3fd0a4", "#e59ccb", "#f0e442", "#9ad4f5", "#858d98"];

function operators(redraw) {
  const here = data.operators.filter((o) => shown.includes(o.row));
  const why = data.operators_absent.map((told) => soft(`Not timed: ${told}`));
  if (!here.length) {
    return [empty(data.operators.length ? "No measurement that passes the filters has operator times." : "No operator was timed: the runtime's own profiler does it in a worker process of its own.", data.operators.length ? null : "edgevit bench BUNDLE TARGET --profile-ops"), ...why];
  }
  const one = here.find((o) => o.row === chosen.profile) ?? here[0], name = namer(here.map((o) => o.row));
  const holder = el("div", { class: "plot", "data-chart": "operators", style: { "min-height": `${90 + 34 * Math.min(here.length, 20)}px` } });
  later(holder, (width) => kinds(width, here.slice(0, 20), name));
  const rows = one.top.map(([called, kind, provider, ms, share, calls]) => el("tr", {}, el("td", { class: "name" }, breakable(called)), el("td", { class: "left" }, kind), el("td", {}, show(ms)), el("td", {}, show(share)), el("td", {}, calls.toLocaleString("en")), el("td", { class: "left" }, provider)));
  const heads = ["operator", "kind", "ms", "share %", "calls", "where"].map((h, k) => el("th", { class: k === 0 ? "name" : k === 1 || k === 5 ? "left" : "" }, h));
  return [holder,
    el("div", { class: "axes" }, select("operators of", here.map((o) => [String(o.row), name(o.row)]), String(one.row), (v) => { chosen.profile = Number(v); redraw(); })),
    el("div", { class: "scroll" }, el("table", { class: "plain" }, el("thead", {}, el("tr", {}, heads)), el("tbody", {}, rows))),
    soft(`${one.rest ? `${count(one.rest, "more operator")} took ${show(one.rest_ms, "ms")}. ` : ""}By ${one.profiler}, mean of ${count(one.inferences, "inference")}. Profiling slows a model down: compare shares, not times.`), ...why];
}

function kinds(width, here, name) {
  const totals = d3.rollups(here.flatMap((o) => o.kinds), (k) => d3.sum(k, (v) => v[2]), ([kind]) => kind).sort((a, b) => b[1] - a[1]);
  const leading = totals.slice(0, 6).map(([kind]) => kind);
  const domain = [...leading, "other"], range = dark.matches ? KINDS_DARK : KINDS;
  const parts = here.flatMap((o) => d3.rollups(o.kinds, (k) => d3.sum(k, (v) => v[1]), ([kind]) => (leading.includes(kind) ? kind : "other")).map(([kind, ms]) => ({ row: o.row, kind, ms, share: (100 * ms) / o.total, total: o.total })));
  const names = new Map(here.map((o) => [o.row, fold(name(o.row), width < 420 ? 20 : 36)]));
  const order = new Map(domain.map((kind, k) => [kind, k]));
  const box = el("div", { class: "key" }, domain.filter((kind) => parts.some((p) => p.kind === kind)).map((kind) => el("span", { style: { "--c": range[order.get(kind)] } }, el("i", {}), kind)));
  return [box, Plot.plot({
    ...common(width), height: 60 + 34 * here.length, marginTop: 8, marginBottom: 40, marginRight: 20,
    marginLeft: Math.min(14 + 6.3 * d3.max(names.values(), (n) => n.length), width * 0.46),
    x: { label: "ms of an inference", grid: true, ticks: width < 500 ? 4 : 8 }, y: { label: null, domain: here.map((o) => o.row), tickSize: 0, tickFormat: (i) => names.get(i) },
    color: { domain, range },
    marks: [
      Plot.barX(parts, Plot.stackX({ y: "row", x: "ms", fill: "kind", order: (p) => order.get(p.kind), insetTop: 4, insetBottom: 4, stroke: "var(--card)", strokeWidth: 0.6 })),
      Plot.tip(parts, Plot.pointer(Plot.stackX({ y: "row", x: "ms", order: (p) => order.get(p.kind), title: (p) => `${name(p.row)}\n${p.kind} ${show(p.ms, "ms")}, ${show(p.share)} %\nall ${show(p.total, "ms")}`, ...TIP }))),
    ],
  }), soft("By kind of operator, mean of the profiled inferences. One profile each, so no error bars.")];
}

function coverage() {
  const here = data.coverage.filter((c) => shown.some((i) => text("artifact", i) === text("artifact", c.row)));
  if (!here.length) {
    return [empty(data.coverage.length ? "No artifact that passes the filters." : "The results store holds what was measured; which share of a file's multiply-adds are integers stands in its bundle. Name the bundle and it is shown here, with class names and the disputed images.", data.coverage.length ? null : "edgevit report -o FILE.html --bundle DIR")];
  }
  const holder = el("div", { class: "plot", "data-chart": "coverage", style: { "min-height": `${80 + 32 * here.length}px` } });
  const placed = here.filter((c) => c.absent === undefined), label = (c) => text("label", c.row);
  if (placed.length) later(holder, (width) => shares(width, placed, label));
  const told = (map) => Object.entries(map).map(([name, n]) => `${name} ${n}`).join(", ") || "none";
  const rows = placed.map((c) => el("tr", {}, el("td", { class: "name" }, label(c)), el("td", {}, show(c.macs / 1e6)), el("td", {}, c.leftover === null ? "–" : String(c.leftover)), el("td", {}, String(c.partitions)), el("td", { class: "left wrap" }, told(c.outside)), el("td", { class: "left wrap" }, c.floats.map(([kind, n]) => `${kind} ${n}`).join(", ") || "none"), el("td", { class: "left" }, c.runtime)));
  const heads = ["artifact", "MACs, millions", "Q→DQ left", "pieces", "outside the delegate", "multiply floats", "partitioned by"].map((h, k) => el("th", { class: k === 0 ? "name" : k > 3 ? "left" : "" }, h));
  return [placed.length ? holder : null, el("div", { class: "scroll" }, el("table", { class: "plain" }, el("thead", {}, el("tr", {}, heads)), el("tbody", {}, rows))),
    ...here.filter((c) => c.absent !== undefined).map((c) => soft(`${label(c)}: ${c.absent}`)),
    soft("Multiply-adds of matrix products and convolutions, as the runtime of the machine that built the file partitioned it for its CPU: counted, so no error bars.")];
}

function shares(width, here, label) {
  const range = [colour("int8-dynamic"), colour("int8-weights"), "var(--line)"], domain = ["int8", "int4", "float"];
  const parts = here.flatMap((c) => [["int8", c.int8], ["int4", c.int4], ["float", 100 - c.int8 - c.int4]].map(([kind, share]) => ({ row: c.row, kind, share })));
  const names = new Map(here.map((c) => [c.row, fold(label(c), width < 420 ? 20 : 36)]));
  const box = el("div", { class: "key" }, domain.map((kind, k) => el("span", { style: { "--c": range[k] } }, el("i", {}), kind)));
  return [box, Plot.plot({
    ...common(width), height: 56 + 30 * here.length, marginTop: 8, marginBottom: 40, marginRight: 46,
    marginLeft: Math.min(14 + 6.3 * d3.max(names.values(), (n) => n.length), width * 0.46),
    x: { label: "share of multiply-adds (%)", grid: true, domain: [0, 100] }, y: { label: null, domain: here.map((c) => c.row), tickSize: 0, tickFormat: (i) => names.get(i) }, color: { domain, range },
    marks: [
      Plot.barX(parts, { y: "row", x: "share", fill: "kind", insetTop: 4, insetBottom: 4, title: (p) => `${p.kind} ${show(p.share)} %` }),
      Plot.text(here, { y: (c) => c.row, x: 100, text: (c) => `${show(c.int8 + c.int4)} %`, textAnchor: "start", dx: 5 }),
    ],
  })];
}
