// A job's curves, live.

import {get, wait} from "./api.js";
import {Chart} from "./charts.js";
import {empty, field, h, loading, replace, select} from "./dom.js";

const POINTS = 500;
const AT_ONCE = 3; // charts that are asked for
const EVERY_MS = 4000; // between two looks at what is new
const NOTHING = { // what is told of a job that has measured nothing, by its status
  queued: ["It waits for a worker: one that is free takes it.", "ratchet workers"],
  paused: ["Nothing is measured yet: it rests."],
  ...Object.fromEntries(["validating", "running", "pausing", "cancelling"].map((status) => [status, ["Nothing is measured yet: the first step comes when the model is loaded."]])),
};
const GROUPS = [
  ["Reward", ["reward/mean", "eval/reward/mean", "eval/greedy/reward/mean"]],
  ["Loss", ["loss", "eval/loss", "loss/sum", "policy/loss"]],
  ["KL", ["policy/approx_kl_k3", "kl/ref_k3", "rollout/approx_kl_k3"]],
  ["Clipped", ["policy/clip_fraction_low", "policy/clip_fraction_high", "policy/clip_fraction_dual"]],
  ["Ratio", ["policy/ratio_min", "policy/ratio_mean", "policy/ratio_max"]],
  ["Entropy", ["policy/entropy"]],
  ["Length of answers", ["completion/length_mean", "eval/completion/length_mean"]],
  ["Cut answers, groups without spread", ["completion/truncated_fraction", "reward/zero_variance_fraction"]],
  ["Learning rate", ["optimizer/learning_rate"]],
  ["Norm of the gradient", ["optimizer/grad_norm"]],
  ["Speed", ["perf/sample_tokens_per_s", "perf/update_tokens_per_s"]],
];

/** A curve as the server puts it together: of `points` stretches of equal width the last step, mean, least and greatest. A point
 *  counts for the steps since the one before it. */
export function condensed({step, value, min = value, max = value}, points) {
  const [first, width] = [step[0], step.at(-1) - step[0] + 1];
  const made = {step: [], value: [], min: [], max: []};
  let at = -1;
  let counted = 0;
  step.forEach((one, i) => {
    const stretch = Math.floor(((one - first) * points) / width);
    if (stretch !== at) {
      [at, counted] = [stretch, 0];
      for (const column of Object.values(made)) column.push(null);
    }
    const last = made.step.length - 1;
    made.step[last] = one;
    if (value[i] === null) return;
    const weight = i ? one - step[i - 1] : step[1] - one;
    counted += weight;
    made.value[last] += ((value[i] - made.value[last]) * weight) / counted; // null counts as 0 here
    made.min[last] = Math.min(min[i], made.min[last] ?? Infinity);
    made.max[last] = Math.max(max[i], made.max[last] ?? -Infinity);
  });
  return made;
}

