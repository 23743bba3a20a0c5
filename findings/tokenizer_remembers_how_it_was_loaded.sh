#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer.from_pretrained(folder).save_pretrained(other).
#
# One would guess that a tokenizer that is loaded and saved is the same files. Seen: tokenizer_config.json gains the arguments
# of the loading, "is_local": true and "local_files_only": false, so that what was saved once and what was saved after a
# restart have different checksums.
#
# Seen on 2026-11-28, Python 3.11.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" -W ignore - "$folder" <<'PY'
import json, sys
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

first, second = Path(sys.argv[1], "first"), Path(sys.argv[1], "second")
words = Tokenizer(models.WordLevel({"a": 0, "<e>": 1}, unk_token="a"))
PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>").save_pretrained(first)
AutoTokenizer.from_pretrained(first).save_pretrained(second)
before, after = (json.loads((place / "tokenizer_config.json").read_text()) for place in (first, second))
gained = {name: after[name] for name in after.keys() - before.keys()}
print("gained:", gained)
assert gained == {"is_local": True, "local_files_only": False}, "it changed"
PY
