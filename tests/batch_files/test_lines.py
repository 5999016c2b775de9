import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.batch_files.lines import read_lines

GOOD: dict[str, Any] = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"prompt": "x"},
}


def problems(tmp_path: Path, *lines: str) -> list[str]:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines))
    return [line.problem for line in read_lines(path)]


def test_good_lines_are_requests_and_empty_ones_are_none(tmp_path: Path):
    path = tmp_path / "in.jsonl"
    path.write_text(f"\n{json.dumps(GOOD)}\n\n{json.dumps({**GOOD, 'custom_id': 'b'})}")
    first, second = read_lines(path)
    assert (first.number, first.key, first.url) == (2, "id a", "/v1/completions")
    assert (second.number, second.key, second.body) == (4, "id b", {"prompt": "x"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"custom_id": None}, "custom_id is missing"),
        ({"custom_id": ""}, "custom_id is missing"),
        ({"custom_id": 7}, "custom_id is missing"),
        ({"method": "GET"}, "expected 'POST'"),
        ({"url": "/v1/completion"}, "did you mean /v1/completions"),
        ({"url": None}, "unknown url"),
        ({"body": []}, "body is missing"),
        ({"body": {"stream": True}}, "cannot be streamed"),
    ],
)
def test_what_is_wrong_with_a_line_is_told(tmp_path: Path, change: dict[str, Any], problem: str):
    (found,) = problems(tmp_path, json.dumps({**GOOD, **change}))
    assert problem in found


def test_lines_that_are_no_objects_and_ids_given_twice_are_told(tmp_path: Path):
    good = json.dumps(GOOD)
    found = problems(tmp_path, good, "{", "[]", good, '"x"')
    assert found[0] == "" and "not JSON" in found[1] and "not a JSON object" in found[2]
    assert "that of line 1, too" in found[3] and "not a JSON object" in found[4]
