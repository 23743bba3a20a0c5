// Aliases: names that point at a checkpoint. Promoted, rolled back, deleted, and what they pointed at before.

import {get, send, session} from "./api.js";
import {ask, say, show} from "./dialog.js";
import {ACTIONS, empty, field, h, loading, named, replace, row, rowOf, table} from "./dom.js";
import {ago, time} from "./format.js";

const PART = "[A-Za-z0-9][A-Za-z0-9._\\-]{0,49}";

export function open({signal, title, fail}) {
  title("Aliases");
  const place = h("div", null, loading());
  let shown = [];

  async function load(after) {
    const {data, has_more, last_id} = await get("/v1/aliases", {limit: 100, after}, signal);
    shown = after ? [...shown, ...data] : data;
    if (!shown.length) return replace(place, empty("There are none yet. An alias is a name such as digits@production that points at a checkpoint; programs ask it as their model, and go on when another is promoted. A job's page promotes its checkpoints, too.", "ratchet promote CHECKPOINT digits@production"));
    const write = session.may("write");
    replace(place, table("Aliases", ["alias", "points at", "changed", "by", "note", ACTIONS], shown.map((one) => rowOf(one.id,
      h("strong", {class: "key"}, one.id),
      [h("code", null, one.checkpoint_id), " ", h("small", {class: "soft"}, `step ${one.step} of `, one.job_id ? h("a", {href: `#/jobs/${one.job_id}/checkpoints`}, one.job_id) : "a deleted job")],
      h("span", {class: "whole"}, ago(one.changed_at)), named(one.changed_by), one.note ? h("div", {class: "prose", dir: "auto"}, one.note) : null,
      h("div", {class: "buttons"},
        h("button", {type: "button", onclick: () => history(one).catch(fail)}, "History"),
        write && one.previous_id ? h("button", {type: "button", onclick: () => change(back(one))}, "Roll back …") : null,
        h("a", {class: "button", href: `#/playground?left=${encodeURIComponent(one.id)}`}, "Ask it"),
        write ? h("button", {type: "button", class: "danger", onclick: () => change(drop(one))}, "Delete …") : null)))),
    has_more ? h("div", {class: "buttons pages"}, h("button", {type: "button", onclick: () => load(last_id).catch(fail)}, "More")) : null);
  }

  function change(done) {
    done.then((changed) => changed && load()).catch(fail);
  }

  load().catch(fail);
  return [h("div", {class: "head"}, h("h1", null, "Aliases"), session.may("write") ? h("button", {type: "button", class: "main", onclick: () => change(promote(null))}, "Promote …") : null), place];
}

/** Ask for an alias, and let it point at the checkpoint; without one, ask for that, too. Answers whether it was done. What the
 *  alias pointed at when the question was asked is expected still, so that nobody's promotion is overwritten unseen. */
export async function promote(checkpoint) {
  const {data} = await get("/v1/aliases", {limit: 100});
  const at = new Map(data.map((one) => [one.id, one.checkpoint_id]));
  const which = h("input", {type: "text", required: true, spellcheck: "false", autocomplete: "off", placeholder: "ckpt_…, or another alias"});
  const names = h("datalist", {id: "aliases-there"}, data.map((one) => h("option", {value: one.id})));
  const name = h("input", {type: "text", required: true, spellcheck: "false", autocomplete: "off", maxlength: "101", pattern: `${PART}@${PART}`, list: names.id, placeholder: "digits@production", title: "MODEL@ALIAS: letters, digits, dots, underscores and hyphens"});
  const note = h("input", {type: "text", maxlength: "1000"});
  const moves = h("small", {role: "status"});
  name.addEventListener("input", () => { moves.textContent = at.has(name.value) ? `It points at ${at.get(name.value)} now.` : ""; });
  const done = await ask({
    title: "Promote", action: "Promote", text: checkpoint ? `${checkpoint.id} (step ${checkpoint.step}) is what the alias stands for from the next request on, and is kept.` : null,
    fields: [checkpoint ? null : field("Checkpoint", which), field("Alias", name, "MODEL@ALIAS. A new one is made, one that is there is moved."), names, moves, field("Note", note, "Why: it stands in the alias's history.")],
    work: () => send("PUT", `/v1/aliases/${encodeURIComponent(name.value)}`, {checkpoint: checkpoint?.id ?? which.value.trim(),
      ...(data.length < 100 || at.has(name.value) ? {expected: at.get(name.value) ?? "none"} : {}), ...(note.value ? {note: note.value} : {})}),
  });
  if (done) say(`${name.value} is promoted.`);
  return done;
}

async function back(one) {
  const note = h("input", {type: "text", maxlength: "1000"});
  const done = await ask({title: `Roll ${one.id} back?`, text: `It points at ${one.checkpoint_id}, and will point at ${one.previous_id} again.`, fields: [field("Note", note, "Why: it stands in the alias's history.")], action: "Roll back",
    work: () => send("POST", `/v1/aliases/${encodeURIComponent(one.id)}/rollback`, {expected: one.checkpoint_id, ...(note.value ? {note: note.value} : {})})});
  if (done) say("It is rolled back.");
  return done;
}

async function drop(one) {
  const done = await ask({title: `Delete ${one.id}?`, text: `Who asks for it gets an error from then on. The checkpoint ${one.checkpoint_id} stays, as long as its job's rule of which are kept says, and so does the alias's history.`, action: "Delete", danger: true,
    work: () => send("DELETE", `/v1/aliases/${encodeURIComponent(one.id)}?expected=${one.checkpoint_id}`)});
  if (done) say("It is deleted.");
  return done;
}

async function history(one) {
  const {data, has_more} = await get(`/v1/aliases/${encodeURIComponent(one.id)}/history`, {limit: 100});
  show(`What ${one.id} pointed at`, table("History", ["change", "what", "pointed at"], data.map((each) => row(
    each.seq, each.action, [each.checkpoint_id ? h("code", null, each.checkpoint_id) : "nothing", " ", h("small", {class: "soft"}, `${time(each.created_at)} by `, named(each.key_name ?? each.key_id)), each.note ? h("div", {dir: "auto"}, each.note) : null]))),
  has_more ? h("p", {class: "soft"}, `These are the newest; all of them: ratchet aliases history ${one.id}`) : null);
}