export function open(job) {
  const {id, signal, fail} = job;
  const grid = h("div", {class: "charts"});
  const nothing = h("div", null, loading());
  const more = select([["", "another curve …"]], "", {});
  const store = new Map(); // name -> {step, value, min?, max?}
  let known = [];
  let charts = []; // {chart, names}

  function chart(title, names) {
    const made = new Chart(title, {
      unit: known.find((one) => one.name === names[0])?.unit,
      look: async (from, to) => labelled((await get(`/v1/jobs/${id}/metrics`, {name: names, from_step: from, to_step: to, points: POINTS}, signal)).series, names),
    });
    charts.push({chart: made, names});
    grid.append(made.element);
  }

  function labelled(series, names) {
    const policy = names.every((name) => name.startsWith("policy/"));
    const short = (name) => (policy ? name.slice("policy/".length) : name);
    return Object.fromEntries(names.filter((name) => series[name]).map((name) => [short(name), series[name]]));
  }

  function show() {
    const all = Object.fromEntries(store);
    for (const {chart: one, names} of charts) one.show(labelled(all, names));
  }

  const tools = h("div", {class: "filters", hidden: true}, field("Add", more), h("p", {class: "soft"}, "Drag over a chart to look into it; double-click for the whole."));
  const shown = () => charts.flatMap((one) => one.names);
  let generation = 0;

  /** All curves anew, and the charts for those that have come to be. */
  async function load() {
    const mine = ++generation;
    known = (await get(`/v1/jobs/${id}/metrics/names`, {}, signal)).data;
    const there = new Set(known.map((one) => one.name));
    const extra = charts.filter((one) => one.extra);
    for (const {chart: one} of charts) one.close();
    charts = [];
    replace(grid);
    for (const [title, names] of GROUPS) {
      const present = names.filter((name) => there.has(name));
      if (present.length) chart(title, present);
    }
    for (const {names} of extra) add(names[0]);
    const drawn = new Set(shown());
    replace(more, h("option", {value: ""}, "another curve …"), known.filter((one) => !drawn.has(one.name)).map((one) => h("option", {value: one.name, title: one.means}, one.name)));
    tools.hidden = !known.length;
    const [said, command] = NOTHING[job.now?.status] ?? ["It has measured nothing.", `ratchet show ${id}`];
    replace(nothing, known.length ? null : empty(said, command ?? `ratchet watch ${id}`));
    if (!known.length) return;
    store.clear();
    const waiting = [...charts]; // long curves take a while: each chart is shown as soon as its own are there
    await Promise.all(Array.from({length: AT_ONCE}, async () => {
      for (let next = waiting.shift(); next; next = waiting.shift()) {
        const {series} = await get(`/v1/jobs/${id}/metrics`, {name: next.names, points: POINTS}, signal);
        if (mine !== generation) return;
        for (const [name, one] of Object.entries(series)) store.set(name, one);
        next.chart.show(labelled(series, next.names));
      }
    }));
  }

  function add(name) {
    chart(name, [name]);
    charts.at(-1).extra = true;
  }

  more.addEventListener("change", async () => {
    const name = more.value;
    if (!name) return;
    more.querySelector(`option[value="${CSS.escape(name)}"]`)?.remove();
    more.value = "";
    add(name);
    const {series} = await get(`/v1/jobs/${id}/metrics`, {name, points: POINTS}, signal).catch(fail) ?? {series: {}};
    for (const [key, one] of Object.entries(series)) store.set(key, one);
    show();
  });

  // What is new is asked for after the last step that is known; a step that comes again (a resume from a checkpoint) asks for all.
  let last = 0;
  let fresh = false;
  let running = false;

  async function catchUp() {
    if (running) return;
    running = true;
    await loaded; // what is new is put after what was asked for first
    while (fresh && !signal.aborted) {
      fresh = false;
      try {
        if (!charts.length || repeated) {
          repeated = false;
          await load();
        } else {
          const from = Math.max(0, ...[...store.values()].map((one) => one.step.at(-1) ?? 0)) + 1;
          const {series} = await get(`/v1/jobs/${id}/metrics`, {name: shown(), from_step: from, points: 5000}, signal);
          for (const [name, one] of Object.entries(series)) append(name, one);
          for (const [name, one] of store) if (one.step.length > 3 * POINTS) store.set(name, condensed(one, POINTS));
          show();
        }
      } catch { /* the next event asks again */ }
      await wait(EVERY_MS, signal);
      while (document.hidden && !signal.aborted) await wait(500, signal);
    }
    running = false;
  }

  function append(name, more_) {
    const one = store.get(name);
    if (!one) return store.set(name, more_);
    one.step.push(...more_.step);
    one.value.push(...more_.value);
    if (one.min) {
      one.min.push(...(more_.min ?? more_.value));
      one.max.push(...(more_.max ?? more_.value));
    }
  }

  let repeated = false;
  job.on((event) => {
    if (event.type !== "step" && event.type !== "evaluation") return;
    if (event.type === "step") {
      repeated ||= event.data.step <= last;
      last = event.data.step;
    }
    fresh = true;
    catchUp();
  });
  addEventListener("theme", () => charts.forEach((one) => one.chart.again()), {signal});
  signal.addEventListener("abort", () => charts.forEach((one) => one.chart.close()));
  const loaded = load().catch(fail);
  return [nothing, grid, tools];
}
