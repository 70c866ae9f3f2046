// One figure against another, and the front of what nothing else beats.
const MOST_POINTS = 2500, MOST_FRONTS = 4, MOST_NAMES = 9;
const metric = (name) => data.metrics.find((m) => m.key === name);
const available = () => data.metrics.filter((m) => has(m.key));

// Of rows of one model and target: those that no other beats in one of the two figures without losing in the other.
function front(rows, x, y) {
  const sign = (m) => (m.better === "less" ? 1 : -1);
  const ordered = d3.sort(rows, (i) => sign(x) * number(x.key, i), (i) => sign(y) * number(y.key, i));
  let best = Infinity;
  const found = [];
  for (const i of ordered) {
    const cost = sign(y) * number(y.key, i);
    if (cost < best) { best = cost; found.push(i); }
  }
  return d3.sort(found, (i) => number(x.key, i));
}

function scale(m, rows, low, high) {
  const ends = rows.flatMap((i) => [number(low ?? m.key, i) ?? number(m.key, i), number(high ?? m.key, i) ?? number(m.key, i)]);
  const [least, most] = d3.extent(ends);
  if (least > 0 && most / least > 40) return { ...LOG, domain: [0.8 * least, 1.25 * most] };
  const pad = Math.max((most - least) * 0.08, Math.abs(most) * 0.004, 1e-9);
  const top = m.unit === "%" ? Math.min(100 + pad * 0.5, most + pad) : most + pad;
  return { domain: [least < 0.5 * most && m.unit !== "%" ? 0 : least - pad, top] };
}

function tradeoff(redraw) {
  const metrics = available();
  if (metrics.length < 2) return [empty("Nothing was timed yet: there is no figure to weigh against another.", "edgevit bench BUNDLE TARGET")];
  if (!has(chosen.x)) chosen.x = metrics[0].key;
  if (!has(chosen.y) || chosen.y === chosen.x) chosen.y = (metrics.find((m) => m.key === "file" && m.key !== chosen.x) ?? metrics.find((m) => m.key !== chosen.x)).key;
  const options = metrics.map((m) => [m.key, m.unit ? `${m.label} (${m.unit})` : m.label]);
  const bar = el("div", { class: "axes" },
    select("across", options, chosen.x, (v) => { if (v === chosen.y) chosen.y = chosen.x; chosen.x = v; redraw(); }),
    select("up", options, chosen.y, (v) => { if (v === chosen.x) chosen.x = chosen.y; chosen.y = v; redraw(); }),
    el("button", { type: "button", on: { click: () => { [chosen.x, chosen.y] = [chosen.y, chosen.x]; redraw(); } } }, "swap"));
  const holder = el("div", { class: "plot tall", "data-chart": "tradeoff" });
  later(holder, (width) => scatter(width, metric(chosen.x), metric(chosen.y)));
  return [bar, holder];
}

