// The list of jobs and sessions.

import {get, poll, session} from "./api.js";
import {sparkline} from "./charts.js";
import {badge, empty, field, h, loading, replace, select, setText} from "./dom.js";
import {ago, counted, duration, time, whole} from "./format.js";
import {submit} from "./submit.js";

const LIMIT = 50;
const EVERY_MS = 5000;
const STATUSES = ["running", "queued", "paused", "pausing", "cancelling", "succeeded", "failed", "cancelled", "validating"];
const KINDS = ["rl", "supervised", "session", "sampler"];
export const chosen = new Map(); // id -> name: what is compared; kept while pages change

export function open({query, signal, keys, title, fail, clear: clearWrong, keep}) {
  title("Jobs");
  const before = []; // cursors of the pages before this one
  let after = query.get("after") ?? "";
  let page = null;
  let at = -1;
  const rows = new Map();

  const search = h("input", {type: "search", placeholder: "a part of a name, tag:NAME or job_…", value: query.get("q") ?? "", maxlength: "200"});
  const status = select([["", "any status"], ...STATUSES], query.get("status") ?? "", {});
  const kind = select([["", "any kind"], ...KINDS], query.get("kind") ?? "", {});
  const counts = h("p", {class: "counts", "aria-live": "polite"});
  const body = h("tbody");
  const heads = ["", "job", "status", "progress", "reward or loss", "spent", "by", "made"];
  const list = h("table", {class: "jobs stacked"}, h("caption", {class: "unseen"}, "Jobs, newest first"),
    h("thead", null, h("tr", null, heads.map((head) => h("th", {scope: "col"}, head || h("span", {class: "unseen"}, "compare"))))), body);
  const nothing = h("div", null, loading());
  const newer = h("button", {type: "button", onclick: back, disabled: true}, "← Newer");
  const older = h("button", {type: "button", onclick: next, disabled: true}, "Older →");
  const comparing = h("button", {type: "button", onclick: compare, disabled: true}, "Compare");

  function parameters() {
    const text = search.value.trim();
    const tag = text.startsWith("tag:") ? text.slice(4) : "";
    const name = tag || text.startsWith("job_") ? "" : text;
    const id = text.startsWith("job_") ? text : "";
    return {name, tag, id, status: status.value, kind: kind.value, limit: LIMIT, after};
  }

  function changed() {
    before.length = 0;
    turned("");
  }

  /** To the jobs after this one. */
  function turned(to) {
    after = to;
    at = -1;
    keep({q: search.value.trim(), status: status.value, kind: kind.value, after});
    clearWrong();
    load().catch(fail);
  }

  function clear() {
    search.value = status.value = kind.value = "";
    changed();
  }

  let asked = 0;
  async function load(curves = "all") {
    const number = ++asked;
    const found = await get("/v1/jobs:overview", {...parameters(), curves}, signal);
    if (number !== asked) return; // another question was asked meanwhile
    const marked = page?.data[at]?.id;
    page = found;
    if (marked) at = page.data.findIndex((job) => job.id === marked); // jobs that are new come above it
    draw();
  }

  function draw() {
    const ids = new Set(page.data.map((job) => job.id));
    for (const [id, row] of rows) {
      if (!ids.has(id)) {
        row.element.remove();
        rows.delete(id);
      }
    }
    page.data.forEach((job, i) => {
      const row = rows.get(job.id) ?? line(job);
      rows.set(job.id, row);
      row.update(job);
      if (body.children[i] !== row.element) body.insertBefore(row.element, body.children[i] ?? null);
    });
    newer.disabled = !before.length && !after;
    older.disabled = !page.has_more;
    list.hidden = !page.data.length;
    const filtered = search.value || status.value || kind.value || after;
    replace(nothing, page.data.length ? null : filtered ? h("div", {class: "empty"}, h("p", null, "No job is like that."), h("button", {type: "button", onclick: clear}, "Show all jobs"))
      : empty("There are no jobs yet. Submit one:", "ratchet submit examples/copy-digits.yaml", "ratchet demo --help"));
    marks();
  }

  function marks() {
    [...rows.values()].forEach((row) => row.element.classList.remove("at"));
    const id = page?.data[at]?.id;
    if (id) rows.get(id)?.element.classList.add("at");
    comparing.disabled = chosen.size < 2;
    comparing.textContent = chosen.size ? `Compare ${chosen.size}` : "Compare";
  }

  function line(job) {
    const box = h("input", {type: "checkbox", "aria-label": `compare ${job.name || job.id}`, onchange: () => choose(job.id)});
    box.checked = chosen.has(job.id);
    const link = h("a", {href: `#/jobs/${job.id}`, dir: "auto"});
    const state = h("span");
    const why = h("small", {class: "soft"});
    const bar = h("progress", {max: "1", value: "0", "aria-label": "steps done"});
    const steps = h("small");
    const curve = h("td", {"data-label": "curve"});
    const spent = h("span");
    const by = h("td", {"data-label": "by", class: "by"});
    const made = h("time", {class: "whole"});
    const element = h("tr", null,
      h("td", {class: "pick"}, box),
      h("td", {class: "name"}, link, h("small", {class: "soft"}, `${job.kind} · ${job.id}`), job.tags.map((tag) => h("span", {class: "tag", dir: "auto"}, tag))),
      h("td", {"data-label": "status"}, state, " ", why), h("td", {"data-label": "progress", class: "progress"}, bar, steps), curve,
      h("td", {"data-label": "spent"}, spent), by, h("td", {"data-label": "made"}, made));
    setText(link, job.name || "(no name)");
    made.dateTime = job.created_at;
    made.title = time(job.created_at);
    setText(by, job.key_name ?? job.key_id ?? "–");
    let drawn = "";
    return {
      element, box,
      update(now) {
        if (state.dataset.is !== now.status) {
          state.dataset.is = now.status;
          replace(state, badge(now.status));
        }
        setText(why, [now.phase, now.error?.code ?? (now.status === "paused" || now.status === "queued" ? now.status_reason : null)].filter(Boolean).join(" · "));
        const managed = now.kind === "rl" || now.kind === "supervised";
        bar.hidden = !managed;
        bar.value = now.max_steps ? now.step / now.max_steps : 0;
        const left = now.left_s === null ? "" : ` · ${duration(now.left_s)} left`;
        setText(steps, managed ? `${whole(now.step)} / ${whole(now.max_steps)}${left}` : counted(now.step, "step", whole(now.step)));
        const key = now.curve ? `${now.curve.step.at(-1)}/${now.curve.step.length}` : "";
        if ((now.curve || !drawn) && key !== drawn) {
          replace(curve, sparkline(now.curve));
          drawn = key;
        } else if (!drawn && !curve.firstChild) replace(curve, sparkline(null));
        setText(spent, now.tokens || now.worker_s ? `${counted(now.tokens, "token")} · ${duration(now.worker_s)}` : "–");
        setText(made, ago(now.created_at));
      },
    };
  }

  function choose(id) {
    if (chosen.has(id)) chosen.delete(id);
    else chosen.set(id, page.data.find((job) => job.id === id)?.name ?? id);
    const row = rows.get(id);
    if (row) row.box.checked = chosen.has(id);
    marks();
  }

  function compare() {
    if (chosen.size > 1) location.hash = `#/compare/${[...chosen.keys()].join(",")}`;
  }

  function next() {
    if (!page?.has_more) return;
    before.push(after);
    turned(page.last_id);
  }

  function back() {
    if (!before.length && !after) return;
    turned(before.pop() ?? "");
  }

  function move(by) {
    at = Math.max(0, Math.min((page?.data.length ?? 1) - 1, at + by));
    marks();
    rows.get(page?.data[at]?.id)?.element.scrollIntoView({block: "nearest"});
  }

  Object.assign(keys, {
    N: () => session.may("write") && submit(),
    "/": () => search.focus(), j: () => move(1), k: () => move(-1), n: next, b: back, c: compare,
    x: () => page?.data[at] && choose(page.data[at].id),
    Enter: () => { if (page?.data[at]) location.hash = `#/jobs/${page.data[at].id}`; },
  });
  let typed;
  search.addEventListener("input", () => {
    clearTimeout(typed);
    typed = setTimeout(changed, 250);
  });
  for (const one of [status, kind]) one.addEventListener("change", changed);
  document.addEventListener("visibilitychange", () => document.hidden || load("live").catch(() => {}), {signal});

  let first = true;
  poll(async () => {
    await load(first ? "all" : "live");
    first = false;
  }, EVERY_MS, signal).catch(fail);
  poll(async () => {
    const queue = await get("/v1/queue", {}, signal);
    const all = Object.entries(queue.jobs).sort(([one], [other]) => STATUSES.indexOf(one) - STATUSES.indexOf(other));
    setText(counts, all.map(([name, jobs]) => `${jobs} ${name}`).join(" · "));
  }, 3 * EVERY_MS, signal).catch(() => {});

  return [h("div", {class: "head"}, h("h1", null, "Jobs and sessions"), counts, session.may("write") ? h("button", {type: "button", class: "main", onclick: submit}, "New job …") : null),
    h("form", {class: "filters", role: "search", onsubmit: (event) => { event.preventDefault(); changed(); }}, field("Search", search), field("Status", status), field("Kind", kind), comparing),
    h("div", {class: "scrolls"}, list), nothing, h("div", {class: "buttons pages"}, newer, older)];
}
