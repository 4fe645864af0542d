// Two settings at once: the mean of a metric over the finished, selected runs of every cell.

const MOST_VALUES = 30; // along a side
const MOST_MAPS = 6;

function mapAxes() {
  return data.axes.filter((axis) => axis.values.length > 1 && axis.values.length <= MOST_VALUES);
}

// The two axes that cross best: numbers first, then those with the most filled cells.
function bestPair(axes) {
  let best = null;
  axes.forEach((x, i) =>
    axes.forEach((y, j) => {
      if (i >= j) return;
      const cells = new Set(
        runs.filter(isKnown).map((run) => `${sameKey(settingOf(run, x.key))} ${sameKey(settingOf(run, y.key))}`),
      ).size;
      const lines = Math.max(x.values.length, y.values.length);
      const score = cells <= lines ? 0 : cells + 100 * (Number(x.numeric) + Number(y.numeric));
      if (score > (best?.score ?? 0)) best = { score, x, y };
    }),
  );
  return best;
}

function cellsOf(metric, x, y, filter) {
  const cells = new Map();
  for (const run of shownRuns().filter(isFinished).filter(filter)) {
    const value = finalOf(run, metric);
    if (value === null) continue;
    const key = `${sameKey(settingOf(run, x.key))} ${sameKey(settingOf(run, y.key))}`;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push({ run, value });
  }
  return cells;
}

function mapOf(metric, x, y, filter) {
  const cells = cellsOf(metric, x, y, filter);
  const at = (yValue, xValue) => cells.get(`${sameKey(xValue)} ${sameKey(yValue)}`) ?? [];
  const stats = y.values.map((v) => x.values.map((u) => statOf(at(v, u).map((entry) => entry.value))));
  const many = x.values.length * y.values.length > 120;
  const hover = (stat, u, v) =>
    stat === null
      ? ""
      : `${label(x.key)} ${label(setting(u))}<br>${label(y.key)} ${label(setting(v))}<br>` +
        `<b>${figure(stat.mean)}</b>${stat.sd === null ? "" : ` ± ${figure(stat.sd)}`}<br>${plural(stat.n, "run")}`;
  return {
    z: stats.map((row) => row.map((stat) => (stat === null ? null : finite(stat.mean)))),
    text: stats.map((row) => row.map((stat) => (stat === null || many ? "" : figure(stat.mean)))),
    hovertext: stats.map((row, i) => row.map((stat, j) => hover(stat, x.values[j], y.values[i]))),
    customdata: y.values.map((v) => x.values.map((u) => ids(at(v, u).map((entry) => entry.run)))),
  };
}

// Better is stronger; without a direction more is stronger.
function mapScale(metric) {
  const scale = [
    [0, colour("--map-low")],
    [0.5, colour("--map-middle")],
    [1, colour("--map-high")],
  ];
  return directionOf(metric) === "min" ? scale.map(([place], i) => [place, scale[2 - i][1]]) : scale;
}

function mapLayout(x, y) {
  const ticks = (axis) => ({
    type: "linear",
    tickvals: axis.values.map((_, i) => i),
    ticktext: axis.values.map((value) => label(setting(value), 18)),
    showgrid: false,
    range: [-0.5, axis.values.length - 0.5],
    fixedrange: true,
  });
  return chartLayout({
    xaxis: chartAxis(label(x.key), ticks(x)),
    yaxis: chartAxis(label(y.key), ticks(y)),
    hovermode: "closest",
    dragmode: false,
  });
}

function heatmapTrace(map, metric, [low, high], last) {
  return {
    type: "heatmap",
    ...map,
    zmin: low,
    zmax: high,
    zauto: false,
    colorscale: mapScale(metric),
    xgap: 2,
    ygap: 2,
    hoverinfo: "text",
    texttemplate: "%{text}",
    textfont: { color: colour("--ink") },
    hoverongaps: false,
    showscale: last,
    colorbar: { thickness: 10, outlinewidth: 0, tickformat: ".4~g", len: 1, tickfont: { size: 11 } },
  };
}

