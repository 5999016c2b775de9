"""Stores by URL: `s3://bucket/prefix?max_bytes=1TiB&ttl=7d` becomes a `Store`, or a worker of one.

    file://                                     packed local disk
    memory://  s3://  gs://  objects+file://    one object per record
    valkey://  valkeys://  redis://  rediss://  a key-value server (with s: TLS)
    fault+<any of these>                        the same, but faulty, for tests
    <scheme of an entry point>                  somebody else's

Knows which options each kind has and what they mean; the stores know only their values.
"""

import os
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from urllib.parse import unquote, urlsplit, urlunsplit

from jaxserve.errors import ConfigError, StoreError
from jaxserve.kv.policy.factory import check_policy
from jaxserve.kv.stores.base import Store
from jaxserve.kv.stores.faults import FaultPlan, FaultyStore
from jaxserve.kv.stores.limits import WorkerLimits
from jaxserve.kv.stores.objects import ObjectOptions, ObjectStore
from jaxserve.kv.stores.options import as_bytes, as_choice, as_count, as_seconds, parse_options
from jaxserve.kv.stores.tensorstores import DriverOptions, open_driver
from jaxserve.kv.stores.worker import StoreWorker

ENTRY_POINTS = "jaxserve.kv_stores"
"""Group of third-party stores: name is the scheme, value a callable `(StoreAddress) -> Store`."""

Parse = Callable[[str, str], object]


def _threads(name: str, text: str) -> int:
    return as_count(name, text, 1, 64)


def _share(name: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"{name} is {text!r:.60}; expected a share from 0 to 1.")
    return share


def _flag(name: str, text: str) -> bool:
    return as_choice(name, text, ("true", "false")) == "true"


def _text(name: str, text: str) -> str:
    return text


def _patience(name: str, text: str) -> float:
    seconds = as_seconds(name, text)
    if not seconds:
        raise ConfigError(f"{name} is {text!r:.60}; expected a duration above 0, such as 0.5s.")
    return seconds


def _web_address(name: str, text: str) -> str:
    parts = urlsplit(text)
    if text and (parts.scheme not in ("http", "https") or not parts.netloc):
        raise ConfigError(f"{name} is {text!r:.100}; expected e.g. http://host:port")
    return text


def _readable(name: str, text: str) -> str:
    try:
        with open(text, "rb"):
            return text
    except OSError as error:
        raise ConfigError(
            f"{name} is {text!r:.200}, which cannot be read ({error.strerror}); expected a PEM file"
        ) from error


def _policy(name: str, text: str) -> str:
    return check_policy(text)


_WORKER: dict[str, tuple[str, Parse]] = {
    "load_threads": ("num_load_threads", _threads),
    "write_threads": ("num_write_threads", _threads),
    "queue_bytes": ("max_queued_write_bytes", as_bytes),
    "scratch_bytes": ("scratch_bytes", as_bytes),
    "probe_timeout": ("probe_timeout_s", _patience),
    "get_timeout": ("get_timeout_s", _patience),
    "put_timeout": ("put_timeout_s", _patience),
}
_RECORDS: dict[str, tuple[str, Parse]] = {
    "max_bytes": ("max_bytes", as_bytes),
    "policy": ("policy", _policy),
    "ttl": ("ttl_s", as_seconds),
    "timeout": ("timeout_s", _patience),
    "refresh": ("refresh_s", as_seconds),
}
_BUCKET: dict[str, tuple[str, Parse]] = {
    "retries": ("retries", lambda name, text: as_count(name, text, 1, 32)),
    "concurrency": ("concurrency", lambda name, text: as_count(name, text, 1, 1024)),
}
_S3: dict[str, tuple[str, Parse]] = _BUCKET | {
    "endpoint": ("endpoint", _web_address),
    "region": ("region", _text),
    "profile": ("profile", _text),
    "anonymous": ("anonymous", _flag),
}
_VALKEY: dict[str, tuple[str, Parse]] = {
    **{key: _RECORDS[key] for key in ("max_bytes", "policy", "ttl", "timeout")},
    "connect_timeout": ("connect_timeout_s", _patience),
    "connections": ("connections", _threads),
    "prefix": ("prefix", _text),
    "password_env": ("password_env", _text),
}
_TLS: dict[str, tuple[str, Parse]] = {
    "ca_file": ("ca_file", _readable),
    "cert_file": ("cert_file", _readable),
    "key_file": ("key_file", _readable),
}
_FAULTS: dict[str, tuple[str, Parse]] = {
    "latency": ("latency_s", as_seconds),
    "bandwidth": ("bytes_per_s", as_bytes),
    "error_rate": ("error_rate", _share),
    "hang": ("hang", _flag),
    "flap": ("flap_s", as_seconds),
    "corrupt": ("corrupt_rate", _share),
    "seed": ("seed", lambda name, text: as_count(name, text, 0, 2**31)),
}
_DRIVERS: dict[str, tuple[str, dict[str, tuple[str, Parse]]]] = {
    "memory": ("memory", {}),
    "s3": ("s3", _S3),
    "gs": ("gcs", _BUCKET),
    "objects+file": ("file", {"sync": ("sync", _flag)}),
}


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """A URL taken apart.

    Attributes:
        scheme: lower case.
        url: without the options that are the worker's.
        shown: the URL as it may be logged: without a password.
        name: of the store: option `name`, else the scheme's.
        limits: of its worker.
        clock: seconds since the epoch.
    """

    scheme: str
    url: str
    shown: str
    name: str
    limits: WorkerLimits = field(repr=False)
    clock: Callable[[], float] = field(default=time.time, repr=False)

    def options(self, valid: Mapping[str, tuple[str, Parse]]) -> dict[str, object]:
        """The values of the options that were given, by the names that the table gives them.

        Raises:
            ConfigError: an unknown option (with the valid ones), or a value that cannot be.
        """
        everything = [*valid, *_WORKER, "name"]
        query = urlsplit(self.url).query
        shown = urlunsplit(urlsplit(self.shown)._replace(query=query))
        given = parse_options(shown, everything)
        return {valid[key][0]: valid[key][1](key, text) for key, text in given.items()}


