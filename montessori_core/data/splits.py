"""The splits that names of data files and folders tell, by the rules of the library `datasets`."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {keyword: split for split, keywords in _KEYWORDS.items() for keyword in keywords}
_KEYWORD = re.compile(rf"(?:^|[-_. 0-9])({'|'.join(_SPLITS)})(?=[-_. 0-9]|$)", re.IGNORECASE)
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")


def split_named(name: str) -> str:
    """Return the split that a word means: 'dev' means 'validation'; a word with no such meaning is a split's own name."""
    return _SPLITS.get(name.lower(), name)


def splits_of(paths: Sequence[PurePosixPath]) -> list[str | None]:
    """Return the split of each file of a data set; None for files that name none, where others do.

    A shard such as `data/train_sft-00000-of-00003.parquet` has the split `train_sft`. Other files have a split if a word of
    their name is one; folders count if no name of a file has such a word.

    Args:
        paths: relative to the data set's folder.
    """
    splits = [_of_file(path) for path in paths]
    return splits if any(splits) else [_of_folders(path) for path in paths]


def _of_file(path: PurePosixPath) -> str | None:
    shard = _SHARD.match(path.name)
    keyword = _KEYWORD.search(path.name)
    if shard and (path.parent.name == "data" or (keyword and keyword.start() == 0)):
        return split_named(shard[1])
    return split_named(keyword[1]) if keyword else None


def _of_folders(path: PurePosixPath) -> str | None:
    keywords = (_KEYWORD.search(folder.name) for folder in path.parents)
    return next((split_named(keyword[1]) for keyword in keywords if keyword), None)
