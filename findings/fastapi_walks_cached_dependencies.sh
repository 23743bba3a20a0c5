#!/usr/bin/env bash
# fastapi 0.165.0 and a dependency that several others name.
#
# Each dependency runs once a request and is kept (use_cache), so one would guess that its own dependencies are looked at once,
# too. Seen: what stands below it is gone through anew wherever it is named, and only its own call is left out. Where each of n
# dependencies names the two before it, the nodes that a request resolves grow like Fibonacci's numbers, though it calls n functions;
# a request whose authentication is named by its body's reader, its page and its route pays for it at each of them.
#
# Seen on 2026-11-29, Python 3.11: 20 calls, and 21,891 nodes resolved.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check fastapi==0.165.0 httpx==0.28.1
"$folder/venv/bin/python" - <<'PY'
import asyncio
from itertools import count

import httpx
from fastapi import Depends, FastAPI
from fastapi.dependencies import utils

calls, nodes, N = count(), count(), 20
solve = utils.solve_dependencies


async def counted(**named):
    next(nodes)
    return await solve(**named)


utils.solve_dependencies = counted  # by which it resolves what stands below a dependency


def first():
    next(calls)


def both(one, other):
    async def dependency(a=Depends(one), b=Depends(other)):
        next(calls)

    return dependency


chain = [first, first]
for _ in range(N - 1):
    chain.append(both(chain[-1], chain[-2]))
app = FastAPI()


@app.get("/")
async def root(last=Depends(chain[-1])):
    return {}


async def ask():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x") as client:
        return (await client.get("/")).status_code


assert asyncio.run(ask()) == 200
called, walked = next(calls), next(nodes)
print(f"{called} functions were called, and {walked:,} nodes resolved")
assert called == N and walked > 1000, "it changed"
PY
