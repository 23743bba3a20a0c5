"""What holds work: the leases of this process, what it spends, the log's tail, checkpoints, and how each piece of work ends."""
