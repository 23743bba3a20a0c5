"""A process's hold on its jobs: leases, tokens and seconds spent, the last log lines, checkpoints, and how each job ends."""
