"""Rows for the addition of two digits: a fifth of the pairs is held out.

python examples/smollm2/make_rows.py > addition.jsonl        # to train on
python examples/smollm2/make_rows.py held > held-out.jsonl   # to evaluate on
"""

import json
import random
import sys

pairs = [(x, y) for x in range(1, 10) for y in range(1, 10)]
random.Random(0).shuffle(pairs)
held = len(pairs) // 5
for x, y in pairs[:held] if sys.argv[1:] == ["held"] else pairs[held:]:
    print(json.dumps({"x": x, "y": y, "sum": str(x + y)}))
