"""The Celery tasks. A message is a doorbell: it says that there may be work, never what the work is."""


def train(job_id: str) -> None:
    """Take the best queued job, which need not be the one that rang, and run it to its end."""
    from workers.runner import run_next  # torch lives in the child only

    run_next(rung_by=job_id)


def losses() -> None:
    """Answer the loss requests that wait; on a worker for nothing else, stay and wait for more."""
    from workers.losses import serve

    serve.run()
