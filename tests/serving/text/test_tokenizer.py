import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers.decoders
import tokenizers.pre_tokenizers
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.fetch.catalog import resolve
from checkpoints.load import open_checkpoint
from jaxinfer.config import TokenizerSpec
from serving.text.tokenizer import Detokenizer, Tokenizer

DATA = Path(__file__).parents[2] / "data"
START, END, TOOL = 0, 1, 2
TEMPLATE = (
    "{% for message in messages %}\n"
    "  {% if message.content == 'skip' %}{% continue %}{% endif %}\n"
    "<|start|>{{ message['role'] }}: {{ message['content'] | trim }}<|end|>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ bos_token }}assistant:{% endif %}"
)
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
SPEC = TokenizerSpec(
    tokens=("<|start|>", "<|end|>", "<tool é>", *ALPHABET, "ab", "abc", "12", "123", "Ġa"),
    merges=("a b", "ab c", "1 2", "12 3", "Ġ a"),
    pre_tokenizer="smollm",
    control_token_ids=(START, END),
    added_token_ids=(TOOL,),
    bos_token_id=START,
    eos_token_ids=(END,),
    chat_template=TEMPLATE,
)
TOKENIZER = Tokenizer(SPEC)
USER = [{"role": "user", "content": "Hi"}]


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [SPEC.tokens[token_id] for token_id in tokenizer.encode(text, parse_special_tokens=True)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-2", ["abc", "Ġa", "Ġ", "123", "4", "<tool é>", "<|end|>"]),
        ("smollm", ["abc", "Ġa", "Ġ", "1", "2", "3", "4", "<tool é>", "<|end|>"]),
        ("llama-bpe", ["abc", "Ġa", "Ġ", "123", "4", "<tool é>", "<|end|>"]),
        ("qwen2", ["abc", "Ġa", "Ġ", "1", "2", "3", "4", "<tool é>", "<|end|>"]),
    ],
)
def test_pre_tokenizers(name: str, expected: list[str]) -> None:
    tokenizer = Tokenizer(replace(SPEC, pre_tokenizer=name))
    assert pieces(tokenizer, "abc a 1234<tool é><|end|>") == expected


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("deepseek-r1-qwen", "qwen2"),
        ("megrez", "qwen2"),
        ("stablelm2", "qwen2"),
        ("hunyuan", "qwen2"),
        ("falcon3", "llama-bpe"),
        ("midm-2.0", "llama-bpe"),
        ("llama4", "gpt-4o"),
        ("mellum", "gpt-2"),
        ("a.x-4.0", "gpt-2"),
        ("starcoder", "smollm"),
        ("minerva-7b", "smollm"),
    ],
)
def test_names_of_one_split(name: str, same: str) -> None:
    """As llama.cpp groups them."""
    alias, base = (Tokenizer(replace(SPEC, pre_tokenizer=one)) for one in (name, same))
    for text in ("abc a 1234 a's\n\n x", "HelloWorld 12 ab'S", "  a\t1a"):
        assert alias.encode(text) == base.encode(text)


def test_a_word_that_is_a_token_is_one_though_no_merge_makes_it() -> None:
    """So for Llama 3's names; others with its split take merges."""
    tokens = tuple("xyz" if token == "abc" else token for token in SPEC.tokens)
    spec = replace(SPEC, tokens=tokens, merges=("a b",))
    for name, is_whole in (("falcon3", True), ("llama3", True), ("smaug-bpe", False)):
        ids = Tokenizer(replace(spec, pre_tokenizer=name)).encode("xyz")
        assert (ids == [tokens.index("xyz")]) == is_whole


def test_properties_and_bos() -> None:
    assert TOKENIZER.vocab_size == len(SPEC.tokens)
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_ids) == (START, (END,))
    assert TOKENIZER.has_chat_template
    assert TOKENIZER.encode("") == []
    with_bos = Tokenizer(replace(SPEC, add_bos_token=True))
    assert with_bos.encode("") == [START]
    assert with_bos.encode("", add_special_tokens=False) == []


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"pre_tokenizer": "bloom"},
            "'bloom' is not supported; supported are a.x-4.0, chatglm-bpe, .*gpt-4o",
        ),
        ({"tokens": (*SPEC.tokens, "ab")}, "265 tokens only 264 are different"),
        ({"merges": ("ab",)}, "a merge must be two tokens and a space, got 'ab'"),
        ({"merges": ("x y",)}, "merges do not fit its tokens"),
        ({"chat_template": "{% if %}"}, "chat template is not valid"),
        ({"chat_template": "{{" + "(" * 5000}, "chat template is not valid"),
        ({"chat_template": " " * (2 << 20)}, "2097152 characters, more than the limit"),
    ],
)
def test_specs_that_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Tokenizer(replace(SPEC, **changes))


