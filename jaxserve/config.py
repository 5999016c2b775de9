"""Every setting of jaxserve, with its default, unit and help text, written once.

The tree is frozen and is checked as a whole when it is built. Command-line flags, environment
variables, YAML keys and docs/configuration.md derive from the fields (see `cli`). Values that say
"auto" are None here; `Engine` resolves them into a new config, which it logs.

Knows nothing of jax, devices or checkpoints.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from jaxserve.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
POLICIES = ("fcfs", "priority")
ATTENTION_BACKENDS = ("auto", "mosaic_gpu", "triton", "tpu", "cpu_native", "reference")
OFFLOAD_MODES = ("auto", "eager", "lazy")
LOAD_MODES = ("auto", "load", "recompute")
LOAD_FORMATS = ("auto", "dummy")
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
PLATFORMS = ("auto", "cpu", "gpu", "tpu")


def setting(default: Any, help: str, *, choices: tuple[str, ...] = ()) -> Any:
    """A config field: `help` is the text of the flag and of the docs, `choices` are enforced."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, slots=True)
class ModelConfig:
    model: str | None = setting(
        None, "checkpoint folder or Hugging Face hub name; none means the embedded model"
    )
    revision: str | None = setting(None, "hub revision (branch, tag or commit)")
    served_model_name: str | None = setting(None, "name in the API; default: the model's own")
    dtype: str = setting("auto", "compute dtype; auto is the checkpoint's", choices=DTYPES)
    load_format: str = setting(
        "auto",
        "auto reads the checkpoint; dummy makes random weights of its shape, to measure with",
        choices=LOAD_FORMATS,
    )
    max_model_len: int | None = setting(
        None, "longest prompt plus answer, in tokens; default: the checkpoint's, if it fits"
    )
    tool_call_parser: str = setting(
        "auto", "how replies write tool calls, such as hermes; auto: as the chat template shows"
    )
    reasoning_parser: str = setting(
        "auto", "how replies mark reasoning, such as qwen3; none: not; auto: as the template shows"
    )


@dataclass(frozen=True, slots=True)
class CacheConfig:
    page_size: int = setting(16, "tokens per KV page")
    kv_bytes: int | None = setting(
        None, "bytes of device memory for KV pages; default: measured from what is free"
    )
    num_pages: int | None = setting(None, "KV pages per group; overrides kv-bytes")
    enable_prefix_caching: bool = setting(True, "reuse the KV of equal prompt prefixes")
    kv_host_bytes: int = setting(
        0,
        "bytes of host memory for KV blocks that leave the device, such as 8GiB; 0: no host tier, "
        "or 256MiB to pass through if there are stores",
    )
    kv_host_policy: str = setting(
        "auto", "which block leaves the full host tier: auto, lru, arc, s3fifo, tinylfu"
    )
    kv_store: str | None = setting(
        None,
        "URLs of the stores behind the host tier, nearest first, separated by blanks, such as "
        "'file:///var/cache/jaxserve?max_bytes=100GiB s3://bucket/kv'",
    )
    kv_ttl: str | None = setting(
        None, "how long stored blocks may live, such as 7d; default: for ever"
    )
    kv_encrypt: bool = setting(
        False, "encrypt stored blocks (AES-256-GCM, a key per tenant) with the master key"
    )
    kv_key_file: str | None = setting(
        None, "file of the master key, mode 0600; default: the environment's JAXSERVE_KV_KEY"
    )
    kv_key_folder: str | None = setting(
        None, "folder of the tenants' wrapped keys; default: under the user's cache folder"
    )
    kv_offload: str = setting(
        "auto",
        "save blocks when they are complete (eager) or when they lose their page (lazy); auto: "
        "eager if there is a store",
        choices=OFFLOAD_MODES,
    )
    kv_load: str = setting(
        "auto",
        "load blocks from lower tiers or recompute them: auto decides by measured costs",
        choices=LOAD_MODES,
    )


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_num_seqs: int = setting(64, "most sequences that run at once")
    max_num_batched_tokens: int = setting(2048, "most tokens computed in one step")
    policy: str = setting("fcfs", "who runs first", choices=POLICIES)
    max_num_waiting: int = setting(1024, "most requests that wait; more are refused")


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    tensor_parallel_size: int = setting(1, "devices that share each layer")


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    seed: int = setting(0, "seeds requests that bring none")
    compile_cache_dir: str | None = setting(
        None, "persistent compile cache; default: under the user's cache folder; '' turns it off"
    )
    warmup: bool = setting(True, "compile every graph before serving")
    attention_backend: str = setting(
        "auto",
        "attention kernels to try first; what they cannot do goes to the next ones",
        choices=ATTENTION_BACKENDS,
    )
    native_cpu: bool = setting(
        True, "on CPU, compile C++ kernels for decode at first use, if there is a compiler"
    )


