// Numbers and times as people read them.

export function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0 || Number.isInteger(value) && Math.abs(value) < 1e5) return String(value);
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

export function count(value) {
  for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (value >= size) return `${Number((value / size).toPrecision(3))} ${unit}`;
  }
  return String(value);
}

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (value >= size) return `${Number((value / size).toPrecision(3))} ${unit}`;
  }
  return `${value} B`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${seconds < 10 ? Number(seconds.toFixed(1)) : Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${minutes % 60} min`;
  return `${Math.round(hours / 24)} d`;
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
