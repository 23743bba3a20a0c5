// Webhooks: where programs are told of what happens. Listed, made, tried out, rotated, deleted; what was sent, and sent again.

import {get, poll, send, session} from "./api.js";
import {ask, say, showSecret} from "./dialog.js";
import {ACTIONS, badge, empty, field, h, loading, replace, rowOf, table} from "./dom.js";
import {time} from "./format.js";

const LOOK_MS = 5000;
const LIMIT = 50;
const SIGNS = "It verifies the signatures of what is sent. It is shown this once; another takes its place by Rotate.";
const UNSURE = "It may have been done all the same. Go back and look: if its line says since now that the secret before signs, too, the new one is lost. Rotate again only when the receiver can be given another at once: the one that it has then signs no more.";

export function open({rest: [id], signal, title, fail, clear}) {
  title("Webhooks");
  const place = h("div", null, loading());
  const sent = h("div");
  const write = session.may("write");
  let drawn = null;
  let drawnSent = null;

  async function load() {
    const {data} = await get("/v1/webhooks", {}, signal);
    if (JSON.stringify(data) === drawn) return; // what is opened or marked stays as it is
    drawn = JSON.stringify(data);
    replace(place, data.length ? table("Webhooks", ["address", "state", "events", "made", ACTIONS], data.map(line))
      : empty("There are none yet. A webhook is an address that is told, signed, when a job begins, saves, fails or ends.", "ratchet webhooks create URL"));
  }

  function line(one) {
    return rowOf(one.id, [h("code", {class: "key"}, one.url), one.description ? h("small", {class: "soft", dir: "auto"}, one.description) : null, h("small", {class: "soft"}, one.id)],
      [badge(one.enabled ? "enabled" : "disabled", one.enabled ? "succeeded" : "failed"), one.disabled_reason ? h("small", null, one.disabled_reason) : null, one.failing_since && one.enabled ? h("small", null, `fails since ${time(one.failing_since)}`) : null,
        new Date(one.previous_secret_until) > Date.now() ? h("small", null, `the secret before signs, too, until ${time(one.previous_secret_until)}`) : null],
      h("details", null, h("summary", null, String(one.events.length)), one.events.join(", ")), h("span", {class: "whole"}, time(one.created_at)),
      h("div", {class: "buttons"},
        h("a", {class: "button", href: `#/webhooks/${one.id}`, "aria-current": one.id === id ? "true" : null}, "Deliveries"),
        ...(write ? [["Test", () => send("POST", `/v1/webhooks/${one.id}/test`).then(() => say("A test is sent."))],
          [one.enabled ? "Disable" : "Enable", () => send("PATCH", `/v1/webhooks/${one.id}`, {enabled: !one.enabled})],
          ["Rotate …", () => rotate(one)], ["Delete …", () => drop(one)]] : []).map(([text, work]) => button(text, work))));
  }

  function button(text, work) {
    let busy = false; // one click is one request, and so are two quick ones
    return h("button", {type: "button", class: text === "Delete …" ? "danger" : null, onclick: async () => {
      if (busy) return;
      busy = true;
      clear();
      try {
        await work();
        await Promise.all([load(), deliveries()]);
      } catch (error) {
        fail(error);
      }
      busy = false;
    }}, text);
  }

  async function create() {
    const url = h("input", {type: "url", required: true, maxlength: "2048", spellcheck: "false"});
    const about = h("input", {type: "text", maxlength: "500"});
    const events = h("input", {type: "text", placeholder: "all", spellcheck: "false"});
    let made = null;
    const done = await ask({
      title: "A new webhook", action: "Make it", fields: [field("Address", url, "It is sent POST requests."), field("What it is for", about), field("Events", events, "such as job.failed, job.succeeded; without any: all")],
      work: async () => {
        const wanted = events.value.split(/[\s,]+/).filter(Boolean);
        made = await send("POST", "/v1/webhooks", {url: url.value, description: about.value, ...(wanted.length ? {events: wanted} : {})});
      },
    });
    if (done) showSecret("The webhook's secret", made.secret, SIGNS);
  }

  async function rotate(one) {
    let made = null;
    const done = await ask({title: "Rotate its secret?", text: ["What is sent to ", h("code", null, one.url), " is signed with a new secret; for a day with the one before, too."], action: "Rotate", unsure: UNSURE,
      work: async () => { made = await send("POST", `/v1/webhooks/${one.id}/rotate`); }});
    if (done) showSecret("The webhook's new secret", made.secret, SIGNS);
  }

  async function drop(one) {
    const done = await ask({title: "Delete this webhook?", text: [h("code", null, one.url), " is told of nothing any more, and what was sent to it is forgotten."], action: "Delete the webhook", danger: true, work: () => send("DELETE", `/v1/webhooks/${one.id}`)});
    if (!done) return;
    say("It is deleted.");
    if (one.id === id && !signal.aborted) location.hash = "#/webhooks";
  }

  /** What was sent to the one whose deliveries are looked at. */
  async function deliveries() {
    if (!id) return;
    const {data, has_more} = await get(`/v1/webhooks/${id}/deliveries`, {limit: LIMIT}, signal);
    if (JSON.stringify([data, has_more]) === drawnSent) return;
    drawnSent = JSON.stringify([data, has_more]);
    replace(sent, h("h2", null, "Deliveries"), h("p", {class: "soft"}, id), data.length ? table("Deliveries", ["event", "state", "job", "attempts", "answer", "sent", ACTIONS], data.map((one) => rowOf(one.id,
      [h("code", null, one.type), h("small", {class: "soft"}, one.id)], badge(one.status, {delivered: "succeeded", waiting: "queued"}[one.status]), one.job_id ? h("a", {href: `#/jobs/${one.job_id}`}, one.job_id) : "–", one.attempts,
      h("div", {class: "prose"}, [one.response_status, one.error].filter((part) => part !== null).join(" ") || "–"),
      [h("span", {class: "whole"}, one.last_tried_at ? time(one.last_tried_at) : "not yet"), one.next_try_at ? h("small", {class: "soft"}, `again ${time(one.next_try_at)}`) : null],
      write ? button("Redeliver", () => send("POST", `/v1/webhooks/${id}/deliveries/${one.id}/redeliver`).then(() => say("It is sent again."))) : null)))
      : empty("Nothing was sent to it within the last 14 days.", `ratchet webhooks test ${id}`),
    has_more ? h("p", {class: "soft"}, `These are the newest; all of them: ratchet webhooks deliveries ${id}`) : null);
  }

  poll(() => Promise.all([load(), deliveries()]), LOOK_MS, signal).catch(fail);
  const fresh = button("New webhook …", create);
  fresh.className = "main";
  return [h("div", {class: "head"}, h("h1", null, "Webhooks"), write ? fresh : null), place, sent];
}
