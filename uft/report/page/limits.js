// Where an axis ends. What is possible bounds it, what is common decides, and arrows stand for what lies outside.

const FENCE = 7; // median absolute deviations from the median, beyond which a value lies outside
const FLATTENED = 3; // times as wide as without the values outside: else they may stay
const MARGIN = 0.04;

function medianOf(sorted) {
  const middle = sorted.length / 2;
  return (sorted[Math.ceil(middle) - 1] + sorted[Math.floor(middle)]) / 2;
}

// The values within the fence, sorted.
function common(values) {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = medianOf(sorted);
  const fence = FENCE * medianOf(sorted.map((value) => Math.abs(value - middle)).toSorted((a, b) => a - b));
  return sorted.filter((value) => Math.abs(value - middle) <= fence);
}

// The ends of intervals [low, high] without those that would flatten the others. What is good is never outside.
function commonRange(intervals, direction) {
  const [lows, highs] = [0, 1].map((end) => intervals.map((interval) => interval[end]));
  const [low, high] = [Math.min(...lows), Math.max(...highs)];
  const from = direction === "min" ? low : common(lows)[0];
  const to = direction === "max" ? high : common(highs).at(-1);
  return to > from && high - low > FLATTENED * (to - from) ? [from, to] : [low, high];
}

// [low, high] for {mean, low, high} of one metric. On either side intervals get as much room as the means, or as the
// usual one needs.
function limitsOf(stats, metric, whole = false) {
  const means = stats.map((stat) => stat.mean).filter(Number.isFinite);
  if (means.length === 0) return [0, 1];
  let [low, high] = whole ? [Math.min(...means), Math.max(...means)] : commonRange(means.map((mean) => [mean, mean]), directionOf(metric));
  const inside = stats.filter((stat) => stat.mean >= low && stat.mean <= high);
  const ends = inside.flatMap((stat) => [stat.low, stat.high]).filter(Number.isFinite);
  const halves = inside.map((stat) => (stat.high - stat.low) / 2).toSorted((a, b) => a - b);
  const room = whole || high === low ? Infinity : Math.max(high - low, medianOf(halves) || 0);
  [low, high] = [Math.max(Math.min(low, ...ends), low - room), Math.min(Math.max(high, ...ends), high + room)];
  const [least, most] = metricByName.get(metric)?.possible ?? [null, null];
  [low, high] = [Math.max(low, least ?? -Infinity), Math.min(high, most ?? Infinity)];
  if (high <= low) return [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
  return [low - MARGIN * (high - low), high + MARGIN * (high - low)];
}

// -1 below the limits, 1 above them, else 0.
function outside(value, [low, high]) {
  return Number(value > high) - Number(value < low);
}

function within(value, [low, high]) {
  return Math.min(high, Math.max(low, value));
}

// Plotly's triangle that points out of the plot: "triangle-ne" for a point beyond both axes.
function outwards(across, up) {
  const north = ["down", "", "up"][up + 1];
  if (across === 0) return `triangle-${north}`;
  const letter = across > 0 ? "e" : "w";
  return up === 0 ? `triangle-${across > 0 ? "right" : "left"}` : `triangle-${up > 0 ? "n" : "s"}${letter}`;
}

// The points that no other beats in both metrics, from left to right; signs are 1 where more is better.
function frontOf(points, [across, up]) {
  const beats = (a, b) =>
    across * a.x >= across * b.x && up * a.y >= up * b.y && (a.x !== b.x || a.y !== b.y);
  return points.filter((b) => !points.some((a) => beats(a, b))).toSorted((a, b) => a.x - b.x);
}

// Rank correlation of two lists, each with its sign: below zero where one is paid for with the other.
function rankCorrelation(first, second) {
  const ranks = (values) => values.map((value) => values.filter((other) => other < value).length);
  const centred = (values) => values.map((value) => value - values.reduce((sum, x) => sum + x, 0) / values.length);
  const [a, b] = [centred(ranks(first)), centred(ranks(second))];
  const dot = (u, v) => u.reduce((sum, x, i) => sum + x * v[i], 0);
  return dot(a, b) / (Math.sqrt(dot(a, a) * dot(b, b)) || 1);
}
