// Means, intervals and smoothing: the same rules as in compare.json, for the runs that are selected.

// Student's t, 97.5 %, for 1 to 30 degrees of freedom; beyond, an expansion that is right to four digits.
const T = [
  12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.306, 2.26216, 2.22814, 2.20099, 2.17881, 2.16037,
  2.14479, 2.13145, 2.11991, 2.10982, 2.10092, 2.09302, 2.08596, 2.07961, 2.07387, 2.06866, 2.0639, 2.05954, 2.05553,
  2.05183, 2.04841, 2.04523, 2.04227,
];
const Z = 1.959964;

function tQuantile(freedom) {
  if (freedom <= T.length) return T[freedom - 1];
  return Z + (Z ** 3 + Z) / (4 * freedom) + (5 * Z ** 5 + 16 * Z ** 3 + 3 * Z) / (96 * freedom ** 2);
}

// Of one value there is a mean and nothing else.
function statOf(values) {
  const n = values.length;
  if (n === 0) return null;
  const mean = values.reduce((sum, value) => sum + value, 0) / n;
  if (n === 1 || !Number.isFinite(mean)) return { n, mean, sd: null, low: null, high: null };
  const sd = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (n - 1));
  const half = (tQuantile(n - 1) * sd) / Math.sqrt(n);
  return { n, mean, sd, low: mean - half, high: mean + half };
}

function finalStat(members, metric) {
  return statOf(members.map((run) => finalOf(run, metric)).filter((value) => value !== null));
}

// compare.json's own figures while the whole group is selected, else the same over its selected runs.
function groupStat(group, metric) {
  const finished = membersOf(group).filter(isFinished);
  if (!finished.every(isSelected)) return finalStat(finished.filter(isSelected), metric);
  const given = own(group.metrics, metric);
  if (given === null) return null;
  const [mean, sd, low, high] = ["mean", "sd", "low", "high"].map((key) => toNumber(own(given, key)));
  return { n: given.n, mean, sd, low, high };
}

// Exponential moving average, corrected for its start. What is not a number stays, and does not spread.
function smooth(values, amount) {
  if (amount === 0) return values;
  const result = new Float32Array(values.length);
  let average = 0;
  let weight = 0;
  values.forEach((value, i) => {
    if (Number.isFinite(value)) {
      average = amount * average + (1 - amount) * value;
      weight = amount * weight + (1 - amount);
      result[i] = average / weight;
    } else {
      result[i] = value;
    }
  });
  return result;
}

const MOST = 500; // places at which a mean is taken

function gridOf(curves) {
  if (curves.every((curve) => curve.x === curves[0].x)) return curves[0].x;
  const all = [...new Set(curves.flatMap((curve) => [...curve.x]))].filter(Number.isFinite).sort((a, b) => a - b);
  const every = Math.ceil(all.length / MOST);
  return all.filter((_, i) => i % every === 0 || i === all.length - 1);
}

// The curve at the places of `grid`, on straight lines between its points; null outside.
function along(curve, grid) {
  if (curve.x === grid) return curve.y;
  const { x, y } = curve;
  let i = 0;
  return Array.from(grid, (place) => {
    while (i < x.length - 1 && x[i + 1] <= place) i += 1;
    if (!(x[i] <= place)) return null;
    if (x[i] === place) return y[i];
    if (i === x.length - 1) return null;
    return y[i] + ((y[i + 1] - y[i]) * (place - x[i])) / (x[i + 1] - x[i]);
  });
}

// [{x, n, mean, sd, low, high}]; the mean has a gap where a run holds what is not a number.
function meanCurve(curves) {
  const grid = gridOf(curves);
  const columns = curves.map((curve) => along(curve, grid));
  return Array.from(grid, (x, i) => {
    const values = columns.map((column) => column[i]).filter((value) => value !== null);
    return { x, ...(statOf(values) ?? { n: 0, mean: NaN, sd: null, low: null, high: null }) };
  });
}
