// A metric's curves as Plotly traces: a mean and a band per group, single runs, and runs that did not finish.

const FEW = 8; // groups up to which one hover box names them all
const UNITS = { step: "steps", tokens: "tokens", seconds: "seconds" };

// Seconds become minutes or hours where there are many.
function timeUnit(longest) {
  const scale = longest > 7200 ? [3600, "hours"] : longest > 300 ? [60, "minutes"] : [1, "seconds"];
  return { scale: scale[0], name: scale[1] };
}

function memberCurve(metric, run, view) {
  const curve = curveOf(metric, run, view.x);
  if (curve === null) return null;
  const broken = curve.y.some((value) => !Number.isFinite(value));
  return { run, x: curve.x, y: smooth(curve.y, view.smoothing), broken };
}

// Groups that have curves here, each with the runs that make its mean: the finished ones, or all if none has finished.
function curveGroups(metric, view) {
  const found = [];
  for (const group of shownGroups()) {
    const members = membersOf(group)
      .filter(isSelected)
      .map((run) => memberCurve(metric, run, view))
      .filter(Boolean);
    const finished = members.filter((member) => isFinished(member.run));
    if (members.length)
      found.push({
        group,
        members,
        averaged: finished.length ? finished : members,
        others: finished.length ? members.filter((m) => !isFinished(m.run)) : [],
      });
  }
  return found;
}

function bandOf(points, kind, log) {
  const ends = (point) => (kind === "sd" ? [point.mean - point.sd, point.mean + point.sd] : [point.low, point.high]);
  const floor = log ? Math.min(...points.map((point) => point.mean).filter((mean) => mean > 0)) / 10 : -Infinity;
  const [x, y] = [[], []];
  const close = (piece) => {
    if (piece.length < 2) return;
    x.push(...piece.map((p) => p.x), ...piece.map((p) => p.x).reverse(), null);
    y.push(...piece.map((p) => ends(p)[1]), ...piece.map((p) => Math.max(floor, ends(p)[0])).reverse(), null);
  };
  let piece = [];
  for (const point of points) {
    if (point.sd !== null && Number.isFinite(point.mean)) piece.push(point);
    else {
      close(piece);
      piece = [];
    }
  }
  close(piece);
  return { x, y };
}

function finite(value) {
  return Number.isFinite(value) ? value : null;
}

function hoverMean(name, point, kind) {
  const spread = point.sd === null ? "" : kind === "interval" ? ` ${interval(point)}` : ` ± ${figure(point.sd)}`;
  return `${name}  <b>${figure(point.mean)}</b>${spread}${point.n > 1 ? `  (n ${point.n})` : ""}`;
}

function groupTraces({ group, averaged, others }, view, scale) {
  const look = lookOfGroup(group);
  const name = label(group.name);
  const points = meanCurve(averaged).map((point) => ({ ...point, x: point.x / scale }));
  const line = {
    color: colour(look.variable),
    dash: group.loose ? "dot" : look.dash,
    width: groups.length > BANDS_UP_TO ? 1.2 : 2,
  };
  const traces = [];
  if (view.band !== "none" && averaged.length > 1) {
    const band = bandOf(points, view.band, view.log);
    traces.push({
      ...band,
      fill: "toself",
      fillcolor: colour(look.variable, 0.16),
      line: { width: 0 },
      mode: "lines",
      hoverinfo: "skip",
      uft: "band",
    });
  }
  if (others.length) traces.push(singleTrace(others, look, scale, "dot"));
  if (view.seeds) traces.push(singleTrace(averaged, look, scale, "solid"));
  traces.push({
    x: points.map((point) => point.x),
    y: points.map((point) => finite(point.mean)),
    line,
    mode: points.length <= 25 ? "lines+markers" : "lines",
    marker: { symbol: look.marker, size: 6, color: line.color },
    customdata: points.map((point) => hoverMean(name, point, view.band)),
    hovertemplate: "%{customdata}<extra></extra>",
    uft: "mean",
    group: group.id,
  });
  return traces;
}

// Runs of a group in one trace, with a gap between them: 200 traces would be slow.
function singleTrace(members, look, scale, dash) {
  const [x, y, customdata] = [[], [], []];
  for (const { run, ...curve } of members) {
    const name = `${label(run.name)}${isFinished(run) ? "" : ` (${label(run.status)})`}`;
    curve.x.forEach((place, i) => {
      x.push(place / scale);
      y.push(finite(curve.y[i]));
      customdata.push(`${name}  ${figure(curve.y[i])}`);
    });
    x.push(null);
    y.push(null);
    customdata.push("");
  }
  return {
    x,
    y,
    customdata,
    mode: "lines",
    opacity: 0.55,
    line: { color: colour(look.variable), dash, width: 1 },
    hovertemplate: "%{customdata}<extra></extra>",
    uft: "single",
  };
}

