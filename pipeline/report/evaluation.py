"""What the terminal, the model card and the report tell of the modes' speed, from `evaluate.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.plots import grouped_bars, lines, stacked_bars

Result = Mapping[str, Any]
HEADING = ("mode", "tokens/s", "× plain", "predicted", "end to end", "first token, ms", "τ", "same answers")
MOST_POSITIONS = 6


def summary_lines(result: Result) -> list[str]:
    """The target alone, the fastest mode and mode auto: `plain 545 tok/s, auto 700 tok/s (1.28x), identical 40/40`."""
    modes = result["modes"]
    drafting = [mode for mode in modes if mode not in ("plain", "auto")]
    best = max(drafting, key=lambda mode: modes[mode]["decode_tok_s"] or 0.0, default=None)
    named = [mode for mode in ("plain", best, "auto") if mode is not None and modes.get(mode, {}).get("decode_tok_s")]
    rates = [f"{mode} {modes[mode]['decode_tok_s']:.0f} tok/s{_times(result, mode)}" for mode in named]
    same, total = count_same(result)
    return [", ".join([*rates, f"identical {same}/{total}"])]


def _times(result: Result, mode: str) -> str:
    return "" if mode == "plain" else f" ({_speed_up(result['modes'][mode], result['modes']['plain']):.2f}x)"


def _speed_up(found: Result, plain: Result) -> float:
    return (found["decode_tok_s"] or 0.0) / plain["decode_tok_s"] if plain["decode_tok_s"] else 0.0


def count_same(result: Result) -> tuple[int, int]:
    """Answers of all drafting modes, greedy and sampled, that are the target's own; and all of them."""
    counts = [
        found["identical_to_plain"]
        for modes in (result["modes"], result.get("sampled", {}).get("modes", {}))
        for mode, found in modes.items()
        if mode != "plain"
    ]
    return sum(count["same"] for count in counts), sum(count["total"] for count in counts)


def cells(result: Result) -> list[list[str]]:
    """The table as text, heading first."""
    table = [list(HEADING)]
    plain = result["modes"]["plain"]
    for mode, found in result["modes"].items():
        same = found["identical_to_plain"]
        rates = [_number(found[key], 0) for key in ("decode_tok_s", "predicted_tok_s", "e2e_tok_s")]
        row = [mode, rates[0], f"{_speed_up(found, plain):.2f}", *rates[1:], f"{found['ttft_ms']:.1f}"]
        table.append([*row, f"{found['tau']:.2f}", f"{same['same']}/{same['total']}"])
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def as_markdown(result: Result) -> str:
    """The table for the model card: fewer columns than the report's."""
    table = [[row[0], row[1], row[2], row[6], row[7]] for row in cells(result)]
    rule = ["---", *("---:" for _ in table[0][1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (table[0], rule, *table[1:]))


def caption(result: Result) -> str:
    """On what it was measured, and what the columns mean."""
    machine, plain = result["machine"], result["modes"]["plain"]
    where = f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, load {machine['load_average']} before"
    return (
        f"Held-out text, greedy, {plain['tokens']} tokens a mode, each prompt by all modes in turn ({where})."
        " Predicted: the cost model, given this mode's own acceptance. End to end: with the reading of the prompt."
        " τ: tokens a call of the target. Same answers: token by token those of the target alone; all were compared at"
        f" temperature {result['sampled']['temperature']} too."
    )


def plots(result: Result) -> list[str]:
    """SVG elements: speed-up by kind of text, acceptance by position, T(rows), and where a round's time goes."""
    modes: Mapping[str, Result] = result["modes"]
    drafting = {mode: found for mode, found in modes.items() if mode != "plain"}
    accepted = {mode: found["acceptance_by_position"][:MOST_POSITIONS] for mode, found in drafting.items()}
    accepted = {mode: shares for mode, shares in accepted.items() if shares}
    made = [grouped_bars(*_speed_ups(result), "Decoding speed over the target alone, by kind of text")]
    if accepted:
        num_positions = max(map(len, accepted.values()))
        padded = {mode: [*shares, *[0.0] * (num_positions - len(shares))] for mode, shares in accepted.items()}
        positions = [str(position + 1) for position in range(num_positions)]
        title = "Drafts accepted at each position, where those before were"
        made.append(grouped_bars(positions, padded, title, labels=list(modes)))
    curves = {model: [(int(n), ms) for n, ms in by_rows.items()] for model, by_rows in result["rows_ms"].items()}
    made.append(lines(curves, "Milliseconds of a forward", x_label="rows"))
    shares = {mode: found["round_ms"] for mode, found in modes.items() if found["round_ms"]}
    if shares:
        parts = {part: [found[part] for found in shares.values()] for part in ("verify", "draft", "other")}
        made.append(stacked_bars(list(shares), parts, "Where a round's milliseconds go"))
    return made


def _speed_ups(result: Result) -> tuple[list[str], dict[str, Sequence[float]]]:
    modes = result["modes"]
    categories = list(modes["plain"]["by_category"])
    series: dict[str, Sequence[float]] = {}
    for mode, found in modes.items():
        pairs = [(found["by_category"][name], modes["plain"]["by_category"][name]) for name in categories]
        series[mode] = [_speed_up(*pair) for pair in (*pairs, (found, modes["plain"]))]
    return [*categories, "all"], series
