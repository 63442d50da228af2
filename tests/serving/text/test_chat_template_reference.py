"""Published chat templates against transformers, see tests/data/make_chat_template_reference.py."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from serving.text.chat_template import ChatTemplate

# Another file made by the same script may be given.
PATH = os.environ.get("CHAT_TEMPLATES") or (
    Path(__file__).parents[2] / "data" / "chat_template_reference.json"
)
REFERENCE: dict[str, Any] = json.loads(Path(PATH).read_text())


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=f"{c['template']}, {c['conversation']}") for c in REFERENCE["cases"]],
)
def test_the_same_prompt(case: dict[str, Any]) -> None:
    template = ChatTemplate(REFERENCE["templates"][case["template"]], REFERENCE["special_tokens"])
    conversation = REFERENCE["conversations"][case["conversation"]]
    arguments = (
        conversation["messages"],
        conversation.get("add_generation_prompt", True),
        {},
        conversation.get("tools", ()),
    )
    knows_tools = "tools" in REFERENCE["templates"][case["template"]]
    if "tools" in conversation and not knows_tools:
        # transformers drops them in silence.
        with pytest.raises(ValueError, match="knows no tools"):
            template.render(*arguments)
    elif case["text"] is None:
        with pytest.raises(ValueError, match="the chat template failed on these messages"):
            template.render(*arguments)
    else:
        assert template.render(*arguments) == case["text"]


def test_most_conversations_are_taken() -> None:
    rendered = [case for case in REFERENCE["cases"] if case["text"] is not None]
    assert len(rendered) > 0.8 * len(REFERENCE["cases"])
