# pyright: reportMissingImports=false
"""Writes chat_template_reference.json: published chat templates, rendered by transformers.

Run with Python 3.11 in an environment with transformers==5.23.0 and jinja2:

    python make_chat_template_reference.py FOLDER

FOLDER has the templates under the names of TEMPLATES, such as llama.cpp's models/templates, where
those of many models are kept as they were published.
"""

import json
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

OUTPUT = Path(__file__).with_name("chat_template_reference.json")
# Apache 2.0, but for Phi's, MIT.
TEMPLATES = {
    "qwen2.5": "Qwen-Qwen2.5-7B-Instruct.jinja",
    "qwen3": "Qwen-Qwen3-0.6B.jinja",
    "mistral-nemo": "mistralai-Mistral-Nemo-Instruct-2407.jinja",
    "phi-3.5": "microsoft-Phi-3.5-mini-instruct.jinja",
}
# By hand: licences of their own, or too long to keep.
FURTHER = {
    "llama-3.1": "meta-llama-Llama-3.1-8B-Instruct.jinja",
    "llama-3.3": "meta-llama-Llama-3.3-70B-Instruct.jinja",
    "gemma-2": "google-gemma-2-2b-it.jinja",
    "qwen3-coder": "Qwen3-Coder.jinja",
    "hermes-3": "NousResearch-Hermes-3-Llama-3.1-8B-tool_use.jinja",
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city, in \u00b0C & more <now>.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "its name"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Z\u00fcrich"}},
}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "  What's 2 + 2?\n"}
ANSWER = {"role": "assistant", "content": "4 \u2014 of course."}
AGAIN = {"role": "user", "content": "And <b>3 & 3</b>?"}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one": {"messages": [USER]},
    "system": {"messages": [SYSTEM, USER]},
    "turns": {"messages": [USER, ANSWER, AGAIN]},
    "system and turns": {"messages": [SYSTEM, USER, ANSWER, AGAIN, ANSWER, USER]},
    "ends with an answer": {"messages": [USER, ANSWER], "add_generation_prompt": False},
    "empty": {"messages": [{"role": "user", "content": ""}]},
    "tools": {"messages": [USER], "tools": [TOOL, TOOL]},
    "tools and system": {"messages": [SYSTEM, USER], "tools": [TOOL]},
    "call": {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": '{"celsius": 7}', "tool_call_id": "call12345"},
        ],
        "tools": [TOOL],
    },
    "thinking": {
        "messages": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}, AGAIN]
    },
    "two users": {"messages": [USER, AGAIN]},
}


def main() -> None:
    folder = Path(sys.argv[1])
    wanted = {**TEMPLATES, **FURTHER} if "--all" in sys.argv else TEMPLATES
    templates = {name: (folder / file).read_text() for name, file in wanted.items()}
    cases = [
        {"template": name, "conversation": which, "text": render(source, conversation)}
        for name, source in templates.items()
        for which, conversation in CONVERSATIONS.items()
    ]
    data = {
        "source": f"transformers {transformers.__version__}",
        "special_tokens": SPECIAL,
        "templates": templates,
        "conversations": CONVERSATIONS,
        "cases": cases,
    }
    output = Path(sys.argv[sys.argv.index("--all") + 1]) if "--all" in sys.argv else OUTPUT
    output.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def render(source: str, conversation: dict[str, Any]) -> str | None:
    """The prompt, None where the template refuses the conversation."""
    try:
        rendered, _ = render_jinja_template(
            conversations=[conversation["messages"]],
            tools=conversation.get("tools"),
            chat_template=source,
            add_generation_prompt=conversation.get("add_generation_prompt", True),
            **SPECIAL,
        )
    except Exception as error:
        print("refused:", error)
        return None
    return rendered[0]


if __name__ == "__main__":
    main()
