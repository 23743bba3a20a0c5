"""`python -m forked_follower RANK RANKS SOCKET [short]`: a rank that a zygote can make; `short` of memory in a step."""

import socket
import sys
from multiprocessing.connection import Connection
from typing import Any

import torch

from workers.ranks import follower


def out_of_memory(weights: Any) -> None:
    raise torch.OutOfMemoryError(f"no memory for {len(weights)} gradients")


if __name__ == "__main__":
    rank, ranks, path, *short = sys.argv[1:]
    if short:
        follower.add_up = out_of_memory
    line = socket.socket(socket.AF_UNIX)
    line.connect(path)
    follower.follow(Connection(line.detach()), int(rank), int(ranks))
