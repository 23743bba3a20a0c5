// Curves: small ones in lists, and large ones that can be looked into.

import uPlot from "./uplot/uPlot.esm.js";
import {h, svg} from "./dom.js";
import {number} from "./format.js";

const COLOURS = 8;
const together = new Map(); // name of a group -> its charts, which are looked into together

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** A curve of some 30 points as a picture, with its newest value beside it. */
export function sparkline(curve) {
  if (!curve) return h("span", {class: "soft"}, "–");
  const known = curve.value.map((value, i) => [curve.step[i], value]).filter(([, value]) => value !== null);
  if (!known.length) return h("span", {class: "soft"}, "–");
  const [width, height] = [96, 26];
  const values = known.map(([, value]) => value);
  const [low, high, first, last] = [Math.min(...values), Math.max(...values), known[0][0], known.at(-1)[0]];
  const points = known.map(([step, value]) => {
    const x = last === first ? width - 3 : (width * (step - first)) / (last - first);
    const y = high === low ? height / 2 : height - 2 - (height - 4) * ((value / 2 - low / 2) / (high / 2 - low / 2)); // halves: the whole may be more than a number holds
    return `${x.toFixed(1)},${y.toFixed(1)}`;
  });
  const said = `${curve.name}: ${number(values[0])} to ${number(values.at(-1))}`;
  return h("span", {class: "spark"},
    svg("svg", {viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": said},
      svg("title", null, said), points.length > 1 ? svg("polyline", {points: points.join(" "), fill: "none"}) : svg("circle", {cx: width - 3, cy: height / 2, r: "2"})),
    h("span", {class: "value"}, number(values.at(-1))));
}

function range(low, high) {
  if (low === null) return [0, 1];
  const room = low === high ? Math.abs(low) / 10 || 1 : high / 20 - low / 20;
  return [low - room, high + room];
}

/** The value at a place, or the last one before it: an evaluation is not measured at every step. */
function known(values, at) {
  while (at !== null && at >= 0 && (values[at] === null || values[at] === undefined)) at--;
  return at === null ? null : values[at];
}

/** Where nothing is pointed at, the legend tells the newest values. */
function newest(plot) {
  if (plot.cursor.idx === null || plot.cursor.idx === undefined) plot.setLegend({idx: plot.data[0].length ? plot.data[0].length - 1 : null}, false);
}

/** One chart of several curves over steps, in a figure with its title and the newest values. */
export class Chart {
  /** `look(from, to)`: asked for the curves of a part that is looked into, {label: series}. */
  constructor(title, {unit = "", look = null, sync = "steps"} = {}) {
    Object.assign(this, {title, unit, look, sync, curves: {}, part: null, plot: null, shape: ""});
    this.place = h("div", {class: "plot"});
    this.element = h("figure", {class: "chart"}, h("figcaption", null, h("strong", null, title), unit && unit !== "1" ? h("span", {class: "soft"}, ` ${unit}`) : null), this.place);
    this.sizes = new ResizeObserver(() => this.plot?.setSize(this.size()));
    this.sizes.observe(this.place);
    if (!together.has(sync)) together.set(sync, new Set());
    together.get(sync).add(this);
  }

  close() {
    together.get(this.sync).delete(this);
    this.sizes.disconnect();
    this.plot?.destroy();
    this.plot = null;
  }

  size() {
    return {width: Math.max(200, this.place.clientWidth), height: 190};
  }

  /** Show these curves: {label: {step, value, min?, max?}}. What is looked into stays in place. */
  show(curves) {
    this.curves = curves;
    const values = Object.entries(curves).filter(([, one]) => one.step.length).map(([label, one]) => `${label} ${number(one.value.at(-1))}`);
    this.place.setAttribute("role", "img");
    this.place.setAttribute("aria-label", `${this.title}; the newest: ${values.join(", ") || "nothing yet"}`);
    if (this.part === null) this.draw(curves, true);
  }

  draw(curves, whole) {
    const labels = Object.keys(curves);
    const tables = labels.map((label) => {
      const one = curves[label];
      return [one.step, one.value, one.min ?? one.value, one.max ?? one.value];
    });
    const data = tables.length ? uPlot.join(tables) : [[]];
    const shape = labels.join("\n");
    if (this.plot === null || this.shape !== shape) {
      this.plot?.destroy();
      this.plot = new uPlot(this.options(labels), data, this.place);
      this.shape = shape;
    } else {
      this.plot.setData(data, whole);
    }
    newest(this.plot);
  }

  again() { // in the colours of another theme
    this.plot?.destroy();
    this.plot = null;
    this.part = null;
    this.show(this.curves);
  }

  options(labels) {
    const [ink, grid] = [colour("--soft"), colour("--line")];
    const series = [{label: "step"}];
    const bands = [];
    labels.forEach((label, i) => {
      const stroke = colour(`--curve-${i % COLOURS}`);
      const at = series.length;
      series.push({label, stroke, width: 1.5, spanGaps: true, points: {show: (u, s, from, to) => to - from < 30 || undefined}, value: (u, value, i, at) => number(known(u.data[i], at))});
      const faint = {stroke: "transparent", points: {show: false}, spanGaps: true, class: "bound"};
      series.push({...faint, label: `${label} min`}, {...faint, label: `${label} max`});
      bands.push({series: [at + 2, at + 1], fill: `${stroke}33`});
    });
    const axis = {stroke: ink, grid: {stroke: grid, width: 1}, ticks: {stroke: grid, width: 1}, font: "12px system-ui, sans-serif"};
    return {
      ...this.size(), series, bands,
      scales: {x: {time: false}, y: {range: (u, low, high) => range(low, high)}},
      axes: [{...axis, size: 32}, {...axis, size: 68, values: (u, values) => values.map((value) => number(value))}],
      legend: {show: true, live: true},
      cursor: {
        sync: {key: this.sync, setSeries: false},
        drag: {x: true, y: false},
        bind: {dblclick: () => () => together.get(this.sync).forEach((one) => one.whole())},
      },
      hooks: {
        setCursor: [(u) => u.cursor.idx === null && newest(u)],
        setSelect: [(u) => u.select.width > 0 && this.into(u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x"))],
      },
    };
  }

  /** Look into some steps: with finer points, where the curve was put together. */
  async into(from, to) {
    this.part = [Math.max(0, Math.floor(from)), Math.ceil(to)];
    const merged = Object.values(this.curves).some((one) => one.min);
    if (merged && this.look) {
      const part = this.part;
      const finer = await this.look(...part);
      if (this.part === part && this.plot) {
        this.draw(finer, false);
        this.plot.setScale("x", {min: part[0], max: part[1]});
      }
    }
  }

  whole() {
    this.part = null;
    this.draw(this.curves, true);
  }
}
