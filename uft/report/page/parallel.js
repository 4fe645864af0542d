// Parallel coordinates: an axis per setting and headline metric, a line per run. Drawn as plain lines, since Plotly's
// own kind compiles code at run time, which the page's policy forbids.

const MOST_AXES = 9;
const MOST_TICKS = 12;
const NEAR = 0.02; // of an axis' height: a brush takes the line it touches
const brushes = new Map(); // axis number -> [low, high], 0 at the bottom and 1 at the top

function parallelAxes() {
  const settings = data.axes.slice(0, MOST_AXES - Math.min(2, headline.length)).map(settingAxis);
  const metrics = headline
    .filter((name) => runs.some((run) => isFinished(run) && Number.isFinite(finalOf(run, name))))
    .slice(0, 2)
    .map(metricAxis);
  return [...settings, ...metrics];
}

function stand(place, number) {
  return number > 1 ? place / (number - 1) : 0.5;
}

// Few values stand evenly, whatever they are; many numbers stand by size. Runs without the key stand at the foot.
function settingAxis(axis) {
  const missing = runs.some((run) => isKnown(run) && settingOf(run, axis.key) === null) && !axis.values.includes(null);
  const values = missing ? [null, ...axis.values] : axis.values;
  const name = axis.key;
  if (values.length > MOST_TICKS && axis.numeric) {
    const known = axis.values.filter((value) => value !== null);
    return scaled(name, (run) => toNumber(settingOf(run, name)), [Math.min(...known), Math.max(...known)]);
  }
  const places = new Map(values.map((value, i) => [sameKey(value), stand(i, values.length)]));
  const every = Math.ceil(values.length / MOST_TICKS);
  return {
    name,
    at: (run) => places.get(sameKey(settingOf(run, name))) ?? null,
    show: (run) => setting(settingOf(run, name)),
    ticks: values.map((value, i) => [stand(i, values.length), setting(value)]).filter((_, i) => i % every === 0),
  };
}

// Finished runs alone: the line of another ends where its figures would begin. What lies outside stands at the ends.
function metricAxis(name) {
  const valueOf = (run) => (isFinished(run) ? finalOf(run, name) : null);
  const values = shownRuns()
    .map(valueOf)
    .filter((value) => value !== null && Number.isFinite(value));
  const [least, most] = commonRange(values.length ? values.map((value) => [value, value]) : [[0, 0]], directionOf(name));
  return scaled(name, valueOf, [least, most]);
}

function scaled(name, valueOf, [low, high]) {
  const at = (value) => (high > low ? within((value - low) / (high - low), [0, 1]) : 0.5);
  const marks = high > low ? [0, 0.25, 0.5, 0.75, 1] : [0.5];
  return {
    name,
    at: (run) => (Number.isFinite(valueOf(run)) ? at(valueOf(run)) : null),
    show: (run) => figure(valueOf(run)),
    ticks: marks.map((place) => [place, figure(low + place * (high - low))]),
  };
}

function parallelTrace(members, axes, look) {
  const [x, y, text] = [[], [], []];
  for (const run of members) {
    axes.forEach((axis, i) => {
      x.push(i);
      y.push(axis.at(run));
      text.push(look ? `<b>${label(run.name)}</b><br>${label(axis.name)}  ${label(axis.show(run))}` : "");
    });
    x.push(null);
    y.push(null);
    text.push("");
  }
  const crowded = groups.length > BANDS_UP_TO;
  const line = look
    ? { color: colour(look.variable), dash: crowded ? "solid" : look.dash, width: crowded ? 1 : 1.6 }
    : { color: colour("--line"), width: 1 };
  return {
    x,
    y,
    text,
    mode: "lines+markers",
    line,
    opacity: look && !crowded ? 0.85 : 0.6,
    marker: { size: look ? 5 : 1, color: line.color, symbol: look?.marker ?? "circle" },
    hovertemplate: "%{text}<extra></extra>",
    hoverinfo: look ? "all" : "skip",
    uft: look ? "selected" : "others",
    selected: { marker: { opacity: 1 } },
    unselected: { marker: { opacity: 1 } },
  };
}

