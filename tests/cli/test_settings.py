from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import ConfigError
from jaxserve.settings import all_settings, config_from_keywords, load_settings


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path):
    path = write(tmp_path, "port: 1\nhost: 127.0.0.9\npage_size: 8\n")
    loaded = load_settings(
        {"port": 3, "host": None}, {"JAXSERVE_PORT": "2", "JAXSERVE_HOST": "127.0.0.2"}, path
    )
    config = loaded.config
    assert (config.server.port, config.server.host, config.cache.page_size) == (3, "127.0.0.2", 8)
    assert config.scheduler.max_num_seqs == 64
    assert loaded.origins["port"] == "--port" and loaded.origins["host"] == "JAXSERVE_HOST"
    assert loaded.origins["page_size"].endswith("config.yaml:3")


def test_file_keys_may_be_in_sections_or_flat_with_dashes(tmp_path: Path):
    path = write(tmp_path, "cache:\n  page-size: 4\nmax-num-seqs: 7\nmodel: some/model\n")
    config = load_settings({}, {}, path).config
    assert config.cache.page_size == 4
    assert config.scheduler.max_num_seqs == 7
    assert config.model.model == "some/model"


def test_the_environment_can_name_the_file(tmp_path: Path):
    path = write(tmp_path, "port: 9")
    assert load_settings({}, {"JAXSERVE_CONFIG": str(path)}).config.server.port == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pot: 1", "unknown key 'pot'; did you mean port"),
        ("server:\n  page_size: 1", "unknown key 'server.page_size'"),
        ("port: [1]", "expected an integer"),
        ("port: true", "expected an integer"),
        ("port: 1.5", "expected an integer"),
        ("warmup: 3", "expected true or false"),
        ("dtype: float8", "expected one of auto, float32"),
        ("- 1", "holds no keys"),
        ("a: [", "is not YAML"),
        ("server: 3", "unknown key 'server'"),
        ("port: 9\nserver:\n  # a comment\n  port: 3", "config.yaml:4: server.port is given twice"),
        ("cache:\n  page-size: x", "config.yaml:2: cache.page-size is 'x'"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError) as caught:
        load_settings({}, {}, write(tmp_path, text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load_settings({}, {}, tmp_path / "nowhere.yaml")


def test_an_unknown_environment_variable_is_refused():
    with pytest.raises(ConfigError, match="did you mean JAXSERVE_PAGE_SIZE"):
        load_settings({}, {"JAXSERVE_PAGE_SIZ": "3", "HOME": "/root"})


@pytest.mark.parametrize(
    ("text", "number"), [("4096", 4096), ("4KiB", 4096), ("1.5", None), ("2 GB", 2 * 10**9)]
)
def test_bytes_may_have_units(text: str, number: int | None):
    if number is None:
        with pytest.raises(ConfigError, match="4GiB"):
            load_settings({"kv_bytes": text})
    else:
        assert load_settings({"kv_bytes": text}).config.cache.kv_bytes == number


def test_auto_means_none_where_a_setting_can_be_resolved():
    config = load_settings({}, {"JAXSERVE_MAX_MODEL_LEN": "auto"}).config
    assert config.model.max_model_len is None


def test_keywords_are_the_field_names_and_ignore_the_environment(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("JAXSERVE_PAGE_SIZE", "8")
    assert config_from_keywords({"seed": 3}).cache.page_size == 16
    with pytest.raises(ConfigError, match="did you mean max_num_seqs"):
        config_from_keywords({"max_num_seq": 3})
    with pytest.raises(ConfigError, match="page_size is '16x'"):
        config_from_keywords({"page_size": "16x"})


def test_settings_that_exclude_each_other_are_refused():
    flags: dict[str, Any] = {"max_num_batched_tokens": 8, "max_num_seqs": 16}
    with pytest.raises(ConfigError, match="raise the first"):
        load_settings(flags)


def test_every_setting_has_help_and_a_flag_of_its_own():
    settings = all_settings()
    assert all(setting.help for setting in settings.values())
    assert len({setting.flag for setting in settings.values()}) == len(settings)


def test_what_kubernetes_says_about_a_service_called_jaxserve_is_no_setting():
    links = {
        "JAXSERVE_SERVICE_HOST": "10.0.0.7",
        "JAXSERVE_SERVICE_PORT": "80",
        "JAXSERVE_SERVICE_PORT_HTTP": "80",
        "JAXSERVE_PORT": "tcp://10.0.0.7:80",
        "JAXSERVE_PORT_80_TCP": "tcp://10.0.0.7:80",
        "JAXSERVE_PORT_80_TCP_ADDR": "10.0.0.7",
        "JAXSERVE_CANARY_SERVICE_HOST": "10.0.0.8",
    }
    assert load_settings({}, links).config.server.port == 8000
    with pytest.raises(ConfigError, match="JAXSERVE_PORT is 'tcp'"):
        load_settings({}, {"JAXSERVE_PORT": "tcp"})
