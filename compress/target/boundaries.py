"""Where a target's texts begin and its answers end, as far as its files tell.

Programs end an answer at the ids of generation_config.json, or of config.json where that names none. A model may say it
elsewhere too: in the other of the two files, as its tokenizer's end token, and by what its chat template writes behind
an answer. Where a fine-tuned model was taught an end that only its template knows, an answer would run on behind it.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from deploy.formats.chat import ChatTemplate, ChatTemplateError, after_answer
from deploy.formats.model_dir import ModelDirectory, read_json
from deploy.formats.tokenizer import load_tokenizer, special_ids


def begins_with_bos(directory: Path) -> bool:
    """Whether the tokenizer of a model directory puts its token for the beginning in front of every text.

    Its post-processor does it, or, in what was converted from a GGUF file, tokenizer_config.json says so.
    """
    bos = ChatTemplate.from_directory(directory).bos_token
    if not bos:
        return False
    if read_json(directory / "tokenizer_config.json").get("add_bos_token"):
        return True
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    return tokenizer.encode("").ids[:1] == [tokenizer.token_to_id(bos)]


def complete_end_tokens(directory: Path) -> list[int]:
    """Adds to generation_config.json the end tokens that a model directory names elsewhere; returns those added.

    Ids that are declared stay first and in their order. Where there is none to add, no file is touched. config.json's
    ids count beside generation_config.json's only where they are special tokens: old configurations carry their
    class's default, which is some word of another vocabulary. Raises ValueError naming a file that does not load.
    """
    with ModelDirectory.open(directory) as files:
        declared, config, vocab_size = files.eos_token_ids, files.config, files.shape.vocab_size
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    template = ChatTemplate.from_directory(directory)
    special = special_ids(tokenizer)
    found = [token for token in _listed(config.get("eos_token_id")) if token in special]
    found += _end_of_text(tokenizer, template)
    found += [token for token in _behind_an_answer(tokenizer, template) if token in special]
    added = list(dict.fromkeys(token for token in found if token not in declared and token < vocab_size))
    if added:
        path = directory / "generation_config.json"
        generation = read_json(path) if path.exists() else {}
        generation["eos_token_id"] = [*declared, *added]
        path.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    return added


def _listed(value: Any) -> list[int]:
    """`eos_token_id` as config.json has it: a number, several or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _end_of_text(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """The tokenizer's own end token, if it has one."""
    token = tokenizer.token_to_id(template.eos_token) if template.eos_token else None
    return [] if token is None else [token]


def _behind_an_answer(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """The first token that the template writes behind an answer, if it writes one; blanks do not count."""
    try:
        text = after_answer(template).lstrip()
    except ChatTemplateError:  # it takes no conversation with an answer in it, and so does not say how one ends
        return []
    return list(tokenizer.encode(text, add_special_tokens=False).ids[:1])
