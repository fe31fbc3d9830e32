"""Documents, the split by document, and windows of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.calibration.samples import Sample
from compress.calibration.texts import (
    SECTION_CHARACTERS,
    Document,
    dataset_documents,
    file_documents,
    file_format,
    python_documents,
    split_documents,
    windows,
)


def documents(num: int, words: int = 150) -> list[Document]:
    """Every word occurs once over all documents, so that a token says where it came from."""
    return [
        Document(f"d{index}", " ".join(str(index * 10_000 + word) for word in range(words))) for index in range(num)
    ]


def tokenize(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def cut(
    parts: list[Document], num_samples: int, seed: int = 0, length: int = 64, split: str = "heldout"
) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return windows(parts, tokenize, group="g", split=split, num_samples=num_samples, sequence_length=length, rng=rng)


@given(num=st.integers(1, 60), more=st.integers(1, 20), share=st.floats(0, 0.9), seed=st.integers(0, 2**31))
def test_a_document_that_is_added_moves_no_other(num: int, more: int, share: float, seed: int) -> None:
    few, many = documents(num, 1), documents(num + more, 1)
    before = split_documents(few, heldout_share=share, seed=seed)
    after = split_documents(many, heldout_share=share, seed=seed)
    for part, grown in zip(before, after, strict=True):
        assert set(part) <= set(grown)
    assert sorted((*after[0], *after[1]), key=lambda document: document.name) == sorted(
        many, key=lambda document: document.name
    )


def test_the_held_out_share_is_about_what_was_asked_for_and_follows_the_seed() -> None:
    many = documents(2000, 1)
    splits = [split_documents(many, heldout_share=0.2, seed=seed)[1] for seed in (0, 1)]
    for heldout in splits:
        assert 340 < len(heldout) < 460  # 400 ± 3.4 standard deviations
    assert splits[0] != splits[1]


def test_no_token_is_in_both_calibration_and_held_out_windows() -> None:
    parts = split_documents(documents(40), heldout_share=0.3, seed=3)
    tokens = []
    for split, part in zip(("calibration", "heldout"), parts, strict=True):
        tokens.append([token for sample in cut(part, 12, split=split) for token in sample.ids])
        assert len(tokens[-1]) == len(set(tokens[-1])) == 12 * 64
    assert not set(tokens[0]) & set(tokens[1])


def test_windows_are_runs_of_their_document_and_spread_before_any_repeats() -> None:
    samples = cut(documents(10, 300), 10)
    assert len({sample.source for sample in samples}) == 10
    for sample in samples:
        first = sample.ids[0]
        assert sample.ids == tuple(range(first, first + 64))
        assert sample.source == f"d{first // 10_000}"
    more = cut(documents(10, 300), 40)  # four whole windows in each
    assert {sample.source for sample in more[:10]} == {sample.source for sample in samples}
    assert len(set(more)) == 40


def test_windows_depend_on_the_seed_alone() -> None:
    assert cut(documents(30), 7, seed=1) == cut(documents(30), 7, seed=1)
    assert cut(documents(30), 7, seed=1) != cut(documents(30), 7, seed=2)


def test_a_short_document_gives_one_shorter_window_and_a_tiny_one_none() -> None:
    parts = [Document("tiny", documents(1, 63)[0].text), Document("short", documents(1, 70)[0].text)]
    (sample,) = cut(parts, 1, length=200)
    assert (sample.source, len(sample.ids)) == ("short", 70)


def test_too_little_text_says_how_many_windows_there_are() -> None:
    with pytest.raises(ValueError, match=r"the g documents give 3 heldout samples of 64 tokens, 5 are asked for"):
        cut(documents(3, 100), 5)


def test_too_little_held_out_text_names_the_share_that_is_held_out() -> None:
    with pytest.raises(
        ValueError, match=r"lower calibrate\.text\.num_heldout, raise calibrate\.text\.heldout_share or"
    ):
        cut(documents(3, 100), 5)
    with pytest.raises(ValueError, match=r"asked for; lower calibrate\.text\.num_samples or give more text$"):
        cut(documents(3, 100), 5, split="calibration")


def test_long_documents_are_found_among_many_that_are_too_short() -> None:
    prompts = [Document(f"p{index}", "1 2 3") for index in range(500)]
    for seed in range(5):
        samples = cut(prompts + documents(6, 70), 6, seed=seed)
        assert {sample.source for sample in samples} == {f"d{index}" for index in range(6)}


def test_no_more_documents_are_tokenized_than_four_a_sample_where_these_suffice() -> None:
    read: list[str] = []

    def tokenized(text: str) -> list[int]:
        read.append(text)
        return tokenize(text)

    many = documents(50)
    arguments: dict[str, Any] = {"group": "g", "split": "heldout", "num_samples": 5, "sequence_length": 64}
    samples = windows(many, tokenized, **arguments, rng=np.random.default_rng(2))
    order = np.random.default_rng(2).permutation(50)
    assert read == [many[index].text for index in order[:20]]
    assert [sample.source for sample in samples] == [many[index].name for index in order[:5]]


def test_none_asked_for_is_none_made() -> None:
    assert cut([], 0) == []


def test_pythons_own_texts_are_long_enough_for_the_defaults() -> None:
    groups = python_documents()
    assert set(groups) == {"prose", "code"}
    sizes = {group: sum(len(document.text) for document in found) for group, found in groups.items()}
    assert sizes["prose"] > 200_000
    assert sizes["code"] > 2_000_000
    for found in groups.values():
        assert len({document.name for document in found}) == len(found) > 30


def test_json_lines_may_hold_texts_prompts_or_turns(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    records = [{"text": "one"}, {"prompt": "two", "id": 7}, {"turns": ["three", "four"]}]
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    assert [document.text for document in file_documents(path)] == ["one", "two", "three\n\nfour"]


def test_a_line_inserted_into_a_file_renames_no_other_document(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    lines = [json.dumps({"text": text}) for text in ("one", "two", "one")]
    path.write_text("\n".join(lines))
    before = [document.name for document in file_documents(path)]
    path.write_text("\n".join([json.dumps({"text": "zero"}), *lines]))
    assert [document.name for document in file_documents(path)][1:] == before
    assert before[0] == before[2] != before[1]


def test_a_file_and_a_data_set_of_other_names_name_the_same_texts_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["one", "two", "three"]
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "c.txt").write_text("one")
    use_rows(monkeypatch, texts)
    first = file_documents(tmp_path / "a.jsonl")
    assert first == file_documents(tmp_path / "b.jsonl") == dataset_documents("owner/set", "train", "text")
    assert file_documents(tmp_path / "c.txt") == first[:1]


def use_rows(monkeypatch: pytest.MonkeyPatch, values: list[Any]) -> None:
    """A data set whose column "text" has these values."""
    import datasets

    rows = datasets.Dataset.from_dict({"text": values})
    monkeypatch.setattr(datasets, "load_dataset", lambda _name, split: rows)


def test_rows_without_a_text_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    use_rows(monkeypatch, ["one", None, "", " \n", "two"])
    assert [document.text for document in dataset_documents("owner/set", "train", "text")] == ["one", "two"]


def test_a_row_that_holds_no_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    use_rows(monkeypatch, [None, ["turn"]])
    with pytest.raises(
        ValueError, match=r"^calibrate\.text\.column=text: row 1 of owner/set holds .* type list; name a"
    ):
        dataset_documents("owner/set", "train", "text")


@pytest.mark.parametrize(("name", "expected"), [("a.jsonl", "jsonl"), ("a.txt", "text"), ("a", "text")])
def test_a_files_suffix_says_how_it_is_read(name: str, expected: str) -> None:
    assert file_format(Path(name)) == expected


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0b", "\x1c"])
def test_only_a_newline_ends_a_line(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "some.jsonl"
    text = f"a{separator}b"
    line = json.dumps({"text": text}, ensure_ascii=False).replace("\\u000b", "\x0b").replace("\\u001c", "\x1c")
    if separator in "\x0b\x1c":  # bare control characters are not JSON; escaped ones are
        line = json.dumps({"text": text})
    path.write_text(line + "\n", encoding="utf-8")
    assert [document.text for document in file_documents(path)] == [text]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "x"', "line 3: not JSON"),
        ("just text", "line 3: not JSON"),
        ('["text"]', 'line 3: needs a "text" or "prompt" string or a list of "turns"'),
        ('{"text": 5}', 'line 3: needs a "text"'),
        ('{"turns": []}', 'line 3: needs a "text"'),
        ('{"turns": ["a", 2]}', 'line 3: needs a "text"'),
        ("[" * 100_000, "line 3: not JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"^calibrate\.text\.path=.*some\.jsonl, line 3: ") as caught:
        file_documents(path)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.txt", b" \n\n \n", "is empty"),
        ("a.jsonl", b'{"text": ""}\n{"text": "  "}\n', "is empty"),
        ("a.txt", b"caf\xe9", r"is not UTF-8 \(byte 3\)"),
        ("a.jsonl", b'{"text": "\xff"}', "is not UTF-8"),
    ],
)
def test_a_file_without_usable_text_is_refused(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^calibrate\.text\.path=.*{name} {reason}"):
        file_documents(path)


@pytest.mark.parametrize("name", ["nothing.txt", "."])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"calibrate\.text\.path=.* is not a file; name a \.txt or \.jsonl file"):
        file_documents(tmp_path / name)


def test_a_plain_text_is_cut_into_sections_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    paragraphs = [f"{index} " + "x" * 900 for index in range(23)]
    path.write_text("\n\n".join(paragraphs))
    found = file_documents(path)
    assert "\n\n".join(document.text for document in found) == "\n\n".join(paragraphs)
    assert len(found) == 5
    assert all(len(document.text) >= SECTION_CHARACTERS for document in found[:-1])
