"""All tables. A change here needs a migration (`alembic revision --autogenerate`); CI runs `alembic check`."""

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from service.store.values import storable


class UTCDateTime(TypeDecorator[datetime]):
    """Takes aware datetimes and returns aware UTC, also on SQLite, which stores them naive."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("naive datetime; use service.ids.utcnow()")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            return value.replace(tzinfo=UTC)
        return None if value is None else value.astimezone(UTC)


class StorableText(TypeDecorator[str]):
    """Text that both databases can store, see `service.store.values`."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else storable(value)


Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
JsonAsSent = JSON(none_as_null=True)  # with the keys of objects in their order, which jsonb changes
Id = String(40)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UTCDateTime(),
        dict[str, Any]: Json,
        list[str]: Json,
        list[dict[str, Any]]: Json,
        str: StorableText(),
        int: BigInteger().with_variant(Integer(), "sqlite"),
    }


class ApiKey(Base):
    """An API key. Only its sha256 is stored; the text is shown once, when the key is created."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str]
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    ends_with: Mapped[str] = mapped_column(String(4))
    scopes: Mapped[list[str]] = mapped_column(server_default='["read", "write", "admin"]')
    requests_per_s: Mapped[float | None] = mapped_column(Float)  # null: the operator's default
    burst: Mapped[int | None]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


IS_SAMPLER = text("kind = 'sampler' AND status NOT IN ('succeeded', 'failed', 'cancelled')")  # of its base, for its project


class Job(Base):
    """A training job: its spec as sent and with defaults, what the worker resolved, its state, and its lease."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_project_created", "project", "created_at", "id"),
        Index("ix_jobs_project_status_created", "project", "status", "created_at", "id"),
        Index("uq_jobs_sampler", "project", "base_key", unique=True, sqlite_where=IS_SAMPLER, postgresql_where=IS_SAMPLER),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str]
    tags: Mapped[list[str]]
    # the attribute name `metadata` is reserved by SQLAlchemy
    user_metadata: Mapped[dict[str, Any]] = mapped_column("metadata", JsonAsSent)

    spec_sent: Mapped[dict[str, Any]] = mapped_column(JsonAsSent)
    spec: Mapped[dict[str, Any]] = mapped_column(JsonAsSent)  # every default filled in, the objective as its seven axes
    spec_sha256: Mapped[str] = mapped_column(String(64))
    data_sha256: Mapped[str] = mapped_column(String(64))
    resolved: Mapped[dict[str, Any]]  # found by the worker: device, dtype, revision, parameters, versions
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    from_checkpoint_id: Mapped[str | None] = mapped_column(Id)

    status: Mapped[str] = mapped_column(String(16))
    status_reason: Mapped[str | None]
    phase: Mapped[str | None] = mapped_column(String(16))
    wish: Mapped[str | None] = mapped_column(String(16))
    wish_until: Mapped[datetime | None]  # a worker that has not fulfilled the wish by then is killed
    step: Mapped[int] = mapped_column(default=0)
    max_steps: Mapped[int]
    error: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]  # the last evaluation, best checkpoint, why it ended

    priority: Mapped[int] = mapped_column(default=50)
    resource_class: Mapped[str] = mapped_column(String(8), default="any")
    attempt: Mapped[int] = mapped_column(default=0)  # the fencing number
    lease_until: Mapped[datetime | None]
    lease_owner: Mapped[str | None]
    crashes: Mapped[int] = mapped_column(default=0)  # attempts lost since the last checkpoint
    retries: Mapped[int] = mapped_column(default=0)  # attempts that ended with a retryable error since the last checkpoint
    checkpoint_id: Mapped[str | None] = mapped_column(Id)  # where a resume starts
    run_s: Mapped[float] = mapped_column(Float, default=0.0)  # seconds spent running, over all attempts
    last_event: Mapped[int] = mapped_column(default=0)

    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    queued_at: Mapped[datetime | None]
    not_before: Mapped[datetime | None]
    rung_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    claimed_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    deadline_at: Mapped[datetime | None] = mapped_column(index=True)

    key_id: Mapped[str | None] = mapped_column(Id)  # the API key that submitted it
    budget_tokens: Mapped[int | None]
    budget_worker_s: Mapped[float | None] = mapped_column(Float)
    # Of sessions and samplers: what they share a process by. The same key, the same frozen weights.
    base_key: Mapped[str | None] = mapped_column(String(64), index=True)


# The queue in its order. Workers and the reconciler filter by the columns at the end.
Index(
    "ix_jobs_status_queue",
    Job.status,
    Job.priority.desc(),
    Job.queued_at,
    Job.id,
    Job.resource_class,
    Job.not_before,
    Job.run_s,
)