def parse_address(url: str, clock: Callable[[], float] = time.time) -> StoreAddress:
    """Take a store's URL apart, as far as all kinds have it in common.

    Raises:
        ConfigError: no URL, an unknown scheme (with the valid ones), or a bad common option.
    """
    if not url.isprintable():
        raise ConfigError(f"KV store {url!r:.100} has characters that no URL has")
    scheme, colon, _ = url.partition("://")
    scheme = scheme.lower()
    if not colon:
        raise ConfigError(
            f"KV store {url!r:.100} is no URL; expected e.g. file:///var/cache/jaxserve"
            f"?max_bytes=100GiB or one of {', '.join(schemes())}"
        )
    innermost = scheme.removeprefix("fault+")
    inside = innermost.removeprefix("ocdbt+")
    if inside != innermost:
        raise ConfigError(
            f"KV store scheme {innermost!r:.60} is refused: OCDBT keeps what is deleted, so "
            f"neither a bound nor an erasure would hold. Use {inside!r:.60}: file:// packs blocks, "
            f"s3:// and gs:// keep one object for each"
        )
    if innermost not in schemes():
        raise ConfigError(
            f"unknown KV store scheme {innermost!r:.60}; expected one of {', '.join(schemes())}"
        )
    parts = urlsplit(url)
    pairs = [pair for pair in parts.query.split("&") if pair]
    ours = [pair for pair in pairs if pair.partition("=")[0] in (*_WORKER, "name")]
    theirs = [pair for pair in pairs if pair not in ours]
    given = parse_options("?" + "&".join(ours), [*_WORKER, "name"])
    name = given.pop("name", "") or _NAMES.get(innermost, innermost)
    values = {_WORKER[key][0]: _WORKER[key][1](key, text) for key, text in given.items()}
    latency_s, bytes_per_s = _PRIORS.get(innermost, _PRIORS["s3"])
    prior = WorkerLimits(prior_latency_s=latency_s, prior_bytes_per_s=bytes_per_s)
    limits = replace(prior, **values)  # pyright: ignore[reportArgumentType]
    userinfo, at, host = parts.netloc.rpartition("@")
    is_secret = at and ":" in userinfo
    return StoreAddress(
        scheme=scheme,
        url=urlunsplit(parts._replace(query="&".join(theirs))),
        shown=url.replace(parts.netloc, f"***@{host}", 1) if is_secret else url,
        name=name,
        limits=limits,
        clock=clock,
    )


def open_store(url: str, clock: Callable[[], float] = time.time) -> Store:
    """The store of a URL. A remote store that is down is opened all the same, and tried later.

    Raises:
        ConfigError: an unknown scheme or option (with the valid ones), or a bad value.
        StoreError: a local store that cannot be opened.
    """
    return _open(parse_address(url, clock))


def open_worker(url: str, clock: Callable[[], float] = time.time) -> StoreWorker:
    """The same behind a worker, whose limits are among the options of the URL."""
    address = parse_address(url, clock)
    return StoreWorker(_open(address), address.limits)


