// The run table: every run there is, whatever became of it, with the command that makes it again.

const MARKS = { finished: "✓", failed: "✕", stopped: "■", running: "…", interrupted: "!", unreadable: "?" };
const AXES_AT_FIRST = 6;
const sorting = { column: null, descending: false };
const rowOf = new Map();
let columns = [];
let chosen = new Set();

function numberColumn(key, title, value, show = figure) {
  return { key, title, value, show: (run) => show(value(run)), number: true };
}

function allColumns() {
  const fact = (name) => (run) => toNumber(run[name]);
  return [
    { key: "name", title: "Run", value: (run) => run.name, node: nameCell, always: true },
    { key: "status", title: "Status", value: (run) => run.status, node: statusCell, always: true },
    ...data.axes.map((axis) => settingColumn(axis)),
    {
      key: "seed",
      title: "seed",
      value: (run) => run.seed,
      show: (run) => shown(setting(run.seed), 40),
      number: runs.every((run) => typeof (run.seed ?? 0) === "number"),
    },
    ...data.metrics
      .filter((metric) => metric.kind === "eval" || headline.includes(metric.name))
      .map((metric) => numberColumn(`final ${metric.name}`, metric.name, (run) => finalOf(run, metric.name))),
    ...headline.map((name) => numberColumn(`best ${name}`, `best ${name}`, (run) => toNumber(own(run.best, name)))),
    { key: "steps", title: "steps", value: (run) => run.steps, show: stepsOf, number: true },
    numberColumn("seconds", "training time", fact("seconds"), duration),
    numberColumn("tokens", "tokens", fact("tokens"), count),
    numberColumn("supervised", "supervised tokens", fact("supervised_tokens"), count),
    numberColumn("speed", "tokens/s", fact("tokens_per_second"), count),
    numberColumn("memory", "memory", fact("peak_memory_bytes"), gigabytes),
    { key: "command", title: "Command", value: (run) => run.command, node: commandCell },
  ];
}

function settingColumn(axis) {
  return {
    key: `axis ${axis.key}`,
    title: axis.key,
    number: axis.numeric,
    value: (run) => (axis.numeric ? toNumber(settingOf(run, axis.key)) : settingOf(run, axis.key)),
    show: (run) => shown(setting(settingOf(run, axis.key)), 60),
  };
}

function firstColumns() {
  const there = (column) => runs.some((run) => column.value(run) !== null && column.value(run) !== undefined);
  const wanted = [
    ...data.axes.slice(0, AXES_AT_FIRST).map((axis) => `axis ${axis.key}`),
    "seed",
    ...headline.map((name) => `final ${name}`),
    "steps",
    "seconds",
    "speed",
    "memory",
    "command",
  ];
  return new Set(
    columns
      .filter((column) => column.always || (wanted.includes(column.key) && there(column)))
      .map((column) => column.key),
  );
}

function stepsOf(run) {
  if (run.steps === null) return "–";
  return run.total_steps !== null && run.total_steps !== run.steps
    ? `${run.steps}/${run.total_steps}`
    : String(run.steps);
}

function nameCell(run) {
  const parts = [swatch(groupIndex.get(run.group)), breakable(run.name)];
  const link = (href, text) => el("a", { href, class: "small", rel: "noreferrer", target: "_blank" }, text);
  if (own(data.folders, run.id)) parts.push(link(data.folders[run.id], "folder"));
  if (run.wandb) parts.push(link(run.wandb, "W&B"));
  if (run.error) parts.push(errorNode(String(run.error)));
  return el("div", { class: "run-name" }, ...parts);
}

function errorNode(text) {
  const first = shown(text.trim().split("\n", 1)[0], 120);
  if (first === text.trim()) return el("p", { class: "error" }, first);
  return el("details", { class: "error" }, el("summary", {}, first), el("pre", {}, visible(clip(text, 4000))));
}

function statusCell(run) {
  return el(
    "span",
    { class: `status ${own(MARKS, run.status) ? run.status : "unreadable"}` },
    `${own(MARKS, run.status) ?? "?"} ${shown(run.status, 40)}`,
  );
}

function commandCell(run) {
  if (!run.command) return el("span", {}, "–");
  const button = copyButton("Copy", run.command, { "aria-label": `Copy the command of ${shown(run.name, 80)}` });
  return el(
    "div",
    { class: "command" },
    button,
    el("code", { title: shown(run.command, 2000) }, shown(run.command, 4000)),
  );
}

function rowFor(run) {
  const box = el("input", { type: "checkbox", "aria-label": `Select ${shown(run.name, 80)}` });
  box.addEventListener("change", () => {
    const now = new Set(selected ?? []);
    if (box.checked) now.add(run.id);
    else now.delete(run.id);
    select(now, "table");
  });
  const cells = columns
    .filter((column) => chosen.has(column.key))
    .map((column) =>
      el(
        "td",
        { class: column.number ? "number" : column.node && `cell-${column.key}`, "data-column": column.key },
        column.node ? column.node(run) : column.show(run),
      ),
    );
  return el("tr", { "data-run": run.id }, el("td", { class: "screen" }, box), ...cells);
}

// Numbers by size, texts by letter; what is missing or not a number stands last in both directions.
function compareRuns(a, b) {
  const value = (run) => {
    const found = sorting.column.value(run);
    return Number.isNaN(found) ? null : found;
  };
  const [x, y] = [value(a), value(b)].map((v) => v ?? null);
  if (x === null || y === null) return Number(x === null) - Number(y === null);
  const order =
    typeof x === "number" && typeof y === "number"
      ? Math.sign(x - y) || 0
      : setting(x).localeCompare(setting(y), "en", { numeric: true });
  return sorting.descending ? -order : order;
}

function sortBy(column) {
  sorting.descending = sorting.column === column && !sorting.descending;
  sorting.column = column;
  drawTable();
  byId("run-table").querySelector("th[aria-sort] button").focus();
}

function headerCell(column) {
  const sorted = sorting.column === column;
  const arrow = sorted ? (sorting.descending ? " ↓" : " ↑") : "";
  return el(
    "th",
    {
      scope: "col",
      class: column.number ? "number" : column.node && `cell-${column.key}`,
      "data-column": column.key,
      "aria-sort": sorted ? (sorting.descending ? "descending" : "ascending") : null,
    },
    el("button", { type: "button", onclick: () => sortBy(column) }, breakable(column.title, 60), arrow),
  );
}

function drawTable() {
  const order = sorting.column === null ? runs : [...runs].sort(compareRuns);
  const all = el("input", { type: "checkbox", "aria-label": "Select all runs in the table" });
  all.addEventListener("change", () => select(all.checked ? ids(runs.filter(isListed)) : null, "table"));
  rowOf.clear();
  for (const run of order) rowOf.set(run.id, rowFor(run));
  byId("run-table").replaceChildren(
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        el("th", { class: "screen" }, all),
        ...columns.filter((column) => chosen.has(column.key)).map(headerCell),
      ),
    ),
    el("tbody", {}, ...rowOf.values()),
  );
  listRuns();
}
