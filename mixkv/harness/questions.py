"""Where the question of a prompt begins."""

from __future__ import annotations

from typing import Any


def start(tokens: list[int], tokenizer: Any, lines: int) -> int:
    """The index of the first token of the last ``lines`` lines of a prompt; empty lines do not count.

    A token that has the end of a line and text after it belongs to the context.

    Raises:
        ValueError: the prompt has no line before them, so that there is no context to read.
    """
    found = 0
    seen_text = False
    for index in range(len(tokens) - 1, 0, -1):
        before, newline, after = tokenizer.decode(tokens[index]).rpartition("\n")
        seen_text |= bool(after.strip())
        if not newline:
            continue
        if seen_text:
            found += 1
            if found == lines:
                return index + 1
        seen_text = bool(before.strip())
    raise ValueError(
        f"a prompt of {len(tokens)} tokens has no line before its last {lines}: question_lines={lines} needs prompts that end in "
        f"so many lines of question"
    )
