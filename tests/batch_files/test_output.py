import json
from pathlib import Path

import pytest

from jaxserve.batch_files.lines import BatchLine
from jaxserve.batch_files.output import BatchOutput, answered, refused
from jaxserve.errors import ConfigError

LINES = [BatchLine(n, f"id-{n}", "/v1/completions", {}) for n in range(1, 4)]


def fill(path: Path) -> None:
    output = BatchOutput(path)
    output.append([answered(LINES[0], 200, "r", {"ok": 1}), answered(LINES[1], 400, "r", {})])
    output.append([refused(BatchLine(9, None, problem="no id"))])
    output.close()


def test_what_is_complete_is_done_when_the_file_is_opened_again(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    fill(path)
    output = BatchOutput(path)
    assert output.done == {"id id-1", "id id-2", "line 9"} and output.num_failed == 2
    output.close()


@pytest.mark.parametrize("keep", [1, 10, 60, -1])
def test_a_line_that_was_cut_short_is_removed_and_done_again(tmp_path: Path, keep: int):
    path = tmp_path / "out.jsonl"
    fill(path)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(whole[:last] + whole[last:][:keep])
    output = BatchOutput(path)
    assert output.done == {"id id-1", "id id-2"}
    output.append([answered(LINES[2], 200, "r", {})])
    output.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["custom_id"] for record in records] == ["id-1", "id-2", "id-3"]


def test_failed_lines_can_be_taken_out_to_be_done_again(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    fill(path)
    output = BatchOutput(path, retry_failed=True)
    assert output.done == {"id id-1"} and output.num_failed == 0
    output.append([answered(LINES[1], 200, "r", {})])
    output.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["custom_id"] for record in records] == ["id-1", "id-2"]
    assert not list(tmp_path.glob(".*"))


def test_two_runs_cannot_write_one_file(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    first = BatchOutput(path)
    with pytest.raises(ConfigError, match="in use by another run"):
        BatchOutput(path)
    first.close()
    BatchOutput(path).close()


def test_a_file_that_is_something_else_is_left_as_it_is(tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes\nand more\n")
    with pytest.raises(ConfigError, match="not the output of a batch"):
        BatchOutput(path)
    assert path.read_text() == "my notes\nand more\n"
