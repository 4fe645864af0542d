// The headline table, a row a group with the interval drawn beside the figures, and the comparisons behind the words.

const FIRST_ROWS = 12;
const WIDE = 4; // metrics up to which mean and interval stand side by side
const ABOUT_ALL = "These are the groups of the selected runs. The words above are about all finished runs.";
let allRows = false;

// By metric the best mean of all finished runs; several groups may have it.
const meanOf = (group, metric) => toNumber(own(own(group?.metrics, metric), "mean"));

function bestMeans() {
  const byGroup = new Map(groups.map((group) => [group.id, group]));
  return new Map(data.summary.map(({ metric, best }) => [metric, meanOf(byGroup.get(best), metric)]));
}

// Best first by the most important metric; what has no figure last.
function ranked() {
  const [first] = headline;
  const sign = directionOf(first) === "max" || data.headline[0]?.direction === "max" ? -1 : 1;
  const place = (group) => {
    const mean = first === undefined ? null : (groupStat(group, first)?.mean ?? null);
    return mean === null || Number.isNaN(mean) ? Infinity : sign * mean;
  };
  const key = new Map(groups.map((group) => [group.id, place(group)]));
  const order = (a, b) => (key.get(a.id) === key.get(b.id) ? 0 : key.get(a.id) - key.get(b.id));
  return shownGroups()
    .filter((group) => !group.loose)
    .sort(order);
}

function rangeOf(metric) {
  const stats = groups.map((group) => groupStat(group, metric)).filter((stat) => stat !== null);
  const ends = stats
    .flatMap((stat) => [stat.mean, stat.low, stat.high])
    .filter((x) => x !== null && Number.isFinite(x));
  return [Math.min(...ends), Math.max(...ends)];
}

// A dot for the mean and a line for its interval, on one scale per column.
function whisker(stat, [low, high], variable) {
  const at = (x) => (high > low ? 4 + (92 * (x - low)) / (high - low) : 50);
  const box = svg("svg", {
    class: "whisker",
    viewBox: "0 0 100 12",
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  });
  if (stat === null || !Number.isFinite(stat.mean)) return box;
  const parts = [svg("path", { d: `M${at(stat.mean)} 2v8`, "stroke-width": 5 })];
  if (stat.low !== null) parts.push(svg("path", { d: `M${at(stat.low)} 6H${at(stat.high)}`, "stroke-width": 2 }));
  for (const part of parts) {
    part.setAttribute("vector-effect", "non-scaling-stroke");
    part.style.stroke = `var(${variable})`;
  }
  box.append(...parts);
  return box;
}

function headlineCell(group, metric, range, best) {
  const stat = groupStat(group, metric);
  if (stat === null) return el("td", { class: "number" }, "–");
  const isBest = best.has(metric) && best.get(metric) === meanOf(group, metric);
  return el(
    "td",
    { class: "number", "data-metric": metric },
    isBest ? el("span", { class: "tag accent" }, "best") : null,
    el("span", { class: isBest ? "mean best" : "mean" }, figure(stat.mean)),
    el("span", { class: "interval" }, stat.low === null ? (stat.n === 1 ? "one seed" : "") : interval(stat)),
    whisker(stat, range, lookOfGroup(group).variable),
  );
}

function headlineRow(group, ranges, best) {
  const members = membersOf(group);
  const finished = members.filter(isFinished).filter(isSelected).length;
  const of = members.length === finished ? String(finished) : `${finished} of ${members.length}`;
  const baseline = group.baseline ? el("span", { class: "tag" }, "baseline") : null;
  const name = el("div", { class: "run-name" }, swatch(groupIndex.get(group.id)), breakable(group.name), baseline);
  return el(
    "tr",
    { "data-group": group.id },
    el("th", { scope: "row" }, name),
    el("td", { class: "number" }, of),
    ...headline.map((metric) => headlineCell(group, metric, ranges.get(metric), best)),
  );
}

function drawHeadline() {
  const place = byId("headline");
  if (headline.length === 0 || groups.length === 0) return place.replaceChildren();
  const ranges = new Map(headline.map((metric) => [metric, rangeOf(metric)]));
  const best = bestMeans();
  const rows = ranked();
  const titles = headline.map((metric) =>
    el(
      "th",
      { scope: "col", class: "number" },
      breakable(metric, 60),
      el("span", { class: "quiet small" }, better(metric)),
    ),
  );
  const table = el(
    "table",
    { class: headline.length > WIDE ? "headline many" : "headline" },
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        el("th", { scope: "col" }, "Group"),
        el("th", { scope: "col", class: "number" }, "Finished"),
        ...titles,
      ),
    ),
    el(
      "tbody",
      {},
      ...rows.slice(0, allRows || printing ? rows.length : FIRST_ROWS).map((group) => headlineRow(group, ranges, best)),
    ),
  );
  const more = el(
    "button",
    {
      type: "button",
      class: "link screen",
      onclick: () => {
        allRows = true;
        drawHeadline();
      },
    },
    `All ${rows.length} groups`,
  );
  return place.replaceChildren(
    el("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Headline metrics" }, table),
    ...(rows.length > FIRST_ROWS && !allRows ? [more] : []),
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
