// Two models answer the same prompt, side by side.

import {events, get, request, session} from "./api.js";
import {explain} from "./dialog.js";
import {empty, field, h, put, replace, select} from "./dom.js";
import {counted, duration} from "./format.js";

export function open({query, signal, title, keys, fail}) {
  title("Playground");
  if (!session.may("write")) return [h("h1", null, "Playground"), empty("Sampling takes a key of scope write.", "ratchet keys create me --scope write")];
  const prompt = h("textarea", {rows: "4", required: true, placeholder: "rev 271828>"});
  const form = select([["completions", "continue the text"], ["chat/completions", "answer a chat"]], "completions", {});
  const tokens = h("input", {type: "number", min: "1", max: "4096", value: "64"});
  const temperature = h("input", {type: "number", min: "0", max: "10", step: "0.1", value: "1"});
  const sides = ["left", "right"].map((side) => panel(side));
  const stop = h("button", {type: "button", disabled: true, onclick: () => asking?.abort()}, "Stop");
  let asking = null;

  function panel(side) {
    const model = select([["", "choose a model"]], "", {});
    const text = h("pre", {class: "said", "aria-live": "polite"});
    const told = h("p", {class: "soft"});
    const about = h("small", {class: "soft"}); // whole, where the field cuts it
    const choose = (id) => {
      if (id !== undefined) model.value = id;
      about.textContent = model.selectedOptions[0]?.dataset.about ?? "";
    };
    model.addEventListener("change", () => choose());
    return {side, model, text, told, choose, element: h("section", {class: "side", "aria-label": side}, field(side === "left" ? "One model" : "The other", model), about, text, told)};
  }

  async function answer(one, stopped) {
    one.text.textContent = one.told.textContent = "";
    if (!one.model.value) return;
    const began = performance.now();
    const chat = form.value !== "completions";
    const body = {model: one.model.value, temperature: Number(temperature.value), stream: true, stream_options: {include_usage: true},
      ...(chat ? {messages: [{role: "user", content: prompt.value}], max_completion_tokens: Number(tokens.value)} : {prompt: prompt.value, max_tokens: Number(tokens.value)})};
    try {
      one.text.setAttribute("aria-busy", "true"); // it is read out when it is whole
      one.told.textContent = "waiting for a worker …";
      const came = await request("POST", `/v1/${form.value}`, {body, signal: stopped});
      let spent = null;
      for await (const {data} of events(came)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        one.text.append(chunk.choices?.[0]?.text ?? chunk.choices?.[0]?.delta?.content ?? "");
        spent = chunk.usage ?? spent;
      }
      one.told.textContent = [spent ? counted(spent.completion_tokens, "token") : null, duration((performance.now() - began) / 1000)].filter(Boolean).join(" · ");
    } catch (error) {
      if (stopped !== asking?.signal) return; // asked anew meanwhile
      one.told.replaceChildren();
      put(one.told, stopped.aborted ? "stopped" : explain(error));
    } finally {
      if (stopped === asking?.signal) one.text.removeAttribute("aria-busy");
    }
  }

  async function both(event) {
    event.preventDefault();
    asking?.abort();
    const mine = asking = new AbortController();
    signal.addEventListener("abort", () => mine.abort(), {once: true});
    stop.disabled = false;
    await Promise.all(sides.map((one) => answer(one, mine.signal)));
    if (asking === mine) stop.disabled = true;
  }

  async function models() {
    const {data} = await get("/v1/models", {}, signal);
    const made = (one) => ["checkpoint", "alias"].includes(one.kind);
    const options = data.map((one) => h("option", {value: one.id, "data-about": made(one) ? one.description : null}, made(one) ? `${one.id} (${one.description})` : one.id));
    const ids = data.map((one) => one.id);
    const likely = ["alias", "checkpoint"].flatMap((kind) => data.filter((one) => one.kind === kind).map((one) => one.id)); // a running job soon deletes its newest
    for (const [i, one] of sides.entries()) {
      replace(one.model, h("option", {value: ""}, "nobody"), options.map((option) => option.cloneNode(true)));
      const wanted = query.get(one.side) ?? (likely[i] ?? "tiny");
      if (!ids.includes(wanted)) one.model.append(h("option", {value: wanted}, wanted));
      one.choose(wanted);
    }
  }

  keys["/"] = () => prompt.focus();
  prompt.addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && both(event));
  models().catch(fail);
  return [h("h1", null, "Playground"), h("form", {onsubmit: both}, field("Prompt", prompt, "Ctrl-Enter asks both"),
    h("div", {class: "filters"}, field("Form", form), field("Tokens at most", tokens), field("Temperature", temperature), h("button", {type: "submit", class: "main"}, "Ask both"), stop)),
  h("div", {class: "sides"}, sides.map((one) => one.element))];
}
