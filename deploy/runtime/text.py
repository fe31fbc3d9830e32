"""Text while it is generated: whole characters only, and nothing beyond a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"


class IncrementalDecoder:
    """Turns tokens into text piece by piece; the pieces joined are `whole_text` of all tokens.

    A character may span several tokens: text that ends in an incomplete one is held back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = 0  # tokens before this one no longer influence the decoding of new ones
        self._emitted = 0

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._tokens[begin:end], skip_special_tokens=True))

    def _held(self) -> str:
        """What follows the text that was given out."""
        known = self._decode(self._context, self._emitted)
        text = self._decode(self._context, len(self._tokens))
        if text.startswith(known):
            return text[len(known) :]
        return self._decode(self._emitted, len(self._tokens))  # known characters were given up for an incomplete one

    def push(self, token: int) -> str:
        """The text that `token` completes; often one piece, sometimes empty."""
        self._tokens.append(token)
        held = self._held()
        if not held or held.endswith(_REPLACEMENT):
            return ""
        self._context, self._emitted = self._emitted, len(self._tokens)
        return held

    def flush(self) -> str:
        """What is still held back: an incomplete character, as replacement characters."""
        held = self._held()
        self._context = self._emitted = len(self._tokens)
        return held


def whole_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of all tokens: their decoding, where every character in it is complete.

    Beside an incomplete one, a tokenizer with bytes to fall back on gives up complete ones, which a listener was given
    when they came; the text is then what a listener was given.
    """
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True))
    if _REPLACEMENT not in text:
        return text
    decoder = IncrementalDecoder(tokenizer)
    return "".join([*map(decoder.push, tokens), decoder.flush()])


class StopFilter:
    """Passes text on until the first stop string, which it swallows; holds back what might become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("stop='' would stop at once; leave it out or give some text")
        self._stops = tuple(stops)
        self._pending = ""
        self.is_stopped = False

    def _held(self) -> int:
        """Length of the longest end of the pending text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-size:]) for stop in self._stops):
                return size
        return 0

    def push(self, text: str) -> str:
        """The text that may be shown now."""
        self._pending += text
        found = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            shown, self._pending = self._pending[: min(found)], ""
            return shown
        end = len(self._pending) - self._held()
        shown, self._pending = self._pending[:end], self._pending[end:]
        return shown

    def flush(self) -> str:
        """The rest, once no more text will come."""
        shown, self._pending = self._pending, ""
        return shown