def test_ids_and_text_that_are_refused() -> None:
    for token_id in (-1, len(SPEC.tokens)):
        with pytest.raises(ValueError, match=rf"in \[0, 263\], got {token_id}"):
            TOKENIZER.decode([token_id])
    with pytest.raises(ValueError, match="not valid Unicode at character 1"):
        TOKENIZER.encode("a\ud800")


def test_rows_without_a_token_are_no_text() -> None:
    """A model may write one of the rows that fill its embedding up."""
    count = len(SPEC.tokens)
    tokenizer = Tokenizer(SPEC, num_embeddings=count + 2)
    assert tokenizer.decode([*tokenizer.encode("ab"), count + 1]) == "ab"
    with pytest.raises(ValueError, match=rf"token id must be in .* got {count + 2}"):
        tokenizer.decode([count + 2])


def test_control_tokens_are_found_by_what_they_are_written_as() -> None:
    (token_id,) = TOKENIZER.encode("<|end|>", False, parse_special_tokens=True)
    assert TOKENIZER.control_tokens(["a", "<|end|>", "<|e"]) == (token_id,)
    assert TOKENIZER.control_tokens([]) == ()


def test_control_tokens_are_left_out_of_text() -> None:
    token_ids = TOKENIZER.encode("a<|end|><tool é>b", parse_special_tokens=True)
    assert TOKENIZER.decode(token_ids) == "a<tool é>b"
    assert TOKENIZER.decode(token_ids, skip_control_tokens=False) == "a<|end|><tool é>b"


@given(st.text())
def test_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_control_tokens=False) == text


TOKEN_IDS = st.lists(st.integers(0, len(SPEC.tokens) - 1), max_size=60)


@given(token_ids=TOKEN_IDS | st.text().map(TOKENIZER.encode), data=st.data())
def test_any_split_of_the_stream_gives_the_same_text(
    token_ids: list[int], data: st.DataObject
) -> None:
    detokenizer, emitted, start = Detokenizer(TOKENIZER), "", 0
    while start < len(token_ids):
        stop = start + data.draw(st.integers(1, 5))
        emitted += detokenizer.add(token_ids[start:stop])
        so_far = TOKENIZER.decode(token_ids[:stop])
        # Nothing is taken back later, and at most one incomplete character is held.
        assert so_far.startswith(emitted)
        assert len(so_far) - len(emitted) <= 1
        start = stop
    assert emitted + detokenizer.finish() == TOKENIZER.decode(token_ids)


@given(st.lists(st.sampled_from(ALPHABET), max_size=40))
def test_bytes_that_are_no_text_become_what_hugging_face_gives(tokens: list[str]) -> None:
    expected = tokenizers.decoders.ByteLevel().decode(tokens)
    assert TOKENIZER.decode([SPEC.tokens.index(token) for token in tokens]) == expected


def test_a_character_appears_when_its_last_byte_does() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    token_ids = TOKENIZER.encode("é€😀")
    assert [detokenizer.add([token_id]) for token_id in token_ids] == [
        *["", "é"],
        *["", "", "€"],
        *["", "", "", "😀"],
    ]
    assert detokenizer.add(token_ids[:1]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_chat_template() -> None:
    messages = [*USER, {"role": "user", "content": "skip"}, {"role": "assistant", "content": " x "}]
    expected = "<|start|>user: Hi<|end|>\n<|start|>assistant: x<|end|>\n"
    assert TOKENIZER.render_chat(messages, add_generation_prompt=False) == expected
    assert TOKENIZER.render_chat(messages) == expected + "<|start|>assistant:"
    token_ids = Tokenizer(replace(SPEC, add_bos_token=True)).encode_chat(messages)
    assert token_ids.count(START) == 3
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(replace(SPEC, chat_template=None)).render_chat(USER)


@pytest.mark.parametrize("content", ["Sure", "", "end", "<|end|>", " both ", "x\n"])
def test_the_last_message_can_be_left_open(content: str) -> None:
    messages = [*USER, {"role": "assistant", "content": content}]
    text = TOKENIZER.render_chat(messages, continue_final_message=True)
    # The template trims, so what is left open is trimmed too: a beginning of the whole.
    expected = f"<|start|>user: Hi<|end|>\n<|start|>assistant: {content.strip()}"
    assert text == expected or text == expected.rstrip()
    whole = TOKENIZER.render_chat(messages, add_generation_prompt=False)
    assert whole.startswith(text)
    token_ids = TOKENIZER.encode_chat(messages, continue_final_message=True)
    special = len(content) > 6
    assert token_ids[-special:] == (TOKENIZER.encode(content)[-1:] if special else token_ids)
    assert token_ids.count(END) == 1
    asked = TOKENIZER.encode_chat(messages, continue_final_message=True, parse_special_tokens=True)
    assert asked == TOKENIZER.encode(text, parse_special_tokens=True)
    assert asked.count(END) == 1 + special


FORGED = st.lists(st.sampled_from(["<|end|>", "<|start|>", "<|", "|>", "a", " ", "\U00010000"]))


@given(FORGED.map("".join), FORGED.map("".join))
def test_nobody_ends_a_message_within_a_message(content: str, answer: str) -> None:
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "!", "tool_calls": [{content: [answer, 1, None]}]},
    ]
    tokenizer = Tokenizer(replace(SPEC, chat_template=TEMPLATE + "{{ messages[1].tool_calls }}"))
    token_ids = tokenizer.encode_chat(messages)
    assert (token_ids.count(START), token_ids.count(END)) == (3, 2)
    text = tokenizer.render_chat(messages)
    assert tokenizer.decode(token_ids, skip_control_tokens=False) == text


