"""Host memory of an influence job: tensors in pinned memory, and the limit of the job."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

_ALIGNMENT = 512  # bytes
_CONTROL_GROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def pinned_tensors(
    formats: Mapping[str, tuple[torch.Size, torch.dtype]],
    allocate: Callable[[int], torch.Tensor] = lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True),
) -> dict[str, torch.Tensor]:
    """Return uninitialised tensors in pinned memory.

    torch rounds each pinned allocation up to a power of two, which nearly doubles a matrix of 260 MB. The tensors therefore
    share blocks of such sizes.

    Args:
        formats: shape and dtype of each tensor, by name.
        allocate: returns [bytes] a block.
    """
    sizes = [shape.numel() * dtype.itemsize for shape, dtype in formats.values()]
    block_sizes, places = pack(sizes)
    blocks = [allocate(size) for size in block_sizes]
    return {
        name: blocks[block][start : start + size].view(dtype).view(shape)
        for (name, (shape, dtype)), size, (block, start) in zip(formats.items(), sizes, places, strict=True)
    }


def pack(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Pack tensors into blocks whose sizes are powers of two: largest first, into the first block with enough space.

    A new block is the largest power of two that what remains can fill.

    Args:
        sizes: bytes of the tensors.

    Returns:
        Bytes of the blocks; block and offset of each tensor.
    """
    aligned = [-(-max(1, size) // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    remaining, blocks, used = sum(aligned), list[int](), list[int]()
    places: dict[int, tuple[int, int]] = {}
    for tensor in sorted(range(len(sizes)), key=aligned.__getitem__, reverse=True):
        size = aligned[tensor]
        block = next((b for b, start in enumerate(used) if start + size <= blocks[b]), len(blocks))
        if block == len(blocks):
            blocks.append(max(1 << (remaining.bit_length() - 1), 1 << (size - 1).bit_length()))
            used.append(0)
        places[tensor] = (block, used[block])
        used[block] += size
        remaining -= size
    return blocks, [places[tensor] for tensor in range(len(sizes))]


def host_memory_limit(root: Path = _CONTROL_GROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Return the bytes of host memory that this process may use: the machine's, or less if a control group limits it.

    Args:
        root: folder of the control groups, version 1 or 2.
        membership: file that names those of this process.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                with suppress(OSError, ValueError):  # no such file; "max"
                    limits.append(int((folder / name).read_text()))
    return min(limits)
