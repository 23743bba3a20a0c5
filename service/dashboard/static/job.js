// One job: its state and what may be asked of it, and its tabs.

import {answered, exactly, follow, get, getExactly, poll, send, session, wait} from "./api.js";
import {ask, say} from "./dialog.js";
import {badge, field, h, loading, named, replace, setText} from "./dom.js";
import {ago, counted, duration, time, whole} from "./format.js";
import * as curves from "./curves.js";
import * as samples from "./samples.js";
import * as operations from "./operations.js";
import * as told from "./told.js";
import * as checkpoints from "./checkpoints.js";
import * as spec from "./spec.js";

const TABS = [["curves", "Curves", curves.open], ["samples", "Samples", samples.open], ["events", "Events", told.events], ["attempts", "Attempts", told.attempts],
  ["checkpoints", "Checkpoints", checkpoints.open], ["spec", "Spec", spec.open], ["advice", "Advice", told.advice], ["operations", "Operations", operations.open]];
const HAVE_OPERATIONS = ["session", "sampler"]; // kinds of jobs

export function open(context) {
  const {rest: [id, tab = "curves"], query, keep, signal, keys, title, fail} = context;
  title(id);
  const name = h("h1", {dir: "auto"}, id);
  const state = h("span");
  const facts = h("p", {class: "facts"});
  const bar = h("progress", {max: "1", value: "0", "aria-label": "steps done", hidden: true});
  const wrong = h("div");
  const buttons = h("div", {class: "buttons"});
  const line = h("small", {class: "soft", role: "status"});
  const place = h("div", {id: "tab"}, loading());
  const part = h("h2", {class: "unseen"}, TABS.find(([key]) => key === tab)?.[1] ?? "");
  const listeners = [];
  let shown = null;

  function draw(job) {
    shown = job;
    title(job.name || job.id);
    setText(name, job.name || "(no name)");
    if (state.dataset.is !== job.status) {
      state.dataset.is = job.status;
      replace(state, badge(job.status));
    }
    const managed = job.kind === "rl" || job.kind === "supervised";
    bar.hidden = !managed;
    bar.value = job.max_steps ? job.step / job.max_steps : 0;
    setText(facts, [job.kind, job.phase, managed ? `step ${whole(job.step)} of ${whole(job.max_steps)}` : counted(job.step, "step", whole(job.step)),
      job.left_s === null ? null : `${duration(job.left_s)} left`, `attempt ${job.attempt}`, counted(job.tokens, "token"), `${duration(job.worker_s)} of a worker`,
      job.key_name ? `by \u2068${job.key_name}\u2069` : null, `made ${ago(job.created_at)}`, job.id].filter(Boolean).join(" · "));
    facts.title = `made ${time(job.created_at)}`;
    replace(wrong, job.error ? h("div", {class: job.status === "failed" ? "wrong" : "note"}, h("strong", null, job.error.code), " ", job.error.detail,
      job.error.hint ? h("p", null, job.error.hint) : null, job.error.log_tail?.length ? h("details", null, h("summary", null, "its last log lines"), h("pre", null, job.error.log_tail.join("\n"))) : null) : null);
    const may = session.may("write") ? job.allowed_actions : [];
    const wanted = may.filter((action) => ACTIONS[action]).join();
    if (buttons.dataset.are !== wanted) {
      buttons.dataset.are = wanted;
      replace(buttons, may.filter((action) => ACTIONS[action]).map((action) => h("button", {type: "button", class: action === "cancel" || action === "delete" ? "danger" : null,
        onclick: () => ACTIONS[action](shown, again)}, ACTIONS[action].text)));
    }
  }

  async function look() {
    const {data: [job]} = await get("/v1/jobs:overview", {id, curves: "none"}, signal);
    if (!job) await get(`/v1/jobs/${id}`, {wait_s: 0}, signal); // raises the 404
    draw(job);
    return job;
  }

  // Looks are shared: however many events come, one is asked for at a time, and not more often than every two seconds.
  let due = false;
  let looking = false;
  async function again() {
    due = true;
    if (looking) return;
    looking = true;
    while (due && !signal.aborted) {
      await wait(200, signal);
      while (document.hidden && !signal.aborted) await wait(1000, signal);
      due = false;
      await look().then(() => answered(look), (error) => {
        if (signal.aborted) return;
        due = !(error.status < 500); // what is gone stays gone
        if (error.status) answered(look, error.status >= 500 ? error : null);
        if (error.status !== 404) return;
        fail(error);
        replace(buttons);
      });
      await wait(1800, signal);
    }
    looking = false;
  }

  const job = {
    id, query, keep, signal, keys, fail, again,
    get now() { return shown; },
    /** Tell `listener` every event from now on. */
    on: (listener) => listeners.push(listener),
    whole: once(() => getExactly(`/v1/jobs/${id}`, signal)),
  };

  const into = () => tabs.querySelector("[aria-current]")?.scrollIntoView({block: "nearest", inline: "nearest"});

  async function begin() {
    const first = await look();
    for (const link of tabs.children) link.hidden = link.dataset.tab === "operations" && !HAVE_OPERATIONS.includes(first.kind);
    into();
    replace(place, TABS.find(([key]) => key === tab)?.[2](job) ?? "");
    poll(async () => again(), LOOK_MS, signal).catch(() => {});
    await follow(id, first.last_event, {
      signal,
      state: (now) => {
        setText(line, {live: "live", away: "the connection is lost; trying again …", ended: "ended"}[now]);
        if (now !== "away") again();
      },
      tell: (event) => {
        for (const listener of listeners) listener(event);
        const often = OFTEN[event.type];
        if (!often || !shown) again();
        else draw({...shown, ...often(event.data)});
      },
    });
  }

  begin().catch((error) => {
    fail(error);
    if (shown) return;
    tabs.hidden = part.hidden = true; // there is no such job
    replace(place, h("a", {href: "#/jobs"}, "All jobs"));
  });
  setTimeout(into);
  TABS.forEach(([key], i) => { keys[i + 1] = () => { location.hash = `#/jobs/${id}/${key}`; }; });
  for (const [key, action] of [["P", "pause"], ["R", "resume"], ["X", "cancel"], ["F", "fork"]]) {
    keys[key] = () => shown?.allowed_actions.includes(action) && session.may("write") && ACTIONS[action](shown, again);
  }
  const tabs = h("nav", {class: "tabs", "aria-label": "Parts of the job"}, TABS.map(([key, text]) => h("a", {href: `#/jobs/${id}/${key}`, "data-tab": key, hidden: key === "operations", "aria-current": key === tab ? "page" : null}, text)));
  return [h("div", {class: "head"}, name, state, line), bar, facts, wrong, buttons,
    tabs, part, place];
}

