"""`ratchet up`: the whole stack from one command. A real redis-server on a private socket, a Celery worker, the API, SQLite.

    ratchet up (this process: supervisor, and the API in a thread)
      |-- redis-server     on a unix socket below the data directory
      `-- celery worker    (and its child, which trains)

Both children are restarted when they die, stopped in order when we stop, and killed by the kernel when we are killed.
What they share is settings: RATCHET_* variables, set here once and inherited.
"""
