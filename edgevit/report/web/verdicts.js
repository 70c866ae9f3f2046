// Why figures do not count, or count with a warning; pairs compared; and what identifies every run.
function verdicts() {
  const groups = new Map();
  for (const i of shown) {
    if (text("verdict", i) === "VALID") continue;
    for (const told of (text("reasons", i) || "no reason was recorded").split("\n")) {
      // One reason, whatever its figures and the number of its series.
      const name = `${text("verdict", i)}\n${told.replace(/\d+([.,]\d+)*/g, "#")}`;
      const one = groups.get(name) ?? { told, rows: new Set() };
      one.rows.add(i);
      groups.set(name, one);
    }
  }
  const valid = shown.filter(rankable).length;
  const say = el("p", {}, `${valid.toLocaleString("en")} of ${count(shown.length, "measurement")} ${shown.length === 1 ? "is" : "are"} VALID.`);
  const rank = { failed: 0, INVALID: 1, warned: 2 };
  const ordered = d3.sort(groups, ([name]) => rank[name.split("\n")[0]], ([, one]) => -one.rows.size);
  const several = distinct(data.table.texts.target.values).length > 1;
  const names = (rows) => { const short = namer(rows.slice(0, 200)), name = (i) => (several && !short(i).includes(text("target", i)) ? `${text("target", i)}: ${short(i)}` : short(i)); return rows.slice(0, 6).map(name).join("; ") + (rows.length > 6 ? `; and ${count(rows.length - 6, "more")}`.replace(/mores$/, "more") : ""); };
  return [say, el("ul", { class: "verdicts" }, ordered.slice(0, 60).map(([name, { told, rows }]) => {
    const word = name.split("\n")[0];
    return el("li", {}, el("b", { class: word.toLowerCase() }, word === "warned" ? "warning" : word), rows.size > 1 ? `, ${rows.size} times, such as: ` : ": ", told, el("small", {}, names([...rows])));
  })), ordered.length > 60 ? soft(`${count(ordered.length - 60, "further reason")}: filter to see them.`) : null,
  ...data.plans.pairs.map((p) => el("p", { class: "finding" }, el("strong", {}, `${p.target}: B ${p.b} against A ${p.a}: `), p.ratio ? `${p.ratio[0]} (${p.ratio[1]} to ${p.ratio[2]}, 95 %, ${p.blocks} ABBA blocks); ` : "", p.words, ...p.left_out.map((l) => el("small", {}, `left out: ${l}`))))];
}

function evidence() {
  const runs = new Set(shown.map((i) => text("run", i)));
  const here = data.evidence.filter((e) => runs.has(e.run));
  return [el("p", {}, `${count(here.length, "run")}. Every figure can be redone from the raw samples in the store: `, el("code", {}, "edgevit results export -o FILE.json")),
    ...data.thinned.map((told) => soft(told)),
    ...here.slice(0, 40).map((e) => fact(`${e.target}, run ${e.run}`, e.lines)),
    here.length > 40 ? soft(`The newest 40 of ${here.length} are listed; filter by target for others.`) : null];
}
