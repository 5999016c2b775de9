"""Opens tensorstore key-value stores for `ObjectStore`: which driver, where, how patient.

Credentials come from the environment and the usual files (AWS_ACCESS_KEY_ID, ~/.aws,
GOOGLE_APPLICATION_CREDENTIALS), never from a URL. Knows nothing of records.
"""

import os
from dataclasses import dataclass
from typing import Any

from jaxserve.kv.stores.objects import KeyValues


@dataclass(frozen=True, slots=True)
class DriverOptions:
    """Of the driver, beside bucket and path.

    Attributes:
        endpoint: base URL of an S3-compatible server; empty means AWS.
        region: of the bucket; empty lets the driver find out.
        profile: section of ~/.aws/credentials; empty means the environment's.
        anonymous: send no credentials.
        retries: how often a request is made again after an error that may pass.
        concurrency: requests at the same time.
        sync: whether the file driver waits for the disk at each write.
    """

    endpoint: str = ""
    region: str = ""
    profile: str = ""
    anonymous: bool = False
    retries: int = 2
    concurrency: int = 16
    sync: bool = False


def open_driver(driver: str, bucket: str, path: str, options: DriverOptions) -> KeyValues:
    """Open a store of tensorstore's; contacts nobody yet.

    Args:
        driver: `s3`, `gcs`, `file` or `memory`.
        bucket: for s3 and gcs.
        path: prefix of all keys; ends with a slash, or is empty.

    Raises:
        ValueError: as tensorstore does, if it cannot work.
    """
    import tensorstore as ts

    spec: dict[str, Any] = {"driver": driver, "path": path}
    if driver in ("s3", "gcs"):
        spec["bucket"] = bucket
    if driver == "s3":
        optional = {"endpoint": options.endpoint, "aws_region": options.region}
        spec |= {name: value for name, value in optional.items() if value}
        if options.anonymous:
            spec["aws_credentials"] = {"type": "anonymous"}
        elif options.profile:
            spec["aws_credentials"] = {"type": "profile", "profile": options.profile}
        elif "AWS_ACCESS_KEY_ID" in os.environ:  # else the driver looks everywhere, and says so
            spec["aws_credentials"] = {"type": "environment"}
    patience = {
        "max_retries": max(options.retries, 1),
        "initial_delay": "50ms",
        "max_delay": "1s",
    }
    context = {
        "s3_request_retries": patience,
        "gcs_request_retries": patience,
        "s3_request_concurrency": {"limit": options.concurrency},
        "gcs_request_concurrency": {"limit": options.concurrency},
        "file_io_sync": options.sync,
    }
    # A context of its own, so that two stores in memory are two.
    return ts.KvStore.open(spec, context=ts.Context(context)).result()