class Usage(Base):
    """What one attempt at a job spent on one day (UTC). No foreign keys: the ledger outlives jobs and keys.

    Attempt 0 stands for the queue: a job that failed outside an attempt has a row with number 0, which spent nothing.
    """

    __tablename__ = "usage"
    __table_args__ = (Index("ix_usage_project_day", "project", "day"),)

    job_id: Mapped[str] = mapped_column(Id, primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    day: Mapped[str] = mapped_column(String(10), primary_key=True)  # YYYY-MM-DD
    project: Mapped[str] = mapped_column(String(64))
    key_id: Mapped[str | None] = mapped_column(Id)
    sampled_tokens: Mapped[int]
    trained_tokens: Mapped[int]
    loading_s: Mapped[float] = mapped_column(Float)
    sampling_s: Mapped[float] = mapped_column(Float)
    grading_s: Mapped[float] = mapped_column(Float)
    updating_s: Mapped[float] = mapped_column(Float)
    evaluating_s: Mapped[float] = mapped_column(Float)
    saving_s: Mapped[float] = mapped_column(Float)
    # Parts of the above. unsaved: since the attempt's last checkpoint; wasted: lost, for the attempt ended without another.
    unsaved_sampled_tokens: Mapped[int]
    unsaved_trained_tokens: Mapped[int]
    unsaved_s: Mapped[float] = mapped_column(Float)
    wasted_sampled_tokens: Mapped[int]
    wasted_trained_tokens: Mapped[int]
    wasted_s: Mapped[float] = mapped_column(Float)
    steps: Mapped[int] = mapped_column(server_default="0")
    queued_s: Mapped[float] = mapped_column(Float, server_default="0")  # how long the job waited for this attempt
    failure: Mapped[str | None] = mapped_column(String(64))  # the error code that the attempt ended with


class Budget(Base):
    """What a project may spend from the day `since` on; null means no limit."""

    __tablename__ = "budgets"

    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    tokens: Mapped[int | None]
    worker_s: Mapped[float | None] = mapped_column(Float)
    since: Mapped[str] = mapped_column(String(10))  # YYYY-MM-DD
    updated_at: Mapped[datetime]


class Event(Base):
    """An event in the log of a job, numbered 1, 2, 3 ... without gaps; written in the transaction of the change it reports."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    type: Mapped[str] = mapped_column(String(32))
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class Metric(Base):
    """One point of one curve. The later attempt wins, so a resumed run has one clean line."""

    __tablename__ = "metrics"
    # A curve is read from one place, not from wherever each step was written: SQLite stores the rows in the order of the
    # key, and PostgreSQL has the values in the index.
    __table_args__ = (
        PrimaryKeyConstraint("job_id", "name", "step", postgresql_include=["value"]),
        {"sqlite_with_rowid": False},
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(128))
    step: Mapped[int]
    value: Mapped[float | None] = mapped_column(Float)  # null if it was not finite
    attempt: Mapped[int]
    created_at: Mapped[datetime]


class Operation(Base):
    """One operation of a session: what was asked, and what came of it. The table is the session's write-ahead log.

    In the lane '' operations run in the order of `seq` from 1, and a gap waits. In any other lane they run in any order.
    """

    __tablename__ = "operations"
    __table_args__ = (
        UniqueConstraint("job_id", "lane", "seq"),
        Index("ix_operations_job_status", "job_id", "status", "lane", "seq"),
        Index("ix_operations_newest", "job_id", "created_at", "seq"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    lane: Mapped[str] = mapped_column(String(128))
    seq: Mapped[int]
    kind: Mapped[str] = mapped_column(String(24))
    body_sha256: Mapped[str] = mapped_column(String(64))
    request: Mapped[bytes | None] = mapped_column(LargeBinary)  # null when no replay needs it any more
    size_bytes: Mapped[int]  # of the request
    cost: Mapped[int]  # tokens of work: what turns between projects are counted by
    status: Mapped[str] = mapped_column(String(8))  # waiting | done | failed
    answer: Mapped[bytes | None] = mapped_column(LargeBinary)  # null until done, and again when it has expired
    error: Mapped[dict[str, Any] | None]
    attempt: Mapped[int | None]  # the attempt that answered it
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]  # when that attempt began with it; null until it has finished
    finished_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None] = mapped_column(index=True)  # when the answer is forgotten
    traceparent: Mapped[str | None] = mapped_column(String(64))  # of the request that it came with, while that is traced


class Rollout(Base):
    """One sampled group: the prompt, its answers and their rewards."""

    __tablename__ = "rollouts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    split: Mapped[str] = mapped_column(String(16), primary_key=True)  # train | eval
    step: Mapped[int] = mapped_column(primary_key=True)
    group_index: Mapped[int] = mapped_column(primary_key=True)
    prompt: Mapped[str]
    reference: Mapped[str | None]
    samples: Mapped[list[dict[str, Any]]]
    attempt: Mapped[int]
    created_at: Mapped[datetime]


class Checkpoint(Base):
    """A folder of safetensors in the blob store, committed by rename, with a manifest of sha256 sums."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        Index("ix_checkpoints_job_step", "job_id", "step"),
        Index("ix_checkpoints_job_name", "job_id", "purpose", "name"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    step: Mapped[int]
    attempt: Mapped[int]
    adapter: Mapped[str] = mapped_column(String(8))  # lora | full
    model: Mapped[dict[str, Any]]  # the model section of the job's spec, needed to load the checkpoint
    path: Mapped[str]  # relative to the blob store
    size_bytes: Mapped[int]
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    metrics: Mapped[dict[str, Any]]  # the last evaluation before it was saved
    has_optimizer: Mapped[bool]
    is_final: Mapped[bool]
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]
    pinned_at: Mapped[datetime | None]  # pinned by a person: nothing deletes it
    # Given by a session's owner; unique among the session's checkpoints of one purpose, but for checkpoints.DELETED.
    name: Mapped[str | None]
    purpose: Mapped[str] = mapped_column(String(8), server_default="training")  # training | sampler (no optimizer state)
    user_metadata: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    expires_at: Mapped[datetime | None] = mapped_column(index=True)  # from checkpoints.ttl_s of its job's spec


class Alias(Base):
    """A name in a project that points at one of its checkpoints. A deleted one keeps its row: its history goes on if it is
    made again."""

    __tablename__ = "aliases"

    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(101), primary_key=True)  # MODEL@ALIAS
    checkpoint_id: Mapped[str | None] = mapped_column(Id, index=True)  # null: it is deleted
    previous_id: Mapped[str | None] = mapped_column(Id, index=True)  # the checkpoint that a rollback promotes
    version: Mapped[int]  # seq of the newest change: each change is conditional on it
    created_at: Mapped[datetime]


