// What a session or sampler was asked for, newest first.

import {get, poll} from "./api.js";
import {badge, empty, h, loading, replace, row, table} from "./dom.js";
import {clock, count, counted, duration, number, time} from "./format.js";

const LIMIT = 50; // of one request
const LOOK_MS = 2000; // not every operation makes an event
const ENDED = ["succeeded", "failed", "cancelled"];
const OF_INTEREST = [/^loss:sum$/, /reward\/mean$/, /grad_norm$/, /learning_rate$/, /entropy$/, /clip_fraction$/, /./]; // metrics, the first of all
const METRICS = 4;

export function open(job) {
  const {id, signal, fail} = job;
  const place = h("div", null, loading());
  const line = h("p", {class: "soft"});
  const more = h("button", {type: "button", hidden: true, onclick: () => { shown += LIMIT; look().catch(fail); }}, "Earlier");
  let shown = LIMIT;
  let drawn = null;

  async function look() {
    const rows = [];
    let page = null;
    do {
      page = await get(`/v1/sessions/${id}/operations`, {order: "newest_first", before: page?.last_id, limit: LIMIT}, signal);
      rows.push(...page.data);
    } while (page.has_more && rows.length < shown);
    more.hidden = !page.has_more;
    replace(line, `${count(page.waiting)} waiting · next seq ${page.next_seq}`);
    const now = JSON.stringify(rows);
    if (now === drawn) return; // what is read or marked stays as it is
    drawn = now;
    if (!rows.length) return replace(place, empty("Nothing was asked of it yet.", `ratchet operations ${id}`));
    const at = place.firstChild?.scrollLeft ?? 0;
    replace(place, table("Operations", ["seq", "operation", "state", "sent", "started", "finished", "took", "attempt", "came of it"], rows.map(line_of)));
    place.firstChild.scrollLeft = at;
  }

  let over = false;
  poll(async () => {
    if (over) return; // nothing comes any more
    const ended = ENDED.includes(job.now.status);
    try {
      await look();
    } catch (error) {
      if (error.status !== 422) throw error;
      return; // the last operation of a page has expired meanwhile: the next look begins anew
    }
    over = ended;
  }, LOOK_MS, signal).catch(fail);
  return [line, place, more];
}

function line_of(one) {
  const seconds = one.finished_at === null ? null : (new Date(one.finished_at) - new Date(one.started_at ?? one.created_at)) / 1000;
  return row(one.seq, h("code", {title: one.id}, one.kind), badge(one.status, {done: "succeeded", waiting: "queued"}[one.status]), at(one.created_at), at(one.started_at), at(one.finished_at),
    seconds === null ? "–" : h("span", {class: "whole"}, took(seconds)), one.attempt ?? "–", result(one));
}

function at(text) {
  return text ? h("time", {class: "whole", datetime: text, title: time(text)}, clock(text)) : "–";
}

function took(seconds) {
  return seconds < 0.95 ? `${Math.max(0, Math.round(1000 * seconds))} ms` : duration(seconds);
}

/** The error of one that failed, or what is short of its answer. */
function result(one) {
  if (one.error) return h("span", {class: "bad"}, h("strong", null, one.error.code), " ", one.error.detail, one.error.hint ? h("small", {class: "soft"}, ` ${one.error.hint}`) : null);
  const {metrics = {}, answers, tokens, checkpoint_id, name, step} = one.summary ?? {};
  const rank = (key) => OF_INTEREST.findIndex((wanted) => wanted.test(key));
  const first = Object.entries(metrics).filter(([, value]) => typeof value === "number").sort(([a], [b]) => rank(a) - rank(b)).slice(0, METRICS);
  const said = [answers === undefined ? null : counted(answers, "answer") + (tokens === undefined ? "" : `, ${counted(tokens, "token")}`), name ? `“${name}”` : null, checkpoint_id ?? null, step === undefined ? null : `step ${step}`,
    ...first.map(([key, value]) => `${key} ${number(value)}`)].filter(Boolean);
  if (said.length) return said.join(" · ");
  return h("span", {class: "soft"}, one.status === "done" && one.summary === null ? "its answer has expired" : "–");
}
