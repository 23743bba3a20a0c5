// The samples viewer: a prompt's answers side by side, token by token.

import {get} from "./api.js";
import {empty, field, h, loading, replace, select} from "./dom.js";
import {counted, number} from "./format.js";

const MODES = [["ratio", "importance ratio"], ["moved", "log p: new − old, of the token"], ["p", "probability when sampled"], ["none", "no colours"]];
const LEAST = {ratio: 1e-3, moved: 1e-3, p: 1}; // the colour is strongest at the largest value of the group, or at this if that is less
const CLIPS = {low: "the lower bound holds it", high: "the upper bound holds it", dual: "the dual clip holds it"};

export function open(job) {
  const {id, fail} = job;
  const place = h("div", null, loading());
  job.whole().then((whole) => replace(place, viewer(id, whole, job))).catch(fail);
  return place;
}

/** The steps whose groups were kept, by the spec's own rule. */
export function keptSteps(spec, split, done) {
  const [every, first] = split === "train" ? [spec.log_rollouts?.every_steps ?? 5, 1] : [spec.eval?.every_steps ?? 10, 0];
  const steps = new Set(first <= done ? [first] : []);
  for (let step = every; step <= done; step += every) steps.add(step);
  if (done === spec.limits?.max_steps) steps.add(done);
  return [...steps].sort((one, other) => one - other);
}

function viewer(id, whole, job) {
  const {signal, keys, fail, query, keep: remember} = job;
  const splits = [...(whole.kind === "rl" && whole.spec.log_rollouts?.groups ? [["train", "training"]] : []), ...(whole.spec.data?.eval ? [["eval", "held out"]] : [])];
  if (whole.kind === "session") return empty("A session's own program sees what it samples; nothing of it is kept here.", `ratchet operations ${id}`);
  if (!splits.length) return empty("This job keeps no samples: set log_rollouts.groups, or give data.eval.", "ratchet validate job.yaml");
  const split = select(splits, splits.find(([name]) => name === query.get("of"))?.[0] ?? splits[0][0], {});
  const step = h("input", {type: "range", min: "0"});
  const said = h("output");
  const which = select([["0", "prompt 1"]], "0", {});
  const mode = select(MODES, MODES.find(([name]) => name === query.get("by"))?.[0] ?? "ratio", {});
  const body = h("div");
  let steps = [];
  let groups = [];
  let picked = false;

  function range(keep) {
    const before = steps[step.value];
    steps = keptSteps(whole.spec, split.value, Math.max(whole.step, job.now?.step ?? 0));
    step.max = Math.max(0, steps.length - 1);
    const at = keep ? steps.indexOf(before) : -1;
    step.value = at >= 0 ? at : steps.length - 1;
  }

  function tell() {
    const at = steps[step.value];
    said.textContent = at === undefined ? "no step yet" : `step ${at}`;
    step.setAttribute("aria-valuetext", said.textContent);
  }

  /** In the address: a step only if it is not the newest, which a page that is opened again looks at. */
  function kept() {
    const last = Number(step.value) === steps.length - 1;
    remember({of: split.value === splits[0][0] ? "" : split.value, step: last ? "" : String(steps[step.value] ?? ""), by: mode.value === "ratio" ? "" : mode.value});
  }

  let asked = 0;
  async function load() {
    const at = steps[step.value];
    tell();
    if (at === undefined) return replace(body, empty("Nothing was sampled yet.", `ratchet watch ${id}`));
    const number_ = ++asked;
    const page = await get(`/v1/jobs/${id}/rollouts`, {split: split.value, step: at, limit: 100}, signal);
    if (number_ !== asked) return;
    groups = page.data;
    const spread = Math.max(0, groups.findIndex((group) => new Set(group.samples.map((one) => one.reward)).size > 1));
    const keep = picked ? Math.min(Number(which.value), groups.length - 1) : spread; // what has no spread teaches little
    replace(which, groups.map((group, i) => h("option", {value: String(i)}, `${i + 1}: ${group.prompt.replaceAll(/\s+/g, " ").slice(-40)} (${number(mean(group.samples))})`)));
    if (groups.length) which.value = String(Math.max(0, keep));
    draw();
  }

  function draw() {
    const group = groups[Number(which.value)];
    if (!group) return replace(body, empty("Nothing is kept of this step.", `ratchet rollouts ${id}`));
    const rewards = group.samples.map((one) => one.reward).filter((one) => one !== null);
    const [low, high] = [Math.min(...rewards), Math.max(...rewards)];
    const values = group.samples.flatMap((one) => one.by_token?.text.map((_, at) => Math.abs(measured(one.by_token, at, mode.value) ?? 0)) ?? []);
    const full = Math.max(LEAST[mode.value] ?? 1, ...values);
    replace(body, h("div", {class: "prompt"}, h("h3", null, "Prompt"), h("pre", null, group.prompt), group.reference === null ? null : [h("h3", null, "Right answer"), h("pre", null, group.reference)]),
      group.samples.some((one) => one.by_token) ? legend(mode.value, full) : null, h("ol", {class: "answers"}, group.samples.map((one, i) => answer(one, i, mode.value, full, low, high))));
  }

  function go(by) {
    step.value = Number(step.value) + by;
    turned();
  }

  keys["["] = () => go(-1);
  keys["]"] = () => go(1);
  function turned() {
    kept();
    load().catch(fail);
  }

  split.addEventListener("change", () => { range(false); turned(); });
  step.addEventListener("input", turned);
  which.addEventListener("change", () => { picked = true; draw(); });
  mode.addEventListener("change", () => { kept(); draw(); });
  let newest = 0;
  job.on((event) => {
    if (event.type === "step" && Date.now() - newest > 2000) {
      newest = Date.now();
      const last = Number(step.value) === steps.length - 1;
      range(!last);
      if (last) load().catch(() => {});
      else tell();
    }
  });
  range(false);
  if (query.has("step") && steps.includes(Number(query.get("step")))) step.value = steps.indexOf(Number(query.get("step")));
  load().catch(fail);
  return [h("div", {class: "filters"}, field("Of", split), field("Step", step), h("div", {class: "buttons"}, h("button", {type: "button", onclick: () => go(-1), title: "the step before ([)", "aria-label": "the step before"}, "‹"), said,
    h("button", {type: "button", onclick: () => go(1), title: "the step after (])", "aria-label": "the step after"}, "›")), field("Prompt", which), field("Colour by", mode)), body];
}