class AliasChange(Base):
    """A change of what an alias points at, numbered 1, 2, 3 ...; written in the transaction of the change. It outlives keys and
    checkpoints."""

    __tablename__ = "alias_changes"
    __table_args__ = (UniqueConstraint("project", "alias", "seq"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project: Mapped[str] = mapped_column(String(64))
    alias: Mapped[str] = mapped_column(String(101))
    seq: Mapped[int]
    action: Mapped[str] = mapped_column(String(16))  # promote | rollback | delete
    from_checkpoint_id: Mapped[str | None] = mapped_column(Id)
    checkpoint_id: Mapped[str | None] = mapped_column(Id)  # what it points at from then on; null: it was deleted
    back_to: Mapped[int | None]  # seq of the change that a rollback from here restores
    note: Mapped[str | None]
    key_id: Mapped[str] = mapped_column(Id)
    created_at: Mapped[datetime]


class Dataset(Base):
    """An uploaded JSONL file of rows, validated line by line."""

    __tablename__ = "datasets"
    __table_args__ = (Index("ix_datasets_project_created", "project", "created_at", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project: Mapped[str] = mapped_column(String(64))
    name: Mapped[str]
    rows: Mapped[int]
    columns: Mapped[dict[str, Any]]  # name -> {"types": ["string"], "rows": number of rows that have it}
    sha256: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int]
    path: Mapped[str]  # relative to the blob store
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]


class IdempotencyKey(Base):
    """The stored answer to a POST with this key. `status` is null while the request is in flight."""

    __tablename__ = "idempotency_keys"

    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    route: Mapped[str] = mapped_column(String(128), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64))
    status: Mapped[int | None]
    answer: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(index=True)


class Worker(Base):
    """A worker's parent process as it last reported; shows people why nothing runs."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    host: Mapped[str]
    pid: Mapped[int]
    device: Mapped[str]
    resource_classes: Mapped[list[str]]
    draining: Mapped[bool] = mapped_column(default=False)
    started_at: Mapped[datetime]
    last_seen_at: Mapped[datetime]
    memory: Mapped[dict[str, Any] | None]  # bytes: process, and with a GPU gpu_used and gpu_total


class TinkerSession(Base):
    """A client of the Tinker wire: one run of a program. Its models and samplers are jobs."""

    __tablename__ = "tinker_sessions"
    __table_args__ = (Index("ix_tinker_sessions_project_created", "project", "created_at"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str] = mapped_column(String(64))
    display_name: Mapped[str | None]
    tags: Mapped[list[str]]
    user_metadata: Mapped[dict[str, Any]] = mapped_column("metadata")
    created_at: Mapped[datetime]
    seen_at: Mapped[datetime]  # the last heartbeat
    finished_at: Mapped[datetime | None]
    finish: Mapped[dict[str, Any] | None]  # {type, detail}: how its client said that it ended


class TinkerModel(Base):
    """A training run of the Tinker wire: its id there, and the session (a job) that it is here."""

    __tablename__ = "tinker_models"
    __table_args__ = (Index("ix_tinker_models_project_created", "project", "created_at"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str] = mapped_column(String(64))
    session_id: Mapped[str] = mapped_column(ForeignKey("tinker_sessions.id", ondelete="CASCADE"), index=True)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    checkpoint_id: Mapped[str | None] = mapped_column(Id)  # of a copy, which has no job: what was copied
    base_model: Mapped[str]  # as its client named it
    user_metadata: Mapped[dict[str, Any]] = mapped_column("metadata")
    published: Mapped[list[str]]  # ids of checkpoints that its owner marked as public
    created_at: Mapped[datetime]


class TinkerSampler(Base):
    """A sampling session of the Tinker wire: an immutable version of some weights, and the sampler (a job) that samples it."""

    __tablename__ = "tinker_samplers"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str] = mapped_column(String(64))
    session_id: Mapped[str] = mapped_column(ForeignKey("tinker_sessions.id", ondelete="CASCADE"), index=True)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"), index=True)
    model_id: Mapped[str | None] = mapped_column(String(64))  # whose weights they are, if they were saved for this sampler
    checkpoint_id: Mapped[str | None] = mapped_column(Id)  # null: the base itself, or not looked up yet
    base_model: Mapped[str]
    context: Mapped[int | None]  # the model's, in tokens, if it is known without loading it
    model_path: Mapped[str | None]
    seed: Mapped[int] = mapped_column(server_default="0")  # of the run whose weights they are; of requests that name none
    created_at: Mapped[datetime]


class Webhook(Base):
    """Where a project wants to be told of events, by Standard Webhooks. The secret is stored as it is, for it signs."""

    __tablename__ = "webhooks"
    __table_args__ = (Index("ix_webhooks_project_created", "project", "created_at", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project: Mapped[str] = mapped_column(String(64))
    url: Mapped[str]
    description: Mapped[str]
    events: Mapped[list[str]]  # the types that it gets
    secret: Mapped[str]
    previous_secret: Mapped[str | None]  # signs beside the new one until `previous_until`
    previous_until: Mapped[datetime | None]
    created_at: Mapped[datetime]
    failing_since: Mapped[datetime | None]  # the first failed attempt after the last that succeeded
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None]


class WebhookDelivery(Base):
    """One event for one webhook: the outbox. Written in the event's transaction; its id is the `webhook-id` of each attempt.

    Whoever sends it claims it first: `attempts` grows by one, and `next_try_at` moves to when the claim ends. The result is
    written only while `attempts` is still the same.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_due", "status", "next_try_at"),
        Index("ix_webhook_deliveries_webhook_created", "webhook_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    project: Mapped[str] = mapped_column(String(64))
    type: Mapped[str] = mapped_column(String(48))
    job_id: Mapped[str | None] = mapped_column(Id)
    body: Mapped[str]  # JSON, as it is signed and sent
    status: Mapped[str] = mapped_column(String(16))  # waiting | delivered | failed
    attempts: Mapped[int]
    last_attempt: Mapped[int]  # the attempt after which it is given up
    next_try_at: Mapped[datetime]
    last_tried_at: Mapped[datetime | None]
    response_status: Mapped[int | None]  # of the last attempt; null: there was no answer
    error: Mapped[str | None]  # of the last attempt
    created_at: Mapped[datetime] = mapped_column(index=True)
    delivered_at: Mapped[datetime | None]


class AuditEntry(Base):
    """A change that a request made: who, what, when. No foreign keys: the log outlives keys and objects."""

    __tablename__ = "audit"
    __table_args__ = (Index("ix_audit_project_created", "project", "created_at", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project: Mapped[str] = mapped_column(String(64))
    key_id: Mapped[str] = mapped_column(Id)
    action: Mapped[str] = mapped_column(String(128))  # method and route: POST /v1/jobs/{job_id}/cancel
    object_id: Mapped[str | None] = mapped_column(String(128))  # of the path, else of what was made
    status: Mapped[int]
    request_id: Mapped[str] = mapped_column(Id)
    created_at: Mapped[datetime] = mapped_column(index=True)
