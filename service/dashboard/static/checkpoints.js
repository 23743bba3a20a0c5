// A job's checkpoints: downloaded, promoted, pinned, forked from, asked, deleted.

import {promote} from "./aliases.js";
import {get, request, send, session} from "./api.js";
import {ask, say} from "./dialog.js";
import {ACTIONS, badge, empty, h, loading, replace, rowOf, table} from "./dom.js";
import {ago, bytes, number} from "./format.js";
import {fork} from "./job.js";

const IN_MEMORY = 2 ** 30; // a browser that cannot write a stream to disk holds the file in memory

export function open(job) {
  const {id, signal, fail} = job;
  const place = h("div", null, loading());

  async function load() {
    const {data, has_more} = await get(`/v1/jobs/${id}/checkpoints`, {limit: 100}, signal);
    if (!data.length) return replace(place, empty("It has saved none yet. One is saved every checkpoints.every_steps steps, and at the end.", `ratchet watch ${id}`));
    const write = session.may("write");
    replace(place, table("Checkpoints", ["checkpoint", "step", "saved", "size", "measured", ACTIONS], data.map((one) => rowOf(one.id,
      [h("code", null, one.id), " ", one.is_final ? badge("final", "plain") : null, one.pinned_at ? badge("pinned", "succeeded") : null,
        one.aliases.map((alias) => [" ", h("a", {class: "badge succeeded", href: "#/aliases"}, alias)])],
      one.step, h("span", {class: "whole"}, ago(one.created_at)), h("span", {class: "whole"}, bytes(one.size_bytes)), Object.entries(one.metrics).filter(([name]) => /reward\/mean|loss$/.test(name)).map(([name, value]) => `${name} ${number(value)}`).join(" · "),
      h("div", {class: "buttons"},
        h("button", {type: "button", onclick: () => download(one).catch(fail)}, "Download"),
        write ? h("button", {type: "button", onclick: () => promote(one).then((done) => done && load()).catch(fail)}, "Promote …") : null,
        write ? h("button", {type: "button", title: "a pinned checkpoint is deleted by nothing", onclick: () => pin(one).catch(fail)}, one.pinned_at ? "Unpin" : "Pin") : null,
        write && job.now?.kind !== "session" ? h("button", {type: "button", onclick: () => fork(job.now, one.id)}, "Fork …") : null,
        h("a", {class: "button", href: `#/playground?left=${one.id}`}, "Ask it"),
        write ? h("button", {type: "button", class: "danger", onclick: () => drop(one).then((done) => done && load()).catch(fail)}, "Delete …") : null)))),
    has_more ? h("p", {class: "soft"}, `These are the newest; all of them: ratchet checkpoints --job ${id}`) : null);
  }

  async function pin(one) {
    if (one.pinned_at && !await ask({title: "Unpin it?", text: "Its job's rule of which checkpoints are kept may then delete it.", action: "Unpin", work: () => send("POST", `/v1/checkpoints/${one.id}/unpin`)})) return;
    if (!one.pinned_at) await send("POST", `/v1/checkpoints/${one.id}/pin`);
    say(one.pinned_at ? "It is unpinned." : "It is pinned: nothing deletes it.");
    await load();
  }

  async function drop(one) {
    const done = await ask({title: "Delete this checkpoint?", text: `${one.id} (step ${one.step}) and its files are removed for good. One that is pinned, or that an alias points at, stays.`, action: "Delete the checkpoint", danger: true,
      work: () => send("DELETE", `/v1/checkpoints/${one.id}`)});
    if (done) say("It is deleted.");
    return done;
  }

  job.on((event) => event.type === "checkpoint_saved" && load().catch(() => {}));
  load().catch(fail);
  return place;
}

/** The key travels in a header, so that a plain link will not do: the file is written as it comes, or kept and then saved. */
async function download(one) {
  const name = `${one.id}.tar`;
  if (window.showSaveFilePicker) {
    const file = await window.showSaveFilePicker({suggestedName: name}).catch(() => null);
    if (!file) return;
    const answer = await request("GET", `/v1/checkpoints/${one.id}/archive`);
    await answer.body.pipeTo(await file.createWritable());
    return say(`${name} is saved.`);
  }
  if (one.size_bytes > IN_MEMORY) throw new Error(`It has ${bytes(one.size_bytes)}, too much for this browser to hold. In a terminal: ratchet checkpoints download ${one.id}`);
  say("Downloading …");
  const blob = await (await request("GET", `/v1/checkpoints/${one.id}/archive`)).blob();
  const url = URL.createObjectURL(blob);
  h("a", {href: url, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
