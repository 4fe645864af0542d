// Start, theme and paper.

function showCounts() {
  const words = [...new Set(runs.map((run) => run.status))].map(
    (status) => `${runs.filter((run) => run.status === status).length} ${shown(status, 30)}`,
  );
  byId("counts").textContent =
    `${plural(runs.length, "run")} in ${plural(groups.length, "group")}: ${words.join(", ") || "none"}`;
}

// Paper is light, has no controls and shows everything: charts are drawn for its width before the browser lays it out.
function startPrinting() {
  let before;
  addEventListener("beforeprint", () => {
    before = document.documentElement.dataset.theme;
    printing = true;
    document.documentElement.classList.add("paper");
    document.documentElement.dataset.theme = "light";
    for (const warnings of document.querySelectorAll(".warnings")) warnings.open = true;
    drawHeadline();
    drawSamples();
    for (const panel of panels.filter((candidate) => candidate.node.offsetParent !== null)) drawNow(panel);
  });
  addEventListener("afterprint", () => {
    printing = false;
    document.documentElement.classList.remove("paper");
    if (before) document.documentElement.dataset.theme = before;
    else delete document.documentElement.dataset.theme;
    drawHeadline();
    drawSamples();
    redraw();
  });
}

function startTheme() {
  byId("theme").addEventListener("click", () => {
    const next = isDark() ? "light" : "dark";
    remember(next);
    setTheme(next);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme());
  setTheme(remembered());
}

showCounts();
startLegend();
startHeadline();
startCurves();
startScatter();
startHeatmap();
startParallel();
byId("settings").hidden = byId("heatmap-part").hidden && byId("parallel-part").hidden;
startTable();
startDifferences();
startSamples();
showSections();
startTheme();
startPrinting();
addEventListener("hashchange", selectFromAddress);
selectFromAddress();
