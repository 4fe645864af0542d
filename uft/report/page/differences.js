// What is not the same in the selected runs: settings, data, code, hardware.

const VALUES_AT_FIRST = 6;

function valueButton({ value, runs: members }) {
  const here = members.filter((id) => runById.has(id) && isSelected(runById.get(id)));
  const text = shown(setting(value), 120);
  return el(
    "li",
    {},
    el(
      "button",
      { type: "button", class: "chip", title: "Select these runs", onclick: () => selectOnly(members, "differences") },
      el("bdi", {}, text),
      el("span", { class: "quiet small" }, plural(here.length, "run")),
    ),
  );
}

function differenceRow({ key, values }) {
  const buttons = values.map(valueButton);
  const rest = buttons.slice(VALUES_AT_FIRST);
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, el("bdi", {}, shown(key, 120))),
    el(
      "td",
      {},
      el("ul", { class: "values" }, ...buttons.slice(0, VALUES_AT_FIRST)),
      rest.length
        ? el("details", {}, el("summary", {}, `${rest.length} more`), el("ul", { class: "values" }, ...rest))
        : null,
    ),
  );
}

// A key of an objective that others lack, with one value: it follows from the choice of the objective.
function isOwnOfSome({ key, values }) {
  return key.startsWith("objective.") && values.length === 2 && values.some(({ value }) => value === "(absent)");
}

function differenceTable(rows) {
  const head = el("tr", {}, el("th", { scope: "col" }, "Key"), el("th", { scope: "col" }, "Values"));
  return el("table", { class: "differences" }, el("thead", {}, head), el("tbody", {}, ...rows.map(differenceRow)));
}

function drawDifferences() {
  const here = (entry) => entry.runs.some((id) => runById.has(id) && isSelected(runById.get(id)));
  const left = data.differences
    .map(({ key, values }) => ({ key, values: values.filter(here) }))
    .filter(({ values }) => values.length > 1);
  const implied = left.filter(isOwnOfSome);
  const rest = left.filter((each) => !isOwnOfSome(each));
  const nothing = selected === null ? "Nothing differs." : "Nothing differs between the selected runs.";
  const title = `${plural(implied.length, "key")} that only some objectives have`;
  byId("difference-table").replaceChildren(
    rest.length ? differenceTable(rest) : el("p", { class: "notice" }, nothing),
    ...(implied.length ? [el("details", {}, el("summary", {}, title), differenceTable(implied))] : []),
  );
}

function startDifferences() {
  onSelection(drawDifferences);
  drawDifferences();
}
