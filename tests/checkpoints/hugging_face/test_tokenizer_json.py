"""Tokens and rows of the embedding, of which Gemma 3 has one token more than rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Library

from checkpoints.converted.convert import convert
from checkpoints.load import open_checkpoint
from serving.text.tokenizer import Tokenizer
from tests.checkpoints.hugging_face.family_folder import write_folder, write_tokenizer
from tests.jaxinfer.models.random_checkpoint import CASES

ROWS = CASES["gemma3"]["config"]["vocab_size"]
IMAGE = "<image_soft_token>"
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'tool' %}<image_soft_token>{% endif %}{% endfor %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Has a special token whose id is the number of rows."""
    folder = tmp_path / "gemma"
    write_folder(folder, "gemma3")
    write_tokenizer(folder, ROWS)
    path = str(folder / "tokenizer.json")
    library = Library.from_file(path)
    library.add_special_tokens([f"<{n}>" for n in range(library.get_vocab_size(), ROWS)] + [IMAGE])
    assert library.token_to_id(IMAGE) == ROWS
    library.save(path)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_prompts_with_a_token_that_has_no_row(folder: Path, tmp_path: Path) -> None:
    convert(open_checkpoint(folder), tmp_path / "converted", np.dtype(np.float32), {})
    for path in (folder, tmp_path / "converted"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.tokenizer.tokens[ROWS:] == (IMAGE,)
        tokenizer = Tokenizer(checkpoint.tokenizer, checkpoint.model.vocab_size)
        match = rf"the prompt has '{IMAGE}', token {ROWS}, which .* has {ROWS} embeddings"
        with pytest.raises(ValueError, match=match):
            tokenizer.encode(f"a {IMAGE}", parse_special_tokens=True)
        # Written out by a user it is text.
        assert max(tokenizer.encode("<1>", parse_special_tokens=False)) < ROWS
        hello = {"role": "user", "content": "ab"}
        assert tokenizer.encode_chat([hello]) == tokenizer.encode("ab")
        for content in ("ab", "<|end|>"):
            with pytest.raises(ValueError, match=match):
                tokenizer.encode_chat([{"role": "tool", "content": content}])


def test_a_token_without_a_row_ends_nothing(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ROWS, 3, 10**6]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": IMAGE}))
    assert open_checkpoint(folder).tokenizer.eos_token_ids == (3,)


@pytest.mark.parametrize(
    ("token_id", "match"),
    [
        (ROWS + 1024, f"token 'x' has id {ROWS + 1024}, the embedding has {ROWS} rows"),
        (1 << 40, "token 'x' has id 1099511627776, the embedding has"),
        (-1, "an added token needs an id and a content"),
    ],
)
def test_added_tokens_that_are_refused(folder: Path, token_id: int, match: str) -> None:
    edit(folder, added_tokens=[{"id": token_id, "content": "x", "special": True}])
    with pytest.raises(ValueError, match=match):
        assert open_checkpoint(folder).tokenizer


def test_an_ordinary_token_needs_a_row(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    edit(folder, model=model | {"vocab": model["vocab"] | {"x1": ROWS + 1}})
    with pytest.raises(ValueError, match=f"token 'x1' has id {ROWS + 1}, the embedding has"):
        assert open_checkpoint(folder).tokenizer


def test_a_vocabulary_may_list_its_added_tokens_too(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    edit(folder, model=model | {"vocab": model["vocab"] | {IMAGE: ROWS}})
    assert open_checkpoint(folder).tokenizer.tokens[ROWS] == IMAGE


NAMED = [
    {"name": "default", "template": "{{ eos_token }}{{ unk_token }}{{ pad_token }}"},
    {"name": "tool_use", "template": "{{ tools[0].name }}{{ image_token }}{{ sep_token }}"},
]
TOKENS = {
    "eos_token": "<|end|>",
    "pad_token": {"content": "<1>", "lstrip": False},
    "unk_token": "<2>",
    "sep_token": None,
    "extra_special_tokens": {"image_token": IMAGE},
}


@pytest.mark.parametrize("place", ["named", "files", "map"])
def test_templates_are_rendered_as_transformers_does(folder: Path, place: str) -> None:
    """The one for tools, and special tokens by the names that templates know them by.

    EOS is what the tokenizer calls so, not the first token that ends a text.
    """
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
    settings = {**TOKENS, "chat_template": NAMED if place != "files" else "{{ bad"}
    if place == "map":
        names = {name: settings.pop(name) for name in ("pad_token", "unk_token")}
        (folder / "special_tokens_map.json").write_text(json.dumps({**names, "eos_token": "<3>"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink()
    if place == "files":
        (folder / "additional_chat_templates").mkdir()
        paths = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")
        for path, named in zip(paths, NAMED, strict=True):
            (folder / path).write_text(named["template"])
    tokenizer = Tokenizer(open_checkpoint(folder).tokenizer)
    hello = [{"role": "user", "content": "ab"}]
    assert tokenizer.render_chat(hello) == "<|end|><2><1>"
    assert tokenizer.render_chat(hello, tools=[{"name": "look"}]) == f"look{IMAGE}"


def test_a_template_for_chats_with_tools_alone(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": NAMED[1:]}))
    tokenizer = Tokenizer(open_checkpoint(folder).tokenizer)
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat([], tools=[{"name": "look"}]) == "look"
    with pytest.raises(ValueError, match="no chat template for chats without tools"):
        tokenizer.render_chat([])


@pytest.mark.parametrize("template", [3, [{"name": "tool_use", "template": ["x"]}]])
def test_templates_that_are_no_text(folder: Path, template: Any) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ValueError, match=r"tokenizer_config.json: chat_template must be a string"):
        assert open_checkpoint(folder).tokenizer