function facets(per, metric, x, y) {
  if (!per) return [{ title: "", map: mapOf(metric, x, y, () => true) }];
  const maps = per.values.slice(0, MOST_MAPS).map((value) => ({
    title: `${shown(per.key, 60)} = ${shown(setting(value), 60)}`,
    map: mapOf(metric, x, y, (run) => sameKey(settingOf(run, per.key)) === sameKey(value)),
  }));
  return maps.filter(({ map }) => map.z.flat().some((z) => z !== null));
}

function heatmapNote(axes, used, per) {
  const others = axes.filter((axis) => !used.includes(axis)).map((axis) => shown(axis.key, 60));
  const cut =
    per && per.values.length > MOST_MAPS ? `The first ${MOST_MAPS} of ${per.values.length} values have a map. ` : "";
  const isOn = (run, axis) => axis.values.some((value) => sameKey(value) === sameKey(settingOf(run, axis.key)));
  const without = shownRuns().filter((run) => isFinished(run) && used.some((axis) => axis && !isOn(run, axis)));
  const lost = without.length ? `${plural(without.length, "run")} without one of these settings: not in the map. ` : "";
  return cut + lost + (others.length ? `Cells are means over runs that differ in ${others.join(", ")} too.` : "");
}

function drawHeatmaps() {
  const form = byId("heatmap-controls").elements;
  const metric = form.metric.value;
  const [x, y, per] = [form.x, form.y, form.per].map((field) => data.axes.find((axis) => axis.key === field.value));
  const maps = facets(per === x || per === y ? undefined : per, metric, x, y);
  const values = maps.flatMap(({ map }) => map.z.flat()).filter((z) => z !== null);
  const range = limitsOf(
    values.map((mean) => ({ mean, low: null, high: null })),
    metric,
  );
  const arrow = (z) => ["▼", "", "▲"][outside(z, range) + 1];
  for (const { map } of maps) map.text = map.text.map((row, i) => row.map((text, j) => text && `${text} ${arrow(map.z[i][j])}`.trim()));
  const place = byId("heatmaps");
  for (const node of place.querySelectorAll(".chart")) Plotly.purge(node);
  place.replaceChildren(
    ...maps.map(({ title }) =>
      el("div", { class: "map" }, title ? el("h4", {}, title) : null, el("div", {}, el("div", { class: "chart" }))),
    ),
  );
  maps.forEach(({ map }, i) => {
    const node = place.children[i].querySelector(".chart");
    node.style.height = `${Math.min(640, Math.max(180, 90 + 44 * y.values.length))}px`;
    draw(node, [heatmapTrace(map, metric, range, i === maps.length - 1)], mapLayout(x, y), PICTURES_ALONE);
    node.on("plotly_click", (event) => selectOnly(event.points[0].customdata, "heatmap"));
  });
  if (values.length === 0)
    place.replaceChildren(el("p", { class: "notice" }, "No finished run among the selected ones has this metric."));
  byId("heatmap-note").textContent = heatmapNote(data.axes, [x, y, per], per);
}

function startHeatmap() {
  const axes = mapAxes();
  const pair = bestPair(axes);
  const metrics = measured();
  if (pair === null || metrics.length === 0) {
    byId("heatmap-part").hidden = true;
    return;
  }
  const form = byId("heatmap-controls");
  const options = axes.map((axis) => [axis.key, shown(axis.key, 60)]);
  const third =
    axes.find((axis) => axis !== pair.x && axis !== pair.y && !axis.numeric) ??
    axes.find((axis) => axis !== pair.x && axis !== pair.y);
  fill(
    form.elements.metric,
    metricOptions(metrics),
    headline.find((name) => metricByName.has(name)) ?? metrics[0].name,
  );
  fill(form.elements.x, options, pair.x.key);
  fill(form.elements.y, options, pair.y.key);
  fill(form.elements.per, [["", "– (mean over all)"], ...options], third?.key ?? "");
  const panel = addPanel(byId("heatmaps"), drawHeatmaps);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => redraw([panel]));
}
