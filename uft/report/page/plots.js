// A plot, or several side by side, one for each value of a setting: their axes, and where names stand.

const MOST_PLOTS = 30;
const COLUMNS_OF_PLOTS = 3;

// [{title, has}]: one plot of all groups, or one for each value of a setting.
function plotsPer(key) {
  const axis = data.axes.find((each) => each.key === key);
  if (!axis) return [{ title: "", has: () => true }];
  return axis.values.slice(0, MOST_PLOTS).map((value) => ({
    title: label(setting(value), 40),
    has: (group) => sameKey(own(group.config, key)) === sameKey(value),
  }));
}

// What a plot can be drawn per, beside all in one.
function facetOptions() {
  const axes = data.axes.filter((axis) => axis.values.length > 1 && axis.values.length <= MOST_PLOTS);
  return [["", "– (all in one)"], ...axes.map((axis) => [axis.key, shown(axis.key, 40)])];
}

// Plots side by side are 230 pixels high each; one is as high as its place says.
function fitPlots(node, plots) {
  const lines = Math.ceil(plots.length / columnsOf(node, plots));
  if (plots.length > 1) node.style.height = `${Math.max(290, 230 * lines)}px`;
  else node.style.removeProperty("height");
}

function columnsOf(node, plots) {
  return Math.min(plots.length, node.clientWidth < 640 ? 1 : COLUMNS_OF_PLOTS);
}

// Axes of plots side by side, with the same options each, and the plots' titles.
function plotAxes(node, plots, titles, options) {
  const columns = columnsOf(node, plots);
  const lines = Math.ceil(plots.length / columns);
  const layout = { annotations: [] };
  plots.forEach(({ title }, i) => {
    const [column, line] = [i % columns, Math.floor(i / columns)];
    const [end, gap] = [i === 0 ? "" : i + 1, plots.length > 1 ? [0.03, 0.13] : [0, 0]];
    const place = (at, count, space) => [at / count + (at ? space / 2 : 0), (at + 1) / count - (at + 1 < count ? space / 2 : 0)];
    const x = column === 0 && line === lines - 1;
    layout[`xaxis${end}`] = {
      ...chartAxis(plots.length === 1 || line === lines - 1 ? titles[0] : "", options[0]),
      domain: place(column, columns, gap[0]),
      anchor: `y${end}`,
    };
    layout[`yaxis${end}`] = {
      ...chartAxis(column === 0 ? titles[1] : "", options[1]),
      domain: place(lines - 1 - line, lines, gap[1]),
      anchor: `x${end}`,
      showticklabels: column === 0 || x,
    };
    if (title) {
      const at = { xref: `x${end} domain`, yref: `y${end} domain`, x: 0, y: 1, xanchor: "left", yanchor: "bottom" };
      layout.annotations.push({ ...at, text: `<b>${title}</b>`, showarrow: false, font: { color: colour("--ink") } });
    }
  });
  return layout;
}

const POSITIONS = ["top right", "bottom right", "top left", "bottom left", "top center", "bottom center"];

// Where each name hides the least of other names and points; sizes in pixels, roughly.
function namePositions(points, limits, [width, height]) {
  const centres = points.map(({ stats }) => [
    (width * (within(stats[0].mean, limits[0]) - limits[0][0])) / (limits[0][1] - limits[0][0]),
    (height * (limits[1][1] - within(stats[1].mean, limits[1]))) / (limits[1][1] - limits[1][0]),
  ]);
  const taken = centres.map(([x, y]) => [x - 7, y - 7, x + 7, y + 7]);
  const common = (a, b) =>
    Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  return points.map(({ group }, i) => {
    const wide = 6.2 * Math.min(26, group.name.length);
    const box = (position) => {
      const [up, side] = position.split(" ");
      const left = centres[i][0] + (side === "right" ? 7 : side === "left" ? -7 - wide : -wide / 2);
      const top = centres[i][1] + (up === "top" ? -21 : 7);
      return [left, top, left + wide, top + 14];
    };
    const cost = (position) => {
      const mine = box(position);
      const cut = wide * 14 - common(mine, [0, 0, width, height]);
      return 3 * cut + taken.reduce((sum, other, j) => sum + (j === i ? 0 : common(mine, other)), 0);
    };
    const best = POSITIONS.reduce((a, b) => (cost(b) < cost(a) ? b : a));
    taken.push(box(best));
    return best;
  });
}