// Events that may come with every step say all that is new above the tabs; what else changes with a step is looked at now and then.
const OFTEN = {step: (data) => ({step: data.step}), phase_changed: (data) => ({phase: data.phase}),
  ...Object.fromEntries(["evaluation", "checkpoint_saved", "warning", "step_skipped", "reward_errors"].map((type) => [type, () => ({})]))};
const LOOK_MS = 15_000;

function once(work) {
  let promise = null;
  return () => (promise ??= work());
}

// ---------------------------------------------------------------- what may be asked of it

const ACTIONS = {
  pause: (job, again) => ask({
    title: "Pause this job?", text: [name_of(job), " finishes its step, saves a checkpoint and rests until it is resumed."], action: "Pause",
    work: () => done(send("POST", `/v1/jobs/${job.id}/pause`, {}), "It pauses.", again),
  }),
  resume: (job, again) => ask({
    title: "Resume this job?", text: [name_of(job), " goes on from its newest checkpoint as soon as a worker is free."], action: "Resume",
    work: () => done(send("POST", `/v1/jobs/${job.id}/resume`, {}), "It is queued.", again),
  }),
  cancel: (job, again) => {
    const save = h("input", {type: "checkbox"});
    return ask({
      title: "Cancel this job?", text: [name_of(job), " ends for good. What it has saved, measured and sampled stays."], action: "Cancel the job", danger: true,
      fields: [h("label", {class: "check"}, save, " save a checkpoint first")],
      work: () => done(send("POST", `/v1/jobs/${job.id}/cancel`, {final_checkpoint: save.checked ? "save" : "none"}), "It is cancelled.", again),
    });
  },
  fork: (job) => fork(job),
  delete: (job) => ask({
    title: "Delete this job?", text: ["The events, curves and samples of ", name_of(job), " are removed. Its checkpoints stay."], action: "Delete the job", danger: true,
    work: () => done(send("DELETE", `/v1/jobs/${job.id}`), "It is deleted.", () => { location.hash = "#/jobs"; }),
  }),
};
for (const [action, text] of [["pause", "Pause"], ["resume", "Resume"], ["cancel", "Cancel …"], ["fork", "Fork …"], ["delete", "Delete …"]]) ACTIONS[action].text = text;

function name_of(job) {
  return named(job.name || job.id);
}

async function done(request, text, then) {
  const answer = await request;
  say(text);
  then(answer);
}

function parsed(text) {
  try {
    return exactly(text);
  } catch (error) {
    throw new Error(`The changes are not JSON: ${error.message}`);
  }
}

/** Ask for the changes of a new job that goes on from a checkpoint of this one. */
export function fork(job, checkpointId = null) {
  const name = h("input", {type: "text", maxlength: "200", value: `${job.name || "a fork"} (fork)`.slice(0, 200)});
  const changes = h("textarea", {rows: "6", spellcheck: "false", placeholder: '{"optimizer": {"learning_rate": 1e-4}, "limits": {"max_steps": 200}}'});
  return ask({
    title: "Fork this job?", action: "Fork",
    text: checkpointId ? `A new job starts from ${checkpointId}, and this one is not changed.` : "A new job starts from its newest checkpoint, and this one is not changed.",
    fields: [field("Name", name), field("Changes of its spec, as JSON", changes, "merged into the spec as it was sent; null removes a key")],
    work: async () => {
      const spec = changes.value.trim() ? parsed(changes.value) : {};
      const body = {spec: {...spec, name: name.value}, ...(checkpointId ? {from_checkpoint: checkpointId} : {})};
      await done(send("POST", `/v1/jobs/${job.id}/fork`, body), "The fork is queued.", (made) => { location.hash = `#/jobs/${made.id}`; });
    },
  });
}
