// Any metric against any other: group means with their 95 % intervals, single runs on demand, a box selects.

const NAMED = 12; // groups whose names have room in the chart
// Plotly dims what a box leaves out; the page does that by itself.
const KEPT = { selected: { marker: { opacity: 1 } }, unselected: { marker: { opacity: 1 } } };

function measured() {
  return data.metrics.filter((metric) => runs.some((run) => finalOf(run, metric.name) !== null));
}

function metricOptions(metrics) {
  return metrics.map((metric) => [
    metric.name,
    `${shown(metric.name, 60)}${metric.comparable ? "" : " (not comparable)"}`,
  ]);
}

function metricTitle(metric) {
  const direction = better(metric);
  return `${label(metric)}${direction ? `  (${direction})` : ""}`;
}

function pointHover(name, stats, [x, y]) {
  const line = (metric, stat) => `${label(metric)}  ${figure(stat.mean)} ${interval(stat)}`;
  return `<b>${name}</b><br>${line(x, stats[0])}<br>${line(y, stats[1])}<br>n ${Math.min(stats[0].n, stats[1].n)}`;
}

function errorBar(stat, dimmed) {
  if (stat.low === null) return { visible: false };
  return {
    type: "data",
    symmetric: false,
    array: [stat.high - stat.mean],
    arrayminus: [stat.mean - stat.low],
    thickness: 1.2,
    width: 3,
    color: colour(dimmed.variable, dimmed.on ? 0.25 : 0.8),
  };
}

// What is not selected stays, faint, so that one can select anew.
function groupPoint(group, names) {
  const members = membersOf(group);
  const on = members.some(isSelected);
  const finished = members.filter(isFinished);
  const stats = names.map((metric) => (on ? groupStat(group, metric) : finalStat(finished, metric)));
  if (stats.some((stat) => stat === null || !Number.isFinite(stat.mean))) return null;
  const look = lookOfGroup(group);
  const dimmed = { on: !on, variable: look.variable };
  return {
    x: [stats[0].mean],
    y: [stats[1].mean],
    error_x: errorBar(stats[0], dimmed),
    error_y: errorBar(stats[1], dimmed),
    mode: groups.length <= NAMED ? "markers+text" : "markers",
    text: [label(group.name, 26)],
    textposition: "top right",
    textfont: { size: 11, color: colour(on ? "--quiet" : "--line") },
    marker: { symbol: look.marker, size: 11, color: colour(look.variable, on ? 1 : 0.25) },
    customdata: [group.runs],
    hovertext: [pointHover(label(group.name), stats, names)],
    hovertemplate: "%{hovertext}<extra></extra>",
    ...KEPT,
    uft: "group",
    group: group.id,
  };
}

function runPoints(group, names) {
  const look = lookOfGroup(group);
  const members = membersOf(group).filter((run) => names.every((metric) => Number.isFinite(finalOf(run, metric))));
  if (members.length === 0) return null;
  const stats = (run) => names.map((metric) => statOf([finalOf(run, metric)]));
  return {
    x: members.map((run) => finalOf(run, names[0])),
    y: members.map((run) => finalOf(run, names[1])),
    mode: "markers",
    marker: {
      symbol: members.map((run) => look.marker + (isFinished(run) ? "" : "-open")),
      size: 6,
      color: members.map((run) => colour(look.variable, isSelected(run) ? 0.75 : 0.2)),
      line: { width: 1, color: colour(look.variable) },
    },
    customdata: members.map((run) => [run.id]),
    hovertemplate: "%{hovertext}<extra></extra>",
    hovertext: members.map((run) =>
      pointHover(`${label(run.name)}${isFinished(run) ? "" : ` (${label(run.status)})`}`, stats(run), names),
    ),
    ...KEPT,
    uft: "runs",
  };
}

function captionOf(name) {
  return shown(metricByName.get(name).caption ?? "", 500);
}

function scatterNote(names, drawn) {
  const unlike = names.filter((name) => !metricByName.get(name).comparable);
  const left = shownGroups().filter((group) => !group.loose).length - drawn;
  return [
    ...unlike.map((name) => `${shown(name, 60)} is not comparable between objectives. ${captionOf(name)}`),
    left > 0 ? `${plural(left, "group")} without finite values of both.` : "",
  ]
    .filter(Boolean)
    .join(" ");
}

function drawScatter() {
  const form = byId("scatter-controls").elements;
  const names = [form.x.value, form.y.value];
  const means = groups.map((group) => groupPoint(group, names)).filter(Boolean);
  const single = form.seeds.checked
    ? allGroups()
        .map((group) => runPoints(group, names))
        .filter(Boolean)
    : [];
  const layout = chartLayout({
    dragmode: "select",
    hovermode: "closest",
    selections: [],
    xaxis: chartAxis(metricTitle(names[0]), { type: "linear", tickformat: ".4~g" }),
    yaxis: chartAxis(metricTitle(names[1]), { type: "linear", tickformat: ".4~g" }),
    uirevision: names.join(" "),
  });
  const node = byId("scatter");
  draw(node, [...single, ...means], layout, { modeBarButtonsToRemove: ["lasso2d", "autoScale2d"] });
  const shownMeans = means.filter((trace) => membersOf(groupById.get(trace.group)).some(isSelected)).length;
  byId("scatter-note").textContent = scatterNote(names, shownMeans);
  listen(node);
}

// With single runs drawn, a box takes exactly those within it; else whole groups.
function listen(node) {
  if (node.dataset.listens) return;
  node.dataset.listens = "yes";
  node.on("plotly_selected", (event) => {
    if (!event?.points?.length) return;
    const single = event.points.filter((point) => point.data.uft === "runs");
    select(
      (single.length ? single : event.points).flatMap((point) => point.customdata),
      "scatter",
    );
  });
  node.on("plotly_deselect", () => select(null, "scatter"));
  node.on("plotly_click", (event) => selectOnly(event.points[0].customdata, "scatter"));
}

function startScatter() {
  const metrics = measured();
  if (metrics.length < 2 || runs.length < 2) {
    byId("tradeoff").hidden = true;
    return;
  }
  const form = byId("scatter-controls");
  const names = metrics.map((metric) => metric.name);
  const [x, y] = [...new Set([...headline.filter((name) => names.includes(name)), ...names])];
  fill(form.elements.x, metricOptions(metrics), x);
  fill(form.elements.y, metricOptions(metrics), y);
  form.elements.seeds.checked = !groups.some((group) => Object.keys(group.metrics).length > 0);
  const panel = addPanel(byId("scatter"), drawScatter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => redraw([panel]));
}
