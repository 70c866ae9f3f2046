// Accuracy class by class, and the images that variants dispute.
function accuracy(redraw) {
  if (!data.accuracy.length) return [empty("No variant was scored: accuracy by class needs labelled images in the bundle.", "edgevit build MODEL … --eval DATA -o DIR")];
  const g = data.accuracy[Math.min(chosen.group ?? 0, data.accuracy.length - 1)];
  const here = g.variants.map((row, k) => ({ row, k })).filter(({ row }) => isShown(row));
  const out = [];
  if (data.accuracy.length > 1) out.push(el("div", { class: "axes" }, select("images", data.accuracy.map((a, k) => [String(k), `${a.model}, ${a.evaluation}, ${count(a.images, "image")}`]), String(data.accuracy.indexOf(g)), (v) => { chosen.group = Number(v); redraw(); })));
  if (!here.length) return [...out, empty("No scored variant passes the filters.")];
  const name = namer(g.variants), called = (c) => (g.names[c] === undefined ? `class ${c}` : g.names[c]);
  if (g.variants_of > g.variants.length) out.push(soft(`The first ${g.variants.length} of ${count(g.variants_of, "variant")}, fp32 first.`));
  const holder = el("div", { class: "plot tall", "data-chart": "classes" });
  if (g.classes.length) later(holder, (width) => classes(width, g, here, name, called));
  out.push(el("h3", {}, "Top-1 by class"));
  if (!g.classes.length) out.push(empty(`${count(g.images, "image")} of ${count(g.classes_few, "class")} are too few to tell classes apart: at least five a class are needed.`, "edgevit build MODEL … --eval DATA -o DIR"));
  else out.push(soft(`${g.evaluation}, ${count(g.images, "image")}${g.classes_of > g.classes.length ? `; the ${g.classes.length} of ${g.classes_of} classes on which variants differ most` : ""}${g.classes_few ? `; ${g.classes_few} with fewer than five images are left out` : ""}. Line: ${name(g.variants[0])} ± its standard error.`), holder);
  for (const told of g.devices_disagree) out.push(el("p", { class: "finding" }, told));
  out.push(el("h3", {}, "Images on which variants disagree"));
  if (here.length < 2) out.push(soft("One variant alone has no other to disagree with."));
  else out.push(...disputes(g, here, name, called));
  return out;
}

// A variant of a group is drawn where any measurement of the same file in the same runtime passes the filters.
const isShown = (row) => shown.some((i) => text("artifact", i) === text("artifact", row) && text("runtime", i) === text("runtime", row));

function classes(width, g, here, name, called) {
  const points = g.classes.flatMap(([c, n, shares]) => here.map(({ row, k }) => ({ c, n, row, v: shares[k] })));
  const bars = g.classes.map(([c, n, shares]) => { const p = shares[0] / 100, e = 100 * Math.sqrt((p * (1 - p)) / n); return { c, low: Math.max(0, shares[0] - e), high: Math.min(100, shares[0] + e) }; });
  // Variants that agree would lie on one another: each has a line of its own within its class.
  const lane = Math.min(4, 16 / here.length), place = new Map(here.map(({ row }, k) => [row, lane * (k - (here.length - 1) / 2)]));
  const names = new Map(g.classes.map(([c]) => [c, fold(called(c), width < 420 ? 16 : 28)]));
  return [key(here.map(({ row }) => row)), Plot.plot({
    ...common(width), height: 56 + 30 * g.classes.length, marginTop: 8, marginBottom: 40, marginRight: 18,
    marginLeft: Math.min(14 + 6.6 * d3.max(names.values(), (n) => n.length), width * 0.4),
    x: { label: "top-1 (%)", grid: true, domain: [Math.max(0, d3.min([...points.map((p) => p.v), ...bars.map((b) => b.low)]) - 2), Math.min(100.5, d3.max([...points.map((p) => p.v), ...bars.map((b) => b.high)]) + 2)], ticks: width < 500 ? 4 : 8 },
    y: { label: null, type: "point", padding: 0.6, domain: g.classes.map(([c]) => c), tickSize: 0, tickFormat: (c) => names.get(c) },
    marks: [
      Plot.ruleY(bars, { y: "c", x1: "low", x2: "high", stroke: "currentColor", strokeOpacity: 0.5 }),
      ...d3.groups(points, (p) => p.row).map(([row, some]) => Plot.dot(some, { y: "c", x: "v", dy: place.get(row), r: 3.6, symbol: SYMBOLS[text("runtime", row)] ?? "circle", stroke: colour(text("scheme", row)), fill: colour(text("scheme", row)), fillOpacity: 0.45, strokeWidth: 1.2 })),
      Plot.tip(points, Plot.pointer({ y: "c", x: "v", title: (p) => `${called(p.c)}, ${count(p.n, "image")}\n${name(p.row)}\n${show(p.v)} %`, ...TIP })),
    ],
  })];
}

function disputes(g, here, name, called) {
  const disputed = g.disputed.filter(([, , told]) => distinct(here.map(({ k }) => told[k])).length > 1);
  const pictured = Object.keys(g.pictures).length > 0;
  const say = soft(`${count(g.disputed_of, "image")} of ${g.images.toLocaleString("en")}${g.disputed_of > g.disputed.length ? `, the ${g.disputed.length} most disputed` : ""}; wrong answers in red.${pictured ? "" : " Named with --bundle DIR, a bundle adds the pictures."}`);
  if (!disputed.length) return [say, soft("The variants shown here agree on every one of these images.")];
  const heads = [el("th", { class: "left" }, "image"), el("th", { class: "left" }, "label"), ...here.map(({ row }) => el("th", { class: "left slant" }, name(row)))];
  const rows = disputed.map(([image, label, told]) => el("tr", {},
    el("td", { class: "left image" }, g.pictures[image] ? el("img", { src: g.pictures[image], alt: `image ${image}`, loading: "lazy" }) : null, el("small", {}, `#${image}`)),
    el("td", { class: "left" }, called(label)), ...here.map(({ k }) => el("td", { class: `left ${told[k] === label ? "" : "invalid"}` }, called(told[k])))));
  return [say, el("div", { class: "scroll low" }, el("table", { class: "plain" }, el("thead", {}, el("tr", {}, heads)), el("tbody", {}, rows)))];
}
