// A new job from a spec that is typed, pasted or read from a file.

import {request} from "./api.js";
import {ask, explain, say} from "./dialog.js";
import {field, h, replace} from "./dom.js";
import {whole} from "./format.js";

const EXAMPLE = `kind: rl
name: copy-digits
model: {source: tiny}
data:
  train: {source: inline, rows: [{digits: "1592"}]}
  prompt: "copy {digits}>"
objective: {preset: gspo}
reward:
  graders: [{kind: exact, reference: "{digits}"}]
limits: {max_steps: 60}`;

/** Ask for a spec, as YAML or JSON, and make a job of it; without making it, it can be checked. */
export function submit() {
  const spec = h("textarea", {rows: "12", required: true, spellcheck: "false", placeholder: EXAMPLE});
  const file = h("input", {type: "file", accept: ".yaml,.yml,.json", onchange: async () => { spec.value = await file.files[0]?.text() ?? spec.value; }});
  const found = h("div", {role: "status"});
  spec.addEventListener("input", () => replace(found));
  const post = async (path) => (await request("POST", path, {body: spec.value, headers: {"Content-Type": "application/yaml"}})).json();

  async function check() {
    if (!spec.reportValidity()) return;
    replace(found, h("p", {class: "soft"}, "checking …"));
    try {
      replace(found, said(await post("/v1/jobs:validate")));
    } catch (error) {
      replace(found, h("div", {class: "wrong"}, explain(error)));
    }
  }

  return ask({
    title: "A new job", action: "Submit", wide: true,
    fields: [field("Spec, in YAML or JSON", spec), field("or from a file", file), h("button", {type: "button", onclick: check}, "Check it"), found],
    work: async () => {
      replace(found);
      const made = await post("/v1/jobs");
      say("It is queued.");
      location.hash = `#/jobs/${made.id}`;
    },
  });
}

function said({estimates, warnings, samples}) {
  const facts = Object.entries(estimates).filter(([, value]) => value).map(([name, value]) => `${name.replaceAll("_", " ")} ${whole(value)}`);
  const [first] = samples;
  return [h("p", null, `The spec is valid; nothing was made. ${facts.join(" · ")}`), warnings.map((one) => h("p", {class: "note"}, one)),
    first ? [h("p", {class: "soft"}, "The first row:"), h("pre", null, typeof first.prompt === "string" ? first.prompt : JSON.stringify(first.prompt, null, 2))] : null];
}
