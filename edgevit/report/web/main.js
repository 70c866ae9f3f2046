// The sections in order, and the page kept up to date where it is served.
const SECTIONS = [
  ["table", "Measurements", () => table(drawAll)],
  ["tradeoff", "Trade-off", () => tradeoff(() => section("tradeoff"))],
  ["latency", "Latency", latency],
  ["time", "Through time", () => time(() => section("time"))],
  ["operators", "Operators", () => operators(() => section("operators"))],
  ["coverage", "Integers", coverage],
  ["accuracy", "Accuracy by class", () => accuracy(() => section("accuracy"))],
  ["fleet", "Devices", () => fleet(() => section("fleet"))],
  ["verdicts", "Verdicts", verdicts],
  ["evidence", "Evidence", evidence],
];

function section(id) {
  const [, , make] = SECTIONS.find(([name]) => name === id);
  document.getElementById(`${id}-body`).replaceChildren(...[make()].flat(3).filter((c) => c !== null && c !== undefined));
}
const drawTable = () => section("table");
function drawAll() {
  refilter();
  for (const holder of [...pending.keys()]) if (!holder.isConnected) { near.unobserve(holder); pending.delete(holder); }
  const told = document.getElementById("count");
  if (told) told.textContent = shown.length === data.table.count ? count(shown.length, "measurement") : `${shown.length.toLocaleString("en")} of ${count(data.table.count, "measurement")}`;
  for (const [id] of SECTIONS) section(id);
}

function rebuild() {
  document.title = data.title;
  document.getElementById("title").textContent = data.title;
  document.getElementById("lead").textContent = data.lead;
  document.getElementById("written").textContent = `Written by edgevit on ${data.written}.`;
  const page = document.getElementById("page");
  page.replaceChildren(
    el("section", { id: "answers" }, el("h2", {}, "What to ship"), data.answers.length ? answers() : empty("There are no measurements yet.", "edgevit bench BUNDLE TARGET")),
    ...(data.table.count ? [el("div", { class: "bar", id: "filters" }, filters(() => { chosen.limit = 25; drawAll(); })), ...SECTIONS.map(([id, title]) => el("section", { id }, el("h2", {}, title), el("div", { id: `${id}-body` })))] : []));
  document.getElementById("nav").replaceChildren(...[["answers", "Ship"], ...(data.table.count ? SECTIONS : [])].map(([id, title]) => el("a", { href: `#${id}` }, title)));
  if (data.table.count) drawAll();
  document.documentElement.dataset.drawn = "yes";
}

// Where the page is served it asks for what is new; what a person chose and opened stays as it is.
async function follow() {
  const told = document.getElementById("live");
  told.hidden = false;
  let revision = data.revision, changed = null;
  for (;;) {
    try {
      const answer = await fetch(`data?since=${encodeURIComponent(revision)}`, { cache: "no-store" });
      if (answer.status === 200) {
        const focus = document.activeElement?.getAttribute("aria-label"), at = scrollY;
        data = await answer.json();
        revision = data.revision;
        changed = Date.now();
        chosen.open.clear();
        rebuild();
        if (focus) document.querySelector(`[aria-label="${CSS.escape(focus)}"]`)?.focus({ preventScroll: true });
        scrollTo({ top: at });
      } else if (answer.status !== 204) throw new Error(`${answer.status} ${await answer.text()}`);
      told.className = "live";
      told.textContent = changed === null ? "live · nothing new since this page was opened" : `live · last result ${since(Date.now() - changed)}`;
    } catch (problem) {
      told.className = "live gone";
      told.textContent = `not live: ${problem.message === "Failed to fetch" ? "edgevit report --serve is not answering" : problem.message}; this is what was known last`;
    }
    await new Promise((done) => setTimeout(done, 2000));
  }
}
const since = (ms) => (ms < 5000 ? "just now" : ms < 120000 ? `${Math.round(ms / 1000)} s ago` : `${Math.round(ms / 60000)} min ago`);

rebuild();
dark.addEventListener("change", () => { if (data.table.count) drawAll(); });
let across = innerWidth;
addEventListener("resize", () => { if (innerWidth !== across) { across = innerWidth; if (data.table.count) drawAll(); } });
if (data.live) follow();
