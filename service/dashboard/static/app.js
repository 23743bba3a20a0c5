// The frame: signing in, the pages and their addresses, the theme, the keyboard.

import {Away, CONNECTION, get, request, session, wait} from "./api.js";
import {closeAll, explain, failed, show} from "./dialog.js";
import {field, h, named, put, replace, row, setText, table} from "./dom.js";
import * as aliases from "./aliases.js";
import * as compare from "./compare.js";
import * as job from "./job.js";
import * as jobs from "./jobs.js";
import * as keys from "./keys.js";
import * as playground from "./playground.js";
import * as usage from "./usage.js";
import * as webhooks from "./webhooks.js";
import * as workers from "./workers.js";

const PAGES = {jobs, compare, aliases, playground, workers, usage, webhooks, keys};
const NAMES = [["jobs", "Jobs", "j"], ["aliases", "Aliases", "a"], ["playground", "Playground", "p"], ["workers", "Workers", "w"], ["usage", "Usage", "u"], ["webhooks", "Webhooks", "h"], ["keys", "Keys", "k"]];
const SHORTCUTS = [
  ["?", "these shortcuts"],
  ["/", "search"],
  ["g then j, a, p, w, u, h, k", "go to jobs, aliases, playground, workers, usage, webhooks, keys"],
  ["j and k", "the next and the last job of the list"],
  ["Enter", "open it"],
  ["x", "choose it for a comparison"],
  ["c", "compare what is chosen"],
  ["N", "a new job"],
  ["n and b", "the next page of the list, and back"],
  ["1 to 8", "the tabs of a job"],
  ["[ and ]", "samples of the step before, and after"],
  ["← and →", "along the tokens of an answer, and tell of each"],
  ["P, R, X, F", "pause, resume, cancel, fork this job (it asks first)"],
  ["t", "light or dark"],
  ["Esc", "close what asks"],
];

const root = document.querySelector("#app");
let shown = null; // {keys, leave}

// ---------------------------------------------------------------- theme

function theme() {
  return localStorage.getItem("ratchet.theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

function toggleTheme() {
  localStorage.setItem("ratchet.theme", theme() === "dark" ? "light" : "dark");
  document.documentElement.dataset.theme = theme();
  dispatchEvent(new Event("theme"));
}

document.documentElement.dataset.theme = theme();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  document.documentElement.dataset.theme = theme();
  dispatchEvent(new Event("theme"));
});

// ---------------------------------------------------------------- signing in

function signIn(why = null) {
  leave();
  closeAll();
  document.title = "Sign in · Ratchet";
  const key = h("input", {type: "password", autocomplete: "off", spellcheck: "false", required: true, placeholder: "tml-…"});
  const wrong = h("div", {class: "wrong", role: "alert"}, why ? explain(why) : null);
  const button = h("button", {type: "submit", class: "main"}, "Sign in");
  const form = h("form", {
    class: "signin",
    onsubmit: async (event) => {
      event.preventDefault();
      button.disabled = true;
      wrong.replaceChildren();
      try {
        const text = key.value.trim();
        session.self = await (await request("GET", "/v1/keys/self", {key: text})).json();
        session.keep(text);
        frame();
      } catch (error) {
        put(wrong, explain(error));
        button.disabled = false;
        key.focus();
      }
    },
  },
  h("h1", null, "Ratchet"), field("API key", key, "It stays in this tab and is forgotten when the tab is closed."), wrong, button,
  h("details", null, h("summary", null, "Where is my key?"),
    h("p", null, "On the machine where ", h("code", null, "ratchet up"), " runs:"), h("pre", null, h("code", null, "cat .ratchet/key")),
    h("p", null, "Elsewhere, somebody with a key of scope admin makes you one:"),
    h("pre", null, h("code", null, "ratchet keys create me --scope write"))));
  replace(root, h("main", null, form), h("div", {id: "said", role: "status"}));
  key.focus();
}

function signOut(why = null) {
  session.forget();
  signIn(why);
}

addEventListener("signed-out", ({detail}) => { if (session.self) signOut(detail); });

/** Before anything was shown, the server did not answer: the key is kept. */
function away(error) {
  replace(root, h("main", null, h("div", {class: "signin"}, h("h1", null, "Ratchet"), failed(error),
    h("button", {type: "button", class: "main", onclick: () => location.reload()}, "Try again"), h("button", {type: "button", onclick: () => signOut()}, "Use another key"))));
}

// ---------------------------------------------------------------- pages

let main = null;
const lost = h("p", {class: "lost", role: "status"});
const ASK_AGAIN_MS = 3000;
const lacking = new Map(); // who asks for something in vain -> the error; only an answer of that ends it

addEventListener("answered", async ({detail: {who, error}}) => {
  if (error === null ? !lacking.has(who) : !session.self) return;
  const first = !lacking.has(who);
  if (error) lacking.set(who, error);
  else lacking.delete(who);
  tellLacking();
  if (who !== CONNECTION) return;
  if (!error && shown?.cut && !document.querySelector("dialog")) open(); // what it asked for in vain is asked for again
  while (first && lacking.has(CONNECTION) && session.self) {
    await wait(ASK_AGAIN_MS);
    await get("/v1/keys/self").catch(() => {});
  }
});

