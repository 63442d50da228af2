"""The JSON in a conversation."""

import pytest

from serving.text.conversation import json_objects


def test_objects_are_parsed() -> None:
    assert json_objects("tools", ['{"a": [1]}', "{}"]) == [{"a": [1]}, {}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", r"^tools\[1\] is no JSON: "),
        ('{"a": NaN}', r"^tools\[1\] is no JSON: NaN is no JSON$"),
        ("[]", r"^tools\[1\] must be a JSON object, got '\[\]'$"),
        ("[" * 100_000, r"^tools\[1\] is no JSON: "),
    ],
    ids=lambda text: text[:20],
)
def test_others_are_refused_by_place(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        json_objects("tools", ["{}", text])
