import pytest

from deploy.runtime.prompts import PromptRecord, read_prompts


def written(tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_both_forms_of_a_record_are_read(tmp_path):
    path = written(
        tmp_path,
        '{"prompt": "Hi"}\n\n{"id": 7, "category": "chat", "turns": ["a", "b"]}\r\n  {"id": "x", "prompt": "\u2028"}',
    )
    assert read_prompts(path) == [
        PromptRecord("1", "all", ("Hi",)),
        PromptRecord("7", "chat", ("a", "b")),
        PromptRecord("x", "all", ("\u2028",)),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "nonsense",
        "[" * 100_000,
        "[]",
        "3",
        '"text"',
        "{}",
        '{"turns": []}',
        '{"turns": "text"}',
        '{"turns": ["a", ""]}',
        '{"turns": ["a", 3]}',
        '{"prompt": ""}',
        '{"prompt": null}',
        '{"prompt": ["a"]}',
    ],
    ids=lambda line: line[:20],
)
def test_a_malformed_line_is_named(tmp_path, line):
    path = written(tmp_path, f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 3: (not JSON|needs a \"prompt\" text or a list)"):
        read_prompts(path)


@pytest.mark.parametrize(("content", "reason"), [("", "is empty"), ("\n \n", "is empty"), (b'{"a\xff', "not UTF-8")])
def test_a_file_without_records_is_refused(tmp_path, content, reason):
    with pytest.raises(ValueError, match=reason):
        read_prompts(written(tmp_path, content))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ValueError, match="no such file"):
            read_prompts(path)
