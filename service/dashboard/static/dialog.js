// Questions before anything is changed, and what came of it.

import {Away, sameWhile} from "./api.js";
import {field, h, put} from "./dom.js";

/** A dialog that is removed when it is closed. Only one is open at a time: a second click while it comes opens no other. */
function open(attributes, title, titled, then, ...content) {
  if (document.querySelector("dialog[open]")) return null;
  const dialog = h("dialog", {"aria-labelledby": "dialog-title", ...attributes}, h("h2", {id: "dialog-title", ...titled}, title), content);
  dialog.addEventListener("close", () => {
    dialog.remove();
    sameWhile(false);
    if (document.activeElement === document.body) document.querySelector("#main")?.focus({preventScroll: true}); // what it was asked from is gone
    then();
  });
  document.body.append(dialog);
  dialog.showModal();
  sameWhile(true);
  return dialog;
}

/** Ask in a dialog. `work` runs when it is confirmed; while it fails, the dialog stays and says why. Answers whether it was done, when
 *  the work is over, also where the page was left meanwhile. While it is under way, neither Back nor Escape closes the dialog.
 *  What is dangerous is not confirmed by the Enter key, except at its own button.
 *  `unsure`: for work that must not be done twice, what to look for when no answer came. It is said then, and not asked again. */
export function ask({title, text, fields = [], action, danger = false, wide = false, unsure = null, work}) {
  return new Promise((resolve) => {
    const wrong = h("div", {class: "wrong", role: "alert"});
    const act = h("button", {type: "submit", class: danger ? "danger" : "main"}, action);
    const back = h("button", {type: "button", autofocus: danger, onclick: () => dialog.close()}, "Back");
    const stay = (event) => (event.type === "cancel" || event.key === "Escape") && event.preventDefault(); // a second Escape closes what only "cancel" keeps open
    let done = false;
    let dialog = null;
    function busy(is) {
      act.disabled = back.disabled = is;
      dialog[is ? "addEventListener" : "removeEventListener"]("cancel", stay);
      (is ? addEventListener : removeEventListener)("keydown", stay);
    }
    const form = h("form", {
      onkeydown: (event) => danger && event.key === "Enter" && event.target.matches("input") && event.preventDefault(),
      onsubmit: async (event) => {
        event.preventDefault();
        if (act.disabled) return;
        busy(true);
        wrong.replaceChildren();
        let over = false;
        try {
          await work();
          done = true;
          dialog.close();
        } catch (error) {
          over = unsure && (error instanceof Away || error.status >= 500);
          put(wrong, explain(error), over ? h("p", null, unsure) : null);
          wrong.scrollIntoView({block: "nearest"});
        }
        const lost = document.activeElement === document.body; // a button that is disabled loses the focus
        busy(false);
        act.disabled = over;
        if (!dialog.isConnected) resolve(done);
        else if (lost) (over ? back : act).focus();
      },
    },
    text ? h("p", {id: "dialog-text"}, text) : null, fields, wrong,
    h("div", {class: "buttons"}, back, act));
    dialog = open({class: wide ? "wide" : null, "aria-describedby": text ? "dialog-text" : null}, title, {}, () => back.disabled || resolve(done), form);
    if (!dialog) resolve(false);
  });
}

/** Show something in a dialog. */
export function show(title, ...content) {
  const dialog = open({class: "wide"}, title, {tabindex: "-1", autofocus: true}, () => {}, content, // what is long is read from its beginning
    h("div", {class: "buttons"}, h("button", {type: "button", class: "main", onclick: () => dialog.close()}, "Close")));
}

/** Show a secret that is told this once. */
export function showSecret(title, text, hint) {
  const shown = h("input", {type: "text", readonly: true, value: text, onfocus: (event) => event.target.select()});
  const copy = h("button", {type: "button", onclick: async () => {
    const copied = await navigator.clipboard.writeText(text).then(() => true, () => false);
    copy.textContent = copied ? "Copied" : "This browser copies nothing: choose the text, Ctrl-C";
    if (!copied) shown.focus();
  }}, "Copy");
  closeAll(); // another is asked for again, a secret is not
  show(title, field("Copy it now", shown, hint), navigator.clipboard ? copy : null);
}

/** Close what asks: the page below it is left. */
export function closeAll() {
  for (const one of document.querySelectorAll("dialog")) one.close();
}

export function explain(error) {
  return [h("p", null, error.message), (error.more ?? []).map((line) => h("p", {class: "soft"}, line))];
}

export function failed(error) {
  return h("div", {class: "wrong", role: "alert"}, explain(error));
}

/** A short word at the foot of the page, told to screen readers, too. */
export function say(text) {
  const foot = document.querySelector("#said");
  foot.textContent = text;
  foot.classList.add("seen");
  setTimeout(() => foot.classList.remove("seen"), 4000);
}
