"""Any server that speaks OpenAI's completions (vLLM, SGLang, llama.cpp, TGI), many requests at a time, with retries.

Prompts go as token ids to /v1/completions, so that the chat template is ours whatever the server has. Tokens come back
as ids where the server gives them (vLLM: return_token_ids), else its text is tokenized again.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import httpx

from train.data.chat_format import ChatFormat
from train.data.engines.base import Completion, Request

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class ServerSettings:
    """url: up to and without /completions ("http://localhost:8000/v1"). model: its name there.

    concurrency: requests at a time. max_retries: of one request, after which the run ends. retry_seconds: wait before
    the first retry; it doubles with each. timeout_seconds: for one answer. api_key_variable: the environment variable
    that holds the key, where the server wants one.
    """

    url: str
    model: str
    concurrency: int
    max_retries: int
    retry_seconds: float
    timeout_seconds: float
    api_key_variable: str | None

    def headers(self) -> dict[str, str]:
        """Raises ValueError when the variable that is to hold the key is not set."""
        if self.api_key_variable is None:
            return {}
        key = os.environ.get(self.api_key_variable)
        if not key:
            raise ValueError(
                f"generate.engine.api_key_variable={self.api_key_variable} is not set; export it, or set null"
            )
        return {"Authorization": f"Bearer {key}"}


def check_server(settings: ServerSettings) -> None:
    """Raises ValueError naming key and remedy when the server does not answer, or does not have the model."""
    where, headers = f"generate.engine.url={settings.url}", settings.headers()
    try:
        answer = httpx.get(f"{settings.url.rstrip('/')}/models", headers=headers, timeout=10.0)
        answer.raise_for_status()
        names = [str(entry["id"]) for entry in answer.json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{where} does not answer ({_reason(error)}); start the server, or use another url") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} does not list models as OpenAI's interface does; give the url up to /v1") from error
    if settings.model not in names:
        raise ValueError(f"generate.engine.model={settings.model} is not on the server; it has: {', '.join(names)}")


class ServerEngine:
    """See `train.data.engines.base.Engine`.

    Bits are the server's affair: the same seed is asked for, and what a finished shard holds is never asked for again.
    """

    is_batch_invariant = True

    def __init__(self, settings: ServerSettings, chat: ChatFormat, *, seed: int) -> None:
        self._settings, self._chat, self._seed = settings, chat, seed
        self.capacity = settings.concurrency
        self._waiting: deque[Request] = deque()

    def submit(self, request: Request) -> None:
        """Queue a request; one that continues a conversation comes first, while the server may still have it cached."""
        if request.continues_turns:
            self._waiting.appendleft(request)
        else:
            self._waiting.append(request)

    def completions(self) -> Generator[Completion, None, None]:
        """Completions as they come. Raises ValueError when one request has failed more often than may be."""
        with asyncio.Runner() as runner:
            client = self._client()
            asked: set[asyncio.Task[Completion]] = set()
            done: set[asyncio.Task[Completion]] = set()
            try:
                while self._waiting or asked:
                    while self._waiting and len(asked) < self.capacity:
                        asked.add(runner.get_loop().create_task(self._complete(client, self._waiting.popleft())))
                    done, asked = runner.run(_first_done(asked))
                    for task in done:
                        yield task.result()
            finally:
                self._waiting.clear()
                runner.run(_abandon(done | asked, client))

    def _client(self) -> httpx.AsyncClient:
        """With a connection for each request: httpx's own limit is 100, and what waits for one times out."""
        settings = self._settings
        limits = httpx.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
        return httpx.AsyncClient(headers=settings.headers(), timeout=settings.timeout_seconds, limits=limits)

    async def _complete(self, client: httpx.AsyncClient, request: Request) -> Completion:
        body = {
            "model": self._settings.model,
            "prompt": list(request.prompt),
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": _request_seed(self._seed, request),
            "stop_token_ids": sorted(self._chat.end_ids),
            "return_token_ids": True,
        }
        answer = await self._post(client, body)
        try:
            (choice,) = answer.json()["choices"]
            return self._completion(request, choice)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"generate.engine.url={self._settings.url} answers otherwise than OpenAI's completions do ({error!r});"
                " use a server that has /v1/completions with token ids as prompt"
            ) from error

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
        """The server's answer to one request, asked again after waiting as long as the failure may pass."""
        settings, problem = self._settings, ""
        for attempt in range(settings.max_retries + 1):
            if attempt:
                await asyncio.sleep(min(settings.retry_seconds * 2 ** (attempt - 1), LONGEST_WAIT_SECONDS))
            try:
                answer = await client.post(f"{settings.url.rstrip('/')}/completions", json=body)
                if answer.status_code == 200:
                    return answer
                problem = f"status {answer.status_code}: {answer.text[:200]}"
                if answer.status_code not in RETRIED:
                    raise ValueError(f"generate.engine.url={settings.url} refuses a request ({problem})")
            except httpx.TransportError as error:
                problem = _reason(error)
        raise ValueError(
            f"generate.engine.url={settings.url} failed {settings.max_retries + 1} times in a row ({problem}); what is"
            " finished is kept: mend the server and run again"
        )

    def _completion(self, request: Request, choice: dict[str, Any]) -> Completion:
        """Token ids of an answer up to its first end token, which is added where the server leaves it out.

        A server that does not know `stop_token_ids` writes on behind one that is not its own.
        """
        given = choice.get("token_ids")
        if given is None:
            given = self._chat.tokenizer.encode(choice["text"], add_special_tokens=False).ids
        ids = tuple(int(token) for token in given)
        end = next((place for place, token in enumerate(ids) if token in self._chat.end_ids), None)
        if end is not None:
            return Completion(request.number, ids[: end + 1], is_ended=True)
        if choice["finish_reason"] == "stop":
            return Completion(request.number, (*ids, self._chat.answer_end_id), is_ended=True)
        return Completion(request.number, ids, is_ended=False)


def _request_seed(seed: int, request: Request) -> int:
    """63 bits. A server's noise begins anew with each request, so the prompt's length stands for the position."""
    text = f"{seed}/{request.sample_index}/{len(request.prompt)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


async def _first_done(
    tasks: set[asyncio.Task[Completion]],
) -> tuple[set[asyncio.Task[Completion]], set[asyncio.Task[Completion]]]:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _abandon(tasks: set[asyncio.Task[Completion]], client: httpx.AsyncClient) -> None:
    """Cancel what is under way, and look at what has failed: a failure that nobody looks at is printed at exit."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
