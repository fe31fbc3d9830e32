"""The engines that data is generated with, made from a stage's configuration."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.data.engines.base import Completion, Engine, Request

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from deploy.runtime.backend import Backend
    from train.data.chat_format import ChatFormat


class RuntimeEngine:
    """The bundle's runtime, many sequences by one forward a token. See `train.data.engines.base.Engine`."""

    is_batch_invariant = True

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer, end_ids: frozenset[int], *, num_sequences: int, seed: int
    ) -> None:
        from deploy.runtime.scheduler import Scheduler

        self.capacity, self._seed = num_sequences, seed
        self._scheduler = Scheduler(backend, tokenizer, range(num_sequences), end_ids)
        self._numbers: dict[int, int] = {}  # the scheduler's number → the request's

    def submit(self, request: Request) -> None:
        """Queue a request; one that continues a conversation comes first, while its cache may still be there."""
        from deploy.runtime.generation import GenerationOptions
        from deploy.runtime.generation import Request as RuntimeRequest
        from deploy.runtime.sampling import SamplingParams
        from train.data.loops import is_looping

        sampling = SamplingParams(request.temperature, top_p=request.top_p, seed=self._seed)
        options = GenerationOptions(
            request.max_tokens,
            sampling,
            sample_index=request.sample_index,
            ends=is_looping if request.stops_loops else None,
        )
        number = self._scheduler.submit(RuntimeRequest(request.prompt, options), is_next=request.continues_turns)
        self._numbers[number] = request.number

    def completions(self) -> Generator[Completion, None, None]:
        """Completions as they finish, until no request is left."""
        for number, answer in self._scheduler.answers():
            yield Completion(self._numbers.pop(number), answer.token_ids, answer.finish_reason == "eos")


def open_engine(config: dict[str, Any], model_dir: Path, chat: ChatFormat, *, seed: int, threads: int | None) -> Engine:
    """The engine that `generate.engine` describes, with the model of a directory. Raises ValueError as it does."""
    if config["kind"] == "runtime":
        from deploy.formats.model_dir import ModelDirectory
        from deploy.runtime.backends import open_backend
        from deploy.runtime.devices import choose_backend

        weight_bytes = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
        chosen = choose_backend(config["device"], weight_bytes)
        backend = open_backend(chosen, ModelDirectory.open(model_dir), threads=threads)
        return RuntimeEngine(backend, chat.tokenizer, chat.end_ids, num_sequences=config["num_sequences"], seed=seed)
    if config["kind"] == "transformers":
        from compress.load import load_float32
        from train.data.engines.transformers_engine import TransformersEngine, choose_device

        device, dtype = choose_device(config["device"])
        model = load_float32(model_dir).to(device=device, dtype=dtype)  # type: ignore[call-arg]  # a wrapped method
        return TransformersEngine(model, chat.end_ids, batch_size=config["batch_size"], seed=seed)
    from train.data.engines.server_engine import ServerEngine, ServerSettings, check_server

    settings = ServerSettings(**{key: value for key, value in config.items() if key != "kind"})
    check_server(settings)
    return ServerEngine(settings, chat, seed=seed)
