"""Copies of a model in vLLM: one in this process, or several in processes of their own, each on its GPUs.

vLLM's class `LLM` has no data parallelism within a process. Requests are split into as many parts as there are copies; equal
prompts are adjacent, so that a copy reads a prompt once for all its samples.
"""

import atexit
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from montessori_core.errors import UserError
from montessori_core.synthesis.engine import Generated
from montessori_core.synthesis.vllm_parallelism import Parallelism

_CLOSING_SECONDS = 30.0
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

    def generate(self, work: Work) -> Iterator[Finished]:
        """Yield the continuations that end in each step."""
        names = self._llm.enqueue(
            [{"prompt_token_ids": prompt} for prompt in work.prompts],
            work.parameters,
            lora_request=self._adapter,
            use_tqdm=False,
        )
        index = {name.partition("-")[0]: place for place, name in enumerate(names)}  # vLLM appends random characters
        while self._llm.llm_engine.has_unfinished_requests():
            outputs = self._llm.llm_engine.step()
            yield [(index[output.request_id], _read(output.outputs[0])) for output in outputs]

    def close(self) -> None:
        """Free the model's memory."""
        self._llm.llm_engine.engine_core.shutdown()


class ModelCopies:
    """Copies in processes of their own; see `ModelCopy`."""

    def __init__(self, arguments: dict[str, Any], adapter: LoRARequest | None, parallelism: Parallelism) -> None:
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
        atexit.register(self.close)  # before multiprocessing waits for the processes

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


def _receive(connection: Connection) -> Finished | None:
    """Return continuations, or None after the last ones.

    Raises:
        RuntimeError: the copy failed; the message has its error.
    """
    try:
        message = connection.recv()
    except (EOFError, OSError) as error:
        raise RuntimeError("a copy of the model ended without an error; see the log of the job") from error
    if isinstance(message, UserError):
        raise message
    if isinstance(message, str):
        raise RuntimeError(f"a copy of the model failed: {message}")
    finished: Finished | None = message
    return finished


def _serve(connection: Connection, devices: str, arguments: dict[str, Any], adapter: LoRARequest | None) -> None:
    """Load a copy and answer until the parent closes the connection."""
    os.environ["CUDA_VISIBLE_DEVICES"] = devices
    try:
        copy = ModelCopy(arguments, adapter)
        with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has closed
            while True:
                for finished in copy.generate(connection.recv()):
                    if finished:
                        connection.send(finished)
                connection.send(None)
    except UserError as error:
        connection.send(error)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        raise


def _read(completion: Any) -> Generated:
    reason = "length" if completion.finish_reason == "length" else "stop"
    return Generated(completion.text, len(completion.token_ids), reason, list(completion.token_ids))