def test_special_tokens_are_text_unless_asked_otherwise() -> None:
    text = "a<|end|>"
    assert TOKENIZER.encode(text)[1:] == [SPEC.tokens.index(letter) for letter in "<|end|>"]
    assert TOKENIZER.encode(text, parse_special_tokens=True)[1:] == [END]
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    everything = "".join(chr(code) for code in range(0x10000, 0x1000C))
    with pytest.raises(ValueError, match="must lack one of"):
        TOKENIZER.encode_chat([{"role": "user", "content": everything + text}])


def test_tools() -> None:
    template = "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}"
    tokenizer = Tokenizer(replace(SPEC, chat_template=template))
    assert tokenizer.render_chat(USER, tools=[{"name": "f"}]) == '[{"name": "f"}]Hi'
    assert tokenizer.render_chat(USER) == "Hi"
    with pytest.raises(ValueError, match="knows no tools"):
        TOKENIZER.render_chat(USER, tools=[{"name": "f"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content | upper }}",
        "{{ messages[-1].role }}",
        "{{ messages[-1].content | length }}: {{ messages[-1].content }}",
        "{{ messages[-1].content[:3] }}",
    ],
)
def test_a_message_that_the_template_alters_cannot_be_left_open(template: str) -> None:
    tokenizer = Tokenizer(replace(SPEC, chat_template=template))
    messages = [*USER, {"role": "assistant", "content": "Sure thing"}]
    with pytest.raises(ValueError, match="alters the last message"):
        tokenizer.render_chat(messages, continue_final_message=True)


def test_without_messages_there_is_none_to_continue() -> None:
    with pytest.raises(ValueError, match="no last message"):
        TOKENIZER.render_chat([], continue_final_message=True)


def test_arguments_of_a_template() -> None:
    template = (
        "{%- if not style is defined %}{% set style = 'plain' %}{% endif -%}"
        "{{ style }} {% if think is defined and think is false %}quick{% endif %}"
        "{{ messages[0].name }}{{ bos_token }}{{ namespace(a=1).a }}{% set own = 1 %}"
        "{% for i in range(1) %}{{ raise_exception is defined }}{% endfor %}"
    )
    tokenizer = Tokenizer(replace(SPEC, chat_template=template))
    assert tokenizer.render_chat(USER) == "plain <|start|>1True"
    messages = [{**USER[0], "name": "Ada"}]
    arguments: dict[str, str | bool] = {"style": "bold", "think": False}
    text = tokenizer.render_chat(messages, template_arguments=arguments)
    assert text == "bold quickAda<|start|>1True"
    taken = ("messages", "range", "bos_token", "tools", "namespace", "raise_exception", "self")
    for name in ("colour", *taken):
        with pytest.raises(ValueError, match=f"no variable '{name}' to be set"):
            tokenizer.render_chat(USER, template_arguments={name: "x"})


def render(template: str) -> str:
    return Tokenizer(replace(SPEC, chat_template=template)).render_chat(USER)


def test_roles_that_a_template_knows() -> None:
    """Asked for by name, or written as they come; of others nothing might be left."""
    by_name = "{% for m in messages %}{% if m.role == 'developer' %}D{{ m.content }}{% endif %}"
    generic = "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    developer, other = ([{"role": role, "content": "Hi"}] for role in ("developer", "robot"))

    def tokenizer(template: str) -> Tokenizer:
        return Tokenizer(replace(SPEC, chat_template=template + "{% endfor %}"))

    assert tokenizer(by_name).render_chat(developer) == "DHi"
    assert tokenizer(generic).render_chat(developer) == "[developer]Hi"
    assert tokenizer(generic).render_chat(other) == "[robot]Hi"
    with pytest.raises(ValueError, match="or what else the chat template knows, got 'robot'"):
        tokenizer(by_name).render_chat(other)


