// Several jobs' curves on one chart.

import {get, poll} from "./api.js";
import {Chart} from "./charts.js";
import {failed} from "./dialog.js";
import {empty, field, h, loading, put, replace, row, select, table} from "./dom.js";
import {chosen} from "./jobs.js";
import {count, duration} from "./format.js";

const MOST = 8;
const POINTS = 500;
const MANAGED = ["rl", "supervised"]; // kinds of jobs whose last step is known
const NAME = 40; // characters of a name in a legend

export function open({rest, query, signal, title, fail, clear, keep}) {
  title("Compare");
  let ids = (rest[0] ?? [...chosen.keys()].join(",")).split(",").filter(Boolean).slice(0, MOST);
  const heading = h("div", {class: "head"}, h("h1", null, "Compare"));
  if (ids.length < 2) return [heading, empty("Choose two jobs or more in the list (x), then Compare (c).")];
  const which = select([["reward/mean", "reward/mean"]], "reward/mean", {});
  const holder = h("div", {class: "one"}, loading());
  const facts = h("div");
  let chart = null;
  let labels = {};

  async function curves(name, from, to) {
    const all = await Promise.all(ids.map((id) => get(`/v1/jobs/${id}/metrics`, {name, points: POINTS, from_step: from, to_step: to}, signal)));
    return Object.fromEntries(ids.map((id, i) => [labels[id], all[i].series[name]]));
  }

  async function draw() {
    const name = which.value;
    if (chart?.title !== name) {
      chart?.close();
      chart = new Chart(name, {look: (from, to) => curves(name, from, to), sync: "compare"});
      replace(holder, chart.element);
    }
    const found = await curves(name);
    if (chart.title === name) chart.show(found);
  }

  async function begin() {
    const page = await get("/v1/jobs:overview", {id: ids, limit: MOST, curves: "none"}, signal);
    const jobs = ids.map((id) => page.data.find((job) => job.id === id)).filter(Boolean);
    const absent = ids.filter((id) => !jobs.some((job) => job.id === id));
    ids = jobs.map((job) => job.id);
    if (absent.length) put(facts, failed(new Error(`not in this project: ${absent.join(", ")}`)));
    const names = await Promise.all(ids.map((id) => get(`/v1/jobs/${id}/metrics/names`, {}, signal)));
    labels = Object.fromEntries(jobs.map((job) => [job.id, `${cut(job.name || "(no name)")} ${job.id.slice(-5)}`]));
    const known = [...new Set(names.flatMap((one) => one.data.map((metric) => metric.name)))].sort();
    const wanted = known.find((name) => name === query.get("curve")) ?? (known.includes("reward/mean") ? "reward/mean" : known.find((name) => name.includes("loss")) ?? known[0]);
    replace(which, known.map((name) => h("option", {value: name}, name)));
    if (wanted) which.value = wanted;
    put(facts, table("The jobs", ["job", "status", "steps", "tokens", "worker time"], jobs.map((job) =>
      row(h("a", {href: `#/jobs/${job.id}`, dir: "auto"}, labels[job.id]), job.status, MANAGED.includes(job.kind) ? `${job.step} / ${job.max_steps}` : job.step, count(job.tokens), duration(job.worker_s)))));
    if (wanted) poll(draw, 5000, signal).catch(fail);
    else replace(holder, empty("These jobs have measured nothing yet."));
  }

  which.addEventListener("change", () => {
    clear();
    keep({curve: which.value});
    draw().catch(fail);
  });
  addEventListener("theme", () => chart?.again(), {signal});
  signal.addEventListener("abort", () => chart?.close());
  begin().catch(fail);
  return [heading, h("div", {class: "filters"}, field("Curve", which)), holder, facts];
}

function cut(name) {
  return name.length > NAME ? `${name.slice(0, NAME - 1)}…` : name;
}
