"""The tokenizer against transformers: ids, text and rendered chats; and what it says of damaged files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import TEMPLATES, write_byte_level, write_sentencepiece

from edgetune.errors import DataError, EdgetuneError, ModelError
from edgetune.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "", " ", "Once upon a time", "Lily's dog.", "two  spaces\nline\n\n", "café Zoë naïve 😀👩‍👩‍👧", "\ttab", "名前は",
    "a</s>b<|im_end|>c", " leading", "trailing ", "\x00\x1f", "ﬁ\u0301", "\U0010ffff",
]  # fmt: skip
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "Set an alarm."}],
    "answered": [{"role": "user", "content": "Hi <b>&'\""}, {"role": "assistant", "content": " Hello \n"}],
    "with system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
        {"role": "user", "content": "Zoë? 😀"},
        {"role": "assistant", "content": "No."},
    ],
    "with tools": [
        {"role": "user", "content": "Alarm at 7"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "set", "arguments": {"at": "7", "ü": [1.5, None]}}}
            ],
        },
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "Set."},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "set", "description": "<sets>", "parameters": {"b": 1, "a": 2}}}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    (root / "bytes").mkdir()
    write_tokenizer(root / "bytes", 301)
    return {
        "bytes": root / "bytes",
        "byte_level": write_byte_level(root / "byte_level"),
        "byte_level_bos": write_byte_level(root / "byte_level_bos", bos=True),
        "sentencepiece": write_sentencepiece(root / "sentencepiece"),
    }


KINDS = ["bytes", "byte_level", "byte_level_bos", "sentencepiece"]


def oracle(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_equal_those_of_transformers(kind: str, folders: dict[str, Path]) -> None:
    ours, theirs = load_tokenizer(folders[kind]), oracle(folders[kind])
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs(text, add_special_tokens=special)["input_ids"], text
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(
                    ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
                )


def test_oracle_of_the_real_model(real: Callable[[str], Path]) -> None:
    folder = real("stories260k")
    tokenizer = load_tokenizer(folder)
    expected = json.loads((folder / "oracle.json").read_text())
    for text, ids in expected["tokenizer_examples"].items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(expected["expected_new_token_ids"]) == expected["expected_text"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.vocab_size) == (1, (2,), 512)
    assert stream_of(tokenizer, expected["expected_new_token_ids"]) == expected["expected_text"]


def test_truncation_and_padding_of_the_file_are_off(real: Callable[[str], Path], tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 301)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<unk>",
    }  # fmt: skip
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.encode("abc")) == 3
    assert len(tokenizer.encode("abcdefghij")) == 10
    assert len(load_tokenizer(real("minilm")).encode("one two three")) == 5  # ships both; [CLS] one two three [SEP]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("generation", [False, True])
def test_rendered_chats_equal_those_of_transformers(template: str, chat: str, generation: bool, tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, template=TEMPLATES[template], bos=template == "llama3")
    ours, theirs = load_tokenizer(folder), oracle(folder)
    for tools in (None, TOOLS):
        text = ours.apply_chat_template(CHATS[chat], generation, tools=tools)
        expected = {"conversation": CHATS[chat], "tools": tools, "add_generation_prompt": generation}
        assert text == theirs.apply_chat_template(**expected, tokenize=False)
        ids = theirs.apply_chat_template(**expected, tokenize=True, return_dict=True)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == ids


def test_template_features_equal_those_of_transformers(tmp_path: Path) -> None:
    source = (
        "  {% for m in messages %}\n{% generation %}{{ m.content | tojson(indent=2) }}{% endgeneration %}\n"
        "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}\n{{ bos_token }}{{ eos_token }}"
        "{{ dict(a=1) | tojson }}{{ messages | length }}{{ strftime_now('%Y') }}{{ unk_token is defined }}\n"
    )
    folder = write_byte_level(tmp_path, template=source, bos=True)
    messages = [{"role": "user", "content": c} for c in ("<é>", "b", "c")]
    ours = load_tokenizer(folder).apply_chat_template(messages)
    assert ours == oracle(folder).apply_chat_template(messages, tokenize=False)
    assert '"<é>"' in ours


def test_date_can_be_fixed(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path, template=TEMPLATES["llama3"], bos=True))
    text = tokenizer.apply_chat_template(CHATS["one turn"], now=datetime(2024, 2, 29))
    assert "Today Date: 29 Feb 2024\n" in text
    assert datetime.now().strftime("Today Date: %d %b %Y\n") in tokenizer.apply_chat_template(CHATS["one turn"])


def test_default_of_named_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chat"}]
    write_byte_level(tmp_path)
    change_settings(tmp_path, chat_template=named)
    chat = CHATS["one turn"]
    assert load_tokenizer(tmp_path).apply_chat_template(chat) == "chat"
    assert oracle(tmp_path).apply_chat_template(chat, tokenize=False) == "chat"
    change_settings(tmp_path, chat_template=named[:1])
    assert not load_tokenizer(tmp_path).has_chat_template


def test_template_file_wins(tmp_path: Path) -> None:
    write_byte_level(tmp_path, template="config")
    (tmp_path / "chat_template.jinja").write_text("file\n", encoding="utf-8")
    chat = CHATS["one turn"]
    assert load_tokenizer(tmp_path).apply_chat_template(chat) == "file"
    assert oracle(tmp_path).apply_chat_template(chat, tokenize=False) == "file"


def change_settings(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{{ 1 }}\n{% if %}", ModelError, "is damaged, line 2"),
        ("{% for m in messages %}", ModelError, "is damaged, line 1"),
        ("{{ raise_exception('Roles must alternate') }}", DataError, "Roles must alternate. Their roles are user"),
        ("{{ messages[7].content.x }}", DataError, "refuses these messages"),
        ("{{ 1 / 0 }}", DataError, "refuses these messages"),
        ("{{ raise_exception(messages[0].content) }}", DataError, "hi \\?"),
        ("{{ ''.__class__.__mro__ }}", ModelError, "leave its sandbox"),
        ("{{ cycler.__init__.__globals__.os }}", ModelError, "leave its sandbox"),
        ("{% set _ = messages.append(1) %}", ModelError, "leave its sandbox"),
        ("{{ range(1000000) | list | length }}", DataError, "refuses these messages"),
        ("{% include 'x' %}", DataError, "refuses these messages"),
        ("{{ " + "(" * 3000 + ")" * 3000 + " }}", ModelError, "chat template"),
    ],
)
def test_templates_that_fail(template: str, error: type[EdgetuneError], message: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path, template=template))
    with pytest.raises(error, match=message) as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "hi \ud800"}])
    str(caught.value).encode()


def test_missing_template_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(ModelError, match=r"no chat template.*chat_template\.jinja, or use rows with prompt"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_template_that_is_not_utf8(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="is not UTF-8"):
        load_tokenizer(tmp_path)


def test_a_lone_tokenizer_json_is_enough(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Once upon")) == "Once upon"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token_ids) == (None, None, ())
    assert tokenizer.files == [tmp_path / "tokenizer.json"]


def test_ids_of_the_configs(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 0, 6], "bos_token_id": 1}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 0, "bos_token_id": 2}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_ids == (3, 0, 6)  # eos_token is <|im_end|>, 3
    assert tokenizer.end_tokens == ("<|im_end|>", "<|endoftext|>", "<|eot_id|>")
    assert tokenizer.bos_token_id is None  # tokenizer_config.json says null
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 3)
    assert tokenizer.special_tokens == {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}


def test_special_tokens_map_and_objects(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(
        '{"eos_token": {"content": "<|eot_id|>", "lstrip": false}, "bos_token": "<|begin_of_text|>"}'
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 6)


def test_a_token_that_only_a_config_calls_special(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    change_settings(tmp_path, eos_token="</think>")
    ours, theirs = load_tokenizer(tmp_path), oracle(tmp_path)
    ids = ours.encode("a</think>b")
    assert ids == theirs("a</think>b")["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "ab"
    assert ours.vocab_size == len(theirs)


def test_files_load_elsewhere_as_the_same_tokenizer(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path / "a", template="config", bos=True)
    (folder / "chat_template.jinja").write_text("{{ eos_token }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [6, 0]}')
    (folder / "model.safetensors").write_bytes(b"")
    before = load_tokenizer(folder)
    (tmp_path / "b").mkdir()
    for path in before.files:
        (tmp_path / "b" / path.name).write_bytes(path.read_bytes())
    after = load_tokenizer(tmp_path / "b")
    assert [path.name for path in after.files] == [path.name for path in before.files]
    assert after.eos_token_ids == before.eos_token_ids == (6, 0)
    assert after.apply_chat_template([]) == before.apply_chat_template([]) == "<|eot_id|>"
    assert after.encode("Once upon a time") == before.encode("Once upon a time")


def test_vocabulary_against_the_embedding(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    size = tokenizer.vocab_size
    tokenizer.check_vocab(size)
    tokenizer.check_vocab(size + 100)
    tokenizer.check_vocab(10**9)
    with pytest.raises(ModelError, match=rf"token '</think>' with id {size - 1}.*{size - 1} rows"):
        tokenizer.check_vocab(size - 1)


def test_vocabulary_with_holes(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 301)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["!"] = 1000
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.check_vocab(1001)
    with pytest.raises(ModelError, match="token '!' with id 1000"):
        tokenizer.check_vocab(1000)


def test_text_that_is_no_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    with pytest.raises(DataError, match=r"lone surrogate U\+D83D at character 1"):
        tokenizer.encode("a\ud83d b")


def test_text_without_tokens(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(DataError, match="cannot encode a text of 1 characters"):
        load_tokenizer(tmp_path).encode("b")


def test_a_regular_expression_that_never_ends_is_an_error(tmp_path: Path) -> None:
    content = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="retry-limit"):
        load_tokenizer(tmp_path).encode("a" * 200 + "b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"{}", "damaged"),
        (b"[1]", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b'{"version": "1.0", "model": {"type": "Unknown"}}', "damaged"),
        (b'{"version": "9.9", "model": {"type": "BPE", "vocab": {}, "merges": []}}', "damaged"),
        (b"[" * 100_000, "damaged"),
        (b" " * (64 * 2**20 + 1), "larger than 64 MiB"),
    ],
)
def test_damaged_tokenizer(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(tmp_path)


def test_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json.*save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"]
)
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a": 1}garbage'])
def test_damaged_configs(name: str, content: bytes, tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        load_tokenizer(tmp_path)


def test_configs_of_another_model(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    change_settings(tmp_path, eos_token="</s>")
    with pytest.raises(ModelError, match=r"names '</s>' as its eos_token, but tokenizer\.json has no such token"):
        load_tokenizer(tmp_path)


def test_code_that_comes_with_a_model_is_refused(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    change_settings(tmp_path, auto_map={"AutoTokenizer": ["tokenization_x.X", None]})
    with pytest.raises(ModelError, match="auto_map"):
        load_tokenizer(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CONFIG_KEYS = st.sampled_from(
    ["bos_token", "eos_token", "unk_token", "chat_template", "eos_token_id", "bos_token_id", "auto_map", "added_tokens"]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configs=st.lists(st.dictionaries(CONFIG_KEYS, JSON, max_size=4), min_size=3, max_size=3))
def test_any_config_loads_or_is_refused(
    configs: list[dict[str, Any]], folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folders["byte_level"] / "tokenizer.json").read_bytes())
    names = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
    for name, config in zip(names, configs, strict=True):
        (tmp_path / name).write_text(json.dumps(config))
    try:
        tokenizer = load_tokenizer(tmp_path)
    except ModelError:
        return
    assert tokenizer.decode(tokenizer.encode("Once")) == "Once"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mutation_of_tokenizer_json_loads_or_is_refused(
    data: st.DataObject, folders: dict[str, Path], tmp_path: Path
) -> None:
    content = bytearray((folders["sentencepiece"] / "tokenizer.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=8))
    (tmp_path / "tokenizer.json").write_bytes(content)
    try:
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.decode(tokenizer.encode("Once upon a time é"))
        tokenizer.check_vocab(10_000)
    except EdgetuneError:
        return


def stream_of(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> str:
    stream = tokenizer.stream(skip_special_tokens)
    return "".join([stream.push(i) for i in ids]) + stream.finish()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(KINDS), skip=st.booleans())
def test_stream_of_any_ids_equals_decoding_them_at_once(
    data: st.DataObject, kind: str, skip: bool, folders: dict[str, Path]
) -> None:
    tokenizer = load_tokenizer(folders[kind])
    some = st.integers(0, tokenizer.vocab_size + 5) | st.sampled_from(tokenizer.encode("é😀 a\n  b</s>"))
    ids = data.draw(st.lists(some, max_size=30))
    assert stream_of(tokenizer, ids, skip) == tokenizer.decode(ids, skip)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40), kind=st.sampled_from(KINDS))
def test_stream_never_gives_half_a_character(text: str, kind: str, folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders[kind])
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    whole = "".join(pieces) + stream.finish()
    assert whole == tokenizer.decode(tokenizer.encode(text))
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_stream_is_prompt(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["byte_level"])
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode("Set an alarm 😀!")]
    assert "".join(pieces) == "Set an alarm 😀!"
    assert "".join(pieces[:3]).strip() != ""  # no holding back where nothing can change


def test_import_is_light() -> None:
    code = (
        "import sys, edgetune.tokenizer\n"
        "assert not {'torch', 'transformers', 'jinja2', 'huggingface_hub', 'onnx', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
