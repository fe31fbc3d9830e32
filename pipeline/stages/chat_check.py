"""Whether the target can write user turns itself, held against what is asked of it before anything is built."""

from __future__ import annotations

from collections.abc import Callable

HasUserHeader = Callable[[], bool]


def check_user_header(has_user_header: HasUserHeader, what: str, remedy: str) -> None:
    """Raises ValueError where nothing in the target's chat template says that a user speaks.

    has_user_header: () → whether something does. what: that it is to write.
    """
    if not has_user_header():
        raise ValueError(
            f"the target's chat template has no user header (a base model?), so that it cannot write {what}; {remedy}"
        )


def check_conversations(chat: dict[str, int], has_user_header: HasUserHeader) -> None:
    """For `calibrate.chat`."""
    if chat["num_samples"] + chat["num_heldout"] > 0:
        remedy = "set calibrate.chat.num_samples=0 calibrate.chat.num_heldout=0"
        check_user_header(has_user_header, "conversations", remedy)


def check_prompts(prompts_share: float, has_user_header: HasUserHeader) -> None:
    """For `generate`, of whose conversations a share begins with prompts that exist."""
    if prompts_share < 1:
        remedy = "give some: generate=prompts generate.prompts.path=FILE"
        check_user_header(has_user_header, "prompts", remedy)