def schemes() -> list[str]:
    """All that are known, those of entry points included."""
    return sorted({*_OPENERS, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def _open(address: StoreAddress) -> Store:
    if address.scheme.startswith("fault+"):
        return _open_faulty(address)
    opener = _OPENERS.get(address.scheme)
    if opener is not None:
        return opener(address)
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == address.scheme:
            try:
                return point.load()(address)
            except (ConfigError, StoreError):
                raise
            except Exception as error:
                text = f"KV store {address.shown}: entry point {point.value} failed: {error}"
                raise ConfigError(text) from error
    raise ConfigError(f"KV store {address.shown} has no scheme that is known")


def _open_objects(address: StoreAddress) -> Store:
    driver, extra = _DRIVERS[address.scheme]
    values = address.options(_RECORDS | extra)
    records = {key: value for key, value in values.items() if key in ObjectOptions.__slots__}
    rest = {key: value for key, value in values.items() if key not in records}
    parts = urlsplit(address.url)
    bucket, path = unquote(parts.netloc), unquote(parts.path)
    if driver == "file":
        if bucket or not path.strip("/"):
            raise ConfigError(f"KV store {address.shown}: expected {address.scheme}:///folder")
        path = path.rstrip("/") + "/"
        _make_private(path, address)
    else:
        if not bucket and driver != "memory":
            raise ConfigError(f"KV store {address.shown}: expected {address.scheme}://bucket/path")
        path = path.strip("/") + "/" if path.strip("/") else ""
    defaults = {} if driver in ("s3", "gcs") else {"refresh_s": 0.0}
    return ObjectStore(
        address.name,
        lambda: open_driver(driver, bucket, path, DriverOptions(**rest)),  # pyright: ignore[reportArgumentType]
        ObjectOptions(**(defaults | records)),  # pyright: ignore[reportArgumentType]
        address.clock,
    )


def _make_private(folder: str, address: StoreAddress) -> None:
    """Make the folder, or see that nobody but its owner can enter it."""
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        mode = os.stat(folder).st_mode & 0o777
    except OSError as error:
        raise StoreError(f"KV store {address.shown} cannot be made: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(
            f"Others than its owner may use the folder of KV store {address.shown}; expected a "
            f"folder of its own with mode 0700: name a new one or, if nothing else uses this one, "
            f"`chmod 700 {folder}`."
        )


def _open_disk(address: StoreAddress) -> Store:
    from jaxserve.kv.stores.disk import DiskStore

    return DiskStore.from_url(address.url, address.name, address.clock)


def _open_valkey(address: StoreAddress) -> Store:
    from jaxserve.kv.stores.valkey import ValkeyOptions, ValkeyStore

    is_tls = address.scheme in ("valkeys", "rediss")
    values = address.options(_VALKEY | _TLS if is_tls else _VALKEY)
    parts = urlsplit(address.url)
    try:
        port, db = parts.port, parts.path.strip("/")
    except ValueError:
        port, db = -1, ""
    if not parts.hostname or port == -1 or not (db or "0").isdigit():
        raise ConfigError(
            f"KV store {address.shown}: expected {address.scheme}://host:port/database number"
        )
    _check_certificates(address, values)
    password = unquote(parts.password or "")
    variable = values.pop("password_env", None)
    if variable is not None:
        password = os.environ.get(str(variable), "")
        if not password:
            raise ConfigError(
                f"KV store {address.shown}: environment variable {variable} is not set"
            )
    options = ValkeyOptions(
        host=parts.hostname,
        port=port or 6379,
        db=int(db or "0"),
        username=unquote(parts.username or ""),
        password=password,
        tls=is_tls,
        **values,  # pyright: ignore[reportArgumentType]
    )
    return ValkeyStore(address.name, options, address.clock)


def _check_certificates(address: StoreAddress, values: Mapping[str, object]) -> None:
    """See now, not at the first connection, whether the files hold what they should."""
    ca, cert, key = (str(values.get(name, "")) for name in ("ca_file", "cert_file", "key_file"))
    if key and not cert:
        raise ConfigError(f"KV store {address.shown}: key_file is of no use without cert_file")
    try:
        context = ssl.create_default_context(cafile=ca or None)
        if cert:
            context.load_cert_chain(cert, key or None)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"KV store {address.shown}: its certificate or key files cannot be used ({error}); "
            f"expected PEM files"
        ) from error


def _open_faulty(address: StoreAddress) -> Store:
    parts = urlsplit(address.url)
    pairs = [pair for pair in parts.query.split("&") if pair]
    ours = [pair for pair in pairs if pair.partition("=")[0] in _FAULTS]
    rest = "&".join(pair for pair in pairs if pair not in ours)
    given = parse_options("?" + "&".join(ours), list(_FAULTS))
    values = {_FAULTS[key][0]: _FAULTS[key][1](key, text) for key, text in given.items()}
    scheme = address.scheme.removeprefix("fault+")
    url = urlunsplit(parts._replace(scheme=scheme, query=rest))
    inner = _open(replace(address, scheme=scheme, url=url))
    return FaultyStore(inner, FaultPlan(**values))  # pyright: ignore[reportArgumentType]


_NAMES = {
    "file": "disk",
    "objects+file": "files",
    **dict.fromkeys(("valkeys", "redis", "rediss"), "valkey"),
}
_PRIORS = {  # latency in seconds, bytes per second; until measured
    "file": (0.001, 1e9),
    "objects+file": (0.001, 1e9),
    "memory": (0.0002, 4e9),
    "valkey": (0.001, 5e8),
    **dict.fromkeys(("valkeys", "redis", "rediss"), (0.001, 5e8)),
    "s3": (0.03, 2e8),
}
_OPENERS: dict[str, Callable[[StoreAddress], Store]] = {
    "file": _open_disk,
    **dict.fromkeys(_DRIVERS, _open_objects),
    **dict.fromkeys(("valkey", "valkeys", "redis", "rediss"), _open_valkey),
}