function scatter(width, x, y) {
  let rows = shown.filter((i) => number(x.key, i) !== null && number(y.key, i) !== null);
  if (!rows.length) return [empty(`No measurement that passes the filters has both ${x.label} and ${y.label}.`)];
  const groups = d3.groups(rows.filter(rankable), (i) => `${text("model", i)}\n${text("target", i)}\n${text("batch_id", i)}`).map(([, members]) => front(members, x, y));
  const lines = groups.length <= MOST_FRONTS ? groups : [];
  const name = namer(rows.length <= 400 ? rows : []);
  const every = rows.length;
  if (every > MOST_POINTS) rows = d3.sort(rows, (a, b) => d3.descending(text("started", a), text("started", b))).slice(0, MOST_POINTS);
  const called = (i) => name(i) ?? `${text("target", i)}: ${text("label", i)} · ${text("runtime", i)}`;
  const says = (m, i) => `${m.label} ${show(number(m.key, i), m.unit)}` + (m.low && number(m.low, i) !== null ? ` (${show(number(m.low, i))} – ${show(number(m.high, i))})` : "");
  const better = (m, less, more) => (m.better === "less" ? less : more);
  const step = x.better === "less" ? "step-after" : "step-before";
  const labelled = lines.flat().length <= MOST_NAMES && width > 520 ? lines.flat() : [];
  const horizontal = scale(x, rows, x.low, x.high), vertical = scale(y, rows, y.low, y.high);
  const middle = horizontal.type === "log" ? Math.sqrt(horizontal.domain[0] * horizontal.domain[1]) : d3.mean(horizontal.domain);
  const names = (side) => Plot.text(labelled.filter((i) => (number(x.key, i) > middle) === (side < 0)), { x: (i) => number(x.key, i), y: (i) => number(y.key, i), text: (i) => fold(text("label", i), 28), textAnchor: side < 0 ? "end" : "start", dx: 9 * side, dy: -11, fill: "currentColor", stroke: "var(--card)", strokeWidth: 4, fontSize: 11 });
  const plot = Plot.plot({
    ...common(width), height: Math.min(440, Math.max(300, width * 0.5)), marginLeft: 56, marginRight: 28, marginBottom: 42, marginTop: 26,
    x: { ...horizontal, label: `${x.label}${x.unit ? ` (${x.unit})` : ""}`, grid: true, ...(horizontal.type === "log" ? {} : { ticks: width < 500 ? 5 : 9 }) },
    y: { ...vertical, label: `${y.label}${y.unit ? ` (${y.unit})` : ""}`, grid: true },
    symbol: { domain: Object.keys(SYMBOLS), range: Object.values(SYMBOLS) },
    marks: [
      ...lines.map((f) => Plot.line(f, { x: (i) => number(x.key, i), y: (i) => number(y.key, i), curve: step, stroke: "currentColor", strokeOpacity: 0.45, strokeDasharray: "4 4" })),
      y.low ? Plot.ruleX(rows.filter((i) => number(y.low, i) !== null), { x: (i) => number(x.key, i), y1: (i) => number(y.low, i), y2: (i) => number(y.high, i), stroke: (i) => colour(text("scheme", i)), strokeOpacity: 0.65 }) : null,
      x.low ? Plot.ruleY(rows.filter((i) => number(x.low, i) !== null), { y: (i) => number(y.key, i), x1: (i) => number(x.low, i), x2: (i) => number(x.high, i), stroke: (i) => colour(text("scheme", i)), strokeOpacity: 0.65, strokeWidth: 2 }) : null,
      Plot.dot(rows, { x: (i) => number(x.key, i), y: (i) => number(y.key, i), r: rows.length > 200 ? 3 : 5.5, symbol: (i) => SYMBOLS[text("runtime", i)] ?? "circle", fill: (i) => (rankable(i) ? colour(text("scheme", i)) : "var(--card)"), stroke: (i) => colour(text("scheme", i)), strokeWidth: 1.6 }),
      names(1), names(-1),
      Plot.tip(rows, Plot.pointer({ x: (i) => number(x.key, i), y: (i) => number(y.key, i), title: (i) => `${called(i)}\n${says(x, i)}\n${says(y, i)}${rankable(i) ? "" : `\n${text("verdict", i)}`}`, ...TIP })),
    ],
  });
  const corner = `${better(y, "Down", "Up")} and ${better(x, "left", "right")} is better`;
  const bars = distinct([x, y].filter((m) => m.error).map((m) => `${m.label}: ${m.error}`));
  const alone = rows.some((i) => text("interval_of", i) === "samples") && [x, y].some((m) => m.error === "95 % interval");
  const without = [x, y].filter((m) => !m.error && m.key !== "file").map((m) => m.label);
  const told = [`${corner}; hollow: INVALID, never on a front.`];
  if (lines.length) told.push("Dashed: the Pareto front" + (lines.length > 1 ? " of each target and batch." : "."));
  else if (groups.length > MOST_FRONTS) told.push("Fronts are of one model on one target in one batch: filter to see one.");
  if (bars.length) told.push(`Bars: ${bars.join("; ")}.`);
  if (alone) told.push("Where fewer than three processes were timed, the interval holds for that process alone.");
  if (without.length) told.push(`No bars for ${without.join(" and ")}: one figure a measurement.`);
  if (every > rows.length) told.push(`The newest ${rows.length.toLocaleString("en")} of ${every.toLocaleString("en")} are drawn; fronts are of all.`);
  return [key(rows), plot, soft(told.join(" "))];
}
