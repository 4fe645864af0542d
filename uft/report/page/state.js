// Which runs are selected, and who must know. Nothing selected means all runs. The selection is in the address.

let selected = null; // a Set of run ids, or null: all
const listeners = [];
const panels = [];
const queue = [];

function isSelected(run) {
  return selected === null || selected.has(run.id);
}

function shownRuns() {
  return runs.filter(isSelected);
}

// The groups, and one of its own for every run that has none.
function allGroups() {
  const loose = runs.filter((run) => !groupById.has(run.group));
  return [...groups, ...loose.map((run) => ({ id: null, name: run.name, runs: [run.id], metrics: {}, loose: true }))];
}

function shownGroups() {
  return allGroups().filter((group) => membersOf(group).some(isSelected));
}

function membersOf(group) {
  return group.runs.map((id) => runById.get(id)).filter((run) => run !== undefined);
}

// `origin` is the panel that asked: it may keep showing what it hides elsewhere.
function select(wanted, origin = "") {
  const known = [...(wanted ?? [])].filter((id) => runById.has(id));
  const next = wanted === null || known.length === 0 || known.length === runs.length ? null : new Set(known);
  selected = next;
  const hash = next === null ? "" : `#runs=${[...next].map(encodeURIComponent).join(",")}`;
  if (location.hash !== hash) history.replaceState(null, "", hash || location.pathname + location.search);
  announce(origin);
}

// These alone; all runs where these were alone already.
function selectOnly(wanted, origin) {
  const alone = selected !== null && shownRuns().every((run) => wanted.includes(run.id));
  select(alone ? null : wanted, origin);
}

function selectFromAddress() {
  const match = /^#runs=(.*)$/.exec(location.hash);
  if (match) select(match[1].split(",").map(unescaped), "address");
  else if (selected !== null && location.hash === "") select(null, "address");
}

// An address typed by hand may hold a % that encodes nothing.
function unescaped(text) {
  return /%(?![0-9a-f]{2})/i.test(text) ? text : decodeURIComponent(text);
}

function onSelection(listener) {
  listeners.push(listener);
}

function announce(origin) {
  for (const listener of listeners) listener(origin);
  redraw();
}

// A chart is drawn when it comes into view, and again when something changed and it is in view; till then it is busy.
function addPanel(node, paint) {
  const panel = { node, paint, near: false };
  node.ariaBusy = true;
  panels.push(panel);
  watcher.observe(node);
  return panel;
}

function removePanel(panel) {
  panels.splice(panels.indexOf(panel), 1);
  watcher.unobserve(panel.node);
}

const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      const panel = panels.find((candidate) => candidate.node === entry.target);
      if (panel) panel.near = entry.isIntersecting;
    }
    drawSoon();
  },
  { rootMargin: "200px" },
);

function redraw(which = panels) {
  for (const { node } of which) node.ariaBusy = true;
  drawSoon();
}

// One chart a frame, so that the page answers between them.
function drawSoon() {
  if (queue.length > 0) return;
  queue.push(
    requestAnimationFrame(() => {
      queue.length = 0;
      const next = panels.find(({ node, near }) => node.ariaBusy === "true" && near);
      if (!next) return;
      drawNow(next);
      drawSoon();
    }),
  );
}

function drawNow(panel) {
  panel.node.ariaBusy = false;
  panel.paint();
  if (performance.getEntriesByName("first-chart").length === 0) performance.mark("first-chart");
}
