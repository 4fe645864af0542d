// Any metric against any other: group means with their 95 % intervals and their front, single runs on demand, a box
// selects. A setting may have a plot for each of its values.

const NAMED = 12; // groups whose names have room in a plot
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

// On one line where the axis, `room` pixels long, has space for it.
function metricTitle(metric, room) {
  const direction = better(metric);
  const name = label(metric, Math.max(12, Math.min(48, Math.floor(room / 7))));
  const between = 7 * (name.length + direction.length + 4) < room ? "  " : "<br>";
  return `${name}${direction ? `${between}(${direction})` : ""}`;
}

function pointHover(name, stats, [x, y]) {
  const line = (metric, stat) => `${label(metric)}  ${figure(stat.mean)} ${interval(stat)}`;
  return `<b>${name}</b><br>${line(x, stats[0])}<br>${line(y, stats[1])}<br>n ${Math.min(stats[0].n, stats[1].n)}`;
}

function errorBar(stat, variable, alpha) {
  if (stat.low === null || alpha === 0) return { visible: false };
  return {
    type: "data",
    symmetric: false,
    array: [stat.high - stat.mean],
    arrayminus: [stat.mean - stat.low],
    thickness: 1.2,
    width: 3,
    color: colour(variable, alpha),
  };
}

// {group, on, stats} of every group with a figure of both metrics. What is not selected stays, faint, so that one can
// select anew.
function scatterPoints(names) {
  const found = groups.map((group) => {
    const members = membersOf(group);
    const on = members.some(isSelected);
    const stats = names.map((name) => (on ? groupStat(group, name) : finalStat(members.filter(isFinished), name)));
    return { group, on, stats };
  });
  return found.filter(({ stats }) => stats.every((stat) => stat !== null && Number.isFinite(stat.mean)));
}

// A point beyond the limits stands at the edge, as a triangle that points to it; `room` is the plot's in pixels.
function groupPoint({ group, on, stats }, names, limits, room, position) {
  const look = lookOfGroup(group);
  const beyond = stats.map((stat, i) => outside(stat.mean, limits[i]));
  const [x, y] = stats.map((stat, i) => {
    const inset = (8 * (limits[i][1] - limits[i][0])) / room[i];
    return beyond[i] ? within(stat.mean, [limits[i][0] + inset, limits[i][1] - inset]) : stat.mean;
  });
  const alpha = beyond.some(Boolean) ? 0 : on ? 0.8 : 0.25;
  return {
    x: [x],
    y: [y],
    error_x: errorBar(stats[0], look.variable, alpha),
    error_y: errorBar(stats[1], look.variable, alpha),
    mode: position ? "markers+text" : "markers",
    text: [label(group.name, 26)],
    textposition: position,
    textfont: { size: 11, color: colour(on ? "--quiet" : "--line") },
    marker: {
      symbol: beyond.some(Boolean) ? outwards(...beyond) : look.marker,
      size: beyond.some(Boolean) ? 13 : 11,
      color: colour(look.variable, on ? 1 : 0.25),
    },
    customdata: [group.runs],
    hovertext: [pointHover(label(group.name), stats, names)],
    hovertemplate: "%{hovertext}<extra></extra>",
    ...KEPT,
    uft: "group",
    group: group.id,
    outside: beyond.some(Boolean),
  };
}

// No group is better than one of these in both; the line has the steps that lie between them.
function frontTrace(points, names, limits) {
  const signs = names.map((name) => ({ max: 1, min: -1 })[directionOf(name)] ?? 0);
  const shownPoints = points.filter(({ on }) => on).map(({ stats }) => ({ x: stats[0].mean, y: stats[1].mean }));
  if (signs.includes(0) || shownPoints.length < 2) return [];
  const front = frontOf(shownPoints, signs);
  return [
    {
      x: front.map((point) => within(point.x, limits[0])),
      y: front.map((point) => within(point.y, limits[1])),
      mode: "lines",
      line: { shape: signs[0] > 0 ? "vh" : "hv", dash: "dot", width: 1.5, color: colour("--faint") },
      hoverinfo: "skip",
      uft: "front",
    },
  ];
}

