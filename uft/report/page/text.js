// Text and elements. Data goes into text nodes and attributes, never into markup.

const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]/g;
const SHORT = 12;
const BREAKS = /(?<=[/_])|(?<=[.-])(?=[a-z])/i; // within words, never within numbers
const LESS = "less is better";
const MORE = "more is better";

// el("p", {class: "quiet", onclick: f}, "text", node, ...)
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function byId(id) {
  return document.getElementById(id);
}

// Marks that turn the direction of what follows, or cannot be seen, written out: names must not pass for others.
function visible(text) {
  return String(text).replace(HIDDEN, (mark) => `\\u${mark.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

function clip(text, longest) {
  return text.length <= longest ? text : `${text.slice(0, longest - 1)}…`;
}

function shown(text, longest = 300) {
  return clip(visible(clip(String(text), longest + 1)), longest);
}

// The same with places where a long name may break.
function breakable(text, longest = 80) {
  const parts = text.length > SHORT ? shown(text, longest).split(BREAKS) : [shown(text)];
  return el("bdi", { title: shown(text, 1000) }, ...parts.flatMap((part) => [part, document.createElement("wbr")]));
}

// For Plotly, which reads some tags and entities in every text.
function label(text, longest = 48) {
  return shown(text, longest).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

// A config value as one would type it.
function setting(value) {
  if (value === null || value === undefined) return "–";
  return typeof value === "string" ? value : JSON.stringify(value);
}

// Four significant digits; powers of ten where fixed decimals say little.
function figure(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isNaN(value)) return "nan";
  if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
  const size = Math.abs(value);
  if (size < 1e5 && Number.isInteger(value)) return String(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2);
  return size >= 1000 ? value.toFixed(0) : value.toPrecision(4);
}

// Decimals for a column whose usual size this is: four digits of 12.34, three of 0.123.
function decimalsFor(size) {
  const power = Number.isFinite(size) && size > 0 ? Math.floor(Math.log10(size)) : 0;
  return Math.min(8, Math.max(0, power < -1 ? 2 - power : 3 - Math.max(0, power)));
}

function fixed(value, decimals) {
  return Number.isFinite(value) && Math.abs(value) < 1e5 ? value.toFixed(decimals) : figure(value);
}

function interval(stat) {
  return stat.low === null ? "" : `[${figure(stat.low)}, ${figure(stat.high)}]`;
}

function count(value) {
  if (value === null || !Number.isFinite(value)) return figure(value);
  for (const [limit, unit] of [
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    if (Math.abs(value) >= limit) return `${(value / limit).toFixed(1)}${unit}`;
  }
  return String(Math.round(value));
}

// 432 -> 07:12, 4032 -> 1:07:12
function duration(seconds) {
  if (seconds === null || !Number.isFinite(seconds)) return figure(seconds);
  const whole = Math.max(0, Math.round(seconds));
  const two = (part) => String(part).padStart(2, "0");
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${two(minutes)}:${two(rest)}`;
}

function gigabytes(bytes) {
  return bytes === null || !Number.isFinite(bytes)
    ? figure(bytes)
    : `${(bytes / 1e9).toFixed(bytes < 1e10 ? 2 : 1)} GB`;
}

function plural(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

function better(metric) {
  const direction = directionOf(metric);
  return direction === null ? "" : direction === "min" ? LESS : MORE;
}

// Fills a <select> with [value, text] pairs and keeps or sets the choice.
function fill(list, options, chosen) {
  list.replaceChildren(...options.map(([value, text]) => el("option", { value, selected: value === chosen }, text)));
}
