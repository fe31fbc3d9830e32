"""A byte-level chat format, and an engine that answers by a rule in whatever order a test wants."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from deploy.formats.chat import ChatTemplate
from train.data.chat_format import ChatFormat
from train.data.conversations import Kept, Lost
from train.data.engines.base import Completion, Request
from train.data.recipe import Recipe, SelfWritten

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]")
END = 2
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index + len(SPECIAL) for index, token in enumerate(alphabet)}
    vocabulary |= {token: index for index, token in enumerate(SPECIAL)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


class RuleEngine:
    """Answers by a function of the request alone, in an order that a seed shuffles; may fail after some answers.

    Not a stand-in for a model but for time: which requests end first, and when a run is interrupted.
    """

    def __init__(
        self,
        answer: Callable[[Request], str],
        tokenizer: Tokenizer,
        *,
        order: int = 0,
        capacity: int = 7,
        fails_after: int | None = None,
        is_batch_invariant: bool = True,
    ) -> None:
        self._answer, self._tokenizer, self._order = answer, tokenizer, random.Random(order)
        self.capacity, self.is_batch_invariant, self._left = capacity, is_batch_invariant, fails_after
        self._waiting: list[Request] = []
        self.asked: list[Request] = []
        self.most_waiting = 0

    def submit(self, request: Request) -> None:
        self._waiting.append(request)
        self.asked.append(request)
        self.most_waiting = max(self.most_waiting, len(self._waiting))

    def completions(self) -> Generator[Completion, None, None]:
        while self._waiting:
            if self._left is not None:
                if self._left == 0:
                    raise InterruptedError
                self._left -= 1
            request = self._waiting.pop(self._order.randrange(len(self._waiting)))
            yield self.completion(request)

    def completion(self, request: Request) -> Completion:
        ids = self._tokenizer.encode(self._answer(request), add_special_tokens=False).ids
        is_ended = len(ids) < request.max_tokens
        return Completion(request.number, (*ids, END) if is_ended else tuple(ids[: request.max_tokens]), is_ended)


def babble(request: Request) -> str:
    """A text of 0 to 31 letters that hangs on the prompt, the temperature and the sample index."""
    seen = f"{request.prompt} {request.temperature} {request.sample_index if request.temperature else ''}"
    digest = hashlib.sha256(seen.encode()).digest()
    return "".join(chr(97 + byte % 26) for byte in digest[: digest[0] % 32])


def recipe(**changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "num_tokens": 900,
        "num_heldout": 5,
        "heldout_greedy_share": 0.6,
        "temperatures": (0.0, 0.6, 1.0),
        "top_p": 0.95,
        "max_tokens": 24,
        "stop_loops": True,
        "num_turns": 1,
        "self_written": SelfWritten(24, 0.8, 0.9),
        "context_length": 512,
        "shard_size": 4,
        "seed": 3,
    }
    return Recipe(**(fields | changes))


class Tools:
    """What the tests of this folder share."""

    END = END
    CHATML = CHATML
    RuleEngine = RuleEngine
    babble = staticmethod(babble)
    recipe = staticmethod(recipe)
    tokenizer = staticmethod(byte_tokenizer)

    @staticmethod
    def chat(template: str = CHATML, end_ids: tuple[int, ...] = (END,)) -> ChatFormat:
        return ChatFormat(byte_tokenizer(), ChatTemplate(template, bos_token="<|im_start|>"), end_ids)

    @staticmethod
    def contents(directory: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}

    @staticmethod
    def answered(steps: Generator[Request, Completion, Any], answers: list[Any]) -> tuple[list[Request], Any]:
        """Drive a slot by hand: answers are texts (ended) or tuples of ids (cut); the requests and the result."""
        requests, tokenizer = [], byte_tokenizer()
        try:
            request = next(steps)
            for answer in answers:
                requests.append(request)
                is_ended = isinstance(answer, str)
                ids = (*tokenizer.encode(answer).ids, END) if is_ended else answer
                request = steps.send(Completion(request.number, tuple(ids), is_ended))
        except StopIteration as end:
            return requests, end.value
        raise AssertionError(f"it asks on: {request}")


@pytest.fixture(scope="session")
def tools() -> Tools:
    return Tools()


@pytest.fixture(scope="session")
def kept() -> Callable[[list[Kept | Lost]], list[Kept]]:
    return lambda slots: [slot for slot in slots if isinstance(slot, Kept)]
