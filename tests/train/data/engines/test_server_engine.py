"""A real HTTP server that answers, stumbles, refuses and dies."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from train.data.engines.base import Completion, Request
from train.data.engines.server_engine import ServerEngine, ServerSettings, check_server
from train.data.generation import DataGenerator
from train.data.prompts import Openings
from train.data.shards import ShardDirectory


@dataclass
class Server:
    """OpenAI's completions over a rule. fails: called with each request's body; a status to answer with, or None.

    dies_after: answers, after which it goes down for good. has_ids: whether it gives token ids beside the text.
    gate: passed before an answer, where there is one.
    """

    fails: Callable[[dict[str, Any]], int | None] = lambda body: None
    dies_after: int | None = None
    has_ids: bool = True
    seconds: float = 0.0
    gate: threading.Barrier | None = None
    num_answered: int = 0
    now: int = 0
    most: int = 0
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str | None] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        state = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def answer(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                is_models = self.path == "/v1/models"
                self.answer(200 if is_models else 404, {"data": [{"id": "w4"}, {"id": "other"}]} if is_models else {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with state.lock:
                    state.now += 1
                    state.most = max(state.most, state.now)
                    state.seen.append(body)
                    state.headers.append(self.headers.get("Authorization"))
                time.sleep(state.seconds)
                if state.gate is not None:
                    state.gate.wait()
                with state.lock:
                    state.now -= 1
                    is_dead = state.dies_after is not None and state.num_answered >= state.dies_after
                    status = None if is_dead else state.fails(body)
                    state.num_answered += status is None and not is_dead
                if is_dead:
                    self.close_connection = True
                    self.connection.close()
                elif status is not None:
                    self.answer(status, {"error": "no"})
                else:
                    self.answer(200, {"choices": [state.choice(body)]})

        class ManyAtOnce(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

        self.http = ManyAtOnce(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def choice(self, body: dict[str, Any]) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps([body["prompt"], body["seed"], body["temperature"]]).encode()).digest()
        ids = [5 + byte % 200 for byte in digest[: digest[0] % 32]]
        is_ended = len(ids) < body["max_tokens"]
        ids = ids[: body["max_tokens"]]
        text = "".join(chr(97 + token % 26) for token in ids)
        answer = {"text": text, "finish_reason": "stop" if is_ended else "length"}
        return {**answer, "token_ids": [*ids, 2] if is_ended else ids} if self.has_ids else answer


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(**fields: Any) -> Server:
        server = Server(**fields)
        server.start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


def settings(url: str, **changes: Any) -> ServerSettings:
    fields: dict[str, Any] = {
        "model": "w4",
        "concurrency": 4,
        "max_retries": 3,
        "retry_seconds": 0.01,
        "timeout_seconds": 5.0,
        "api_key_variable": None,
    }
    return ServerSettings(url, **(fields | changes))


def request(number: int, **changes: Any) -> Request:
    fields: dict[str, Any] = {"max_tokens": 24, "temperature": 0.7, "top_p": 0.9, "sample_index": number}
    return Request(number, (1, 9, 10 + number), **(fields | changes))


def ask(engine: ServerEngine, count: int) -> dict[int, tuple[int, ...]]:
    for number in range(count):
        engine.submit(request(number))
    return {found.number: found.token_ids for found in engine.completions()}


def test_every_request_is_answered_with_what_it_asked_for(serve: Any, tools: Any) -> None:
    server = serve()
    found = ask(ServerEngine(settings(server.url + "/"), tools.chat(), seed=5), 20)
    assert sorted(found) == list(range(20))
    asked = {body["prompt"][2] - 10: body for body in server.seen}
    for number, ids in found.items():
        body = asked[number]
        assert ids == tuple(server.choice(body)["token_ids"])
        assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("w4", 0.7, 0.9, 24)
    assert len({body["seed"] for body in server.seen}) == 20


def test_text_is_tokenized_and_ended_where_the_server_gives_no_ids(serve: Any, tools: Any) -> None:
    server, chat = serve(has_ids=False), tools.chat()
    found = ask(ServerEngine(settings(server.url), chat, seed=5), 20)
    for body in server.seen:
        choice = server.choice(body)
        ids = tuple(chat.tokenizer.encode(choice["text"]).ids)
        assert found[body["prompt"][2] - 10] == ((*ids, 2) if choice["finish_reason"] == "stop" else ids)


def completed(engine: ServerEngine, asked: Request) -> Completion:
    engine.submit(asked)
    (found,) = engine.completions()
    return found


@pytest.mark.parametrize("has_ids", [True, False])
@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_nothing_behind_an_end_token_is_part_of_an_answer(
    serve: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, finish_reason: str, has_ids: bool
) -> None:
    """Servers stop at the ends that they know, and may write on behind the template's own."""
    server, chat = serve(), tools.chat(end_ids=(2, 0))
    ids = chat.tokenizer.encode("yes<|im_end|>and on<|im_end|>").ids
    text = chat.tokenizer.decode(ids, skip_special_tokens=False)
    answer = {"text": text, "finish_reason": finish_reason} | ({"token_ids": ids} if has_ids else {})
    monkeypatch.setattr(server, "choice", lambda body: answer)
    found = completed(ServerEngine(settings(server.url), chat, seed=0), request(3))
    assert found == Completion(3, tuple(chat.tokenizer.encode("yes<|im_end|>").ids), is_ended=True)
    assert server.seen[0]["stop_token_ids"] == [0, 2]


