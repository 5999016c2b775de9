"""Endless requests that schemathesis derives from an OpenAPI schema, one JSON object a line.

    schemathesis' python tests/server/proof/schema_requests.py SEED < openapi.json

Half of those for an endpoint fit the schema, half break it where they can. Imports nothing of the
project: it runs where schemathesis is installed.
"""

import base64
import json
import sys
from typing import Any

NUM_OF_A_KIND = 10
"""Requests of one endpoint in a row."""


def main() -> None:
    import requests
    import schemathesis  # pyright: ignore[reportMissingImports]
    from hypothesis import HealthCheck, Phase, errors, given, seed, settings
    from schemathesis import GenerationMode  # pyright: ignore[reportMissingImports]

    schema = schemathesis.openapi.from_dict(json.load(sys.stdin))
    operations = [result.ok() for result in schema.get_all_operations()]
    quiet = settings(
        max_examples=NUM_OF_A_KIND,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    )
    base = int(sys.argv[1])
    hopeless: set[Any] = set()
    while True:
        base += 1
        for mode in (GenerationMode.NEGATIVE, GenerationMode.POSITIVE):
            for operation in operations:
                if (operation.label, mode) in hopeless:
                    continue

                @seed(base)
                @quiet
                @given(operation.as_strategy(generation_mode=mode))
                def write(case: Any) -> None:
                    given = case.as_transport_kwargs(base_url="http://127.0.0.1")
                    try:
                        request = requests.Request(**given).prepare()
                    except (ValueError, requests.RequestException):
                        return  # no HTTP client could send it
                    body: Any = request.body or b""
                    body = body.encode() if isinstance(body, str) else body
                    line = {
                        "method": request.method,
                        "target": request.path_url,
                        "headers": list(request.headers.items()),
                        "body": base64.b64encode(body).decode(),
                    }
                    print(json.dumps(line))

                try:
                    write()
                except errors.Unsatisfiable:  # nothing in this endpoint's schema can be broken
                    hopeless.add((operation.label, mode))


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.stderr.close()
