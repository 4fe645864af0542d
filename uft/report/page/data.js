// What Python put into the page. Numbers that JSON lacks are strings there; curves are decoded when they are drawn.

const data = JSON.parse(document.getElementById("comparison").textContent);
const runs = data.runs;
const groups = data.groups;
const runById = new Map(runs.map((run) => [run.id, run]));
const groupById = new Map(groups.map((group) => [group.id, group]));
const groupIndex = new Map(groups.map((group, index) => [group.id, index]));
const metricByName = new Map(data.metrics.map((metric) => [metric.name, metric]));
const headline = data.headline.map((entry) => entry.metric);
const SPECIAL = new Map([
  ["nan", NaN],
  ["inf", Infinity],
  ["-inf", -Infinity],
]);

// An object's own entry or null: names come from data, and "constructor" may be one of them.
function own(object, key) {
  return object !== null && object !== undefined && Object.hasOwn(object, key) ? object[key] : null;
}

// A number, which may be NaN or infinite, or null where there is none.
function toNumber(value) {
  if (typeof value === "number") return value;
  return typeof value === "string" && SPECIAL.has(value) ? SPECIAL.get(value) : null;
}

function finalOf(run, metric) {
  return toNumber(own(run.final, metric));
}

function isFinished(run) {
  return run.status === "finished";
}

function directionOf(metric) {
  return metricByName.get(metric)?.direction ?? null;
}

const decoded = new Map();

function decode(place) {
  if (place === null) return null;
  if (!decoded.has(place)) {
    const bytes = atob(data.curves.arrays[place]);
    const buffer = new Uint8Array(bytes.length);
    for (let i = 0; i < bytes.length; i += 1) buffer[i] = bytes.charCodeAt(i);
    decoded.set(place, new Float32Array(buffer.buffer)); // little-endian, as every machine that runs a browser is
  }
  return decoded.get(place);
}

const PLACES = ["step", "tokens", "seconds", "value"];

// {x, y} of one run, each a Float32Array, or null. Runs with the same steps share the array `x`.
function curveOf(metric, run, axis) {
  const places = own(own(data.curves.runs, metric), run.id);
  if (places === null) return null;
  const x = decode(places[PLACES.indexOf(axis)]);
  const y = decode(places[PLACES.indexOf("value")]);
  return x === null || y === null ? null : { x, y };
}

// A run that could not be read has no settings.
function isKnown(run) {
  return Object.keys(run.config).length > 0;
}

// Two config values are one when they read the same as JSON; a key that a run lacks is null.
function settingOf(run, key) {
  return own(run.config, key);
}

function sameKey(value) {
  return JSON.stringify(value ?? null);
}