function axisTexts(axes) {
  const plate = { showarrow: false, bgcolor: colour("--paper", 0.75), borderpad: 1 };
  return axes.flatMap((axis, i) => [
    {
      ...plate,
      x: i,
      y: 1.1,
      text: label(axis.name, 24),
      hovertext: label(axis.name, 200),
      font: { color: colour("--ink"), size: 12 },
    },
    ...axis.ticks.map(([y, text]) => ({
      ...plate,
      x: i,
      y,
      text: label(text, 14),
      xanchor: "right",
      xshift: -7,
      font: { size: 11 },
    })),
  ]);
}

function axisShapes(axes) {
  const rule = (i) => ({
    type: "line",
    x0: i,
    x1: i,
    y0: 0,
    y1: 1,
    line: { color: colour("--faint"), width: 1 },
    layer: "below",
  });
  const brush = ([i, [y0, y1]]) => ({
    type: "rect",
    x0: i - 0.04,
    x1: i + 0.04,
    y0,
    y1,
    line: { width: 0 },
    fillcolor: colour("--accent", 0.35),
  });
  return [...axes.map((_, i) => rule(i)), ...[...brushes].map(brush)];
}

// A run that cannot be read has no settings, and no line.
function drawParallel(axes, current) {
  const node = byId("parallel");
  node.style.minWidth = `${axes.length * 112}px`;
  const faint = runs.filter((run) => !isSelected(run) && isKnown(run));
  const traces = faint.length ? [parallelTrace(faint, axes, null)] : [];
  for (const group of shownGroups()) {
    traces.push(
      parallelTrace(
        membersOf(group).filter((run) => isSelected(run) && isKnown(run)),
        axes,
        lookOfGroup(group),
      ),
    );
  }
  const hidden = { visible: false, fixedrange: true };
  draw(
    node,
    traces,
    chartLayout({
      xaxis: { ...hidden, range: [-0.35, axes.length - 0.65] },
      yaxis: { ...hidden, range: [-0.06, 1.16] },
      margin: { l: 8, r: 8, t: 8, b: 8 },
      dragmode: "select",
      hovermode: "closest",
      selections: [],
      annotations: axisTexts(axes),
      shapes: axisShapes(axes),
      newselection: { line: { color: colour("--accent") } },
    }),
    PICTURES_ALONE,
  );
  if (node.dataset.listens) return;
  node.dataset.listens = "yes";
  node.on("plotly_selected", (event) => event?.range && brushed(current(), Object.values(event.range)));
  node.on("plotly_deselect", () => select(null, "reset"));
}

function brushed(axes, [across, up]) {
  const [left, right] = [Math.min(...across), Math.max(...across)];
  const inside = axes.map((_, i) => i).filter((i) => i >= left && i <= right);
  const nearest = Math.min(axes.length - 1, Math.max(0, Math.round((left + right) / 2)));
  for (const i of inside.length ? inside : [nearest])
    brushes.set(i, [Math.max(0, Math.min(...up)), Math.min(1, Math.max(...up))]);
  const passes = (run) =>
    [...brushes].every(([i, [low, high]]) => {
      const place = axes[i].at(run);
      return place !== null && place >= low - NEAR && place <= high + NEAR;
    });
  const kept = ids(runs.filter(passes));
  if (kept.length === 0) brushes.clear();
  select(kept, "parallel");
}

function startParallel() {
  let axes = data.axes.length >= 2 ? parallelAxes() : [];
  if (axes.length < 3) {
    byId("parallel-part").hidden = true;
    return;
  }
  onSelection((origin) => {
    if (origin === "parallel") return;
    brushes.clear();
    axes = parallelAxes();
  });
  addPanel(byId("parallel"), () => drawParallel(axes, () => axes));
}