def test_functions_of_hugging_face_templates() -> None:
    assert render("{% generation %}a{{ 1 }}{% endgeneration %}b") == "a1b"
    assert render("{{ 'a' ~ 1 ~ none ~ ['b'] }}") == "a1None['b']"
    assert render("{{ ['a', 1] | join('-') }}{{ 'xyx'.replace('x', 'z', 1) }}") == "a-1zyx"
    assert render("{% for x in 'ab' %}{{ loop.length }}{{ x }}{{ loop.last }}{% endfor %}") == (
        "2aFalse2bTrue"
    )
    assert (
        render("{% for x in absent %}x{% else %}none{% endfor %}{{ 'b' in 'abc' }}") == "noneTrue"
    )
    assert render("{{ {'a': [1.5, true]} }}|{{ messages | length }}") == "{'a': [1.5, True]}|1"
    assert render("{{ messages[0] | tojson }}") == '{"role": "user", "content": "Hi"}'
    assert render("{{ ['é<'] | tojson(indent=2) }}") == '[\n  "é<"\n]'
    assert render("{{ 'a\nb' | indent(2) }}") == "a\n  b"
    assert len(render("{{ strftime_now('%d %b %Y') }}")) == 11
    assert render("{{ [1, 2] + [3] }}{{ 7 % 4 }}{{ 2 ** 3 }}{{ 'ab' * 2 }}") == "[1, 2, 3]38abab"
    assert render("{% for i in range(3) %}{{ i }}{% endfor %}") == "012"
    assert render("{% if tools is none %}{{ absent }}x{% endif %}") == "x"


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([{"role": "user"}], "needs a content that is a string"),
        ([{"role": "user", "content": 1}], "needs a content that is a string"),
        ([{"content": "x"}], "needs a role that is a string"),
        ([{**USER[0], "name": 3}], "name of a message must be a string"),
    ],
)
def test_messages_that_are_refused(messages: list[dict[str, Any]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TOKENIZER.render_chat(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[5].content }}",
        "{{ 1 / 0 }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.items() }}",
        "{{ range.__call__.__func__ }}",
        "{{ (lipsum).__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% for i in range(10 ** 30) %}x{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{x:10000000000}'.format_map({'x': 1}) }}",
        "{{ ('{:10000000000}' | attr('format'))(1) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ 'a'.center(10 ** 10) }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ 'a' | indent(10000000000) }}",
        "{{ messages | tojson(indent=10000000000) }}",
        "{{ strftime_now('%9999999999d') }}",
        "{% set n = namespace(x='a') %}"
        "{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set x = 'a' * 99999 %}{% for i in range(9999) %}{{ x }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set n = namespace(x='aa') %}{% for i in range(99) %}"
        "{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(99) %}"
        "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(99) %}"
        "{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(99) %}"
        "{% set n.x = n.x | replace('a', n.x) %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(99) %}"
        "{% set n.x = n.x.join(n.x) %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(99) %}"
        "{% set n.x = [n.x, n.x] | join(n.x) %}{% endfor %}",
        *(
            "{% set n = namespace(x='aa') %}{% for i in range(50) %}"
            "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x " + use + " }}"
            for use in ("", "| tojson", "| string", "~ 'a'", "| indent", "| replace('a', 'b')")
        ),
        "{% for i in range(300) %}{% for j in messages[0].content * 90000 %}"
        "{% for k in messages[0].content * 90000 %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(9999) %}{% set x %}" + "word " * 2000 + "{% endset %}{% endfor %}",
        "{% for x in [[[]]] recursive %}{{ loop(x) }}{% endfor %}",
        "{{ [1] | batch(1000000000, 'x') | list }}",
        "{{ [1] | slice(1000000000) | list }}",
    ],
)
def test_templates_that_fail_cleanly(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.text.template_sandbox.MAX_SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"chat template (failed on|is not valid)"):
        render(template)


@pytest.mark.model
def test_the_default_tokenizer_agrees_with_the_reference() -> None:
    tokenizer = Tokenizer(open_checkpoint(resolve("smollm2-135m-instruct")).tokenizer)
    for prompt in json.loads((DATA / "smollm2_f32.json").read_text())["prompts"]:
        if prompt["messages"]:
            assert tokenizer.render_chat(prompt["messages"]) == prompt["text"]
            assert tokenizer.encode_chat(prompt["messages"]) == prompt["prompt_ids"]
        else:
            assert tokenizer.encode(prompt["text"]) == prompt["prompt_ids"]
        decoded = tokenizer.decode(prompt["greedy_ids"], skip_control_tokens=False)
        assert decoded == prompt["greedy_text"]
    reference = json.loads((DATA / "nll_pytopics.json").read_text())
    token_ids = tokenizer.encode(reference["text"])
    assert token_ids[: len(reference["ids"])] == reference["ids"]
    assert tokenizer.decode(token_ids) == reference["text"]
