"""`Session`: a backend, a tokenizer and a chat template, made to answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tokenizers import Tokenizer

from deploy.formats.bundle import Bundle
from deploy.formats.chat import ChatTemplate
from deploy.formats.errors import BundleError
from deploy.kernels.reference.fp32 import Float32
from deploy.kernels.reference.model import Activations, ReferenceBackend
from deploy.runtime.backend import SEQUENCE_END, Backend, Row
from deploy.runtime.sampling import SamplingParams, sample
from deploy.runtime.text import IncrementalDecoder, StopFilter

FinishReason = Literal["eos", "stop", "length"]
_PREFILL_ROWS = 64
_SEQUENCE = 0


@dataclass(frozen=True)
class GenerationOptions:
    """max_tokens: at most this many new tokens. stop: texts that end the answer and are not part of it."""

    max_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    sample_index: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} is out of range; use 1 or more")
        StopFilter(self.stop)  # refuses empty stop strings


@dataclass(frozen=True)
class Generation:
    """An answer. token_ids include the one that ended it; seconds are wall time of the two phases."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float


class _Writer:
    """Tokens in, text out: to `pieces` and to the listener."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], listener: Callable[[str], None] | None) -> None:
        self._decoder, self._filter, self._listener = IncrementalDecoder(tokenizer), StopFilter(stop), listener
        self.pieces: list[str] = []

    def _show(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
            if self._listener is not None:
                self._listener(piece)

    def write(self, token: int) -> bool:
        """Whether a stop string ends the text here."""
        self._show(self._filter.push(self._decoder.push(token)))
        return self._filter.is_stopped

    def finish(self) -> bool:
        """Show what is held back; whether a stop string appeared in it."""
        self._show(self._filter.push(self._decoder.flush()))
        if not self._filter.is_stopped:
            self._show(self._filter.flush())
        return self._filter.is_stopped


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """The bundle's tokenizer. Raises BundleError when tokenizer.json does not load."""
    path = bundle.path / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise BundleError(f"{path}: does not load: {error}") from error


class Session:
    """Answers one prompt at a time. The result depends on the prompt and the options, not on what was asked before."""

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer, template: ChatTemplate, eos_token_ids: Sequence[int]
    ) -> None:
        self.backend, self.tokenizer, self.template = backend, tokenizer, template
        self._eos = frozenset(eos_token_ids)

    @classmethod
    def open(cls, bundle: Bundle, *, activations: Activations = "int8") -> Session:
        """Load the bundle's target. Raises ValueError naming file and reason when something does not fit."""
        directory = bundle.model("target")
        tokenizer = open_tokenizer(bundle)
        if tokenizer.get_vocab_size() > directory.shape.vocab_size:
            raise BundleError(
                f"{bundle.path / 'tokenizer.json'}: has {tokenizer.get_vocab_size()} tokens, "
                f"the target's vocabulary {directory.shape.vocab_size}"
            )
        backend = ReferenceBackend(directory, activations=activations)
        return cls(backend, tokenizer, bundle.chat_template(), directory.eos_token_ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a conversation up to where the answer begins."""
        text = self.template.render(messages, add_generation_prompt=True)
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_raw(self, text: str) -> list[int]:
        """Tokens of a text to be continued, with whatever the tokenizer puts before every text."""
        return list(self.tokenizer.encode(text).ids)

    def _check_length(self, prompt: Sequence[int], max_tokens: int) -> None:
        shape = self.backend.shape
        if not prompt:
            raise ValueError("the prompt has no tokens; give some text")
        if len(prompt) + max_tokens > shape.context_length:
            window = f" (its sliding window is {shape.sliding_window})" if shape.sliding_window else ""
            raise ValueError(
                f"prompt of {len(prompt)} tokens + max_tokens={max_tokens} exceeds the model's context of "
                f"{shape.context_length}{window}; shorten the prompt or lower max_tokens"
            )

    def _prefill(self, prompt: Sequence[int], options: GenerationOptions) -> int:
        """Fill the cache with the prompt; the first new token."""
        for begin in range(0, len(prompt), _PREFILL_ROWS):
            part = prompt[begin : begin + _PREFILL_ROWS]
            rows = [Row(token, begin + i, _SEQUENCE, i - 1 if i else SEQUENCE_END) for i, token in enumerate(part)]
            is_last = begin + len(part) == len(prompt)
            logits = self.backend.forward(rows, logit_rows=[len(part) - 1] if is_last else []).logits
            self.backend.keep(_SEQUENCE, range(len(part)))
        return self._sample(logits[0], prompt, options)

    def _sample(self, logits: Float32, path: Sequence[int], options: GenerationOptions) -> int:
        return sample(logits, options.sampling, position=len(path), path=path, sample_index=options.sample_index)

    def _step(self, path: Sequence[int], options: GenerationOptions) -> int:
        """Run the path's last token; the next one."""
        logits = self.backend.forward([Row(path[-1], len(path) - 1, _SEQUENCE)]).logits
        self.backend.keep(_SEQUENCE, [0])
        return self._sample(logits[0], path, options)

    def generate(
        self,
        prompt: Sequence[int],
        options: GenerationOptions,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Continue `prompt` (token ids) until an end-of-text token, a stop string or `max_tokens`.

        on_text: called with each piece of text as soon as it is certain. Raises ValueError when the prompt is empty
        or does not fit the context together with max_tokens.
        """
        self._check_length(prompt, options.max_tokens)
        writer = _Writer(self.tokenizer, options.stop, on_text)
        start = time.perf_counter()
        self.backend.reset(_SEQUENCE)
        path = list(prompt)
        path.append(self._prefill(prompt, options))
        prefilled = time.perf_counter()
        while (reason := self._finish_reason(path, len(prompt), options, writer)) is None:
            path.append(self._step(path, options))
        if reason != "stop" and writer.finish():
            reason = "stop"
        end = time.perf_counter()
        return Generation(
            text="".join(writer.pieces),
            token_ids=tuple(path[len(prompt) :]),
            finish_reason=reason,
            num_prompt_tokens=len(prompt),
            prefill_seconds=prefilled - start,
            decode_seconds=end - prefilled,
        )

    def _finish_reason(
        self, path: Sequence[int], num_prompt: int, options: GenerationOptions, writer: _Writer
    ) -> FinishReason | None:
        """Write the path's last token; why the answer ends with it, or None."""
        if path[-1] in self._eos:
            return "eos"
        if writer.write(path[-1]):
            return "stop"
        return "length" if len(path) - num_prompt == options.max_tokens else None
