// Three tabs of a job that are lists: events, attempts, advice.

import {get} from "./api.js";
import {badge, empty, h, loading, put, replace, row, table} from "./dom.js";
import {count, duration, number, time} from "./format.js";

const LIMIT = 100;

export function events(job) {
  const {id, signal, fail} = job;
  const steps = h("input", {type: "checkbox"});
  const list = h("ol", {class: "events"});
  const more = h("button", {type: "button", onclick: () => load().catch(fail)}, "Earlier");
  let before = null;

  async function load() {
    const without = steps.checked ? [] : ["step", "phase_changed"];
    const page = await get(`/v1/jobs/${id}/events`, {order: "newest_first", before, without, limit: LIMIT}, signal);
    put(list, page.data.map(line));
    before = page.last_id ?? before;
    more.hidden = !page.has_more;
  }

  function anew() {
    before = null;
    replace(list);
    load().catch(fail);
  }

  steps.addEventListener("change", anew);
  job.on((event) => {
    if (steps.checked || !["step", "phase_changed"].includes(event.type)) list.prepend(line(event));
    while (list.children.length > 20 * LIMIT) list.lastChild.remove();
  });
  anew();
  return [h("label", {class: "check"}, steps, " steps and phases, too"), list, more];
}

function line(event) {
  const metrics = Object.entries(event.data.metrics ?? {}).filter(([name]) => /reward\/mean$|loss$/.test(name)).slice(0, 3);
  const said = [...Object.entries(event.data), ...metrics.map(([name, value]) => [name, number(value)])].filter(([, value]) => value !== null && typeof value !== "object").map(([name, value]) => `${name} ${value}`).join(" · ");
  const deep = Object.values(event.data).some((value) => value !== null && typeof value === "object");
  return h("li", null, h("time", {datetime: event.created_at}, time(event.created_at)), " ", badge(event.type, event.type === "warning" || event.type === "failure" ? "failed" : "plain"), " ", said, " ",
    deep ? h("details", null, h("summary", null, "all of it"), h("pre", null, JSON.stringify(event.data, null, 2))) : null);
}

export function attempts(job) {
  const {id, signal, fail} = job;
  const place = h("div", null, loading());
  async function load() {
    const {data} = await get(`/v1/jobs/${id}/attempts`, {}, signal);
    if (!data.length) return replace(place, empty("No worker has taken it yet.", `ratchet watch ${id}`));
    const phases = Object.keys(data[0].phase_s);
    replace(place, table("Attempts", ["attempt", "steps", "sampled", "trained", "waited", ...phases, "lost", "ended with"], data.map((one) =>
      row(one.attempt, one.steps, count(one.sampled_tokens), count(one.trained_tokens), duration(one.queued_s), ...phases.map((phase) => duration(one.phase_s[phase])), duration(one.wasted_s), one.failure ?? "–"))));
  }
  job.on((event) => ["status_changed", "checkpoint_saved"].includes(event.type) && load().catch(() => {}));
  load().catch(fail);
  return place;
}

export function advice(job) {
  const {id, signal, fail} = job;
  const place = h("div", null, loading());
  async function load() {
    const {data} = await get(`/v1/jobs/${id}/advice`, {}, signal);
    if (!data.length) return replace(place, empty("Nothing stands out in its curves.", `ratchet advice ${id}`));
    replace(place, data.map((one) => h("article", {class: one.severity === "warning" ? "wrong" : "note"}, h("h3", null, badge(one.severity, one.severity === "warning" ? "failed" : "plain"), " ", one.rule),
      h("p", null, one.detail), h("p", null, h("strong", null, "Likely cause: "), one.cause), h("p", null, h("strong", null, "Remedy: "), one.remedy), h("p", {class: "soft"}, `${one.metric}, steps ${one.from_step} to ${one.to_step}`))));
  }
  load().catch(fail);
  return [place, h("button", {type: "button", onclick: () => load().catch(fail)}, "Look again")];
}
