// The answer: a row a group, with the mean, its interval and the difference from the baseline in every headline metric.

const ROWS_AT_ONCE = 8;
const FIRST_ROWS = 5; // where there are more
const FIRST_METRICS = 4;
const INLINE = 2; // metrics up to which an interval stands beside its mean
const ABOUT_ALL = "These are the groups of the selected runs. The words and the copied tables cover all finished runs.";
let allRows = false;
let allMetrics = false;
let rankedBy = headline[0] ?? null;

const summaryOf = new Map(data.summary.map((finding) => [finding.metric, finding]));

// What may be said of a group's mean: the best, not worse than it, or of the best alone where noise is unknown.
function standing(group, metric) {
  const finding = summaryOf.get(metric);
  if (groups.length < 2 || !finding?.leading.includes(group.id)) return null;
  const level = finding.leading.length > 1;
  if (level) return ["≈ best", "not worse than the best beyond seed noise"];
  if (finding.beyond_noise) return ["best", "ahead of all others by more than seed noise"];
  const word = finding.direction === "min" ? "lowest" : "highest";
  return [word, "whether it is the best cannot be said: the noise of a difference is not known"];
}

// Best first by one metric; what has no figure last.
function ranked() {
  const sign = data.headline.find((entry) => entry.metric === rankedBy)?.direction === "max" ? -1 : 1;
  const place = (group) => {
    const mean = rankedBy === null ? null : (groupStat(group, rankedBy)?.mean ?? null);
    return mean === null || Number.isNaN(mean) ? Infinity : sign * mean;
  };
  const key = new Map(groups.map((group) => [group.id, place(group)]));
  const order = (a, b) => (key.get(a.id) === key.get(b.id) ? 0 : key.get(a.id) - key.get(b.id));
  return shownGroups()
    .filter((group) => !group.loose)
    .sort(order);
}

// A dot for the mean and a line for its interval, on one scale per column; an arrow where the mean is beyond it.
function whisker(stat, range, variable) {
  const at = (x) => 4 + (92 * (within(x, range) - range[0])) / (range[1] - range[0]);
  const box = svg("svg", {
    class: "whisker",
    viewBox: "0 0 100 12",
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  });
  if (stat === null || !Number.isFinite(stat.mean)) return box;
  const parts = [];
  const arrow = (way, what) => {
    const [tip, tail] = way > 0 ? [99, 94] : [1, 6];
    return svg("path", { d: `M${tail} 2L${tip} 6L${tail} 10`, "stroke-width": 2, "data-outside": what });
  };
  const beyond = outside(stat.mean, range);
  if (beyond) parts.push(arrow(beyond, "mean"));
  else {
    parts.push(svg("path", { d: `M${at(stat.mean)} 2v8`, "stroke-width": 5 }));
    if (stat.low !== null) {
      parts.push(svg("path", { d: `M${at(stat.low)} 6H${at(stat.high)}`, "stroke-width": 2 }));
      for (const end of [stat.low, stat.high]) if (outside(end, range)) parts.push(arrow(outside(end, range), "end"));
    }
  }
  for (const part of parts) {
    part.setAttribute("vector-effect", "non-scaling-stroke");
    part.setAttribute("fill", "none");
    part.style.stroke = `var(${variable})`;
  }
  box.append(...parts);
  return box;
}

// The stats of a column and what they have in common: limits, and decimals that say something of most of them.
function columnOf(metric) {
  const stats = shownGroups()
    .map((group) => groupStat(group, metric))
    .filter((stat) => stat !== null);
  const sizes = stats.map((stat) => Math.abs(stat.mean)).filter((size) => size > 0 && Number.isFinite(size));
  return { range: limitsOf(stats, metric), decimals: decimalsFor(medianOf(sizes.toSorted((a, b) => a - b))) };
}

function bounds(stat, decimals) {
  return stat.low === null ? "" : `[${fixed(stat.low, decimals)}, ${fixed(stat.high, decimals)}]`;
}

function meanCell(group, metric, { range, decimals }) {
  const stat = groupStat(group, metric);
  if (stat === null) return el("td", { class: "number first" }, "–");
  const said = standing(group, metric);
  return el(
    "td",
    { class: "number first", "data-metric": metric },
    said ? el("span", { class: "tag accent", title: said[1] }, said[0]) : null,
    el("span", { class: said ? "mean best" : "mean" }, fixed(stat.mean, decimals)),
    el("span", { class: "interval" }, stat.n === 1 ? "one seed" : bounds(stat, decimals)),
    whisker(stat, range, lookOfGroup(group).variable),
  );
}

// Of whole groups, as compare.json has it: a selection within a group or its baseline has no difference here.
function differenceCell(group, metric, { decimals }) {
  const finding = summaryOf.get(metric);
  const cell = (text) => el("td", { class: "number quiet", "data-difference": metric }, text);
  if (finding?.baseline === group.id) return cell("baseline");
  const found = finding?.against_baseline.find((each) => each.group === group.id);
  const whole = (id) => membersOf(groupById.get(id)).filter(isFinished).every(isSelected);
  if (!found || !whole(group.id)) return cell("–");
  const difference = toNumber(found.difference);
  const gain = (finding.direction === "max" ? 1 : -1) * difference > 0;
  const kind = found.inside_noise === false ? (gain ? "good" : "bad") : "quiet";
  const words = { null: "its noise is not known", true: "inside seed noise", false: "more than seed noise" };
  const ends = { low: toNumber(found.low), high: toNumber(found.high) };
  return el(
    "td",
    { class: "number", "data-difference": metric, title: `${found.method}: ${words[found.inside_noise]}` },
    el("span", { class: `difference ${kind}` }, `${difference > 0 ? "+" : ""}${fixed(difference, decimals)}`),
    el("span", { class: "interval" }, bounds(ends, decimals)),
  );
}

