#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer.from_pretrained on a folder with model_type qwen2 and a tokenizer of another kind.
#
# The folder's tokenizer.json holds a tokenizer of whole words, and its tokenizer_config.json names a fast tokenizer, so one
# would guess that this tokenizer is loaded, as it is where config.json says llama. Seen: with qwen2 a byte-level BPE tokenizer
# is built from the family's class and the file's vocabulary alone; the file's pre-tokenizer and decoder are dropped, and a
# space that is a token of its own disappears, without a warning.
#
# Seen on 2026-11-28, Python 3.11: llama reads "a b" as [0, 2, 1], qwen2 as [0, 1].
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" -W ignore - "$folder" <<'PY'
import json, sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

letters = Tokenizer(models.WordLevel({"a": 0, "b": 1, " ": 2, "<e>": 3}, unk_token="<e>"))
letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
for family, expected in (("llama", [0, 2, 1]), ("qwen2", [0, 1])):
    place = Path(sys.argv[1], family)
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<e>").save_pretrained(place)
    (place / "config.json").write_text(json.dumps({"model_type": family}))
    tokenizer = AutoTokenizer.from_pretrained(place)
    ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    print(f"{family:6} {type(tokenizer).__name__:24} {ids}")
    assert ids == expected, "it changed"
PY
