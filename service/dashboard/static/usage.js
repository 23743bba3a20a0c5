// What was spent, by key, project, job or day; and the budget.

import {get, session} from "./api.js";
import {empty, field, h, loading, replace, row, select, table} from "./dom.js";
import {count, counted, duration} from "./format.js";

const OPERATORS = "default"; // the project whose admins see every project

export function open({query, signal, title, fail, clear, keep}) {
  title("Usage");
  const all = session.self.project === OPERATORS;
  const ways = ["key", "job", "day", ...(all ? ["project"] : [])];
  const by = select(ways, ways.find((one) => one === query.get("by")) ?? "key", {});
  const project = h("input", {type: "text", value: query.get("project") ?? session.self.project, pattern: "[A-Za-z0-9_.\\-]{1,64}", spellcheck: "false"});
  const since = h("input", {type: "date", value: query.get("since")});
  const place = h("div", null, loading());
  const budget = h("div");

  async function load() {
    const of = all ? project.value.trim() : undefined;
    const wanted = by.value === "project" ? undefined : of;
    const [usage, bound, names] = await Promise.all([
      get("/v1/usage", {group_by: by.value, project: wanted, from: since.value}, signal), get("/v1/budget", {project: of}, signal),
      by.value === "key" && session.may("admin") ? get("/v1/keys", {project: of}, signal).then(({data}) => Object.fromEntries(data.map((one) => [one.id, one.name]))) : {}]);
    const most = Math.max(1e-9, ...usage.data.map((one) => one.worker_s));
    const line = (name, one) => row(name, count(one.tokens), count(one.sampled_tokens), count(one.trained_tokens), [h("meter", {max: String(most), value: String(Math.min(one.worker_s, most)), "aria-hidden": "true"}), " ", duration(one.worker_s)], one.attempts, duration(one.wasted.worker_s));
    const label = (group) => (group === null ? "not known" : by.value === "job" ? h("a", {href: `#/jobs/${group}`}, group) : names[group] ? `${names[group]} (${group})` : group);
    replace(place, usage.data.length ? table("Usage", [by.value, "tokens", "sampled", "trained", "worker time", "attempts", "of it wasted"], [...usage.data.map((one) => line(label(one.group), one)), line(h("strong", null, "all"), usage.total)])
      : empty("Nothing was spent yet.", "ratchet submit examples/copy-digits.yaml", "ratchet usage --by job"));
    const bounds = [bound.tokens === null ? null : `${count(bound.spent.tokens)} of ${counted(bound.tokens, "token")}`, bound.worker_s === null ? null : `${duration(bound.spent.worker_s)} of ${duration(bound.worker_s)} of workers`].filter(Boolean);
    replace(budget, h("h2", null, `Budget of ${bound.project}`), bounds.length ? h("p", null, `${bounds.join(" · ")}, ${bound.since < "1970-01-02" ? "of all time" : `since ${bound.since}`}`)
      : h("p", null, "No bound is set. To set one: ", h("code", null, `ratchet budget --project ${bound.project} --tokens 50000000`)));
  }

  function changed() {
    clear();
    keep({by: by.value === "key" ? "" : by.value, project: project.value.trim() === session.self.project ? "" : project.value.trim(), since: since.value});
    load().catch(fail);
  }

  for (const one of [by, project, since]) one.addEventListener("change", changed);
  load().catch(fail);
  return [h("h1", null, "Usage"), h("div", {class: "filters"}, field("By", by), all ? field("Project", project) : null, field("Since (UTC)", since)), place, budget];
}
