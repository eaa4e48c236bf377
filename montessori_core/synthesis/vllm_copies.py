"""Copies of a model in vLLM: one in this process, or several in processes of their own, each on its GPUs.

vLLM's class `LLM` has no data parallelism within a process. Requests are split into as many parts as there are copies; equal
prompts are adjacent, so that a copy reads a prompt once for all its samples.
"""

import atexit
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import psutil
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from montessori_core.program import ProcessLost
from montessori_core.synthesis.engine import Generated
from montessori_core.synthesis.vllm_parallelism import Parallelism

_CLOSING_SECONDS = 30.0
_WATCH_SECONDS = 2.0
Finished = list[tuple[int, Generated]]
"""Continuations that ended, with the index of their request."""


@dataclass(frozen=True)
class Work:
    """Requests for one copy.

    Attributes:
        prompts: [requests] token ids.
        parameters: [requests] decoding parameters.
    """

    prompts: list[list[int]]
    parameters: list[SamplingParams]


class ModelCopy:
    """A loaded model."""

    def __init__(self, arguments: dict[str, Any], adapter: LoRARequest | None) -> None:
        self._llm, self._adapter = LLM(**arguments), adapter
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Wake `generate` when the engine's process was killed: vLLM would wait forever for its outputs."""
        client = self._llm.llm_engine.engine_core
        while not client.resources.engine_dead:
            time.sleep(_WATCH_SECONDS)
        client.outputs_queue.put(EngineDeadError())

    def generate(self, work: Work) -> Iterator[Finished]:
        """Yield the continuations that end in each step.

        Raises:
            ProcessLost: vLLM's process of the model has ended; its error, if it had one, is in the log.
        """
        try:
            names = self._llm.enqueue(
                [{"prompt_token_ids": prompt} for prompt in work.prompts],
                work.parameters,
                lora_request=self._adapter,
                use_tqdm=False,
            )
            # vLLM appends random characters.
            index = {name.partition("-")[0]: place for place, name in enumerate(names)}
            while self._llm.llm_engine.has_unfinished_requests():
                outputs = self._llm.llm_engine.step()
                yield [(index[output.request_id], _read(output.outputs[0])) for output in outputs]
        except EngineDeadError as error:
            raise ProcessLost(f"vLLM's engine ended; see the log of the job ({error})") from error

    def close(self) -> None:
        """Free the model's memory."""
        self._llm.llm_engine.engine_core.shutdown()


class ModelCopies:
    """Copies in processes of their own; see `ModelCopy`."""

    def __init__(self, arguments: dict[str, Any], adapter: LoRARequest | None, parallelism: Parallelism) -> None:
        """Load all copies at the same time; see `_receive` for errors."""
        devices = (os.environ.get("CUDA_VISIBLE_DEVICES") or "").split(",")
        if len(devices) < parallelism.tensor * parallelism.data:
            devices = [str(number) for number in range(parallelism.tensor * parallelism.data)]
        context = multiprocessing.get_context("spawn")  # a fork would have the parent's CUDA
        self._processes, self._connections = [], list[Connection]()
        for number in range(parallelism.data):
            connection, other = context.Pipe()
            visible = ",".join(devices[number * parallelism.tensor : (number + 1) * parallelism.tensor])
            process = context.Process(target=_serve, args=(other, visible, arguments, adapter))
            process.start()
            other.close()
            self._processes.append(process)
            self._connections.append(connection)
        self._engines: list[psutil.Process] = []
        atexit.register(self.close)  # before multiprocessing waits for the processes
        loading = list(self._connections)
        while loading:
            for ready in wait(loading):
                _receive(cast(Connection, ready))
                loading.remove(cast(Connection, ready))
        for process in self._processes:
            self._engines += psutil.Process(process.pid).children(recursive=True)

    def generate(self, work: Work) -> Iterator[Finished]:
        """Yield the continuations that end in each step of a copy."""
        size = -(-len(work.prompts) // len(self._connections))
        starts = {}
        for connection, start in zip(self._connections, range(0, len(work.prompts), size), strict=False):
            part = slice(start, start + size)
            with suppress(OSError):  # a copy that has ended; its error is received below
                connection.send(Work(work.prompts[part], work.parameters[part]))
            starts[connection] = start
        while starts:
            for ready in wait(list(starts)):
                connection = cast(Connection, ready)
                finished = _receive(connection)
                if finished is None:
                    del starts[connection]
                else:
                    yield [(starts[connection] + index, generated) for index, generated in finished]

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(_CLOSING_SECONDS)
            process.kill()
        for engine in self._engines:  # those of a killed copy hold its memory
            with suppress(psutil.NoSuchProcess):
                engine.kill()


def _receive(connection: Connection) -> Finished | None:
    """Return continuations, or None after loading and after the last ones.

    Raises:
        ProcessLost: the copy, or vLLM's process of it, has ended.
        RuntimeError: the copy failed; the message has its error.
    """
    try:
        message = connection.recv()
    except (EOFError, OSError) as error:
        raise ProcessLost("a copy of the model ended without an error; see the log of the job") from error
    if isinstance(message, ProcessLost):
        raise message
    if isinstance(message, str):
        raise RuntimeError(f"a copy of the model failed: {message}")
    finished: Finished | None = message
    return finished


def _serve(connection: Connection, devices: str, arguments: dict[str, Any], adapter: LoRARequest | None) -> None:
    """Load a copy and answer until the parent closes the connection."""
    os.environ["CUDA_VISIBLE_DEVICES"] = devices
    os.register_at_fork(after_in_child=connection.close)  # the parent sees when this process ends, not one of vLLM's
    try:
        copy = ModelCopy(arguments, adapter)
        with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has closed
            connection.send(None)
            while True:
                for finished in copy.generate(connection.recv()):
                    if finished:
                        connection.send(finished)
                connection.send(None)
    except ProcessLost as error:
        connection.send(error)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        raise


def _read(completion: Any) -> Generated:
    reason = "length" if completion.finish_reason == "length" else "stop"
    return Generated(completion.text, len(completion.token_ids), reason, list(completion.token_ids))
