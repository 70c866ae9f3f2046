// What to ship, first.
const HEADS = { ship: "Ship", missing: "No answer yet", none: "Nothing to ship yet" };

function answers() {
  const many = distinct(data.answers.map((a) => a.model)).length > 1;
  return el("div", { class: "cards" }, data.answers.map((a) => card(a, many)));
}

function card(a, many) {
  const where = a.targets.length > 3 ? `${a.targets.length} targets` : a.targets.join(", ");
  const title = a.word === "none" ? HEADS.none : a.word === "missing" ? HEADS.missing : a.title;
  const box = el("article", { class: `card ${a.word}` },
    el("p", { class: "where" }, el("strong", {}, where), a.board ? el("span", {}, ` · ${a.board}`) : null, many && a.model ? el("span", {}, ` · ${a.model}`) : null),
    el("h3", {}, a.word === "ship" ? el("span", { class: "do" }, "Ship ") : null, title),
    a.word === "ship" ? el("p", { class: "in" }, `in ${a.where}`) : null,
    a.missing.map((told) => el("p", { class: "lacks" }, told)),
    a.word === "missing" ? el("p", { class: "in" }, `Fastest VALID so far: ${a.title} in ${a.where}`) : null,
    a.figures.length ? el("dl", { class: "figures" }, a.figures.map(([name, value, sure]) => el("div", {}, el("dt", {}, name), el("dd", {}, value, sure ? el("small", {}, sure) : null)))) : null,
    a.figures_of ? soft(`Figures ${a.figures_of}.`) : null,
    soft(`Why: ${a.why}.`), a.remarks.map((told) => soft(told)));
  if (a.word !== "ship") box.append(el("p", { class: "next" }, "Next:"), el("pre", {}, el("code", {}, a.commands.join("\n"))));
  const told = [];
  if (a.each.length) told.push(fact(`Each of the ${a.each.length} targets`, a.each));
  if (a.behind.length) told.push(fact(`Might be shipped too, ${a.behind.length}`, a.behind));
  if (a.dropped.length) told.push(fact(`Must not be shipped, ${a.dropped.length}`, a.dropped, a.word === "none"));
  box.append(...told);
  return box;
}

function fact(title, pairs, open = false) {
  return el("details", { open }, el("summary", {}, title), el("dl", { class: "pairs" }, pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
}