def test_turns_of_a_conversation_do_not_share_their_seed(serve: Any, tools: Any) -> None:
    server = serve()
    first, later = request(0, sample_index=7), Request(0, (1, 9, 10, 11, 12), 24, 0.7, 0.9, sample_index=7)
    for seed, asked in ((0, first), (0, later), (0, first), (1, first)):
        completed(ServerEngine(settings(server.url), tools.chat(), seed=seed), asked)
    seeds = [body["seed"] for body in server.seen]
    assert seeds[0] == seeds[2]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_more_than_a_hundred_requests_are_in_flight_where_the_concurrency_says_so(serve: Any, tools: Any) -> None:
    server = serve(gate=threading.Barrier(110, timeout=10))
    engine = ServerEngine(settings(server.url, concurrency=110, timeout_seconds=30.0), tools.chat(), seed=0)
    assert len(ask(engine, 110)) == 110
    assert server.most == 110


def test_no_more_requests_are_in_flight_than_the_concurrency(serve: Any, tools: Any) -> None:
    server = serve(seconds=0.02)
    ask(ServerEngine(settings(server.url, concurrency=3), tools.chat(), seed=0), 20)
    assert server.most == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_stumbling_server_is_asked_again(serve: Any, tools: Any, status: int) -> None:
    tries: Counter[str] = Counter()

    def fails(body: dict[str, Any]) -> int | None:
        tries[str(body)] += 1
        return status if tries[str(body)] <= 2 else None

    server = serve(fails=fails)
    calm = serve()
    assert ask(ServerEngine(settings(server.url), tools.chat(), seed=0), 9) == ask(
        ServerEngine(settings(calm.url), tools.chat(), seed=0), 9
    )
    assert set(tries.values()) == {3}


def test_a_server_that_keeps_failing_ends_the_run(serve: Any, tools: Any) -> None:
    server = serve(fails=lambda body: 500)
    with pytest.raises(ValueError, match=r"generate\.engine\.url=.* failed 3 times in a row \(status 500.*run again"):
        ask(ServerEngine(settings(server.url, max_retries=2), tools.chat(), seed=0), 1)
    assert len(server.seen) == 3


