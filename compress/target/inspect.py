"""What a source says about itself before anything is converted: its shape, or the reason why it cannot be a target."""

import json
from functools import lru_cache
from pathlib import Path

from compress.target.gguf_convert import check_file, model_config
from compress.target.gguf_source import GgufFile
from compress.target.gguf_tokenizer import PRE_TOKENIZERS, pre_tokenizer_name, tokenizer_config
from compress.target.sources import Source, check_directory
from deploy.formats.architectures import ModelShape
from deploy.formats.chat import FIXED_DAY, ChatTemplate, ChatTemplateError, around_user_turn
from deploy.formats.model_dir import read_json

UNUSED = 5
"""A GGUF token type."""


@lru_cache(maxsize=2)
def open_gguf(path: Path) -> GgufFile:
    """The file, opened once per process: reading the metadata of a large vocabulary takes seconds."""
    return GgufFile(path)


def check_source(source: Source) -> None:
    """Raises ValueError when the source is damaged, truncated or of an unsupported architecture."""
    if source.kind == "gguf":
        check_file(open_gguf(source.path))
    else:
        check_directory(source.path)


def read_shape(source: Source) -> ModelShape:
    """The model's shape from the source's metadata. Raises ValueError on an unsupported architecture."""
    if source.kind == "gguf":
        file = open_gguf(source.path)
        tied = "output.weight" not in file.names()
        num_tokens = len(file.tokenizer_metadata().get("tokens", "?"))
        return ModelShape.from_config({**model_config(file), "vocab_size": num_tokens, "tie_word_embeddings": tied})
    return ModelShape.from_config(json.loads((source.path / "config.json").read_text(encoding="utf-8")))


def has_user_header(source: Source) -> bool:
    """Whether the source's chat template writes something by which the model knows that a user speaks.

    A base model has none, mostly, and cannot write user turns. Raises ValueError when the template does not compile or
    takes no user turn.
    """
    try:
        template = _chat_template(source)
        if template is None:
            return False
        before, _ = around_user_turn(lambda messages: template.render(messages, add_generation_prompt=True))
    except ChatTemplateError as error:
        raise ValueError(f"target.path={source.origin}: {error}") from error
    return bool(before.removeprefix(template.bos_token))


def _chat_template(source: Source) -> ChatTemplate | None:
    if source.kind == "gguf":
        file = open_gguf(source.path)
        text, tokens = file.metadata.get("tokenizer.chat_template"), tokenizer_config(file.tokenizer_metadata())
    else:
        config = source.path / "tokenizer_config.json"
        tokens = read_json(config) if config.is_file() else {}
        path = source.path / "chat_template.jinja"
        text = path.read_text(encoding="utf-8") if path.is_file() else tokens.get("chat_template")
        if isinstance(text, list):
            text = {each.get("name"): each.get("template") for each in text}.get("default")
    if not isinstance(text, str):
        return None
    bos = tokens.get("bos_token") or ""
    return ChatTemplate(text, bos_token=bos["content"] if isinstance(bos, dict) else bos, day=FIXED_DAY)


def tokenizer_rules(source: Source) -> dict[str, str]:
    """What beside its files decides a source's tokenizer: name → revision of the rules for its kind, where these were
    ever changed."""
    if source.kind != "gguf":
        return {}
    name = pre_tokenizer_name(open_gguf(source.path).tokenizer_metadata())
    rules = PRE_TOKENIZERS.get(name)
    return {f"rules of {name} tokenizers": str(rules.revision)} if rules and rules.revision else {}


def read_vocabulary(source: Source) -> dict[str, int]:
    """Token → id of the source's tokenizer, without the places that a GGUF file fills up with unused tokens.

    Raises ValueError when a directory's tokenizer cannot be read.
    """
    if source.kind == "gguf":
        metadata = open_gguf(source.path).tokenizer_metadata()
        kinds = metadata["token_type"]
        return {token: index for index, token in enumerate(metadata["tokens"]) if kinds[index] != UNUSED}
    from transformers import AutoTokenizer

    try:
        found: dict[str, int] = AutoTokenizer.from_pretrained(source.path).get_vocab()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"target.path={source.origin}: its tokenizer does not load ({error}); fetch it again"
        ) from error
    return found
