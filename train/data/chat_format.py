"""How a conversation becomes token ids: the target's tokenizer and chat template, as they serve it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from deploy.formats.chat import FIXED_DAY, TURN_MARKER, ChatTemplate, around_user_turn

Message = Mapping[str, str]


class ChatFormat:
    """A tokenizer with a chat template.

    end_ids: tokens that may end an answer. Where the template closes user turns with a special token of its own
    (Mistral's [/INST]), it is added to them, so that a self-written user turn can end.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, end_ids: Iterable[int]) -> None:
        self.tokenizer, self.template = tokenizer, template
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token for token, content in added.items() if content.special}
        _, bridge = around_user_turn(self._render)
        closing = next((token for token in self._encode(bridge) if token in self._special), None)
        self.end_ids = frozenset(end_ids) | (frozenset() if closing is None else {closing})

    @classmethod
    def open(cls, directory: Path, end_ids: Iterable[int]) -> ChatFormat:
        """From tokenizer.json, tokenizer_config.json and chat_template.jinja, on `FIXED_DAY`.

        Raises ValueError naming a bad file.
        """
        path = directory / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise ValueError(f"{path}: does not load: {error}") from error
        return cls(tokenizer, ChatTemplate.from_directory(directory, day=FIXED_DAY), end_ids)

    @property
    def has_user_header(self) -> bool:
        """Whether the template writes something by which the model knows that a user speaks."""
        before, _ = around_user_turn(self._render)
        return bool(before.removeprefix(self.template.bos_token))

    @property
    def answer_end_id(self) -> int:
        """The end token that the template writes after an answer; the lowest of `end_ids` where it writes none."""
        turns = [{"role": "user", "content": TURN_MARKER}, {"role": "assistant", "content": TURN_MARKER}]
        after = self.template.render(turns, add_generation_prompt=False).rpartition(TURN_MARKER)[2]
        return next((token for token in self._encode(after) if token in self.end_ids), min(self.end_ids))

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
