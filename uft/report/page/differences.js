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

function drawDifferences() {
  const here = (entry) => entry.runs.some((id) => runById.has(id) && isSelected(runById.get(id)));
  const left = data.differences
    .map(({ key, values }) => ({ key, values: values.filter(here) }))
    .filter(({ values }) => values.length > 1);
  byId("difference-table").replaceChildren(
    left.length === 0
      ? el(
          "p",
          { class: "notice" },
          selected === null ? "Nothing differs." : "Nothing differs between the selected runs.",
        )
      : el(
          "table",
          { class: "differences" },
          el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Key"), el("th", { scope: "col" }, "Values"))),
          el("tbody", {}, ...left.map(differenceRow)),
        ),
  );
}

function startDifferences() {
  onSelection(drawDifferences);
  drawDifferences();
}
