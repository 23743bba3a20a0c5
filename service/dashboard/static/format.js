// Numbers and times as people read them. A number stays on a line with its unit.

export function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0 || Number.isInteger(value) && Math.abs(value) < 1e5) return String(value);
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

export function count(value) {
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (value >= 0.9995 * size && value >= 1e3) return `${Number((value / size).toPrecision(3))}\u00a0${unit}`;
  }
  return String(value);
}

/** A whole number that is told in full. */
export function whole(value) {
  return value?.toLocaleString("en-US") ?? "–";
}

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  for (const [unit, size] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (value >= size) return `${Number((value / size).toPrecision(3))}\u00a0${unit}`;
  }
  return `${value}\u00a0B`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 59.5) return `${seconds < 9.95 ? Number(seconds.toFixed(1)) : Math.round(seconds)}\u00a0s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes}\u00a0min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours}\u00a0h\u00a0${minutes % 60}\u00a0min`;
  return `${Math.round(hours / 24)}\u00a0d`;
}

export function time(text) {
  return text ? new Date(text).toLocaleString([], {dateStyle: "medium", timeStyle: "medium"}) : "–";
}

/** The time of day; with the date if that is not today. */
export function clock(text) {
  const moment = new Date(text);
  return moment.toDateString() === new Date().toDateString() ? moment.toLocaleTimeString([], {hourCycle: "h23"}) : time(text);
}

export function ago(text) {
  const seconds = Math.max(0, (Date.now() - new Date(text)) / 1000);
  return seconds < 5 ? "now" : `${duration(seconds)} ago`;
}

/** "1 token", "2 tokens", "1.2 k tokens"; `shown`: the number in another form. */
export function counted(value, thing, shown = count(value)) {
  return `${shown} ${thing}${value === 1 ? "" : "s"}`;
}
