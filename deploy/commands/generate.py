"""`deploy generate`: one prompt, one answer."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from deploy.commands import options as o
from deploy.commands.opening import draft_options, open_session
from deploy.commands.terminal import speculation_line, stats_line, write
from deploy.runtime.generation import Generation, GenerationOptions
from deploy.runtime.measure import after_prompts, speculation_json
from deploy.runtime.modes import Mode
from deploy.runtime.sampling import SamplingParams


def generate(
    bundle: o.BundlePath,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="what to say to the model")],
    raw: Annotated[bool, typer.Option("--raw", help="continue the text as it is, without the chat template")] = False,
    system: o.System = None,
    max_tokens: o.MaxTokens = 256,
    temperature: o.Temperature = 0.0,
    top_p: o.TopP = 1.0,
    top_k: o.TopK = 0,
    min_p: o.MinP = 0.0,
    repetition_penalty: o.RepetitionPenalty = 1.0,
    seed: o.Seed = 0,
    stop: o.Stop = None,
    mode: o.Mode = None,
    depth: o.Depth = None,
    width: o.Width = None,
    nodes: o.Nodes = None,
    min_draft_length: o.MinDraftLength = None,
    device: o.Device = "auto",
    backend: o.Backend = None,
    threads: o.Threads = None,
    stats: o.Stats = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of streamed text")] = False,
) -> None:
    """Let the bundle's target answer."""
    if raw and system is not None:
        raise ValueError("--system needs the chat template; leave out --raw or --system")
    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    options = GenerationOptions(max_tokens, sampling, tuple(stop or ()))
    drafts = draft_options(depth, width, nodes, min_draft_length)
    session, decoding = open_session(bundle, mode, drafts, device, backend, threads)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    tokens = session.encode_raw(prompt) if raw else session.encode_chat(messages)
    result = session.generate(tokens, options, None if as_json else write)
    write(_as_json(result, decoding) + "\n" if as_json else "\n")
    if stats:
        typer.echo(stats_line(result), err=True)
        typer.echo(speculation_line(decoding, result), err=True)


def _as_json(result: Generation, mode: Mode) -> str:
    content: dict[str, Any] = {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.num_prompt_tokens,
        "completion_tokens": len(result.token_ids),
        "prefill_seconds": round(result.prefill_seconds, 4),
        "decode_seconds": round(result.decode_seconds, 4),
        "speculation": {"mode": mode, **speculation_json(after_prompts(result.speculation, 1))},
    }
    return json.dumps(content, ensure_ascii=False)
