// Answers to the same prompts, a column per run.

const PROMPTS_AT_A_TIME = 8;
const COLUMNS_AT_FIRST = 4;
const LONG = 600; // characters of a text that is not opened
const GOOD = /^(right|correct|pass|passed|yes|true|good|ok)\b/i;
const BAD = /^(wrong|incorrect|fail|failed|no|false|bad|not)\b/i;
let promptsShown = PROMPTS_AT_A_TIME;
let ticked = null; // run ids somebody chose; null: one of every group

function answering() {
  const answered = new Set(data.samples.flatMap((sample) => sample.answers.map((answer) => answer.run)));
  return runs.filter((run) => answered.has(run.id));
}

// The baseline first, then the best groups, a run of each: what one wants to read side by side.
function sampleColumns() {
  const there = answering().filter(isSelected);
  if (ticked !== null) return there.filter((run) => ticked.has(run.id));
  if (selected !== null && there.length <= COLUMNS_AT_FIRST) return there;
  const best = data.summary.map((finding) => finding.best);
  const baseline = shownGroups().find((group) => group.baseline);
  const rank = (group) => (group === baseline ? -1 : best.includes(group.id) ? best.indexOf(group.id) : best.length);
  const order = [...shownGroups()].sort((a, b) => rank(a) - rank(b));
  const firsts = order.map((group) => there.find((run) => group.runs.includes(run.id))).filter(Boolean);
  return firsts.slice(0, COLUMNS_AT_FIRST);
}

function answerOf(sample, run, step) {
  const mine = sample.answers.filter((answer) => answer.run === run.id);
  if (step !== "") return mine.find((answer) => String(answer.step) === step) ?? null;
  return mine.reduce((last, answer) => (last === null || answer.step >= last.step ? answer : last), null);
}

function longText(text) {
  if (text.trim() === "") return el("div", { class: "text" }, "(empty)");
  if (text.length <= LONG) return el("div", { class: "text", dir: "auto" }, text);
  const box = el("div", { class: "text", dir: "auto" }, `${text.slice(0, LONG)}…`);
  const button = el(
    "button",
    { type: "button", class: "link screen", "aria-expanded": "false" },
    `All ${text.length.toLocaleString("en")} characters`,
  );
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-expanded") === "false";
    button.setAttribute("aria-expanded", String(open));
    box.classList.toggle("open", open);
    box.textContent = open ? text : `${text.slice(0, LONG)}…`;
    button.textContent = open ? "Less" : `All ${text.length.toLocaleString("en")} characters`;
  });
  return el("div", {}, box, button);
}

// "right", or a checker's figures: "exact_match 1, plain 0". The words stay; a mark and a colour say them again.
function verdictTags(verdict) {
  if (verdict === null) return [];
  const parts = verdict.split(", ");
  const figures = parts.map((part) => /^.+ (-?[\d.]+)$/.exec(part)?.[1]);
  if (figures.includes(undefined)) return [verdictTag(verdict, GOOD.test(verdict), BAD.test(verdict))];
  return parts.map((part, i) => verdictTag(part, Number(figures[i]) === 1, Number(figures[i]) === 0));
}

function verdictTag(text, good, bad) {
  return el(
    "span",
    { class: `verdict ${good ? "good" : bad ? "bad" : ""}` },
    (good ? "✓ " : bad ? "✕ " : "") + shown(text, 80),
  );
}

function answerCell(answer) {
  if (answer === null) return el("td", { class: "quiet" }, "no answer");
  return el(
    "td",
    {},
    ...verdictTags(answer.verdict),
    longText(answer.text),
    el("span", { class: "quiet small" }, `step ${answer.step}`),
  );
}

function promptCell(sample) {
  return el(
    "th",
    { scope: "row" },
    el(
      "p",
      { class: "quiet small" },
      el("bdi", {}, shown(sample.source, 60)),
      " ",
      el("bdi", {}, shown(sample.row, 60)),
    ),
    longText(sample.prompt),
    sample.reference === null
      ? null
      : el("div", { class: "reference" }, el("span", { class: "quiet small" }, "expected"), longText(sample.reference)),
  );
}

function sampleFilter(across, step) {
  const form = byId("sample-controls").elements;
  const wanted = form.find.value.toLowerCase();
  return (sample) => {
    const answers = across.map((run) => answerOf(sample, run, step)).filter(Boolean);
    const apart = new Set(answers.map((answer) => answer.verdict)).size > 1;
    const texts = [sample.source, sample.row, sample.prompt, ...answers.map((answer) => answer.text)];
    return (
      (!form.apart.checked || apart) && (wanted === "" || texts.some((text) => text.toLowerCase().includes(wanted)))
    );
  };
}

function drawSamples() {
  const step = byId("sample-controls").elements.step.value;
  const across = sampleColumns();
  const found = data.samples.filter(sampleFilter(across, step));
  const heads = across.map((run) =>
    el("th", { scope: "col" }, swatch(groupIndex.get(run.group)), breakable(run.name, 60)),
  );
  const rows = found
    .slice(0, printing ? found.length : promptsShown)
    .map((sample) => el("tr", {}, promptCell(sample), ...across.map((run) => answerCell(answerOf(sample, run, step)))));
  byId("sample-table").replaceChildren(
    across.length === 0
      ? el("p", { class: "notice" }, "None of the selected runs has samples.")
      : el(
          "table",
          { class: "samples" },
          el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Prompt"), ...heads)),
          el("tbody", {}, ...rows),
        ),
  );
  byId("sample-table").style.setProperty("--columns", across.length + 1);
  byId("sample-count").textContent = `${found.length} of ${plural(data.samples.length, "prompt")}`;
  byId("more-samples").hidden = found.length <= promptsShown;
  listColumns(across);
}

function listColumns(across) {
  const box = (run) =>
    el(
      "label",
      {},
      el("input", { type: "checkbox", value: run.id, checked: across.includes(run) }),
      swatch(groupIndex.get(run.group)),
      el("bdi", {}, shown(run.name, 60)),
    );
  byId("sample-runs").replaceChildren(...answering().filter(isSelected).map(box));
}

function startSamples() {
  if (answering().length === 0) {
    byId("samples").hidden = true;
    return;
  }
  const steps = [...new Set(data.samples.flatMap((sample) => sample.answers.map((answer) => answer.step)))].sort(
    (a, b) => a - b,
  );
  const form = byId("sample-controls");
  fill(
    form.elements.step,
    [["", "the last of every run"], ...steps.map((step) => [String(step), `at step ${step}`])],
    "",
  );
  byId("sample-step").hidden = steps.length < 2;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => drawSamples());
  byId("sample-runs").addEventListener("input", (event) => {
    event.stopPropagation();
    ticked = new Set([...byId("sample-runs").querySelectorAll("input:checked")].map((box) => box.value));
    const at = event.target.value;
    drawSamples();
    [...byId("sample-runs").querySelectorAll("input")].find((box) => box.value === at)?.focus();
  });
  byId("more-samples").addEventListener("click", () => {
    promptsShown += PROMPTS_AT_A_TIME;
    drawSamples();
  });
  onSelection(() => {
    ticked = null;
    drawSamples();
  });
  drawSamples();
}
