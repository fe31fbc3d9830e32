"""Prompts of random characters: text that no drafter knows, where speculation must at least not cost anything."""

from __future__ import annotations

import random
import string

from deploy.runtime.prompts import PromptRecord

CATEGORY = "random"
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + 12 * " "


def random_records(count: int, seed: int = 0) -> list[PromptRecord]:
    """`count` records of 20 to 400 characters each."""
    rng = random.Random(seed)
    texts = ["".join(rng.choices(_CHARACTERS, k=rng.randint(20, 400))).strip() for _ in range(count)]
    return [PromptRecord(f"{CATEGORY}-{number}", CATEGORY, (text,)) for number, text in enumerate(texts)]
