#!/usr/bin/env bash
# transformers 5.23.0 with the chat template qwen3.jinja that TRL 1.16.0 ships.
#
# A chat that ends with an assistant's message "<think>\n" is continued (continue_final_message=True), so that the model begins
# with its thoughts. One would guess a prompt that ends "<|im_start|>assistant\n<think>\n". Seen: an empty think block is put
# before it, and the model is asked to think after it has finished thinking. Templates that open the block themselves
# (qwen3_5_think) and templates that write a closed block in one piece (glm4moe) do the same; deepseek_r1_distill does not.
#
# Seen on 2026-11-28, Python 3.11: qwen3 '<think>\n\n</think>\n\n<think>\nOkay,', glm4moe '<think></think>\n<think>\nOkay,'.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 jinja2==3.1.6
"$folder/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --dest "$folder" trl==1.16.0
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" -W ignore - "$folder" <<'PY'
import sys, zipfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

[wheel] = Path(sys.argv[1]).glob("trl-*.whl")
letters = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>\nOkay,"}]
ends = {
    "qwen3": "assistant\n<think>\n\n</think>\n\n<think>\nOkay,",
    "qwen3_5_think": "assistant\n<think>\n\n</think>\n\n<think>\nOkay,",
    "glm4moe": "<|assistant|>\n<think></think>\n<think>\nOkay,",
    "deepseek_r1_distill": "<｜Assistant｜><think>\nOkay,",
}
for name, end in ends.items():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>")
    tokenizer.chat_template = zipfile.ZipFile(wheel).read(f"trl/chat_templates/{name}.jinja").decode()
    prompt = tokenizer.apply_chat_template(begun, tokenize=False, continue_final_message=True)
    print(f"{name:20} ...{prompt[-60:]!r}")
    assert prompt.endswith(end), "it changed"
PY
