"""The types of Ratchet's responses. They are plain dictionaries at run time, and may have more members than listed here."""

from typing import Any, Generic, Literal, NotRequired, TypedDict, TypeVar

Item = TypeVar("Item")

Status = Literal["validating", "queued", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled"]
FINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})


class Page(TypedDict, Generic[Item]):
    """A part of a list. To get the next part, pass its last_id as `after`."""

    object: Literal["list"]
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None


class JobSummary(TypedDict):
    """A job in a list, without its spec."""

    id: str
    object: Literal["job"]
    kind: Literal["rl", "supervised", "session", "sampler"]
    name: str
    tags: list[str]
    metadata: dict[str, Any]
    status: Status
    status_reason: str | None
    phase: str | None
    step: int
    max_steps: int
    attempt: int
    error: dict[str, Any] | None
    result: dict[str, Any] | None
    spec_sha256: str
    data_sha256: str
    parent_id: str | None
    from_checkpoint_id: str | None
    checkpoint_id: str | None
    run_s: float
    last_event: int
    allowed_actions: list[str]
    created_at: str
    queued_at: str | None
    started_at: str | None
    finished_at: str | None
    links: dict[str, str]


class Job(JobSummary):
    spec: dict[str, Any]
    spec_sent: dict[str, Any]
    resolved: dict[str, Any]
    key_id: str | None
    budget_tokens: int | None
    budget_worker_s: float | None
    usage: "UsageTotals"


class UsageTotals(TypedDict):
    """Sums of what was spent. The other sums include `wasted` (sampled_tokens, trained_tokens, worker_s)."""

    attempts: int
    tokens: int
    sampled_tokens: int
    trained_tokens: int
    worker_s: float
    phase_s: dict[str, float]
    wasted: dict[str, float]


class UsageGroup(UsageTotals):
    group: str | None


class Worker(TypedDict):
    """A worker as it last reported; without resource classes it answers loss requests."""

    id: str
    device: str
    resource_classes: list[str]
    draining: bool
    started_at: str
    last_seen_at: str
    memory: dict[str, int] | None
    job_ids: list[str]


class Waiting(TypedDict):
    jobs: int
    oldest_wait_s: float | None


class Queue(TypedDict):
    """The project's jobs by status, and the jobs of all projects that wait, by class of worker."""

    jobs: dict[str, int]
    waiting: dict[str, Waiting]


class Usage(TypedDict):
    object: Literal["usage"]
    project: str | None  # None: of all projects, grouped by project
    group_by: Literal["day", "job", "key", "project"]
    total: UsageTotals
    data: list[UsageGroup]


class Budget(TypedDict):
    object: Literal["budget"]
    project: str
    tokens: int | None
    worker_s: float | None
    since: str
    updated_at: str | None
    spent: UsageTotals


class Validation(TypedDict):
    """The result of a dry run: the spec with everything filled in, and sample rows with their grades."""

    spec: dict[str, Any]
    spec_sha256: str
    data_sha256: str
    estimates: dict[str, Any]
    samples: list[dict[str, Any]]
    warnings: list[str]


class Event(TypedDict):
    """One entry of a job's log; `seq` counts 1, 2, 3 ... without gaps."""

    object: Literal["event"]
    job_id: str
    seq: int
    type: str
    data: dict[str, Any]
    created_at: str


class Advice(TypedDict):
    """One thing that stands out in a job's curves."""

    rule: str
    severity: Literal["warning", "notice"]
    metric: str
    from_step: int
    to_step: int
    detail: str
    cause: str
    remedy: str


class OperationView(TypedDict):
    """An operation of a session. `result` is None while it waits, in lists, and once it has expired."""

    object: Literal["operation"]
    id: str
    session_id: str
    seq: int
    kind: str
    status: Literal["waiting", "done", "failed"]
    error: dict[str, Any] | None  # code, detail, category ("user" or "server")
    result: dict[str, Any] | None
    summary: dict[str, Any] | None  # in lists: metrics; checkpoint_id, name, step; how many answers and tokens
    attempt: int | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    expires_at: str | None


