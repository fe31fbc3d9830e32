"""How a conversation becomes token ids: the target's tokenizer and chat template, as they serve it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from deploy.formats.chat import FIXED_DAY, ChatTemplate, after_answer, around_user_turn
from deploy.formats.tokenizer import load_tokenizer, special_ids

Message = Mapping[str, str]


class ChatFormat:
    """A tokenizer with a chat template.

    end_ids: tokens that end an answer, the target's own list (generation_config.json). A template that closes user
    turns with a special token that ends no answer (Mistral's [/INST]) adds it: a self-written user turn has to end.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, end_ids: Iterable[int]) -> None:
        self.tokenizer, self.template = tokenizer, template
        special = special_ids(tokenizer)
        _, bridge = around_user_turn(self._render)
        closing = next((token for token in self._encode(bridge) if token in special), None)
        self.end_ids = frozenset(end_ids) | (frozenset() if closing is None else {closing})

    @classmethod
    def open(cls, directory: Path, end_ids: Iterable[int]) -> ChatFormat:
        """From tokenizer.json, tokenizer_config.json and chat_template.jinja, on `FIXED_DAY`.

        Raises ValueError naming a bad file.
        """
        tokenizer = load_tokenizer(directory / "tokenizer.json")
        return cls(tokenizer, ChatTemplate.from_directory(directory, day=FIXED_DAY), end_ids)

    @property
    def has_user_header(self) -> bool:
        """Whether the template writes something by which the model knows that a user speaks."""
        before, _ = around_user_turn(self._render)
        return bool(before.removeprefix(self.template.bos_token))

    @property
    def answer_end_id(self) -> int:
        """The end token that the template writes after an answer; the lowest of `end_ids` where it writes none."""
        after = self._encode(after_answer(self.template))
        return next((token for token in after if token in self.end_ids), min(self.end_ids))

    def _render(self, messages: Sequence[Message]) -> str:
        return self.template.render(messages, add_generation_prompt=True)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens of a conversation up to where the answer begins. Raises ValueError when the template refuses it."""
        return tuple(self._encode(self._render(messages)))

    def user_prefix_ids(self, earlier: Sequence[Message] = ()) -> tuple[int, ...]:
        """Tokens after which the target writes the next user turn (Magpie, arXiv 2406.08464)."""
        return tuple(self._encode(around_user_turn(self._render, earlier)[0]))

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Tokens of a text that stands within a turn."""
        return tuple(self._encode(text))

    def text(self, token_ids: Sequence[int]) -> str:
        """What a reader of the tokens sees, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))
