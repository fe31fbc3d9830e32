"""`Session`: a backend, a tokenizer and a chat template, made to answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from tokenizers import Tokenizer

from deploy.formats.bundle import Bundle
from deploy.formats.chat import ChatTemplate
from deploy.formats.errors import BundleError, FormatError
from deploy.formats.tokenizer import load_tokenizer
from deploy.runtime.backend import Backend
from deploy.runtime.backends import BackendName, open_backend
from deploy.runtime.devices import DeviceName, bundle_bytes, choose_backend
from deploy.runtime.drafters.base import Drafter
from deploy.runtime.drafters.none import NoDrafter
from deploy.runtime.generation import Generation, GenerationOptions, Request, Stream, go_back, step
from deploy.runtime.modes import DrafterFactory, DraftOptions, Mode, require_possible
from deploy.runtime.scheduler import Scheduler, shared_length

CHAT_SEQUENCE = 0
"""The sequence of single answers, whose cache is kept for the next turn; `generate_many` uses those above it."""


class ContextError(ValueError):
    """A prompt and its answer that do not fit the model's context."""


def open_tokenizer(bundle: Bundle, vocab_size: int) -> Tokenizer:
    """The bundle's tokenizer, whose tokens a model with a vocabulary of `vocab_size` can read.

    Raises BundleError when tokenizer.json does not load or has more tokens.
    """
    path = bundle.path / "tokenizer.json"
    try:
        tokenizer = load_tokenizer(path)
    except FormatError as error:
        raise BundleError(str(error)) from error
    if tokenizer.get_vocab_size() > vocab_size:
        raise BundleError(f"{path}: has {tokenizer.get_vocab_size()} tokens, the target's vocabulary {vocab_size}")
    return tokenizer


class Session:
    """Answers prompts. The result depends on prompt and options, not on what was asked before nor on who drafts.

    drafter: for `backend`; by default nobody drafts.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        eos_token_ids: Sequence[int],
        drafter: Drafter | None = None,
    ) -> None:
        self.backend, self.tokenizer, self.template = backend, tokenizer, template
        self._drafter: Drafter = NoDrafter() if drafter is None else drafter
        self._eos = frozenset(eos_token_ids)
        self._cached: list[int] = []  # the tokens that CHAT_SEQUENCE's cache holds
        self._is_batching = False

    @property
    def drafter(self) -> Drafter:
        return self._drafter

    def use(self, drafter: Drafter) -> None:
        """Draft by `drafter` from now on; what earlier turns left in the caches is forgotten."""
        self._cached = []
        self.backend.reset(CHAT_SEQUENCE)
        self._drafter.reset(CHAT_SEQUENCE)
        drafter.reset(CHAT_SEQUENCE)
        self._drafter = drafter

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        mode: Mode = "plain",
        drafts: DraftOptions | None = None,
        backend: BackendName | DeviceName = "cpu",
        threads: int | None = None,
    ) -> Session:
        """Load the bundle's target and what `mode` needs beside it.

        backend: "auto" is the GPU where it can be used, else the CPU. Raises ValueError naming file and reason when
        something does not fit, or the bundle cannot do `mode`, and DeviceError for a GPU that cannot be used.
        """
        require_possible(mode, bundle, drafts)  # before anything is loaded
        chosen = choose_backend(backend, bundle_bytes(bundle))
        directory = bundle.model("target")
        tokenizer = open_tokenizer(bundle, directory.shape.vocab_size)
        opened = open_backend(chosen, directory, threads=threads)
        drafter = DrafterFactory(bundle, opened, chosen, threads).make(mode, drafts)
        return cls(opened, tokenizer, bundle.chat_template(), directory.eos_token_ids, drafter)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a conversation up to where the answer begins."""
        text = self.template.render(messages, add_generation_prompt=True)
        return list(self.tokenizer.encode(_checked(text), add_special_tokens=False).ids)

    def encode_raw(self, text: str) -> list[int]:
        """Tokens of a text to be continued, with whatever the tokenizer puts before every text."""
        return list(self.tokenizer.encode(_checked(text)).ids)

    def _check_length(self, prompt: Sequence[int], max_tokens: int) -> None:
        shape = self.backend.shape
        if not prompt:
            raise ValueError("the prompt has no tokens; give some text")
        if len(prompt) + max_tokens > shape.context_length:
            window = f" (its sliding window is {shape.sliding_window})" if shape.sliding_window else ""
            raise ContextError(
                f"prompt of {len(prompt)} tokens + max_tokens={max_tokens} exceeds the model's context of "
                f"{shape.context_length}{window}; shorten the prompt or lower max_tokens"
            )

    def generate(
        self,
        prompt: Sequence[int],
        options: GenerationOptions,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Continue `prompt` (token ids) until an end-of-text token, a stop string or `max_tokens`.

        What the prompt shares with the last one and its answer is not computed again. on_text: called with each piece
        of text as soon as it is certain. Raises ValueError when the prompt is empty or does not fit the context
        together with max_tokens.
        """
        self._check_length(prompt, options.max_tokens)
        cached, self._cached = self._cached, []  # an interrupt before the first forward leaves nothing to go on from
        num_shared = shared_length(cached, prompt[:-1])  # the last token is run to get what follows it
        num_shared = go_back(self.backend, self._drafter, CHAT_SEQUENCE, num_shared)
        stream = Stream(Request(prompt, options, on_text), CHAT_SEQUENCE, self.tokenizer, num_shared)
        try:
            while stream.finish_reason is None:
                step(self.backend, self._drafter, [stream], self._eos)
        finally:
            # An interrupt may fall between the cache's going back and the stream's.
            self._cached = stream.path[: min(stream.num_kept, self.backend.length(CHAT_SEQUENCE))]
        return stream.result()

    def generate_many(
        self, requests: Sequence[Request], *, num_sequences: int = 16
    ) -> Iterator[tuple[int, Generation]]:
        """Answer many requests, up to `num_sequences` of them in one forward; yields (index, answer) as they end.

        Each answer equals what `generate` gives for it alone. Raises ValueError, before any work, as `generate` does;
        and RuntimeError with the first answer of a batch that is begun before another one has ended or was closed.
        """
        if num_sequences < 1:
            raise ValueError(f"num_sequences={num_sequences} is out of range; use 1 or more")
        for request in requests:
            self._check_length(request.prompt, request.options.max_tokens)
        sequences = range(CHAT_SEQUENCE + 1, CHAT_SEQUENCE + 1 + num_sequences)
        scheduler = Scheduler(self.backend, self.tokenizer, sequences, self._eos, self._drafter)
        for request in requests:
            scheduler.submit(request)
        return self._answers(scheduler)

    def _answers(self, scheduler: Scheduler) -> Iterator[tuple[int, Generation]]:
        if self._is_batching:
            raise RuntimeError(
                "another generate_many of this session has not ended, and both would use the same sequences; read its "
                "answers to the end, close it, or open another session"
            )
        self._is_batching = True
        try:
            yield from scheduler.answers()
        finally:
            self._is_batching = False


def _checked(text: str) -> str:
    """Raises ValueError for what is no Unicode text: half of a surrogate pair, which stands for a byte that is not
    UTF-8 on a command line, and which JSON can spell."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt is not Unicode text: {text[error.start]!r} at character {error.start} is half of a surrogate "
            "pair; give the prompt in UTF-8"
        ) from error
    return text
