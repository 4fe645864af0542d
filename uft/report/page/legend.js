// The bar that stays in view: what is selected, the way back to all runs, and the groups as switches.

function ids(members) {
  return members.map((run) => run.id);
}

function toggleGroup(group, origin) {
  const mine = new Set(group.runs);
  const on = shownRuns().some((run) => mine.has(run.id));
  const others = ids(shownRuns()).filter((id) => !mine.has(id));
  select(on ? others : [...others, ...mine], origin);
}

function legendButton(group) {
  const name = shown(group.name, 60);
  return el(
    "button",
    {
      type: "button",
      class: "chip",
      title: shown(group.name, 1000),
      "data-group": group.id,
      onclick: (event) => (event.shiftKey ? selectOnly(group.runs, "legend") : toggleGroup(group, "legend")),
      ondblclick: (event) => event.shiftKey || selectOnly(group.runs, "legend"),
    },
    swatch(groupIndex.get(group.id)),
    el("bdi", {}, name),
    group.baseline ? el("span", { class: "tag" }, "baseline") : null,
  );
}

function showSelection() {
  const number = shownRuns().length;
  byId("selection").textContent =
    selected === null ? plural(runs.length, "run") : `${number} of ${plural(runs.length, "run")}`;
  byId("all-runs").hidden = selected === null;
  for (const button of byId("legend").children) {
    const on = membersOf(groupById.get(button.dataset.group)).some(isSelected);
    button.setAttribute("aria-pressed", String(on));
  }
}

const SECTIONS = [
  ["answer", "Answer"],
  ["tradeoff", "Trade-off"],
  ["words", "In words"],
  ["curves", "Curves"],
  ["settings", "Settings"],
  ["runs", "Runs"],
  ["differences", "Differences"],
  ["samples", "Samples"],
];

// Links that move without touching the address, where the selection is.
function showSections() {
  const go = (id) => (event) => {
    event.preventDefault();
    byId(id).scrollIntoView();
    byId(id).focus({ preventScroll: true });
  };
  const there = SECTIONS.filter(([id]) => !byId(id).hidden);
  byId("sections").replaceChildren(...there.map(([id, text]) => el("a", { href: `#${id}`, onclick: go(id) }, text)));
  document.querySelector(".skip").addEventListener("click", go("answer"));
}

function startLegend() {
  byId("legend").replaceChildren(...groups.map(legendButton));
  byId("all-runs").addEventListener("click", () => select(null, "reset"));
  for (const button of document.querySelectorAll("[data-warning]")) {
    const about = data.warnings[Number(button.dataset.warning)].runs;
    button.textContent = `Show ${about.length === 1 ? "this run" : `these ${about.length} runs`}`;
    button.addEventListener("click", () => select(about, "warnings"));
  }
  onSelection(showSelection);
  showSelection();
}