@dataclass(frozen=True, slots=True)
class ServerConfig:
    host: str = setting("127.0.0.1", "address to listen on; a public one needs an API key")
    port: int = setting(8000, "port to listen on; 0 picks a free one")
    api_key: str | None = setting(
        None, "key that clients must send as a bearer token; several are separated by commas"
    )
    api_key_file: str | None = setting(None, "file of API keys, one a line; beside api-key")
    admin_key: str | None = setting(
        None, "another key, for /admin routes (`jaxserve kv`); without it there are none"
    )
    max_stored_responses: int = setting(
        1000, "answers of /v1/responses that can be asked for again; at most 64 MiB; 0: none"
    )
    allowed_origins: str | None = setting(
        None,
        "web pages that may ask from a browser (CORS), such as 'https://chat.example.com', "
        "separated by commas; '*' is all; default: none",
    )
    engine_process: bool = setting(
        True, "run the engine in a process of its own, so that serving does not slow its steps"
    )
    request_timeout_s: float = setting(3600.0, "longest time for one request, queue included")
    log_format: str = setting("text", "lines for people, or JSON objects", choices=LOG_FORMATS)
    log_level: str = setting(
        "warning", "what is logged; info has a line for each request", choices=LOG_LEVELS
    )
    slow_request_s: float = setting(
        60.0,
        "requests that take longer are logged, with the time queued, prefilling, decoding",
    )
    otlp_endpoint: str | None = setting(
        None,
        "where traces go, such as http://127.0.0.1:4318: OTLP over HTTP; needs jaxserve[traces]",
    )
    drain_timeout_s: float = setting(
        30.0, "how long running requests may go on after SIGTERM; a second signal ends them at once"
    )


@dataclass(frozen=True, slots=True)
class Config:
    """All settings; raises ConfigError if they cannot work together."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    parallel: ParallelConfig = ParallelConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    server: ServerConfig = ServerConfig()

    def __post_init__(self) -> None:
        for section in fields(self):
            _check_choices(section.name, getattr(self, section.name))
        _at_least(1, cache=self.cache, names=("page_size", "kv_bytes", "num_pages"))
        _at_least(0, cache=self.cache, names=("kv_host_bytes",))
        _at_least(1, model=self.model, names=("max_model_len",))
        _at_least(1, scheduler=self.scheduler, names=("max_num_seqs", "max_num_batched_tokens"))
        _at_least(0, scheduler=self.scheduler, names=("max_num_waiting",))
        _at_least(1, parallel=self.parallel, names=("tensor_parallel_size",))
        _at_least(0, server=self.server, names=("port", "max_stored_responses"))
        if self.scheduler.max_num_batched_tokens < self.scheduler.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.scheduler.max_num_batched_tokens}, less than "
                f"max_num_seqs ({self.scheduler.max_num_seqs}): each running sequence needs one "
                "token a step; raise the first or lower the second"
            )
        if self.server.admin_key is not None and self.server.admin_key == self.server.api_key:
            raise ConfigError(
                "admin_key equals api_key: clients could clear and erase the KV cache; make it "
                "another one, for instance with `openssl rand -hex 32`"
            )
        for name in ("request_timeout_s", "drain_timeout_s", "slow_request_s"):
            if not 0 <= getattr(self.server, name) < 1e9:
                raise ConfigError(
                    f"server.{name} is {getattr(self.server, name)}; expected seconds from 0 on"
                )
        if "" in (self.server.admin_key, self.server.api_key):
            raise ConfigError("an API key or admin key is empty; leave it out, or give a real one")
        has_key = self.server.api_key or self.server.api_key_file
        if not _is_loopback(self.server.host) and not has_key:
            raise ConfigError(
                f"host {self.server.host!r} can be reached from other machines: set an API key "
                "(--api-key, --api-key-file or JAXSERVE_API_KEY), or listen on 127.0.0.1"
            )


def _check_choices(section: str, values: Any) -> None:
    for spec in fields(values):
        choices, value = spec.metadata["choices"], getattr(values, spec.name)
        if choices and value not in choices:
            raise ConfigError(
                f"{section}.{spec.name} is {value!r}; expected one of {', '.join(choices)}"
            )


def _at_least(low: int, *, names: tuple[str, ...], **section: Any) -> None:
    ((section_name, values),) = section.items()
    for name in names:
        value = getattr(values, name)
        if value is not None and value < low:
            raise ConfigError(f"{section_name}.{name} is {value}; expected at least {low}")


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
