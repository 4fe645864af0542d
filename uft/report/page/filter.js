// Which runs the table lists: by text, by status, and the selected ones alone where the selection came from elsewhere.

function searchText(run) {
  const settings = data.axes.map((axis) => `${axis.key}=${setting(settingOf(run, axis.key))}`);
  return [run.name, run.path, run.status, run.error ?? "", ...settings].join(" ").slice(0, 20000).toLowerCase();
}

const searchTexts = new Map(runs.map((run) => [run.id, searchText(run)]));

function isListed(run) {
  const form = byId("run-controls").elements;
  const words = form.find.value.toLowerCase().split(/\s+/).filter(Boolean);
  return (
    words.every((word) => searchTexts.get(run.id).includes(word)) &&
    (form.status.value === "" || run.status === form.status.value) &&
    (!form.only.checked || isSelected(run))
  );
}

function listRuns() {
  let listed = 0;
  for (const run of runs) {
    const row = rowOf.get(run.id);
    row.hidden = !isListed(run);
    row.classList.toggle("dim", !isSelected(run));
    row.querySelector("input").checked = selected !== null && selected.has(run.id);
    listed += Number(!row.hidden);
  }
  byId("run-count").textContent = `${listed} of ${plural(runs.length, "run")} listed`;
  byId("run-controls").elements.take.disabled = listed === 0 || listed === runs.length;
}

function chooseColumns() {
  const choice = (column) => {
    const box = el("input", { type: "checkbox", checked: chosen.has(column.key) });
    box.addEventListener("change", () => {
      if (box.checked) chosen.add(column.key);
      else chosen.delete(column.key);
      drawTable();
    });
    return el("label", {}, box, el("bdi", {}, shown(column.title, 60)));
  };
  byId("column-list").replaceChildren(...columns.filter((column) => !column.always).map(choice));
}

function startTable() {
  const form = byId("run-controls");
  const statuses = [...new Set(runs.map((run) => run.status))];
  fill(form.elements.status, [["", "any"], ...statuses.map((status) => [status, shown(status, 40)])], "");
  columns = allColumns();
  chosen = firstColumns();
  chooseColumns();
  drawTable();
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", listRuns);
  form.elements.take.addEventListener("click", () => select(ids(runs.filter(isListed)), "table"));
  form.elements.commands.addEventListener("click", (event) => {
    const commands = runs.filter(isListed).flatMap((run) => run.command ?? []);
    copyAndSay(event.target, commands.map((command) => `${command}\n`).join(""));
  });
  onSelection((origin) => {
    if (origin !== "table") form.elements.only.checked = selected !== null;
    else if (selected === null) form.elements.only.checked = false;
    listRuns();
  });
}
