// The same variant on many devices of one kind: how far they differ, beside the noise of measuring.
function fleet(redraw) {
  const here = data.fleet.filter((g) => g.rows.filter((i) => shown.includes(i)).length > 1);
  if (!here.length) {
    return [empty(data.fleet.length ? "No variant that passes the filters was measured on two devices of one kind." : "Two or more devices of one kind, measured with the same file, show how far they differ.", data.fleet.length ? null : "edgevit bench BUNDLE tag:NAME")];
  }
  const named = (g) => `${text("label", g.rows[0])} · ${text("runtime", g.rows[0])} · ${count(number("threads", g.rows[0]), "thread")} · ${g.board}${data.answers.some((a) => a.model !== g.model) ? ` · ${g.model}` : ""}`;
  const twins = d3.rollup(here, (some) => some.length > 1, named);
  const called = (g) => (twins.get(named(g)) ? `${named(g)} · ${text("provider", g.rows[0])}, file ${text("artifact", g.rows[0]).slice(0, 8)}` : named(g));
  const identity = (g) => [g.board, g.model, ...["artifact", "runtime", "provider"].map((name) => text(name, g.rows[0])), number("threads", g.rows[0])].join("\n");
  const g = here.find((one) => identity(one) === chosen.variant) ?? here[0];
  const holder = el("div", { class: "plot tall", "data-chart": "fleet" });
  later(holder, (width) => devices(width, g));
  const parts = g.spread.map((s) => [spreadName(s.name), s.percent === null ? s.absent : `${show(s.percent)} %${s.low === null ? "" : ` (${show(s.low)} – ${show(s.high)} %)`}`]);
  const verdict = g.differ === null ? "" : g.differ ? "Devices differ by more than the noise of measuring." : "No difference between devices can be told from the noise of measuring.";
  return [here.length > 1 ? el("div", { class: "axes" }, select("variant", here.map((one) => [identity(one), called(one)]), identity(g), (v) => { chosen.variant = v; redraw(); })) : soft(called(g)),
    verdict ? el("p", { class: "finding" }, verdict) : null,
    el("dl", { class: "figures" }, parts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    soft("Spread: standard deviation of the logarithm of a process's median, 95 % interval in brackets; nested model of devices, runs and processes."), holder];
}

const spreadName = (name) => ({ device: "from device to device", run: "from run to run", process: "from process to process", "device and run": "from device to device (runs not repeated)", "run and process": "from run to run", "device and run and process": "from device to device, noise included" })[name] ?? name;

function devices(width, g) {
  const rows = g.rows.map((i, k) => ({ i, own: g.own[k] })).filter(({ i }) => shown.includes(i));
  const names = new Map(rows.map(({ i }) => [i, fold(text("target", i), width < 420 ? 16 : 30)]));
  const own = rows.flatMap(({ i, own: values }) => values.map((v) => ({ i, v })));
  const ends = d3.extent([...own.map((o) => o.v), ...rows.flatMap(({ i }) => [number("p50_low", i) ?? number("p50", i), number("p50_high", i) ?? number("p50", i)])]);
  const pad = Math.max(0.1 * (ends[1] - ends[0]), 0.002 * ends[1]);
  return [Plot.plot({
    ...common(width), height: 60 + 24 * rows.length, marginTop: 12, marginBottom: 42, marginRight: 18,
    marginLeft: Math.min(16 + 6.6 * d3.max(names.values(), (n) => n.length), width * 0.4),
    x: { label: "p50 latency (ms)", grid: true, domain: [ends[0] - pad, ends[1] + pad], ticks: width < 500 ? 4 : 8 },
    y: { label: null, type: "point", padding: 0.6, domain: rows.map(({ i }) => i), tickSize: 0, tickFormat: (i) => names.get(i) },
    marks: [
      Plot.ruleX([g.middle], { stroke: "currentColor", strokeOpacity: 0.4, strokeDasharray: "4 4" }),
      Plot.ruleY(rows.filter(({ i }) => number("p50_low", i) !== null), { y: "i", x1: ({ i }) => number("p50_low", i), x2: ({ i }) => number("p50_high", i), stroke: ({ i }) => colour(text("scheme", i)), strokeWidth: 2, strokeOpacity: 0.7 }),
      Plot.dot(own, { y: "i", x: "v", r: 2.2, fill: "currentColor", fillOpacity: 0.55 }),
      Plot.dot(rows, { y: "i", x: ({ i }) => number("p50", i), r: 5, fill: ({ i }) => colour(text("scheme", i)) }),
      Plot.tip(rows, Plot.pointerY({ y: "i", x: ({ i }) => number("p50", i), title: ({ i }) => `${text("target", i)}\np50 ${show(number("p50", i), "ms")}${number("p50_low", i) === null ? "" : ` (${show(number("p50_low", i))} – ${show(number("p50_high", i))})`}\n${show((100 * number("p50", i)) / g.middle - 100)} % from the middle${number("hottest", i) === null ? "" : `\nup to ${show(number("hottest", i), "°C")}`}`, ...TIP })),
    ],
  }), soft("Large: the newest p50 of each device with its 95 % interval; small: its processes; dashed: geometric mean of the devices.")];
}