// Arrows where a group's mean leaves the limits, and how many do; no limits where all fit well enough.
function curveLimits(traces, metric) {
  const means = traces.filter((trace) => trace.uft === "mean" && trace.y.some((y) => y !== null));
  const [low, high] = [Math.min, Math.max].map((end) => (trace) => end(...trace.y.filter((y) => y !== null)));
  const ends = means.map((trace) => [low(trace), high(trace)]);
  if (ends.length < 2) return { arrows: [] };
  const range = commonRange(ends, directionOf(metric));
  if (range[0] === Math.min(...ends.flat()) && range[1] === Math.max(...ends.flat())) return { arrows: [] };
  const margin = MARGIN * (range[1] - range[0]);
  const limits = [range[0] - margin, range[1] + margin];
  const arrows = means.flatMap((trace) => {
    const i = trace.y.findIndex((y) => y !== null && outside(y, limits) !== 0);
    if (i < 0) return [];
    const beyond = outside(trace.y[i], limits);
    const marker = { symbol: outwards(0, beyond), size: 12, color: trace.line.color };
    const axes = { xaxis: trace.xaxis, yaxis: trace.yaxis };
    const place = { x: [trace.x[i]], y: [range[beyond > 0 ? 1 : 0]], mode: "markers", ...axes };
    return [{ ...place, marker, hovertemplate: `${trace.customdata[i]}<extra></extra>`, uft: "outside" }];
  });
  return { limits, arrows };
}

function curveNotes(metric, found, beyond) {
  const members = found.flatMap((entry) => entry.members);
  const broken = members.filter((member) => member.broken).length;
  const missing =
    shownRuns().filter((run) => own(own(data.curves.runs, metric), run.id) !== null).length - members.length;
  return [
    members.length === 0 ? "No selected run has this curve." : "",
    broken ? `${plural(broken, "run")} with values that are not numbers: the lines have gaps there.` : "",
    missing ? `${plural(missing, "run")} without this axis.` : "",
    beyond ? `${plural(beyond, "group")} outside, from the triangles on: "whole range" shows all.` : "",
  ]
    .filter(Boolean)
    .join(" ");
}

// The plots of a metric: one, or one for each value of the setting `view.per` that has a curve.
function curveFacets(metric, view) {
  const found = curveGroups(metric, view);
  const facets = plotsPer(view.per).filter(({ has }) => found.some(({ group }) => has(group)));
  return facets.length ? facets : plotsPer("");
}

// {traces, layout, note} of one metric under the view {x, band, per, smoothing, seeds, log, whole}, in plots at `node`.
function curveChart(metric, view, facets, node) {
  const found = curveGroups(metric, view);
  const ends = found
    .flatMap((entry) => entry.members.map((member) => member.x[member.x.length - 1]))
    .filter(Number.isFinite);
  const longest = Math.max(0, ...ends);
  const unit = view.x === "seconds" ? timeUnit(longest) : { scale: 1, name: UNITS[view.x] };
  const traces = facets.flatMap(({ has }, i) => {
    const axes = i === 0 ? {} : { xaxis: `x${i + 1}`, yaxis: `y${i + 1}` };
    const mine = found.filter(({ group }) => has(group)).flatMap((entry) => groupTraces(entry, view, unit.scale));
    return mine.map((trace) => ({ ...trace, ...axes }));
  });
  const { limits, arrows } = view.whole || view.log ? { arrows: [] } : curveLimits(traces, metric);
  traces.push(...arrows);
  // Bands below, single runs above them, means on top.
  const depth = ["band", "single", "mean", "outside"];
  traces.sort((a, b) => depth.indexOf(a.uft) - depth.indexOf(b.uft));
  const across = {
    type: "linear",
    automargin: false, // measuring all labels twice is slow, and these are short
    tickformat: longest / unit.scale >= 1e4 ? "~s" : "",
    rangemode: "tozero",
    hoverformat: view.x === "seconds" ? ".4~g" : ",.0f",
  };
  const up = { type: view.log ? "log" : "linear", automargin: false, tickformat: ".4~g", range: limits };
  const axes = plotAxes(node, facets, [unit.name, ""], [across, up]);
  facets.slice(1).forEach((_, i) => { // the same limits, also when one of them is zoomed
    axes[`xaxis${i + 2}`].matches = "x";
    axes[`yaxis${i + 2}`].matches = "y";
  });
  const layout = chartLayout({
    ...axes,
    hovermode: view.seeds || found.length > FEW ? "closest" : "x unified",
    margin: { l: 58, r: 14, t: facets.length > 1 ? 24 : 10, b: 44 },
    uirevision: `${view.x} ${view.log} ${view.per} ${limits}`,
  });
  return { traces, layout, note: curveNotes(metric, found, arrows.length) };
}
