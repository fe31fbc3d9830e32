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
    from train.data.engines.server_engine import ServerSettings


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


def open_engine(
    config: dict[str, Any], model_dir: Path, chat: ChatFormat, *, seed: int, threads: int | None, is_on_gpu: bool
) -> Engine:
    """The engine that `generate.engine` describes, with the model of a directory.

    is_on_gpu: whether the stage's key says that the runtime computes on a GPU. Raises ValueError as the engine does,
    and where it does and there is none to be used.
    """
    if config["kind"] == "runtime":
        from deploy.formats.model_dir import ModelDirectory
        from deploy.runtime.backends import open_backend

        if is_on_gpu:
            _require_gpu(config["device"], model_dir)
        with ModelDirectory.open(model_dir) as files:
            backend = open_backend("gpu" if is_on_gpu else "cpu", files, threads=threads)
        return RuntimeEngine(backend, chat.tokenizer, chat.end_ids, num_sequences=config["num_sequences"], seed=seed)
    if config["kind"] == "transformers":
        from compress.load import load_float32
        from train.data.engines.transformers_engine import TransformersEngine, choose_device

        device, dtype = choose_device(config["device"])
        model = load_float32(model_dir).to(device=device, dtype=dtype)  # type: ignore[call-arg]  # a wrapped method
        return TransformersEngine(model, chat.end_ids, batch_size=config["batch_size"], seed=seed)
    from train.data.engines.server_engine import ServerEngine, check_server

    settings = server_settings(config)
    check_server(settings)
    return ServerEngine(settings, chat, seed=seed)


def server_settings(config: dict[str, Any]) -> ServerSettings:
    """`generate.engine` where it is a server."""
    from train.data.engines.server_engine import ServerSettings

    return ServerSettings(**{key: value for key, value in config.items() if key != "kind"})


def _require_gpu(device: str, model_dir: Path) -> None:
    """Raises ValueError unless a GPU takes the model: on a CPU it would write other words than the key says."""
    from deploy.runtime.devices import DeviceError, choose_backend

    weight_bytes = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    try:
        choose_backend("gpu", weight_bytes)
    except DeviceError as error:
        raise ValueError(
            f"generate.engine.device={device}: the data set's key says that a GPU writes it, and none can be used now"
            f" ({error.problem}); mend that, or use generate.engine.device=cpu, which writes another data set"
        ) from error
