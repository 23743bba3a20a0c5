#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1): what load_dataset makes of JSON lines whose answers are strings of dates, or whole numbers.
#
# One would guess that a string in JSON stays a string, and that one row does not decide what another one's answer is.
# Seen: where every answer of a column is an ISO 8601 date or time, all become datetimes, so a reward that compares str(answer)
# with "2024-01-31" sees "2024-01-31 00:00:00"; an offset is applied and forgotten; a null does not matter, but a single answer
# that is no day of the calendar ("2024-02-30") or no date keeps all of them strings. So the same row is a string in one file
# and a datetime in another one, or in the split for evaluation. "2024" and "10:30" stay strings. A whole number of 20 digits
# makes all numbers of its column floats: 7 is 7.0, and the long one has lost its last digits. Dataset.from_list of the same rows
# keeps the dates as strings (but there the keys of the first row alone are columns: others are dropped without a word).
#
# Seen on 2026-11-29, Python 3.11.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME="$folder/home" "$folder/venv/bin/python" -W ignore - <<'PY'
import json
from datetime import datetime
from pathlib import Path

import datasets

datasets.disable_progress_bars()


def loaded(*answers):
    """The answers of a file with these."""
    file = Path(f"{abs(hash(answers))}.jsonl")
    file.write_text("".join(json.dumps({"prompt": "When?", "answer": answer}) + "\n" for answer in answers))
    found = datasets.load_dataset("json", data_files=str(file), split="train")["answer"][:]
    print(f"{answers!s:60} -> {found}")
    return found


day = datetime(2024, 1, 31)
assert loaded("2024-01-31", "2024-02-01") == [day, datetime(2024, 2, 1)], "it changed"
assert str(day) == "2024-01-31 00:00:00"
assert loaded("2024-01-31", None) == [day, None], "it changed"
assert loaded("2024-01-31", "2024-02-30") == ["2024-01-31", "2024-02-30"], "it changed"
assert loaded("2024-01-31", "unknown") == ["2024-01-31", "unknown"], "it changed"
assert loaded("2024-01-31T12:00:00+02:00") == [datetime(2024, 1, 31, 10)], "it changed"
assert loaded("2024", "2025") == ["2024", "2025"] and loaded("10:30") == ["10:30"], "it changed"
assert loaded(7, 12345678901234567890) == [7.0, 12345678901234567168.0], "it changed"
rows = [{"answer": "2024-01-31"}, {"answer": "2024-02-01", "hint": "a day later"}]
assert datasets.Dataset.from_list(rows)[:] == {"answer": ["2024-01-31", "2024-02-01"]}, "it changed"
PY