function runPoints(group, names) {
  const look = lookOfGroup(group);
  const members = membersOf(group).filter((run) => names.every((metric) => Number.isFinite(finalOf(run, metric))));
  if (members.length === 0) return [];
  const stats = (run) => names.map((metric) => statOf([finalOf(run, metric)]));
  const trace = {
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
  return [trace];
}

function captionOf(name) {
  return shown(metricByName.get(name).caption ?? "", 500);
}

function scatterNote(names, traces) {
  const unlike = names.filter((name) => !metricByName.get(name).comparable);
  const of = (kind) => traces.filter((trace) => trace.uft === kind);
  const drawn = new Set(of("group").map((trace) => trace.group));
  const left = shownGroups().filter((group) => !group.loose && !drawn.has(group.id)).length;
  const beyond = new Set(of("group").flatMap((trace) => (trace.outside ? [trace.group] : []))).size;
  return [
    of("front").length ? "Dotted: the front. No group is better in both than one on it." : "",
    beyond ? `${plural(beyond, "group")} outside, at the triangles: "whole range" shows all.` : "",
    ...unlike.map((name) => `${shown(name, 60)} is not comparable between objectives. ${captionOf(name)}`),
    left > 0 ? `${plural(left, "group")} without finite values of both.` : "",
  ]
    .filter(Boolean)
    .join(" ");
}

function drawScatter() {
  const form = byId("scatter-controls").elements;
  const node = byId("scatter");
  const names = [form.x.value, form.y.value];
  const points = scatterPoints(names);
  const inView = points.filter(({ on }) => on);
  const limits = names.map((name, i) => {
    const single = form.seeds.checked ? shownRuns().map((run) => statOf([finalOf(run, name) ?? NaN])) : [];
    return limitsOf([...inView.map(({ stats }) => stats[i]), ...single], name, form.whole.checked);
  });
  const plots = plotsPer(form.per.value);
  if (plots.length > columnsOf(node, plots)) fitPlots(node, plots);
  else fitFirstScreen(node);
  const fixed = { type: "linear", tickformat: ".4~g", autorange: false };
  const options = limits.map((range) => ({ ...fixed, range }));
  const columns = columnsOf(node, plots);
  const axes = [(node.clientWidth - 70) / columns, (node.clientHeight - 60) / Math.ceil(plots.length / columns)];
  const titles = names.map((name, i) => metricTitle(name, axes[i]));
  const layout = plotAxes(node, plots, titles, options);
  const traces = plots.flatMap(({ has }, i) => {
    const end = i === 0 ? "" : i + 1;
    const mine = points.filter(({ group }) => has(group));
    const positions = mine.length <= NAMED ? namePositions(mine, limits, axes) : [];
    const single = form.seeds.checked ? allGroups().filter(has).flatMap((group) => runPoints(group, names)) : [];
    return [
      ...frontTrace(points, names, limits),
      ...single,
      ...mine.map((point, j) => groupPoint(point, names, limits, axes, positions[j])),
    ].map((trace) => ({ ...trace, xaxis: `x${end}`, yaxis: `y${end}` }));
  });
  const more = { dragmode: "select", hovermode: "closest", selections: [], uirevision: `${names} ${limits}` };
  draw(node, traces, chartLayout({ ...layout, ...more, margin: { l: 52, r: 14, t: plots.length > 1 ? 24 : 10, b: 44 } }), {
    modeBarButtonsToRemove: REMOVED.filter((name) => name !== "select2d"),
  });
  byId("scatter-note").textContent = scatterNote(names, traces);
  listen(node);
}

// As high as the first screen has room for, below the table.
function fitFirstScreen(node) {
  if (printing) return node.style.removeProperty("height");
  const top = node.getBoundingClientRect().top + scrollY;
  node.style.height = `${Math.min(430, Math.max(220, innerHeight - top - 4))}px`;
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

// The first criterion, and the headline metric that goes with it the least: there something is traded away.
function firstPair(names) {
  const [x, ...others] = headline.filter((name) => names.includes(name));
  if (others.length === 0) return [...new Set([...headline.filter((name) => names.includes(name)), ...names])];
  const signed = (name, group) => (directionOf(name) === "min" ? -1 : 1) * (groupStat(group, name)?.mean ?? NaN);
  const together = (y) => {
    const pairs = groups.map((group) => [signed(x, group), signed(y, group)]).filter((pair) => pair.every(Number.isFinite));
    return pairs.length < 2 ? 1 : rankCorrelation(...[0, 1].map((i) => pairs.map((pair) => pair[i])));
  };
  return [x, others.reduce((a, b) => (together(b) < together(a) ? b : a))];
}

function startScatter() {
  const metrics = measured();
  if (metrics.length < 2 || runs.length < 2) {
    byId("tradeoff").hidden = true;
    return;
  }
  const form = byId("scatter-controls");
  const [x, y] = firstPair(metrics.map((metric) => metric.name));
  const few = data.axes.some((axis) => axis.key === "objective.name" && axis.values.length <= 2 * COLUMNS_OF_PLOTS);
  fill(form.elements.x, metricOptions(metrics), x);
  fill(form.elements.y, metricOptions(metrics), y);
  fill(form.elements.per, facetOptions(), few && groups.length > NAMED ? "objective.name" : "");
  form.elements.per.parentElement.hidden = facetOptions().length === 1;
  form.elements.seeds.checked = !groups.some((group) => Object.keys(group.metrics).length > 0);
  const panel = addPanel(byId("scatter"), drawScatter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => redraw([panel]));
}
