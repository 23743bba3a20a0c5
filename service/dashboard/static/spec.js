// A job's spec as it was sent and as it runs, and what differs from another job's.

import {get, getExactly} from "./api.js";
import {failed} from "./dialog.js";
import {field, h, loading, replace, row, select, table} from "./dom.js";

const MOST = 20; // of a list that are shown

export function open(job) {
  const {signal, fail} = job;
  const place = h("div", null, loading());
  job.whole().then((whole) => replace(place, viewer(whole, signal))).catch(fail);
  return place;
}

function viewer(whole, signal) {
  const parts = {sent: whole.spec_sent, resolved: whole.spec, worker: whole.resolved};
  const which = select([["sent", "as it was sent"], ["resolved", "as it runs: every default filled in"], ["worker", "what its worker found out"]], "sent", {class: "long"});
  const text = h("pre", {class: "spec", tabindex: "0"});
  const other = h("input", {type: "text", placeholder: "job_…", list: "recent-jobs", spellcheck: "false"});
  const recent = h("datalist", {id: "recent-jobs"});
  const differences = h("div", {"aria-live": "polite"});
  const draw = () => { text.textContent = JSON.stringify(shortened(parts[which.value]), null, 2); };
  which.addEventListener("change", draw);
  draw();
  other.value = whole.parent_id ?? "";
  get("/v1/jobs:overview", {limit: 50, curves: "none"}, signal).then(({data}) => replace(recent, data.filter((one) => one.id !== whole.id).map((one) => h("option", {value: one.id}, one.name)))).catch(() => {});

  async function compare(event) {
    event.preventDefault();
    const id = other.value.trim();
    if (!id) return replace(differences);
    try {
      const theirs = await getExactly(`/v1/jobs/${encodeURIComponent(id)}`, signal);
      const found = [...differs(theirs.spec, whole.spec)];
      const from = `in ${theirs.name || theirs.id}`;
      replace(differences, found.length ? table("Differences", ["field", from, "here"], found.map(([path, one, two]) => row(h("code", null, path || "/"), value(one), value(two)))) : h("p", null, "They run by the same spec."));
    } catch (error) {
      replace(differences, failed(error));
    }
  }
  return [h("form", {class: "filters", onsubmit: compare}, field("Spec", which), field("Differences from", other), recent, h("button", {type: "submit"}, "Compare")), differences, text];
}

function value(one) {
  return one === undefined ? h("span", {class: "soft"}, "not there") : h("code", {class: "json"}, JSON.stringify(shortened(one)));
}

function shortened(one) {
  if (Array.isArray(one)) return one.length > MOST ? [...one.slice(0, MOST).map(shortened), `… ${one.length - MOST} more`] : one.map(shortened);
  if (isObject(one)) return Object.fromEntries(Object.entries(one).map(([key, below]) => [key, shortened(below)]));
  return one;
}

function isObject(one) {
  return one !== null && typeof one === "object" && !Array.isArray(one) && !JSON.isRawJSON?.(one);
}

/** [pointer, one, other] of everything that differs; a list is compared as a whole. */
export function* differs(one, other, path = "") {
  if (isObject(one) && isObject(other)) {
    for (const key of [...new Set([...Object.keys(one), ...Object.keys(other)])].sort()) yield* differs(one[key], other[key], `${path}/${key}`);
  } else if (JSON.stringify(one) !== JSON.stringify(other)) yield [path, one, other];
}
