"""The operator's settings: environment variables with the prefix RATCHET_, all defined here and read once."""

import re
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

# Headers that callers set themselves.
NOT_FOR_SSO = frozenset({"authorization", "x-api-key", "cookie", "host", "origin", "user-agent", "idempotency-key"})
# Values from examples and tutorials, which production refuses as secrets.
WELL_KNOWN_SECRETS = frozenset({"", "ratchet", "postgres", "password", "changeme", "change-me", "secret", "admin"})

BUCKETS = ("s3", "gs", "az")
DATABASES = re.compile(r"(postgresql|sqlite)(\+\w+)?://.")


class Settings(BaseSettings):
    """All settings. Durations end in _s, sizes in _bytes."""

    model_config = SettingsConfigDict(
        env_prefix="RATCHET_",
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,  # it may be a secret
    )

    environment: Annotated[
        Literal["development", "production"],
        Field(description="development accepts well-known secrets; production refuses to start"),
    ] = "production"
    data_dir: Annotated[Path, Field(description="datasets, checkpoints, the embedded store: everything that is a file")] = Path(
        ".ratchet"
    )
    blob_url: Annotated[
        str | None,
        Field(description="a bucket for datasets and checkpoints: s3://bucket/prefix, gs:// or az://; data_dir is its cache"),
    ] = None
    database_url: Annotated[SecretStr | None, Field(description="SQLAlchemy URL; default: SQLite in data_dir")] = None
    redis_url: Annotated[
        SecretStr, Field(description="redis://, rediss:// (TLS) or redis+socket:// (unix) URL of the doorbell")
    ] = SecretStr("redis://127.0.0.1:6379/0")
    bootstrap_key: Annotated[
        SecretStr | None,
        Field(description="an API key (tml-...) for the project `default`, created at start when it is missing"),
    ] = None
    models_dir: Annotated[
        Path | None, Field(description="its folders are listed under /v1/models; default: data_dir/models")
    ] = None

    any_model_folder: Annotated[
        bool,
        Field(description="model.source may name any folder of the machine, not only those in models_dir; development: always"),
    ] = False

    host: Annotated[str, Field(description="address the API listens on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="port the API listens on")] = 8000
    max_body_bytes: Annotated[int, Field(ge=1024, description="largest body of a JSON or YAML request")] = 16 * 2**20
    max_dataset_bytes: Annotated[int, Field(ge=1024, description="largest accepted dataset upload")] = 2 * 2**30
    max_loss_body_bytes: Annotated[int, Field(ge=1024, description="largest body of a loss request")] = 64 * 2**20
    max_waiting_loss_bytes: Annotated[
        int, Field(ge=1024, description="loss requests and answers that Redis may hold; beyond that new ones get 429")
    ] = 256 * 2**20
    loss_time_limit_s: Annotated[float, Field(gt=0, description="a loss request without an answer is given up after this")] = (
        60.0
    )
    loss_result_ttl_s: Annotated[float, Field(ge=1, description="how long the answer of a loss request can be fetched")] = 300.0

    key_requests_per_s: Annotated[
        float, Field(ge=0, description="requests a second of one API key, unless it has a rate of its own; 0: no limit")
    ] = 1000.0
    key_burst: Annotated[int, Field(ge=1, description="requests that one API key may make at once")] = 2000

    key_open_streams: Annotated[
        int, Field(ge=1, description="event streams and long polls that one API key may hold open in one process")
    ] = 256

    key_requests_at_once: Annotated[
        int,
        Field(ge=1, description="requests of one API key that one process works on at once; others of the key wait in line"),
    ] = 16

    lease_ttl_s: Annotated[float, Field(gt=0, description="after so long without renewal a job is lost to its worker")] = 60.0
    lease_renew_s: Annotated[float, Field(gt=0, description="how often a worker renews")] = 10.0
    lease_self_stop_s: Annotated[float, Field(gt=0, description="a worker that could not renew for this long stops")] = 45.0
    reconcile_every_s: Annotated[float, Field(gt=0, description="how often the reconciler looks")] = 10.0
    ring_again_s: Annotated[float, Field(gt=0, description="a queued job is rung again after this long")] = 30.0
    drain_grace_s: Annotated[
        float,
        Field(ge=0, description="a stopping worker has this long to finish a checkpoint that is under way and to save its job"),
    ] = 60.0

    max_waiting_operations: Annotated[
        int, Field(ge=1, description="operations that may wait in one session or sampler; beyond that new ones get 429")
    ] = 4096
    max_waiting_operation_bytes: Annotated[
        int, Field(ge=1024, description="bytes of operations that may wait in one session or sampler; then new ones get 429")
    ] = 512 * 2**20
    operation_answer_ttl_s: Annotated[float, Field(ge=1, description="how long the answer of an operation can be fetched")] = (
        3600.0
    )
    session_idle_s: Annotated[
        float, Field(gt=0, description="a session without operations for so long is saved and leaves its worker")
    ] = 300.0
    tinker_silence_s: Annotated[
        float, Field(gt=0, description="a Tinker client without a heartbeat or an operation for so long counts as gone")
    ] = 60.0
    session_slice_s: Annotated[
        float, Field(gt=0, description="sessions hold a worker for at most so long while other work waits for it")
    ] = 60.0

    grader_secrets: Annotated[
        dict[str, SecretStr], Field(description="JSON object name -> secret, for http graders that name one to sign with")
    ] = Field(default_factory=dict)
    serves: Annotated[
        Literal["all", "training", "losses"], Field(description="what a worker does: train jobs, answer loss requests, or both")
    ] = "all"
    grader_networks: Annotated[
        tuple[IPv4Network | IPv6Network, ...],
        NoDecode,
        Field(description="networks, with commas between, that http graders may reach beside public addresses"),
    ] = ()
    rollout_networks: Annotated[
        tuple[IPv4Network | IPv6Network, ...],
        NoDecode,
        Field(description="networks, with commas between, in which vLLM servers may stand beside public addresses"),
    ] = ()
    rollout_keys: Annotated[
        dict[str, SecretStr],
        Field(description="JSON object: a vLLM server's root URL -> its API key, which is sent to that server alone"),
    ] = Field(default_factory=dict)
    rollout_adapters_dir: Annotated[
        Path | None, Field(description="the folder, shared with vLLM servers, into which workers write adapters for them")
    ] = None
    rollout_adapters_seen_as: Annotated[
        str | None, Field(description="the path of that folder on the vLLM servers; default: the same")
    ] = None
    webhook_networks: Annotated[
        tuple[IPv4Network | IPv6Network, ...],
        NoDecode,
        Field(description="networks, with commas between, that webhooks may reach beside public addresses"),
    ] = ()
    webhook_disable_after_s: Annotated[
        float, Field(gt=0, description="a webhook that has only failed for so long is disabled")
    ] = 5 * 86_400.0
    torch_threads: Annotated[int, Field(ge=1, description="CPU threads of one worker; small models are fastest with one")] = 1
    warm_base_s: Annotated[
        float,
        Field(
            ge=0,
            description="how long an idle worker keeps the base of its last LoRA job, so that the next one of the same base "
            "loads no model; 0: not at all",
        ),
    ] = 600.0
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(description="where a worker trains")] = "auto"
    gpus_per_job: Annotated[
        int | None,
        Field(
            ge=1,
            le=64,
            description="how many GPUs one job may have of a worker's machine; without GPUs: processes. "
            "Default: all NVIDIA GPUs that the worker sees, and 1 without",
        ),
    ] = None
    strict_metrics: Annotated[
        bool, Field(description="a metric that no table names ends its job; else it is logged: for tests of the loops")
    ] = False
    log_format: Annotated[
        Literal["auto", "plain", "json"], Field(description="of log lines; auto: JSON in production, plain in development")
    ] = "auto"
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], Field(description="of our own loggers")] = "INFO"

    sso_header: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Za-z][A-Za-z0-9-]{0,63}$",
            description="the header in which a sign-on proxy names the user (X-Forwarded-User); unset: no such mode",
        ),
    ] = None
    sso_proxies: Annotated[
        tuple[IPv4Network | IPv6Network, ...],
        NoDecode,
        Field(description="networks, with commas between, from which that header is believed"),
    ] = ()
    sso_project: Annotated[
        str | None, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="the project of everybody who signs in by that proxy")
    ] = None
    sso_scope: Annotated[Literal["read", "write", "admin"], Field(description="the scope that they get in it")] = "read"

    @field_validator("grader_networks", "rollout_networks", "webhook_networks", "sso_proxies", mode="before")
    @classmethod
    def networks_stand_between_commas(cls, value: object) -> object:
        return [part for part in value.replace(",", " ").split() if part] if isinstance(value, str) else value

    @model_validator(mode="after")
    def sign_on_is_all_said(self) -> Self:
        """Nothing half done: a header that is believed from everywhere would let in everybody."""
        if (self.sso_header is None) != (not self.sso_proxies) or (self.sso_header is None) != (self.sso_project is None):
            raise ValueError("sso_header, sso_proxies and sso_project belong together: set all three, or none")
        if self.sso_header is not None and self.sso_header.lower() in NOT_FOR_SSO:
            raise ValueError(f"sso_header must not be {self.sso_header}, which callers set; X-Forwarded-User is usual")
        if wide := [str(network) for network in self.sso_proxies if network.prefixlen == 0]:
            raise ValueError(f"sso_proxies must name the proxy's own network, got {', '.join(wide)}, which is every address")
        return self

    @model_validator(mode="after")
    def lease_times_are_ordered(self) -> Self:
        if not self.lease_renew_s < self.lease_self_stop_s < self.lease_ttl_s:
            raise ValueError(
                f"lease_renew_s < lease_self_stop_s < lease_ttl_s must hold, "
                f"got {self.lease_renew_s}, {self.lease_self_stop_s}, {self.lease_ttl_s}"
            )
        return self

    @field_validator("database_url", mode="after")
    @classmethod
    def a_database_that_is_spoken_to(cls, value: SecretStr | None) -> SecretStr | None:
        """An empty one is refused, too: an operator who forgot to fill it in does not want SQLite."""
        if value is not None and not DATABASES.match(value.get_secret_value()):
            allowed = "postgresql+psycopg://USER:PASSWORD@HOST/NAME or sqlite:///FILE"
            raise ValueError(f"must be {allowed}; unset: SQLite in the data directory")
        return value

    @field_validator("blob_url", mode="after")
    @classmethod
    def a_bucket_without_a_key_in_it(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in BUCKETS or not parts.hostname:
            raise ValueError(f"RATCHET_BLOB_URL names a bucket: {', '.join(f'{scheme}://bucket/prefix' for scheme in BUCKETS)}")
        if parts.username is not None or parts.password is not None or parts.query:
            raise ValueError("RATCHET_BLOB_URL must hold no key: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the like")
        return value

    @field_validator("rollout_keys", mode="after")
    @classmethod
    def servers_without_a_slash_at_the_end(cls, value: dict[str, SecretStr]) -> dict[str, SecretStr]:
        return {url.rstrip("/"): key for url, key in value.items()}

    @property
    def takes_any_model_folder(self) -> bool:
        return self.any_model_folder or self.environment == "development"

    @property
    def sql_url(self) -> str:
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{(self.data_dir / 'ratchet.db').absolute()}"

    @property
    def blobs_dir(self) -> Path:
        return (self.data_dir / "blobs").absolute()

    @property
    def local_models_dir(self) -> Path:
        return (self.models_dir or self.data_dir / "models").absolute()


@lru_cache
def get_settings() -> Settings:
    return Settings()
