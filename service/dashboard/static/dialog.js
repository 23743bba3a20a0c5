// Questions before anything is changed, and what came of it.

import {h, put} from "./dom.js";

/** Ask in a dialog. `work` runs when it is confirmed; while it fails, the dialog stays and says why. Answers whether it was done. */
export function ask({title, text, fields = [], action, danger = false, work}) {
  return new Promise((resolve) => {
    const wrong = h("div", {class: "wrong", role: "alert"});
    const act = h("button", {type: "submit", class: danger ? "danger" : "main"}, action);
    let done = false;
    const dialog = h("dialog", {"aria-labelledby": "dialog-title"}, h("form", {
      onsubmit: async (event) => {
        event.preventDefault();
        act.disabled = true;
        wrong.replaceChildren();
        try {
          await work();
          done = true;
          dialog.close();
        } catch (error) {
          put(wrong, explain(error));
        }
        act.disabled = false;
      },
    },
    h("h2", {id: "dialog-title"}, title), text ? h("p", null, text) : null, fields, wrong,
    h("div", {class: "buttons"}, h("button", {type: "button", onclick: () => dialog.close()}, "Back"), act)));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(done);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Show something in a dialog. */
export function show(title, ...content) {
  const dialog = h("dialog", {"aria-labelledby": "dialog-title", class: "wide"}, h("h2", {id: "dialog-title", tabindex: "-1", autofocus: true}, title), content, // what is long is read from its beginning
    h("div", {class: "buttons"}, h("button", {type: "button", class: "main", onclick: () => dialog.close()}, "Close")));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
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
