"""Chat templates: the Jinja source that turns messages into a prompt, rendered as transformers renders it.

Environment as in transformers 5.17, `utils/chat_template_utils.py`: sandboxed and immutable, trim_blocks,
lstrip_blocks, loop controls, `raise_exception`, `strftime_now`, `tojson` without HTML escaping, and the `generation`
block, which only marks text there and passes it through here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from deploy.formats.errors import FormatError
from deploy.formats.model_dir import read_json

TURN_MARKER = "\u2063turn\u2063"
"""Stands for a turn's text while a template is taken apart; no template writes it, none trims it."""

OTHER_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names of special tokens that templates may write, besides those for the beginning and the end."""
FIXED_DAY = date(2024, 7, 26)
"""What a template writes as the date where a text has to follow from its key alone: Llama 3's own default."""


class ChatTemplateError(ValueError):
    """The template does not compile, or refuses these messages."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: its contents, unchanged."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration is a mutable class attribute)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_contents"), [], [], body).set_lineno(line)

    def _contents(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _clock(day: date | None) -> Callable[[str], str]:
    """`strftime_now` as it stands at midnight of `day`; None: as it stands when it is asked."""

    def strftime_now(pattern: str) -> str:
        moment = datetime.now() if day is None else datetime.combine(day, time())
        return moment.strftime(pattern)

    return strftime_now


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template. Raises ChatTemplateError (a ValueError) when the source does not compile.

    other_tokens: special tokens that a template may write besides these two, by name ("unk_token": "<unk>"). day: the
    date that a template writes which asks for one (Llama 3, SmolLM3); None writes the present one.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        other_tokens: Mapping[str, str] = MappingProxyType({}),
        day: date | None = None,
    ) -> None:
        self.source, self.bos_token, self.eos_token = source, bos_token, eos_token
        self._tokens = {**other_tokens, "bos_token": bos_token, "eos_token": eos_token}
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _clock(day)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template does not compile: {error}") from error

    @classmethod
    def from_directory(cls, directory: Path, *, day: date | None = None) -> ChatTemplate:
        """`chat_template.jinja` with the special tokens that `tokenizer_config.json` beside it names.

        day: as of the class. Raises FormatError (a ValueError) naming the file that is missing or not readable.
        """
        tokens = read_json(directory / "tokenizer_config.json")

        def text(key: str) -> str:
            value = tokens.get(key) or ""
            return str(value.get("content", "")) if isinstance(value, dict) else str(value)

        path = directory / "chat_template.jinja"
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"{path}: not readable: {error}") from error
        others = {key: text(key) for key in OTHER_TOKENS if text(key)}
        return cls(source, bos_token=text("bos_token"), eos_token=text("eos_token"), other_tokens=others, day=day)

    @property
    def identity(self) -> str:
        """sha256 of the source, hexadecimal: two texts were made alike only if this agrees."""
        return hashlib.sha256(self.source.encode("utf-8")).hexdigest()

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The prompt's text; special tokens are in it, so it is to be tokenized without adding any.

        messages: `{"role": …, "content": …}` in order. Raises ChatTemplateError when the template refuses them.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error


def around_user_turn(
    render: Callable[[list[dict[str, str]]], str], earlier: Sequence[Mapping[str, str]] = ()
) -> tuple[str, str]:
    """What a template writes before a user turn that follows the `earlier` messages, and between it and the answer.

    The first part is what an instruction model continues with a user turn of its own (Magpie, arXiv 2406.08464); it
    holds nothing but the earlier messages where a template has no header for users. render: messages → prompt with the
    generation header. Raises what `render` raises.
    """
    messages = [dict(message) for message in earlier]
    before, _, after = render([*messages, {"role": "user", "content": TURN_MARKER}]).rpartition(TURN_MARKER)
    return before, after


def after_answer(template: ChatTemplate) -> str:
    """What the template writes behind an answer with which a conversation ends: a token that ends turns, mostly.

    "" where it shows no answer as it was given. Raises ChatTemplateError when it refuses a question with its answer.
    """
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": TURN_MARKER}]
    _, marker, after = template.render(turns, add_generation_prompt=False).rpartition(TURN_MARKER)
    return after if marker else ""
