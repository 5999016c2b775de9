import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.errors import RequestError, WeightsError
from jaxserve.tokenizer import Tokenizer
from tests.fake_engine import byte_level_backend, make_tokenizer

USER = [{"role": "user", "content": "Hello"}]


def write_checkpoint(folder: Path, **files: object) -> Path:
    byte_level_backend().save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_encode_and_decode_are_inverse_for_any_text():
    tokenizer = make_tokenizer()
    for text in ("", "Hello world", "日本語 😀", "\x00\n\t", "a" * 5000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_can_keep_special_tokens():
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("<|user|>Hello<|end|>")
    assert tokenizer.decode(ids) == "Hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|>Hello<|end|>"


def test_a_text_with_a_lone_surrogate_is_refused_not_crashed_on():
    with pytest.raises(RequestError, match="cannot be tokenised"):
        make_tokenizer().encode("bad \ud800 text")


def test_token_bytes_join_to_the_text_that_was_encoded():
    tokenizer = make_tokenizer()
    text = "Ünï 日本 😀 <|user|> end"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_token_bytes_of_a_sentencepiece_style_vocabulary():
    vocab = {"<unk>": 0, "\u2581Hi": 1, "<0xE2>": 2}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer = Tokenizer(backend)
    assert tokenizer.token_bytes(1) == b" Hi"
    assert tokenizer.token_bytes(2) == b"\xe2"
    assert tokenizer.token_text(2) == "\ufffd"
    assert tokenizer.token_bytes(99) == b""


def test_truncation_and_padding_in_the_file_do_not_cut_prompts(tmp_path: Path):
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    ids = Tokenizer.from_folder(tmp_path).encode("one two three four five six")
    assert Tokenizer.from_folder(tmp_path).decode(ids) == "one two three four five six"


def test_chat_template_from_its_own_file_wins_over_the_config(tmp_path: Path):
    write_checkpoint(tmp_path, tokenizer_config={"chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text("new {{ messages[0].content }}")
    assert Tokenizer.from_folder(tmp_path).render_chat(USER) == "new Hello"


def test_named_templates_take_default_and_tool_use(tmp_path: Path):
    templates = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | tojson }}"},
    ]
    tokenizer = Tokenizer.from_folder(
        write_checkpoint(tmp_path, tokenizer_config={"chat_template": templates})
    )
    assert tokenizer.render_chat(USER) == "plain"
    assert tokenizer.render_chat(USER, tools=[{"a": "<b>'"}]) == """[{"a": "<b>'"}]"""


def test_special_tokens_reach_the_template_as_text_or_from_objects(tmp_path: Path):
    folder = write_checkpoint(
        tmp_path,
        tokenizer_config={
            "bos_token": {"content": "<|begin|>", "lstrip": False},
            "chat_template": "{{ bos_token }}{{ eos_token }}",
        },
        special_tokens_map={"eos_token": "<|end|>", "bos_token": "other"},
    )
    assert Tokenizer.from_folder(folder).render_chat(USER) == "<|begin|><|end|>"


def test_rendered_chat_is_encoded_without_a_second_begin_token():
    tokenizer = make_tokenizer()
    ids = tokenizer.encode_chat(USER)
    text = "<|begin|><|user|>Hello<|end|><|assistant|>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_text_parts_are_joined_and_other_parts_are_refused():
    tokenizer = make_tokenizer()
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "<|user|>one\ntwo<|end|>" in tokenizer.render_chat([{"role": "user", "content": parts}])
    image = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    with pytest.raises(RequestError) as caught:
        tokenizer.render_chat([*USER, {"role": "user", "content": image}])
    assert caught.value.param == "messages.1.content.0"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("Hello", "messages"),
        ([{"content": "Hello"}], "messages.0.role"),
        ([{"role": 3, "content": "Hello"}], "messages.0.role"),
        ([{"role": "user", "content": 3}], "messages.0.content"),
        (["Hello"], "messages.0"),
    ],
)
def test_messages_of_the_wrong_shape_name_the_field(messages: object, param: str):
    with pytest.raises(RequestError) as caught:
        make_tokenizer().render_chat(messages)  # pyright: ignore[reportArgumentType]
    assert caught.value.param == param


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",  # does not parse
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ ''.__class__.__mro__ }}{{ [].append(1) }}{{ messages.append(1) }}",  # not allowed
        "{{ missing.attribute }}",
    ],
)
def test_a_template_that_fails_is_the_requests_error(template: str):
    with pytest.raises(RequestError, match="chat template"):
        make_tokenizer(template).render_chat(USER)


def test_a_template_cannot_reach_python_objects():
    text = make_tokenizer("[{{ ''.__class__ }}{{ messages.__class__ }}]").render_chat(USER)
    assert text == "[]"


def test_templates_may_use_what_checkpoints_use():
    template = """
    {%- for message in messages %}
        {%- if message.role == "skip" %}{% continue %}{% endif %}
        {% generation %}{{ message.content }}{% endgeneration %}
    {%- endfor %}
    {{ strftime_now("%Y") | length }} {{ flag }}"""
    messages = [{"role": "skip", "content": "no"}, {"role": "user", "content": "yes"}]
    text = make_tokenizer(template).render_chat(messages, flag=True)
    assert text.split() == ["yes", "4", "True"]


def test_trim_blocks_matches_what_checkpoints_are_written_for():
    template = (
        "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}"
    )
    assert make_tokenizer(template).render_chat(USER) == "Hello\n"


def test_a_checkpoint_without_template_says_so():
    with pytest.raises(RequestError, match="no chat template") as caught:
        make_tokenizer(None).render_chat(USER)
    assert caught.value.code == "no_chat_template"


def test_a_checkpoint_without_tokenizer_serves_ids_and_refuses_text(tmp_path: Path):
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert not tokenizer.has_text and tokenizer.decode([1, 2, 3]) == ""
    assert tokenizer.token_bytes(1) == b""
    with pytest.raises(RequestError, match=r"no tokenizer\.json"):
        tokenizer.encode("Hello")


def test_broken_files_are_named(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(WeightsError, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default"}]}')
    with pytest.raises(WeightsError, match=r"tokenizer_config\.json: field 'chat_template'"):
        Tokenizer.from_folder(tmp_path)


def test_generation_config_is_kept(tmp_path: Path):
    write_checkpoint(tmp_path, generation_config={"temperature": 0.6})
    assert Tokenizer.from_folder(tmp_path).generation_config == {"temperature": 0.6}


def test_vocab_size_counts_added_tokens_with_gaps():
    backend = Backend(models.WordLevel(vocab={"a": 0, "b": 7}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    backend.decoder = decoders.Fuse()  # pyright: ignore
    assert Tokenizer(backend).vocab_size >= 2
    assert Tokenizer(byte_level_backend()).vocab_size == byte_level_backend().get_vocab_size()
