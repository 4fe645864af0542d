// Colours, dashes and markers of groups, and how every chart looks.

const HUES = 7; // --g0 ... in page.css; told apart also by people who see fewer colours
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const STROKES = ["", "5 3", "1.5 2.5", "5 2 1.5 2", "9 3"]; // the same for the legend
const MARKERS = ["circle", "square", "diamond", "triangle-up", "x", "triangle-down", "star", "hexagon"];
const SHAPES = [
  "M9 6a3 3 0 1 0 6 0a3 3 0 1 0-6 0",
  "M9.3 3.3h5.4v5.4h-5.4z",
  "M12 2.2L15.8 6L12 9.8L8.2 6z",
  "M12 2.4L15.7 9H8.3z",
  "M9 4.4L10.4 3L12 4.6L13.6 3L15 4.4L13.4 6L15 7.6L13.6 9L12 7.4L10.4 9L9 7.6L10.6 6z",
  "M12 9.6L8.3 3h7.4z",
  "M12 1.8l1.2 2.7 3 .3-2.2 2 .6 2.9-2.6-1.5-2.6 1.5.6-2.9-2.2-2 3-.3z",
  "M12 2.4l3.2 1.8v3.6L12 9.6 8.8 7.8V4.2z",
];
const probe = document.body.appendChild(el("span", { class: "probe", "aria-hidden": "true" }));

// A custom property of the style sheet as a colour that Plotly understands, in the theme of this moment.
function colour(name, alpha = 1) {
  probe.style.color = `var(${name})`;
  const rgb = getComputedStyle(probe).color;
  return alpha === 1 ? rgb : rgb.replace(/^rgb\(/, "rgba(").replace(/\)$/, `, ${alpha})`);
}

function lookOf(index) {
  const known = index !== undefined && index !== null && index >= 0;
  return {
    variable: known ? `--g${index % HUES}` : "--faint",
    dash: known ? DASHES[Math.floor(index / HUES) % DASHES.length] : "dot",
    stroke: known ? STROKES[Math.floor(index / HUES) % STROKES.length] : STROKES[2],
    marker: MARKERS[known ? index % MARKERS.length : 0],
    shape: SHAPES[known ? index % SHAPES.length : 0],
  };
}

function lookOfGroup(group) {
  return lookOf(groupIndex.get(group.id));
}

// A piece of line with the group's marker, as it is drawn in the charts.
function swatch(index) {
  const look = lookOf(index);
  const line = svg("path", { d: "M0 6h24", fill: "none", "stroke-width": 2, "stroke-dasharray": look.stroke });
  const mark = svg("path", { d: look.shape });
  line.style.stroke = `var(${look.variable})`;
  mark.style.fill = `var(${look.variable})`;
  return svg(
    "svg",
    { class: "swatch", viewBox: "0 0 24 12", width: 24, height: 12, "aria-hidden": "true" },
    line,
    mark,
  );
}

function chartAxis(title, more = {}) {
  return {
    title: { text: title, font: { size: printing ? 10 : 12 }, standoff: 10 },
    gridcolor: colour("--grid"),
    linecolor: colour("--line"),
    zeroline: false,
    showline: true,
    ticks: "",
    automargin: true,
    fixedrange: false,
    ...more,
  };
}

function chartLayout(more = {}) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: printing ? 10 : 12, color: colour("--quiet") },
    margin: { l: 52, r: 14, t: 10, b: 44 },
    showlegend: false,
    hoverlabel: {
      bgcolor: colour("--paper"),
      bordercolor: colour("--line"),
      align: "left",
      font: { color: colour("--ink"), size: 12 },
    },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--faint"), activecolor: colour("--accent") },
    ...more,
  };
}

// Plotly's own button saves points; a paper wants lines too.
const PICTURES = [
  ["png", "camera"],
  ["svg", "disk"],
].map(([format, icon]) => ({
  name: `uft-${format}`,
  title: `Save as ${format.toUpperCase()}`,
  icon: Plotly.Icons[icon],
  click: (node) => Plotly.downloadImage(node, { format, filename: "uft", scale: format === "png" ? 2 : 1 }),
}));
const REMOVED = ["toImage", "lasso2d", "select2d", "zoomIn2d", "zoomOut2d", "autoScale2d"];
const PICTURES_ALONE = { modeBarButtons: [PICTURES] };

const CONFIG = {
  displaylogo: false,
  responsive: true,
  doubleClick: "reset",
  displayModeBar: "hover",
  showSendToCloud: false,
  plotlyServerURL: "",
  modeBarButtonsToRemove: REMOVED,
  modeBarButtonsToAdd: PICTURES,
};

function draw(node, traces, layout, config = {}) {
  const size = printing ? { width: node.parentElement.clientWidth, autosize: false } : { autosize: true };
  Plotly.react(node, traces, { ...layout, ...size, height: node.clientHeight }, { ...CONFIG, ...config });
}

let printing = false;

function isDark() {
  const wanted = document.documentElement.dataset.theme;
  return wanted ? wanted === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// The theme is kept where the browser lets a file keep something.
function remember(theme) {
  try {
    localStorage.setItem("uft-theme", theme);
  } catch {
    // A page in a sandbox has no storage: the theme holds until it is closed.
  }
}

function remembered() {
  try {
    return localStorage.getItem("uft-theme");
  } catch {
    return null;
  }
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  redraw();
}
