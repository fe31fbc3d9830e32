"""One sample of tokens and the file that holds many: `samples.jsonl`, one JSON object a line."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from compress.errors import SettingError

SPLITS = ("calibration", "heldout")


@dataclass(frozen=True)
class Sample:
    """A run of tokens. group: "prose", "code", "chat" or "text"; split: one of `SPLITS`; source: which document."""

    group: str
    split: str
    source: str
    ids: tuple[int, ...]


def write_samples(path: Path, samples: Iterable[Sample], decode: Callable[[list[int]], str]) -> None:
    """Writes the samples; decode: ids → text, stored beside the ids for people who read the file."""
    with path.open("w", encoding="utf-8") as stream:
        for sample in samples:
            record = {**asdict(sample), "text": decode(list(sample.ids))}
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_samples(path: Path, split: str, groups: Iterable[str] | None = None) -> list[Sample]:
    """The samples of one split; of all groups, or of those named. Raises SettingError when a group has none."""
    found = []
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            record = json.loads(line)
            if record["split"] == split:
                found.append(Sample(record["group"], split, record["source"], tuple(record["ids"])))
    if groups is None:
        return found
    wanted, present = list(groups), {sample.group for sample in found}
    missing = [group for group in wanted if group not in present]
    if missing:
        raise SettingError(
            f"calibration={wanted}: calibrate made no {', '.join(missing)} samples (there are:"
            f" {', '.join(sorted(present)) or 'none'}); choose among these or set calibrate accordingly"
        )
    return [sample for sample in found if sample.group in wanted]


def spread(samples: list[Sample], num_samples: int | None) -> list[Sample]:
    """The first `num_samples`, taken from the groups in turn so that each gives alike; None takes all.

    Raises SettingError when there are fewer.
    """
    if num_samples is None:
        return samples
    if num_samples > len(samples):
        raise SettingError(f"num_samples={num_samples}: calibrate made only {len(samples)}; raise its budgets")
    by_group: dict[str, list[Sample]] = {}
    for sample in samples:
        by_group.setdefault(sample.group, []).append(sample)
    ranked = [(rank, sample) for group in by_group.values() for rank, sample in enumerate(group)]
    return [sample for _rank, sample in sorted(ranked, key=lambda pair: pair[0])[:num_samples]]
