"""How far a lookup is right, by the length of its match: what `deploy/runtime/plan.py` expects of one.

    python -m benchmarks.lookup ARTIFACT [--conversations 300]

ARTIFACT: of the stage `generate`, with generate.stop_loops=false, for what is served is not cut either. At every token
that the target wrote greedily, the text's end is looked up in what stands before it, and the copy is compared with what
the target went on to write, where that is long enough. Printed are the share of tokens whose longest match has each
length, and the share of these whose first, second, … copied tokens are all right; and by temperature, over the whole
data set, the share of tokens that stand where generate.stop_loops=true would have ended the answer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from deploy.runtime.drafters.lookup import NUM_TOKENS, LookupDrafter, copy_onwards
from train.data.conversations import Conversation, read_conversations
from train.data.loops import until_loop

MOST = 15


def count_copies(conversation: Conversation, counts: dict[int, list[int]]) -> None:
    """Add to counts: length of a match (0: none) → how often it was the longest, then how often j copies were right."""
    text, drafter = conversation.token_ids.tolist(), LookupDrafter()
    for begin, end in conversation.spans:
        for place in range(begin, end - MOST + 1):
            match = drafter.find(0, text[:place])
            found = counts[match.length if match else 0]
            found[0] += 1
            if match is None:
                continue
            copied = copy_onwards(text[:place], match.position, MOST)
            for j, (ours, theirs) in enumerate(zip(copied, text[place : place + MOST], strict=True), 1):
                if ours != theirs:
                    break
                found[j] += 1


def count_looping(conversations: Iterable[Conversation]) -> dict[float, tuple[int, int]]:
    """Temperature → tokens that the target wrote, and those of them behind the point where its answer is known to
    loop."""
    counts: dict[float, tuple[int, int]] = {}
    for conversation in conversations:
        text = conversation.token_ids.tolist()
        for begin, end in conversation.spans:
            written, behind = counts.get(conversation.temperature, (0, 0))
            kept = len(until_loop(text[begin:end]))
            counts[conversation.temperature] = written + end - begin, behind + end - begin - kept
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--conversations", type=int, default=300)
    arguments = parser.parse_args()
    conversations = read_conversations(arguments.artifact, "train")
    greedy = [each for each in conversations if each.temperature == 0]
    counts = {length: [0] * (MOST + 1) for length in (0, *NUM_TOKENS)}
    for conversation in greedy[: arguments.conversations]:
        count_copies(conversation, counts)
    total = sum(found[0] for found in counts.values())
    print(f"{total} tokens, {counts[0][0] / total:.1%} of them without a match")
    for length in NUM_TOKENS:
        times, *right = counts[length]
        survival = " ".join(f"{number / max(times, 1):.2f}" for number in right)
        print(f"match of {length:2}: {times / total:5.1%} of tokens; right: {survival}")
    looping = count_looping(conversations)
    for temperature, (written, behind) in sorted(looping.items()):
        print(f"temperature {temperature:g}: {behind / written:.1%} of {written} tokens are in a loop for long")
    print(f"all: {sum(each[1] for each in looping.values()) / sum(each[0] for each in looping.values()):.1%}")


if __name__ == "__main__":
    main()
