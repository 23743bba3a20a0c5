// Workers and the queue.

import {get, poll} from "./api.js";
import {badge, empty, h, loading, replace, rowOf, table} from "./dom.js";
import {ago, bytes, duration} from "./format.js";

export function open({signal, title, fail}) {
  title("Workers");
  const place = h("div", null, loading());
  const queue = h("div");

  poll(async () => {
    const [alive, waits, next] = await Promise.all([get("/v1/workers", {}, signal), get("/v1/queue", {}, signal), get("/v1/jobs:overview", {status: "queued", limit: 50, curves: "none"}, signal)]);
    replace(place, alive.data.length ? table("Workers", ["worker", "device", "takes", "memory", "GPU memory", "started", "seen", "your jobs on it"], alive.data.map((one) => rowOf(one.id,
      [h("code", null, one.id), " ", one.draining ? badge("draining", "paused") : null], one.device, one.resource_classes.length ? `jobs: ${one.resource_classes.join(", ")}` : "loss requests",
      bytes(one.memory?.process), one.memory?.gpu_total ? `${bytes(one.memory.gpu_used)} of ${bytes(one.memory.gpu_total)}` : "–", ago(one.started_at), ago(one.last_seen_at),
      one.job_ids.map((id) => h("a", {href: `#/jobs/${id}`, class: "spaced"}, id))))) : empty("No worker was seen within the last minute: jobs wait in the queue. Start one:", "ratchet up", "ratchet workers"));
    const classes = Object.entries(waits.waiting).filter(([, one]) => one.jobs);
    replace(queue, h("p", null, classes.length ? classes.map(([name, one]) => `${one.jobs} of class ${name} ${one.jobs === 1 ? "waits," : "wait, the oldest"} for ${duration(one.oldest_wait_s)}`).join(" · ") : "Nothing waits."),
      next.data.length ? table("Your queued jobs, newest first", ["job", "kind", "made", "why"], next.data.map((one) => rowOf(one.id, h("a", {href: `#/jobs/${one.id}`}, one.name || one.id), one.kind, ago(one.created_at), one.status_reason ?? "–"))) : null);
  }, 5000, signal).catch(fail);
  return [h("h1", null, "Workers"), place, h("h2", null, "Queue"), queue];
}
