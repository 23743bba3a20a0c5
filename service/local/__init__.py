"""`ratchet up`: the whole stack from one command. It runs a real redis-server on a private socket, Celery workers, the API and
SQLite.

    ratchet up (this process: supervisor, and the API in a thread)
      |-- redis-server     on a unix socket below the data directory
      |-- celery worker    (and its child, which trains)
      `-- celery worker    (and its child, which answers loss requests; not where RATCHET_SERVES is training)

The children are restarted when they die, stopped in order when we stop, and killed by the kernel when we are killed.
They share their settings: RATCHET_* variables, set here once and inherited.
"""
