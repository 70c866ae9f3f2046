"use strict";
// Draws every chart from the JSON in the page. Text goes through Plot and textContent only, never through innerHTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // Okabe and Ito's palette, told apart with any colour vision; lightened where the paper is dark.
  const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#b4579a", "#8a6d00", "#3b8fb8", "#5c636b"];
  const DARK = ["#56b4e9", "#ff9d57", "#3fd0a4", "#e59ccb", "#f0e442", "#9ad4f5", "#a0a8b2"];
  const ms = (v) => (v >= 100 ? v.toFixed(1) : v >= 1 ? v.toFixed(2) : v.toFixed(3)) + " ms";

  const key = (holder, rows, colour) => {
    const box = document.createElement("div");
    box.className = "key";
    for (const scheme of new Set(rows.map((r) => r.scheme))) {
      const one = document.createElement("span");
      one.textContent = scheme;
      one.style.setProperty("--c", colour(scheme));
      box.append(one);
    }
    holder.append(box);
  };

  const common = (width) => ({ width, style: { background: "transparent", color: "inherit", fontSize: "12px", fontFamily: "inherit" } });

  const fold = (text, room) => (text.length > room ? text.slice(0, room - 1) + "…" : text);

  function latency(holder, rows, width, colour) {
    key(holder, rows, colour);
    const narrow = width < 420;
    const room = narrow ? 21 : 30;
    const domain = rows.map((r) => r.id);
    const name = new Map(rows.map((r) => [r.id, fold(r.label, room)]));
    const medians = rows.flatMap((r) => r.process_p50_ms.map((v) => ({ id: r.id, v })));
    holder.append(Plot.plot({
      ...common(width), height: 48 + 34 * rows.length, marginLeft: Math.min(8 + 6.6 * Math.max(...[...name.values()].map((n) => n.length)), width * 0.45),
      marginRight: 16, marginBottom: 36,
      x: { label: "latency (ms)", grid: true, domain: [0, 1.04 * Math.max(...rows.map((r) => r.q[99]))] },
      y: { label: null, domain, tickSize: 0, tickFormat: (d) => name.get(d) },
      marks: [
        Plot.ruleY(rows, { y: "id", x1: (r) => r.q[1], x2: (r) => r.q[99], stroke: (r) => colour(r.scheme), strokeOpacity: 0.6 }),
        Plot.ruleY(rows, { y: "id", x1: (r) => r.q[25], x2: (r) => r.q[75], stroke: (r) => colour(r.scheme), strokeWidth: 11 }),
        Plot.tickX(rows, { y: "id", x: (r) => r.q[50], stroke: "currentColor", strokeWidth: 2 }),
        Plot.dot(medians, { y: "id", x: "v", r: 2.2, fill: "currentColor", dy: 12 }),
        Plot.tip(rows, Plot.pointerY({ y: "id", x: (r) => r.q[50], title: (r) =>
          `${r.label}\n${r.runtime}, ${r.n} samples in ${r.processes} processes\np50 ${ms(r.q[50])}\nmiddle half ${ms(r.q[25])} – ${ms(r.q[75])}\np1 – p99 ${ms(r.q[1])} – ${ms(r.q[99])}\nslowest ${ms(r.q[100])}`, fill: "var(--card)", stroke: "var(--line)" })),
      ],
    }));
  }

  function cumulative(holder, rows, width, colour) {
    const points = rows.flatMap((r) => r.q.map((v, i) => ({ id: r.id, label: r.label, scheme: r.scheme, dashed: r.runtime !== "onnxruntime", v, share: i })));
    const last = Math.max(...rows.map((r) => r.q[99]));
    holder.append(Plot.plot({
      ...common(width), height: 260, marginLeft: 44, marginBottom: 36, clip: true,
      x: { label: "latency (ms)", grid: true, domain: [0.96 * Math.min(...rows.map((r) => r.q[0])), 1.02 * last], clamp: true },
      y: { label: "samples at or below (%)", grid: true, domain: [0, 100] },
      marks: [
        Plot.line(points.filter((p) => !p.dashed), { x: "v", y: "share", z: "id", stroke: (p) => colour(p.scheme), strokeWidth: 1.8 }),
        Plot.line(points.filter((p) => p.dashed), { x: "v", y: "share", z: "id", stroke: (p) => colour(p.scheme), strokeWidth: 1.8, strokeDasharray: "5 3" }),
        Plot.tip(points, Plot.pointer({ x: "v", y: "share", title: (p) => `${p.label}\n${p.share} % within ${ms(p.v)}`, fill: "var(--card)", stroke: "var(--line)" })),
      ],
    }));
  }

  function accuracy(holder, rows, width, colour) {
    const scored = rows.filter((r) => r.top1 !== null);
    const front = scored.filter((r) => r.front).sort((a, b) => a.p50_ms - b.p50_ms);
    const low = Math.min(...scored.map((r) => r.top1 - r.top1_error)), high = Math.max(...scored.map((r) => r.top1 + r.top1_error));
    const pad = Math.max(0.2, 0.08 * (high - low));
    key(holder, scored, colour);
    holder.append(Plot.plot({
      ...common(width), height: 300, marginLeft: 48, marginRight: 24, marginBottom: 36,
      x: { label: "p50 latency (ms)", grid: true, domain: [0, 1.08 * Math.max(...scored.map((r) => r.p90_ms ?? r.p50_ms))] },
      y: { label: "top-1 (%)", grid: true, domain: [low - pad, high + pad] },
      marks: [
        Plot.line(front, { x: "p50_ms", y: "top1", curve: "step-after", stroke: "currentColor", strokeOpacity: 0.45, strokeDasharray: "4 4" }),
        Plot.ruleX(scored, { x: "p50_ms", y1: (r) => r.top1 - r.top1_error, y2: (r) => r.top1 + r.top1_error, stroke: (r) => colour(r.scheme), strokeOpacity: 0.7 }),
        Plot.ruleY(scored.filter((r) => r.p90_ms !== null), { y: "top1", x1: "p50_ms", x2: "p90_ms", stroke: (r) => colour(r.scheme), strokeOpacity: 0.7 }),
        Plot.dot(scored, { x: "p50_ms", y: "top1", r: 5.5, symbol: (r) => (r.runtime === "onnxruntime" ? "circle" : "square"), fill: (r) => (r.valid ? colour(r.scheme) : "var(--card)"), stroke: (r) => colour(r.scheme), strokeWidth: 1.6 }),
        Plot.tip(scored, Plot.pointer({ x: "p50_ms", y: "top1", title: (r) => `${r.label}\n${r.runtime}\np50 ${ms(r.p50_ms)}\ntop-1 ${r.top1.toFixed(2)} ± ${r.top1_error.toFixed(2)} %\n${r.file_mb.toFixed(1)} MB${r.valid ? "" : "\nINVALID"}`, fill: "var(--card)", stroke: "var(--line)" })),
      ],
    }));
  }

  function load(holder, rows, width, colour) {
    const through = rows.filter((r) => r.load.length);
    const points = through.flatMap((r) => r.load.map(([s, v]) => ({ id: r.id, scheme: r.scheme, s, v })));
    key(holder, through, colour);
    holder.append(Plot.plot({
      ...common(width), height: 220, marginLeft: 48, marginBottom: 36,
      x: { label: "seconds under load", grid: true },
      y: { label: "latency (ms)", grid: true, domain: [0, 1.08 * Math.max(...points.map((p) => p.v))] },
      marks: [
        Plot.line(points, { x: "s", y: "v", z: "id", stroke: (p) => colour(p.scheme) }),
        Plot.ruleX(through.filter((r) => r.knee_s !== null), { x: "knee_s", stroke: (r) => colour(r.scheme), strokeDasharray: "4 3" }),
      ],
    }));
  }

  function conditions(holder, readings, width) {
    for (const [field, label] of [["t", "temperature (°C)"], ["f", "CPU frequency (MHz)"], ["g", "GPU clock (MHz)"], ["p", "power (W)"]]) {
      const known = readings.filter((r) => r[field] !== null);
      if (!known.length) continue;
      const values = known.map((r) => r[field]);
      const low = Math.min(...values), high = Math.max(...values), pad = Math.max(0.05 * high, (high - low) * 0.1);
      holder.append(Plot.plot({
        ...common(width), height: 150, marginLeft: 48, marginBottom: 34,
        x: { label: "seconds since the run began", grid: true, nice: true },
        y: { label, grid: true, domain: [low - pad, high + pad], ticks: 4 },
        marks: [
          Plot.line(known, { x: "s", y: field, z: "z", stroke: "currentColor", strokeOpacity: 0.6 }),
          Plot.dot(known, { x: "s", y: field, r: 2.4, fill: (r) => (r.limited ? "var(--bad)" : "currentColor") }),
        ],
      }));
    }
  }

  const draw = { latency, cumulative, accuracy, load };
  function render() {
    const palette = dark.matches ? DARK : LIGHT;
    const schemes = data.schemes;
    const colour = (scheme) => palette[Math.max(0, schemes.indexOf(scheme)) % palette.length];
    for (const holder of document.querySelectorAll(".plot")) {
      const section = data.sections[Number(holder.dataset.section)];
      const width = Math.max(240, Math.floor(holder.clientWidth));
      holder.replaceChildren();
      if (holder.dataset.chart === "conditions") conditions(holder, section.readings, width);
      else draw[holder.dataset.chart](holder, section.rows, width, colour);
    }
    document.documentElement.dataset.drawn = "yes";
  }
  render();
  dark.addEventListener("change", render);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; render(); } });
})();