class OperationPage(Page[OperationView]):
    next_seq: int  # of the next operation that is to be sent
    waiting: int  # operations, in the whole session


class Series(TypedDict):
    """One curve as columns. min and max are there only if points were merged."""

    step: list[int]
    value: list[float | None]
    min: NotRequired[list[float | None]]
    max: NotRequired[list[float | None]]


class Metrics(TypedDict):
    object: Literal["metrics"]
    job_id: str
    series: dict[str, Series]


class Rollout(TypedDict):
    """A sampled group: one prompt, its answers (text, reward, scores, tokens, finish_reason)."""

    id: str
    split: Literal["train", "eval"]
    step: int
    group_index: int
    prompt: str
    reference: str | None
    samples: list[dict[str, Any]]


class Checkpoint(TypedDict):
    id: str
    object: Literal["checkpoint"]
    job_id: str | None
    step: int
    adapter: Literal["lora", "full"]
    model: dict[str, Any]
    size_bytes: int
    metrics: dict[str, float | None]
    is_final: bool
    created_at: str
    pinned_at: str | None
    expires_at: str | None
    aliases: list[str]


class Alias(TypedDict):
    """A name that points at a checkpoint; `previous_id` is what a rollback promotes."""

    id: str  # MODEL@ALIAS
    object: Literal["alias"]
    checkpoint_id: str
    job_id: str | None
    step: int
    previous_id: str | None
    version: int
    note: str | None
    changed_at: str
    changed_by: str | None
    created_at: str


class AliasChange(TypedDict):
    id: str
    object: Literal["alias.change"]
    alias: str
    seq: int
    action: Literal["promote", "rollback", "delete"]
    from_checkpoint_id: str | None
    checkpoint_id: str | None
    note: str | None
    key_id: str
    key_name: str | None
    created_at: str


class Dataset(TypedDict):
    id: str
    object: Literal["dataset"]
    name: str
    rows: int
    columns: dict[str, Any]
    sha256: str
    size_bytes: int
    created_at: str


class Model(TypedDict):
    """What can be sampled. Write the id of a base as model.source, that of a checkpoint or alias as model.from_checkpoint."""

    id: str
    object: Literal["model"]
    kind: Literal["builtin", "folder", "checkpoint", "alias"]
    root: str | None  # of an alias: the checkpoint that it points at now
    description: str
    config: dict[str, Any]
    size_bytes: int | None


Scope = Literal["read", "write", "admin"]


class KeyRate(TypedDict):
    requests_per_s: float
    burst: int


class Key(TypedDict):
    id: str
    object: Literal["key"]
    project: str
    name: str
    ends_with: str
    scopes: list[Scope]
    rate: KeyRate | None
    created_at: str
    expires_at: str | None
    last_used_at: str | None


class NewKey(Key):
    key: str  # the text itself, shown this once


class AuditEntry(TypedDict):
    id: str
    object: Literal["audit.entry"]
    key_id: str
    key_name: str | None
    action: str  # method and route
    object_id: str | None
    status: int
    request_id: str
    created_at: str


class Webhook(TypedDict):
    id: str
    object: Literal["webhook"]
    url: str
    description: str
    events: list[str]
    enabled: bool
    disabled_at: str | None
    disabled_reason: str | None
    failing_since: str | None
    previous_secret_until: str | None
    created_at: str


class NewWebhook(Webhook):
    secret: str  # whsec_..., shown this once


class Delivery(TypedDict):
    id: str  # the header webhook-id
    object: Literal["webhook.delivery"]
    webhook_id: str
    type: str
    job_id: str | None
    status: Literal["waiting", "delivered", "failed"]
    attempts: int
    response_status: int | None
    error: str | None
    next_try_at: str | None
    last_tried_at: str | None
    created_at: str
    delivered_at: str | None
    body: NotRequired[str]  # not in lists


class Losses(TypedDict):
    """One entry per item: index, status "ok" with loss, metrics and what its `return` named, or "error" with error."""

    object: Literal["list"]
    data: list[dict[str, Any]]
