// API keys: listed, made, rotated, revoked.

import {get, send, session} from "./api.js";
import {ask, say, showSecret} from "./dialog.js";
import {ACTIONS, badge, empty, field, h, loading, named, replace, rowOf, select, table} from "./dom.js";
import {ago, time} from "./format.js";

const [HOUR_S, DAY_S] = [3600, 86_400];
const UNSURE = "It may have been done all the same. Go back and look: if the list has a key of this name that was made just now, its text is lost.";
const ANOTHER = `${UNSURE} Then make another key in its place, and revoke that one.`;
const OWN = `${UNSURE} Yours ends with the hours above and makes no key that lasts longer: let another admin key make you one before that.`;
const KEPT_NOWHERE = "It is kept nowhere. The server knows only its hash.";

export function open({signal, title, fail}) {
  title("Keys");
  if (!session.may("admin")) return [h("h1", null, "Keys"), empty(`Your key has the scopes ${session.self.scopes.join(", ")}. Keys are managed with one of scope admin.`, "ratchet keys create NAME --scope admin")];
  const place = h("div", null, loading());

  async function load() {
    const {data} = await get("/v1/keys", {}, signal);
    replace(place, table("Keys", ["name", "ends with", "may", "made", "used", "expires", ACTIONS], data.map((one) => rowOf(one.id,
      [h("span", {class: "key", dir: "auto"}, one.name), " ", one.id === session.self.id ? badge("yours", "plain") : null, h("small", {class: "soft"}, one.id)], h("span", {class: "whole"}, `…${one.ends_with}`), one.scopes.at(-1), h("span", {class: "whole"}, ago(one.created_at)), h("span", {class: "whole"}, one.last_used_at ? ago(one.last_used_at) : "never"), one.expires_at ? time(one.expires_at) : "never",
      h("div", {class: "buttons"}, h("button", {type: "button", onclick: () => rotate(one)}, "Rotate …"),
        one.id === session.self.id ? null : h("button", {type: "button", class: "danger", onclick: () => revoke(one)}, "Revoke …"))))));
  }

  async function revoke(one) {
    const done = await ask({title: "Revoke this key?", text: [named(one.name), ` (…${one.ends_with}) works no more from now on, and its open streams end. That cannot be undone.`], action: "Revoke", danger: true, work: () => send("DELETE", `/v1/keys/${one.id}`)});
    if (done) {
      say("It is revoked.");
      load().catch(fail);
    }
  }

  async function rotate(one) {
    const own = one.id === session.self.id;
    const grace = h("input", {type: "number", min: own ? "1" : "0", max: "720", required: true, value: "24"});
    let made = null;
    await ask({
      title: "Rotate this key?", action: "Rotate", unsure: own ? OWN : ANOTHER,
      fields: [field("Hours for which the old one works, too", grace, own ? "At least 1: should the new one be lost on its way, this tab goes on with the old one until then." : null)],
      text: [named(one.name), ` (…${one.ends_with}) is replaced by a new key that may do the same.`, own ? " It is yours: this tab goes on with the new one." : ""],
      work: async () => {
        made = await send("POST", `/v1/keys/${one.id}/rotate`, {grace_s: Number(grace.value) * HOUR_S});
        if (own && session.self?.id === one.id) session.change(made);
      },
    });
    if (made) showSecret("The new key, shown this once", made.key, KEPT_NOWHERE);
    load().catch(fail);
  }

  async function create() {
    const name = h("input", {type: "text", required: true, maxlength: "200"});
    const scope = select([["read", "read: look at everything"], ["write", "write: everything but keys"], ["admin", "admin: keys, too"]], "write", {});
    const days = h("input", {type: "number", min: "1", max: "3650", placeholder: "never"});
    let made = null;
    const done = await ask({
      title: "A new key", action: "Make it", fields: [field("Name", name, "whose it is, or what it is for"), field("It may", scope), field("Expires in days", days)],
      work: async () => { made = await send("POST", "/v1/keys", {name: name.value, scopes: [scope.value], ...(days.value ? {expires_in_s: Number(days.value) * DAY_S} : {})}); },
    });
    if (!done) return;
    showSecret("The key, shown this once", made.key, KEPT_NOWHERE);
    load().catch(fail);
  }

  load().catch(fail);
  return [h("div", {class: "head"}, h("h1", null, "Keys"), h("button", {type: "button", class: "main", onclick: create}, "New key …")), place];
}