def test_a_request_that_is_refused_is_not_repeated(serve: Any, tools: Any) -> None:
    server = serve(fails=lambda body: 400)
    with pytest.raises(ValueError, match=r"refuses a request \(status 400"):
        ask(ServerEngine(settings(server.url), tools.chat(), seed=0), 1)
    assert len(server.seen) == 1


def test_requests_that_fail_together_fail_as_one(
    tools: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio complains of every failure that nobody looked at, when its task is forgotten."""

    async def refuse(*_arguments: Any) -> None:
        await asyncio.sleep(0)
        raise ValueError("refuses a request")

    monkeypatch.setattr(ServerEngine, "_post", refuse)
    with pytest.raises(ValueError, match="refuses a request"):
        ask(ServerEngine(settings("http://127.0.0.1:9/v1"), tools.chat(), seed=0), 4)
    gc.collect()
    assert caplog.messages == []


def test_an_answer_of_another_form_is_refused(serve: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    monkeypatch.setattr(server, "choice", lambda body: {"message": "hello"})
    with pytest.raises(ValueError, match=r"answers otherwise than OpenAI's completions do"):
        ask(ServerEngine(settings(server.url), tools.chat(), seed=0), 1)


def test_a_key_is_sent_and_a_missing_one_is_named(serve: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    keyed = settings(server.url, api_key_variable="A_SERVERS_KEY")
    with pytest.raises(ValueError, match=r"api_key_variable=A_SERVERS_KEY is not set; export it, or set null"):
        check_server(keyed)
    monkeypatch.setenv("A_SERVERS_KEY", "abc")
    ask(ServerEngine(keyed, tools.chat(), seed=0), 1)
    assert server.headers == ["Bearer abc"]


def test_a_server_is_checked_before_any_work(serve: Any) -> None:
    server = serve()
    check_server(settings(server.url))
    with pytest.raises(ValueError, match=r"generate\.engine\.model=w8 is not on the server; it has: w4, other"):
        check_server(settings(server.url, model="w8"))
    with pytest.raises(ValueError, match=r"generate\.engine\.url=.*/v2 does not answer \(HTTPStatusError"):
        check_server(settings(server.url.replace("/v1", "/v2")))
    server.http.server_close()
    with pytest.raises(ValueError, match=r"does not answer \(.*\); start the server, or use another url"):
        check_server(settings("http://127.0.0.1:9/v1"))
    with pytest.raises(ValueError, match=r"generate\.engine\.url=nonsense does not answer"):
        check_server(settings("nonsense"))


def test_a_server_that_dies_half_way_loses_no_finished_shard_and_repeats_none(
    serve: Any, tools: Any, tmp_path: Path
) -> None:
    def generate(out: Path, server: Server) -> None:
        out.mkdir(exist_ok=True)
        chat, recipe = tools.chat(), tools.recipe(num_tokens=1500)
        engine = ServerEngine(settings(server.url, max_retries=1), chat, seed=recipe.seed)
        DataGenerator(chat, recipe, Openings([], 0.0, 0), engine, ShardDirectory(out), lambda count: None).run()

    generate(tmp_path / "whole", serve())
    with pytest.raises(ValueError, match=r"failed 2 times in a row \(.*what is finished is kept"):
        generate(tmp_path / "parts", serve(dies_after=60))
    kept = tools.contents(tmp_path / "parts")
    assert 0 < len(kept) < len(tools.contents(tmp_path / "whole"))
    again = serve()
    generate(tmp_path / "parts", again)
    assert tools.contents(tmp_path / "parts") == tools.contents(tmp_path / "whole")
    assert kept.items() <= tools.contents(tmp_path / "parts").items()


def test_closing_early_abandons_what_is_in_flight(serve: Any, tools: Any) -> None:
    server = serve(seconds=0.05)
    engine = ServerEngine(settings(server.url), tools.chat(), seed=0)
    for number in range(12):
        engine.submit(request(number))
    completions = engine.completions()
    next(completions)
    completions.close()
    assert list(engine.completions()) == []
    assert len(server.seen) < 12
