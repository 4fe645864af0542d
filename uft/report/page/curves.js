// The curves' controls, the choice of metrics, and a card for each chosen one.

const AT_FIRST = 4;
const USUAL = ["loss", "nll", "eval/nll"];
const KINDS = [
  ["eval", "Evaluation"],
  ["train", "Training"],
  ["cost", "Cost"],
];
const BANDS_UP_TO = 12; // groups; more bands hide each other
const cards = new Map(); // metric -> panel

function curveMetrics() {
  return data.metrics.filter(
    (metric) => metric.curve && Object.keys(own(data.curves.runs, metric.name) ?? {}).length > 0,
  );
}

function firstMetrics() {
  const there = curveMetrics().map((metric) => metric.name);
  const wanted = [...headline, ...USUAL, ...there].filter((name) => there.includes(name));
  return [...new Set(wanted)].slice(0, AT_FIRST);
}

function curveView() {
  const form = byId("curve-controls").elements;
  return {
    x: form.x.value,
    band: form.band.value,
    per: form.per.value,
    smoothing: Number(form.smoothing.value),
    seeds: form.seeds.checked,
    log: form.log.checked,
    whole: form.whole.checked,
  };
}

function metricTags(metric) {
  const tags = [];
  if (metric.direction) tags.push(el("span", { class: "tag" }, better(metric.name)));
  if (!metric.comparable) tags.push(el("span", { class: "tag warn" }, "not comparable between objectives"));
  return tags;
}

function addCard(metric) {
  const chart = el("div", { class: "chart", role: "img", "aria-label": `Curves of ${shown(metric.name)}` });
  const note = el("p", { class: "caption note" });
  const card = el(
    "article",
    { class: "card", "data-metric": metric.name },
    el("h3", {}, breakable(metric.name), ...metricTags(metric)),
    el("div", {}, chart),
    metric.caption ? el("p", { class: "caption" }, shown(metric.caption, 1000)) : null,
    note,
  );
  byId("curve-grid").append(card);
  const fit = () => {
    const facets = curveFacets(metric.name, curveView());
    card.classList.toggle("across", facets.length > 1);
    fitPlots(chart, facets);
    return facets;
  };
  const panel = addPanel(chart, () => {
    const { traces, layout, note: text } = curveChart(metric.name, curveView(), fit(), chart);
    draw(chart, traces, layout);
    note.textContent = text;
  });
  cards.set(metric.name, { panel, card, fit });
}

function removeCard(metric) {
  const { panel, card } = cards.get(metric.name);
  removePanel(panel);
  Plotly.purge(panel.node);
  card.remove();
  cards.delete(metric.name);
}

function countMetrics() {
  byId("metric-chooser").querySelector("summary").textContent = `Metrics (${cards.size} of ${curveMetrics().length})`;
}

function metricChoice(metric) {
  const box = el("input", { type: "checkbox", value: metric.name, checked: cards.has(metric.name) });
  box.addEventListener("change", () => {
    (box.checked ? addCard : removeCard)(metric);
    countMetrics();
  });
  return el(
    "label",
    { "data-name": metric.name.toLowerCase() },
    box,
    el("bdi", {}, shown(metric.name, 80)),
    metric.comparable ? null : el("span", { class: "quiet small" }, "not comparable"),
  );
}

function listMetrics() {
  const parts = KINDS.map(([kind, title]) => {
    const choices = curveMetrics()
      .filter((metric) => metric.kind === kind)
      .map(metricChoice);
    return choices.length ? el("fieldset", {}, el("legend", {}, title), ...choices) : null;
  });
  byId("metric-list").replaceChildren(...parts.filter(Boolean));
}

function findMetrics(text) {
  const wanted = text.toLowerCase();
  for (const choice of byId("metric-list").querySelectorAll("label"))
    choice.hidden = !choice.dataset.name.includes(wanted);
  for (const part of byId("metric-list").children) part.hidden = !part.querySelector("label:not([hidden])");
}

function noteUnfinished() {
  const drawn = (run) => curveMetrics().some((metric) => own(data.curves.runs[metric.name], run.id) !== null);
  const number = shownRuns().filter((run) => !isFinished(run) && drawn(run)).length;
  const words = "dotted; such runs are in a mean only where no run of their group has finished.";
  byId("curve-note").textContent = number === 0 ? "" : `${plural(number, "unfinished run")} ${words}`;
}

function startCurves() {
  const metrics = curveMetrics();
  if (metrics.length === 0) {
    byId("curves").hidden = true;
    return;
  }
  const form = byId("curve-controls");
  fill(form.elements.per, facetOptions(), "");
  form.elements.per.parentElement.hidden = facetOptions().length === 1;
  if (groups.length > BANDS_UP_TO) form.elements.band.value = "none";
  firstMetrics().forEach((name) => addCard(metricByName.get(name)));
  listMetrics();
  countMetrics();
  onSelection(noteUnfinished);
  noteUnfinished();
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (event.target.name === "find") return findMetrics(event.target.value);
    form.elements.amount.value = form.elements.smoothing.value;
    for (const { fit } of cards.values()) fit(); // all at once: what is in view must not move while they are drawn
    return event.target.closest(".chooser") || redraw([...cards.values()].map((entry) => entry.panel));
  });
}
