// One run from its beginning to its end: latency as it was taken, and what the board's sensors said meanwhile.
const SENSORS = [[1, "temperature (°C)", 1], [2, "CPU clock (MHz)", 20], [3, "GPU clock (MHz)", 20], [4, "power (W)", 0.05]];

function time(redraw) {
  const here = data.runs.filter((r) => r.rows.some((i) => shown.includes(i)));
  if (!here.length) return [empty(data.runs.length ? "No run that passes the filters is drawn through time." : "No run has samples yet.")];
  const run = here.find((r) => r.id === chosen.run) ?? here[0];
  const told = (r) => `${text("target", r.rows[0])}, ${text("plan", r.rows[0])}, ${minute(text("started", r.rows[0]))}, ${count(r.rows.length, "variant")}`;
  const holder = el("div", { class: "plot tall", "data-chart": "time" });
  later(holder, (width) => through(width, run));
  const loads = data.plans.loads.filter((l) => l.run === run.id);
  return [
    here.length > 1 ? el("div", { class: "axes" }, select("run", here.map((r) => [r.id, told(r)]), run.id, (v) => { chosen.run = v; redraw(); })) : soft(told(run)),
    loads.map((l) => el("p", { class: "finding" }, el("strong", {}, l.name), ` under load for ${show(l.minutes)} minutes: ${l.words}`)),
    holder];
}

function through(width, run) {
  const series = run.series.filter((s) => s.points.length);
  const points = series.flatMap((s) => s.points.map(([at, low, v, high]) => ({ at, low: low ?? v, v, high, s })));
  const readings = run.readings.map((r) => ({ at: r[0], r, series: r[6] }));
  const name = namer(run.rows);
  const low = Math.min(0, ...points.map((p) => p.at)), high = d3.max([...points, ...readings], (p) => p.at);
  const x = { domain: [low, high], grid: true, ticks: width < 500 ? 4 : 9 };
  const size = { ...common(width), marginLeft: 56, marginRight: 18 };
  // A few spikes must not press everything else to the floor.
  const most = d3.max(points, (p) => p.high), tall = Math.max(1.5 * d3.max(points, (p) => p.v), d3.quantile(points, 0.9, (p) => p.high));
  const clipped = most > 1.5 * tall, top = 1.08 * (clipped ? tall : most);
  const began = new Map(d3.reverse(run.series).map((s) => [s.row, s.start]));
  const knees = data.plans.loads.filter((l) => l.run === run.id && l.knee !== null).map((l) => ({ ...l, at: began.get(l.row) + l.knee }));
  const out = [key(run.rows)];
  const windows = series.some((s) => s.windows), spiky = points.filter((p) => p.high > top);
  out.push(Plot.plot({
    ...size, height: 260, marginTop: 24, marginBottom: 26, x: { ...x, label: null }, 
    y: { label: "latency (ms)", grid: true, domain: [0, top], clamp: true },
    marks: [
      Plot.areaY(points, { x: "at", y1: "low", y2: "high", z: "s", fill: (p) => colour(text("scheme", p.s.row)), fillOpacity: 0.22 }),
      Plot.line(points, { x: "at", y: "v", z: "s", stroke: (p) => colour(text("scheme", p.s.row)), strokeWidth: 1.5 }),
      Plot.dot(spiky, { x: "at", y: () => top, r: 2.5, symbol: "triangle", fill: (p) => colour(text("scheme", p.s.row)) }),
      Plot.ruleX(knees, { x: "at", stroke: (l) => colour(text("scheme", l.row)), strokeWidth: 1.6, strokeDasharray: "4 3" }),
      Plot.tip(points, Plot.pointer({ x: "at", y: "v", title: (p) => `${name(p.s.row)}\nprocess ${p.s.process + 1}, ${show(p.at, "s")}\nmedian ${show(p.v, "ms")}\n${p.low < p.v ? `${show(p.low)} – ` : "up to "}${show(p.high, "ms")}`, ...TIP })),
    ],
  }));
  const sensors = SENSORS.filter(([at]) => readings.some((p) => p.r[at] !== null));
  for (const [at, label, least] of sensors) {
    const known = readings.filter((p) => p.r[at] !== null);
    const [from, to] = d3.extent(known, (p) => p.r[at]);
    const pad = Math.max(least, (to - from) * 0.1);
    out.push(Plot.plot({
      ...size, height: 128, marginTop: 22, marginBottom: 26, x: { ...x, label: null }, y: { label, grid: true, domain: [from - pad, to + pad], ticks: 3 },
      marks: [
        Plot.line(known, { x: "at", y: (p) => p.r[at], z: "series", stroke: "currentColor", strokeOpacity: 0.6 }),
        Plot.dot(known, { x: "at", y: (p) => p.r[at], r: (p) => (p.r[5] ? 3.2 : 1.6), fill: (p) => (p.r[5] ? "var(--bad)" : "currentColor") }),
        Plot.tip(known, Plot.pointerX({ x: "at", y: (p) => p.r[at], title: (p) => `${show(p.r[at])} ${label}\n${show(p.at, "s")}${p.r[5] ? "\nlimited at that moment" : ""}`, ...TIP })),
      ],
    }));
  }
  const says = ["Seconds since the run began."];
  says.unshift(windows ? "Line: median of each second; band: up to its slowest." : "Line: median of a stretch of samples; band: from its fastest to its slowest.");
  if (clipped) says.push(`Triangles: slower samples than the axis holds, up to ${show(most, "ms")}.`);
  if (knees.length) says.push("Dashed upright: throughput stays 5 % below its first plateau from here on.");
  if (sensors.length) says.push("Red dots: the board was throttled or under-voltage at that moment.");
  else says.push("Temperature, clock and power could not be read on this device.");
  return [...out, soft(says.join(" "))];
}
