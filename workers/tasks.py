"""The Celery tasks. A message only says that there may be work, like a doorbell. The work itself is in the store."""


def train(job_id: str) -> None:
    """Claim the best queued job, which need not be `job_id`, and run it to its end."""
    from workers.runner import run_next  # torch lives in the child only

    run_next(rung_by=job_id)


def losses() -> None:
    """Answer the waiting loss requests. A worker that does nothing else stays and waits for more."""
    from workers.losses import serve

    serve.run()
