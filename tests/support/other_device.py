"""A device beside the CPU, for machines without a GPU: its tensors are computed on the CPU, but not together with the CPU's.

Code that forgets to move a tensor thus fails as on a GPU. It has no autocast and no kernels of its own, and tensors that are
created by other means than operations of torch must be moved to it. Importing this module registers the device until the
process ends; it must be imported before the first backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "other"
_CPU = torch.device("cpu")
_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default)
"""A GPU, too, takes indices from the CPU."""
_PLAIN = (_aten._local_scalar_dense.default, _aten.equal.default)


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _Tensor(torch.Tensor):
    """A tensor of the other device."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "_Tensor":
        like: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        kind: dict[str, Any] = {"dtype": held.dtype, "layout": held.layout, "device": torch.device(NAME, 0)}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.size(), **like, **kind)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(operation, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> "_Tensor":
        return _Tensor(inner["held"])

    def tolist(self) -> Any:
        return self.held.tolist()


class _Everywhere(TorchDispatchMode):
    """Also computes operations that have no tensor of the other device but return one."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(operation, args, kwargs or {})


def _is_other(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _compute(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute an operation on the CPU; its result is on the device on which it should be."""
    tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
    others = [tensor for tensor in tensors if isinstance(tensor, _Tensor)]
    mixed = others and any(tensor.dim() for tensor in tensors if not isinstance(tensor, _Tensor))
    if mixed and operation not in (*_COPIES, *_INDEXING):
        raise RuntimeError(f"{operation}: tensors of two devices")
    if operation is _aten._fused_sdp_choice.default:
        return 0  # attention without a fused kernel
    asked = kwargs.get("device")
    on_cpu = kwargs | ({"device": _CPU} if _is_other(asked) else {}) | ({"pin_memory": False} if asked else {})
    if "pin_memory" not in kwargs:
        on_cpu.pop("pin_memory", None)
    held_args, held_kwargs = tree_map_only(_Tensor, lambda tensor: tensor.held, (args, on_cpu))
    result = operation(*held_args, **held_kwargs)
    if operation is _aten.copy_.default:
        return args[0]
    if operation in _PLAIN or not (others if asked is None else _is_other(asked)):
        return result
    result = tree_map_only(
        torch.Tensor, lambda tensor: tensor if isinstance(tensor, _Tensor) else _Tensor(tensor), result
    )
    return result if asked is not None else return_and_correct_aliasing(operation, args, kwargs, result)


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    return _Tensor(_aten.empty.memory_format(size, dtype=dtype, device=_CPU))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    return _Tensor(_aten.empty_strided.default(size, stride, dtype=dtype, device=_CPU))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    held_source, held_target = tree_map_only(_Tensor, lambda tensor: tensor.held, (source, target))
    held_target.copy_(held_source)
    return target


_setup_privateuseone_for_python_backend(NAME, _Module())
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Return the device, which can be used in this context."""
    generator = torch.Generator

    def on_cpu(device: Any = None) -> torch.Generator:
        return generator()

    with _Everywhere(), mock.patch.object(torch, "Generator", on_cpu):
        yield torch.device(NAME, 0)
