#!/bin/sh
# Submits the job to a running stack (`ratchet up`) and follows it: examples/smollm2/run.sh MODEL_FOLDER [STEPS]
set -eu
here=$(dirname "$0")
MODEL=$(cd "${1:?usage: run.sh MODEL_FOLDER [STEPS]}" && pwd)
STEPS=${2:-22}
rows=$(mktemp -d)
trap 'rm -rf "$rows"' EXIT
python "$here/make_rows.py" >"$rows/addition.jsonl"
python "$here/make_rows.py" held >"$rows/held-out.jsonl"
upload() { ratchet datasets upload --json "$1" | python -c 'import json, sys; print(json.load(sys.stdin)["id"])'; }
TRAIN=$(upload "$rows/addition.jsonl")
HELD_OUT=$(upload "$rows/held-out.jsonl")
export MODEL STEPS TRAIN HELD_OUT
python -c 'import os, string, sys; print(string.Template(sys.stdin.read()).substitute(os.environ))' <"$here/job.yaml" |
  ratchet submit - --follow