function groupRow(group, shownMetrics) {
  const members = membersOf(group);
  const finished = members.filter(isFinished).filter(isSelected).length;
  const of = members.length === finished ? plural(finished, "run") : `${finished} of ${members.length} runs finished`;
  const baseline = group.baseline ? el("span", { class: "tag" }, "baseline") : null;
  const name = el("div", { class: "run-name" }, swatch(groupIndex.get(group.id)), breakable(group.name), baseline);
  const cells = [...shownMetrics].flatMap(([metric, column]) => [
    meanCell(group, metric, column),
    groups.length > 1 ? differenceCell(group, metric, column) : null,
  ]);
  return el(
    "tr",
    { "data-group": group.id },
    el("th", { scope: "row" }, name, el("span", { class: "quiet small" }, of)),
    ...cells,
  );
}

function metricHeads(metric) {
  const order = el(
    "button",
    {
      type: "button",
      title: `${shown(metric, 200)}: best first`,
      onclick: () => {
        rankedBy = metric;
        drawHeadline();
      },
    },
    breakable(metric.replace(/^eval\//, ""), 60),
    rankedBy === metric ? " ↓" : "",
  );
  const direction = better(metric) || (data.headline.find((e) => e.metric === metric).direction === "min" ? LESS : MORE);
  return [
    el("th", { scope: "col", class: "number first" }, order, el("span", { class: "quiet small" }, direction)),
    groups.length > 1 ? el("th", { scope: "col", class: "number" }, "− baseline") : null,
  ];
}

function drawHeadline() {
  const place = byId("headline");
  if (headline.length === 0 || groups.length === 0) return place.replaceChildren();
  const metrics = allMetrics || printing ? headline : headline.slice(0, FIRST_METRICS);
  const columns = new Map(metrics.map((metric) => [metric, columnOf(metric)]));
  const rows = ranked();
  const few = !allRows && !printing && rows.length > ROWS_AT_ONCE;
  const isFirst = (group, i) => i < FIRST_ROWS || group.id === summaryOf.get(rankedBy)?.baseline;
  const listed = few ? rows.filter(isFirst) : rows;
  const heads = [el("th", { scope: "col" }, "Group"), ...metrics.flatMap(metricHeads)];
  const table = el(
    "table",
    { class: metrics.length > INLINE ? "headline many" : "headline" },
    el("thead", {}, el("tr", {}, ...heads)),
    el("tbody", {}, ...listed.map((group) => groupRow(group, columns))),
  );
  const more = (text, open) =>
    el(
      "button",
      {
        type: "button",
        class: "link screen",
        onclick: () => {
          open();
          drawHeadline();
          redraw();
        },
      },
      text,
    );
  const tools = [
    few ? more(`All ${rows.length} groups`, () => (allRows = true)) : null,
    metrics.length < headline.length ? more(`All ${headline.length} metrics`, () => (allMetrics = true)) : null,
    ...tableButtons(),
  ];
  return place.replaceChildren(
    el("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Headline metrics" }, table),
    el("div", { class: "controls screen tools" }, ...tools),
    ...(selected === null ? [] : [el("p", { class: "caption" }, ABOUT_ALL)]),
  );
}

function comparisonRow(comparison) {
  const name = (id) => el("bdi", {}, shown(groupById.get(id)?.name ?? id, 60));
  const noise = comparison.inside_noise;
  const words = noise === null ? "not known" : noise ? "inside noise" : "beyond noise";
  const bounds = { low: toNumber(comparison.low), high: toNumber(comparison.high) };
  const numbers = [
    figure(toNumber(comparison.difference)),
    interval(bounds),
    figure(toNumber(comparison.p)),
    figure(toNumber(comparison.p_adjusted)),
    String(comparison.n),
  ];
  return el(
    "tr",
    {},
    el("td", {}, name(comparison.a), " – ", name(comparison.b)),
    ...numbers.map((text) => el("td", { class: "number" }, text)),
    el("td", {}, shown(comparison.method, 120)),
    el("td", {}, words),
  );
}

// Filled when it is opened: with 66 groups there are many.
function showComparisons(place) {
  const titles = ["Difference of", "is", "95 % interval", "p", "p, adjusted", "n", "Method", ""];
  const rows = data.summary[Number(place.dataset.comparisons)].comparisons.map(comparisonRow);
  const head = titles.map((title, i) => el("th", { scope: "col", class: i > 0 && i < 6 ? "number" : null }, title));
  place.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)));
}

function startHeadline() {
  for (const place of document.querySelectorAll("[data-comparisons]")) {
    place.parentElement.addEventListener("toggle", () => place.children.length || showComparisons(place));
  }
  onSelection(drawHeadline);
  drawHeadline();
}