function mean(samples) {
  const rewards = samples.map((one) => one.reward).filter((one) => one !== null);
  return rewards.length ? rewards.reduce((sum, one) => sum + one, 0) / rewards.length : null;
}

/** What a token is coloured by: null where it is not known. */
function measured(tokens, at, mode) {
  const [ratio, old, now] = [tokens.ratio[at], tokens.old_log_probs[at], tokens.log_probs[at]];
  if (mode === "ratio") return ratio === null ? null : ratio - 1;
  if (mode === "moved") return now === null || old === null ? null : now - old;
  return mode === "p" && old !== null ? Math.exp(old) : null;
}

function legend(mode, full) {
  const most = number(Number(full.toPrecision(2)));
  const ends = {ratio: [`less likely now (1 − ${most})`, `more likely now (1 + ${most})`], moved: [`less likely now (−${most})`, `more likely now (+${most})`], p: ["", "certain"]}[mode];
  if (!ends) return null;
  return h("p", {class: "legend soft"}, ends[0] ? h("span", null, h("span", {class: "swatch down"}), ends[0]) : null, h("span", null, h("span", {class: "swatch up"}), ends[1]), h("span", null, h("span", {class: "token clipped"}, "abc"), " clipped: it teaches nothing more"));
}

function answer(one, i, mode, full, low, high) {
  const tokens = one.by_token;
  const facts = [counted(one.tokens, "token"), one.finish_reason === "length" ? "cut" : null, ...Object.entries(one.scores ?? {}).map(([name, value]) => `${name} ${number(value)}`)].filter(Boolean);
  const kind = one.reward === null ? "none" : high === low ? "same" : one.reward === high ? "best" : one.reward === low ? "worst" : "between";
  const detail = h("p", {class: "detail soft", role: "status"});
  return h("li", {class: `answer ${kind}`, "aria-label": `answer ${i + 1}`},
    h("p", null, h("strong", null, `reward ${number(one.reward)}`), one.advantage === undefined ? null : ` · advantage ${one.advantage > 0 ? "+" : ""}${number(one.advantage)}`),
    h("p", {class: "soft"}, facts.join(" · ")),
    tokens ? h("div", {class: "text", ...walked()}, tokens.text.map((text, at) => token(text, at, tokens, mode, full, detail)), tokens.text.length < one.tokens ? h("span", {class: "soft"}, ` … of the other ${counted(one.tokens - tokens.text.length, "token")} nothing is kept: `) : null,
      tokens.text.length < one.tokens ? one.text.slice(tokens.text.join("").length) : null) : h("div", {class: "text"}, one.text),
    detail, one.errors ? h("p", {class: "wrong"}, Object.entries(one.errors).map(([name, text]) => `${name}: ${text}`).join("; ")) : null);
}

/** A text whose tokens are walked along with the arrow keys: each tells what a click tells. */
function walked() {
  let at = -1;
  return {
    tabindex: "0", role: "group", "aria-label": "tokens: the arrow keys tell of each",
    onkeydown: (event) => {
      const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (!by) return;
      event.preventDefault();
      const all = event.currentTarget.querySelectorAll(".token");
      all[at]?.classList.remove("at");
      at = Math.max(0, Math.min(all.length - 1, at + by));
      all[at]?.classList.add("at");
      all[at]?.click();
    },
  };
}

function token(text, at, tokens, mode, full, detail) {
  const [ratio, clip, old, now] = [tokens.ratio[at], tokens.clipped[at], tokens.old_log_probs[at], tokens.log_probs[at]];
  const value = measured(tokens, at, mode);
  const parts = [ratio === null ? "it does not count in the loss" : `ratio ${number(ratio)}`, old === null ? null : `log p ${number(old)}${now === null ? "" : ` → ${number(now)}`}`, clip ? `clipped: ${CLIPS[clip]}` : null];
  const told = parts.filter(Boolean).join(" · ");
  const strength = value === null ? 0 : Math.min(1, Math.abs(value) / full);
  const span = h("span", {class: `token${clip ? " clipped" : ""}${value === null || mode === "none" ? "" : value < 0 ? " down" : " up"}`, title: told, style: {"--strength": strength.toFixed(3)},
    onclick: () => { detail.textContent = `${JSON.stringify(text)}: ${told}`; }}, text);
  if (clip) span.dataset.clip = clip;
  return span;
}
