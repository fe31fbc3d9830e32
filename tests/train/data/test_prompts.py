from __future__ import annotations

import json
from pathlib import Path

import pytest

from train.data.prompts import Openings, PromptRecord, read_prompt_dataset, read_prompt_file

KEY = "generate.prompts.path"


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_prompts_and_turns_are_read(tmp_path: Path) -> None:
    lines = ['{"prompt": "Why?"}', "", '{"id": 3, "turns": ["Grüße", "And\\nthen?"]}']
    found = read_prompt_file(written(tmp_path / "p.jsonl", "\n".join(lines)), KEY)
    assert found == [PromptRecord(("Why?",)), PromptRecord(("Grüße", "And\nthen?"))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"p\.jsonl is empty; give one JSON object a line"),
        ("\n \n", r"p\.jsonl is empty"),
        (b"\xff\xfe", r"p\.jsonl is not UTF-8 \(byte 0\); convert it"),
        ('{"prompt": "a"}\n\n{"prompt": \n', r"p\.jsonl, line 3: not JSON"),
        ('{"prompt": "a"}\n["b"]', r'p\.jsonl, line 2: needs a "prompt" text or a list of "turns"'),
        ('{"text": "a"}', r"p\.jsonl, line 1: needs a"),
        ('{"prompt": " "}', r"line 1: .*none of them empty"),
        ('{"turns": []}', r"line 1: needs a"),
        ('{"turns": ["a", 3]}', r"line 1: needs a"),
        ("[" * 100_000, r"line 1: not JSON"),
        ('{"prompt": "a"}\n{"turns": ["b", "c \\ud83d"]}', r"line 2: holds '\\ud83d', half of a surrogate pair"),
    ],
)
def test_a_bad_file_is_refused_with_key_path_and_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^generate\.prompts\.path=.*{message}"):
        read_prompt_file(written(tmp_path / "p.jsonl", content), KEY)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"p\.jsonl is not a file; name a \.jsonl file"):
        read_prompt_file(tmp_path / "p.jsonl", KEY)


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    found = read_prompt_file(written(tmp_path / "p.jsonl", '{"prompt": "\\ud83d\\ude00"}'), KEY)
    assert found == [PromptRecord(("\N{GRINNING FACE}",))]


def test_a_data_set_of_texts_or_turns_is_read(tmp_path: Path) -> None:
    rows = [{"ask": "one", "talk": ["a", "b"]}, {"ask": "two", "talk": ["c"]}]
    written(tmp_path / "train.jsonl", "\n".join(map(json.dumps, rows)))
    asked = read_prompt_dataset(str(tmp_path), "train", "ask", "generate.prompts")
    assert asked == [PromptRecord(("one",)), PromptRecord(("two",))]
    talked = read_prompt_dataset(str(tmp_path), "train", "talk", "generate.prompts")
    assert talked == [PromptRecord(("a", "b")), PromptRecord(("c",))]


def test_a_data_set_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"generate\.prompts\.dataset=.*nothing \(split train\) could not be loaded"):
        read_prompt_dataset(str(tmp_path / "nothing"), "train", "ask", "generate.prompts")
    written(tmp_path / "train.jsonl", '{"ask": 3}')
    with pytest.raises(ValueError, match=r"generate\.prompts\.column=text is not in .*; columns: ask"):
        read_prompt_dataset(str(tmp_path), "train", "text", "generate.prompts")
    with pytest.raises(ValueError, match=r"generate\.prompts\.dataset=.*, row 0: needs a"):
        read_prompt_dataset(str(tmp_path), "train", "ask", "generate.prompts")


RECORDS = [PromptRecord((f"question {index}",)) for index in range(9)]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_records_fill_their_share_of_the_slots_evenly_and_each_comes_once(share: float) -> None:
    openings = Openings([*RECORDS, *RECORDS[:3]], share, seed=0)
    found = [openings.record(slot) for slot in range(60)]
    records = [record for record in found if record is not None]
    assert len(records) == len(set(records)) == min(9, int(60 * share))
    for count in range(1, 10 if share == 1 else int(9 / max(share, 0.15))):
        assert abs(sum(record is not None for record in found[:count]) - share * count) < 1


def test_the_seed_decides_the_order_and_other_records_do_not_change_it() -> None:
    def order(seed: int, records: list[PromptRecord]) -> list[PromptRecord | None]:
        openings = Openings(records, 1.0, seed)
        return [openings.record(slot) for slot in range(openings.num_slots(100))]

    assert order(0, RECORDS) == order(0, RECORDS[::-1])
    assert order(0, RECORDS) != order(1, RECORDS)
    assert order(0, RECORDS[1:]) == [record for record in order(0, RECORDS) if record != RECORDS[0]]


def test_given_prompts_alone_end_and_a_mix_goes_on() -> None:
    assert Openings(RECORDS, 1.0, seed=0).num_slots(100) == 9
    assert Openings(RECORDS, 0.5, seed=0).num_slots(100) == 100
    assert Openings(RECORDS, 0.5, seed=0).record(51) is None
