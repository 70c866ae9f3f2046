// How latencies are spread: quantiles in a bar, and in full as a cumulative line.
const MOST_BARS = 16, MOST_LINES = 12;
const spread = (i) => data.spread[String(i)];

function latency() {
  const rows = shown.filter((i) => spread(i));
  if (!rows.length) return [empty(data.table.count ? "No measurement that passes the filters has samples here." : "Nothing was timed yet.")];
  const bars = el("div", { class: "plot", "data-chart": "latency", style: { "min-height": `${60 + 36 * Math.min(rows.length, MOST_BARS)}px` } });
  const lines = el("div", { class: "plot", "data-chart": "cumulative", style: { "min-height": "300px" } });
  later(bars, (width) => quantiles(width, rows));
  later(lines, (width) => cumulative(width, rows));
  return [el("div", { class: "pair" },
    el("div", {}, el("h3", {}, "Quantiles"), soft("Bar: middle half; line: p1–p99; tick: p50 with its 95 % interval; dots: each process's own p50."), bars),
    el("div", {}, el("h3", {}, "Cumulative"), soft("Share of samples at or below a latency, up to the slowest p99."), lines))];
}

const said = (drawn, of, what) => (of > drawn ? [soft(`The first ${drawn} of ${count(of, what)} in the table's order; filter or sort to see others.`)] : []);

function quantiles(width, every) {
  const rows = every.slice(0, MOST_BARS);
  const name = namer(rows), room = width < 420 ? 22 : 38;
  const names = new Map(rows.map((i) => [i, fold(name(i), room)]));
  const medians = rows.flatMap((i) => spread(i).own.map((v) => ({ i, v })));
  const plot = Plot.plot({
    ...common(width), height: 56 + 36 * rows.length, marginTop: 10, marginBottom: 40, marginRight: 18,
    marginLeft: Math.min(14 + 6.3 * d3.max(names.values(), (n) => n.length), width * 0.46),
    x: { label: "latency (ms)", grid: true, domain: [0, 1.04 * d3.max(rows, (i) => spread(i).q[99])], ticks: width < 500 ? 4 : 7 },
    y: { label: null, type: "band", domain: rows, tickSize: 0, tickFormat: (i) => names.get(i) },
    marks: [
      Plot.ruleY(rows, { y: (i) => i, x1: (i) => spread(i).q[1], x2: (i) => spread(i).q[99], stroke: (i) => colour(text("scheme", i)), strokeOpacity: 0.7 }),
      Plot.ruleY(rows, { y: (i) => i, x1: (i) => spread(i).q[25], x2: (i) => spread(i).q[75], stroke: (i) => colour(text("scheme", i)), strokeWidth: 11, strokeOpacity: 0.75 }),
      Plot.ruleY(rows.filter((i) => number("p50_low", i) !== null), { y: (i) => i, x1: (i) => number("p50_low", i), x2: (i) => number("p50_high", i), stroke: "currentColor", strokeWidth: 3 }),
      Plot.tickX(rows, { y: (i) => i, x: (i) => spread(i).q[50], stroke: "currentColor", strokeWidth: 2, insetTop: 7, insetBottom: 7 }),
      Plot.dot(medians, { y: "i", x: "v", r: 2.2, fill: "currentColor", dy: 12 }),
      Plot.tip(rows, Plot.pointerY({ y: (i) => i, x: (i) => spread(i).q[50], title: (i) => quantilesTold(i, name(i)), ...TIP })),
    ],
  });
  return [key(rows), plot, ...said(rows.length, every.length, "measurement")];
}

function quantilesTold(i, name) {
  const q = spread(i).q, interval = number("p50_low", i) === null ? "" : ` (${show(number("p50_low", i))} – ${show(number("p50_high", i))})`;
  return `${name}\n${count(number("n", i), "sample")} in ${number("processes", i)} processes\np50 ${show(q[50], "ms")}${interval}\nmiddle half ${show(q[25])} – ${show(q[75], "ms")}\np1 – p99 ${show(q[1])} – ${show(q[99], "ms")}\nslowest ${show(q[100], "ms")}`;
}

function cumulative(width, every) {
  const rows = every.slice(0, MOST_LINES), name = namer(rows);
  const points = rows.flatMap((i) => spread(i).q.map((v, share) => ({ i, v, share })));
  const dashes = d3.groups(points, (p) => DASHES[text("runtime", p.i)] ?? null);
  const ends = [d3.min(rows, (i) => spread(i).q[0]), d3.max(rows, (i) => spread(i).q[99])];
  const wide = ends[1] / ends[0] > 20;
  const plot = Plot.plot({
    ...common(width), height: 300, marginLeft: 48, marginBottom: 40, marginTop: 22, clip: true,
    x: { label: `latency (ms${wide ? ", logarithmic" : ""})`, type: wide ? "log" : "linear", grid: true, domain: [0.97 * ends[0], 1.02 * ends[1]], clamp: true, ...(wide ? LOG : { ticks: width < 500 ? 4 : 7 }) },
    y: { label: "samples at or below (%)", grid: true, domain: [0, 100] },
    marks: [
      ...dashes.map(([dash, some]) => Plot.line(some, { x: "v", y: "share", z: "i", stroke: (p) => colour(text("scheme", p.i)), strokeWidth: 1.8, strokeDasharray: dash })),
      Plot.tip(points, Plot.pointer({ x: "v", y: "share", title: (p) => `${name(p.i)}\n${p.share} % within ${show(p.v, "ms")}`, ...TIP })),
    ],
  });
  return [key(rows, true), plot, ...said(rows.length, every.length, "measurement")];
}
