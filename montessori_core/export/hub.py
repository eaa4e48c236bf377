"""Push an exported folder to a Hugging Face hub. The token comes from the environment, as huggingface_hub reads it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from montessori_core.errors import UserError
from montessori_core.files import hash_path
from montessori_core.formatting import first_names

_KEPT = ".gitattributes"
"""The file that the hub itself puts into a data set."""


@dataclass(frozen=True)
class HubSet:
    """A data set on the hub.

    Attributes:
        name: its id; without an owner, the token's owner.
        private: whether it is created as private.
        replace: replace other contents.
    """

    name: str
    private: bool = False
    replace: bool = False


def check_hub(target: HubSet, option: str) -> None:
    """Check name and token, before an export is written; `option` is the one that gave the name, for errors.

    Raises:
        UserError: the name is not valid, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(target.name)
    except HFValidationError as error:
        raise UserError(f"{option} {target.name}: {error}; write OWNER/NAME") from error
    if get_token() is None:
        raise UserError(f"{option} {target.name}: no token; set HF_TOKEN to one that may write, or run hf auth login")


def push(folder: Path, target: HubSet, message: str) -> tuple[str, bool]:
    """Push a folder to a data set, which is created if it does not exist.

    Args:
        folder: an exported folder.
        target: the data set.
        message: of the commit.

    Returns:
        Address of the data set, and whether anything was pushed: not if it has these files already.

    Raises:
        UserError: the data set has other contents and is not to be replaced, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        created = hub.create_repo(target.name, repo_type="dataset", private=target.private or None, exist_ok=True)
        info = hub.dataset_info(created.repo_id, files_metadata=True)
        if target.private and not info.private:
            raise UserError(f"{created}: is public, and --private does not change that; give another name")
        present = {file.rfilename: file for file in info.siblings or [] if file.rfilename != _KEPT}
        local = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        other = sorted(
            name for name in present.keys() | local.keys() if not _is_same(present.get(name), local.get(name))
        )
        if not other:
            return str(created), False
        if present and not target.replace:
            raise UserError(
                f"{created}: has other contents ({first_names(other)}); nothing was "
                "pushed: give another name, or replace them with --replace"
            )
        hub.upload_folder(
            repo_id=created.repo_id,
            repo_type="dataset",
            folder_path=folder,
            commit_message=message,
            parent_commit=info.sha,  # another commit in the meantime is an error
            delete_patterns="*",
        )
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds, also of its HTTP library
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"{target.name}: the hub refused the data set or did not answer: {reason}. Check name, network, and that "
            "the token may write; then repeat the command"
        ) from error
    return str(created), True


def _is_same(remote: Any, local: Path | None) -> bool:
    """Return whether a file on the hub has the content of a local one, by git's or LFS's hash."""
    if remote is None or local is None:
        return False
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == hash_path(local))
    blob = hashlib.sha1(b"blob %d\0" % local.stat().st_size, usedforsecurity=False)  # git's name of the content
    with local.open("rb") as stream:
        return bool(remote.blob_id == hashlib.file_digest(stream, lambda: blob).hexdigest())
