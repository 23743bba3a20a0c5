#!/usr/bin/env bash
# math-verify 0.9.0 (antlr4 4.13.2, sympy 1.14.0): answers that it takes for the reference.
#
# One would guess that a library which grades mathematics tells these apart. Seen: a number with a base is read without its
# digits in that base (11 in base 2 and 11 in base 3 are equal); a pair is the set of its numbers, but only in the order of the
# pair ((3,4) equals {3,4}, not {4,3}); what is no mathematics is read as far as it goes: dates are subtractions, a time of
# day is its hour, a length loses its unit, and numbers below 1e-6 are equal.
#
# Seen on 2026-11-28, Python 3.11.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'math-verify[antlr4_13_2]==0.9.0' sympy==1.14.0
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" -W ignore - <<'PY'
from math_verify import parse, verify

PAIRS = [
    (r"\boxed{11_2}", r"\boxed{11_3}", True),
    (r"\boxed{(3,4)}", r"\boxed{\{3,4\}}", True),
    (r"\boxed{(3,4)}", r"\boxed{\{4,3\}}", False),
    ("2025-12-26", "2024-12-25", True),
    ("10:30", "10:45", True),
    ("5 cm", "5 m", True),
    ("0.0000001", "0.0000004", True),
]
for reference, answer, equal in PAIRS:
    found = verify(parse(reference), parse(answer))
    print(f"{reference:20} {answer:20} {found}")
    assert found == equal, "it changed"
PY