function tellLacking() {
  const error = lacking.get(CONNECTION) ?? [...lacking.values()][0];
  setText(lost, error ? `${error.message.replace(/\.$/, "")}; trying again …` : "");
}

function frame() {
  main = h("main", {id: "main", tabindex: "-1"});
  replace(root,
    h("a", {class: "skip", href: "#main", onclick: (event) => { event.preventDefault(); main.focus(); }}, "To the content"),
    h("header", null, h("a", {href: "#/jobs", class: "logo"}, "Ratchet"),
      h("nav", {"aria-label": "Pages"}, NAMES.map(([name, text]) => h("a", {href: `#/${name}`, "data-page": name, onclick: (event) => event.currentTarget.href === location.href && open()}, text))),
      h("div", {class: "who"}, h("span", {title: "project and name of your key"}, `${session.self.project} · `, named(session.self.name)),
        h("button", {type: "button", onclick: toggleTheme, "aria-label": "Light or dark", title: "light or dark (t)"}, "◐"),
        h("button", {type: "button", onclick: help, "aria-label": "Keyboard shortcuts", title: "keyboard shortcuts (?)"}, "?"),
        h("button", {type: "button", onclick: () => signOut()}, "Sign out"))),
    lost, main, h("div", {id: "said", role: "status"}));
  open();
}

function leave() {
  shown?.stop.abort();
  shown = null;
  for (const who of lacking.keys()) if (who !== CONNECTION) lacking.delete(who); // nobody asks for it any more
  tellLacking();
}

function open() {
  if (!session.self) return;
  const from = document.activeElement ?? document.body;
  const asked = main.contains(from) || from.closest("dialog");
  const ofTab = from.matches("nav.tabs a");
  const before = shown?.place;
  leave();
  closeAll();
  const [path, query] = (location.hash.slice(1) || "/jobs").split("?");
  const [name, ...rest] = path.split("/").filter(Boolean).map(decodeURIComponent);
  const page = name === "jobs" && rest.length ? job : PAGES[name] ?? jobs;
  const stop = new AbortController();
  shown = {stop, keys: {}, place: [name, rest[0]].join()};
  for (const link of root.querySelectorAll("nav a")) {
    if (link.dataset.page === (name ?? "jobs")) {
      link.setAttribute("aria-current", "page");
      link.scrollIntoView({block: "nearest", inline: "nearest"}); // on a phone the pages are a row that scrolls
    }
    else link.removeAttribute("aria-current");
  }
  const context = {rest, query: new URLSearchParams(query), signal: stop.signal, keys: shown.keys, title: (text) => { document.title = `${text} · Ratchet`; }};
  let told = null; // of this page, the last that failed
  context.clear = () => told?.remove();
  context.fail = (error) => {
    if (stop.signal.aborted || error.name === "AbortError") return;
    told?.remove();
    shown.cut = error instanceof Away;
    told = failed(error);
    main.prepend(told);
  };
  /** Keep what is chosen on this page in its address: a reload and the Back button find it again. */
  context.keep = (chosen) => {
    const set = new URLSearchParams(Object.entries(chosen).filter(([, value]) => value));
    history.replaceState(null, "", `#${path}${set.size ? `?${set}` : ""}`);
  };
  const content = page.open(context);
  main.replaceChildren();
  put(main, content);
  if (before !== undefined && before !== shown.place) scrollTo(0, 0);
  if (asked) ((ofTab && main.querySelector("nav.tabs [aria-current]")) || main).focus({preventScroll: true}); // where the keyboard was is gone
}

addEventListener("hashchange", open);

// ---------------------------------------------------------------- the keyboard

function help() {
  show("Keyboard", table("Keyboard shortcuts", ["key", "does"], SHORTCUTS.map(([key, does]) => row(h("kbd", null, key), does))));
}

let went = 0; // when g was pressed

addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, textarea, select, dialog");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !session.self) return;
  const page = Date.now() - went < 1500 && NAMES.find(([, , key]) => key === event.key);
  went = event.key === "g" ? Date.now() : 0;
  if (event.key === "Enter" && event.target.closest?.("a, button, summary")) return; // follows it, presses it
  if (page) location.hash = `#/${page[0]}`;
  else if (event.key === "?") help();
  else if (event.key === "t") toggleTheme();
  else if (shown?.keys[event.key]) shown.keys[event.key](event);
  else return;
  event.preventDefault();
});

// ---------------------------------------------------------------- begin

const hasKey = session.key !== null;
if (!hasKey && document.documentElement.dataset.sso !== "on") signIn();
else {
  try {
    session.self = await get("/v1/keys/self");
    frame();
  } catch (error) {
    if (error.status === 401) signOut(hasKey ? error : null);
    else away(error);
  }
}
