"""Find secrets in a configuration: it is copied to run folders and Prefect's server, shown in reports and published."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_NAME = re.compile(
    r".*(?:password|passwd|passphrase|secret|credential|auth(?:orization|string)|(?:api|auth|access|secret|private)(?:key|token))s?|pwd"
)
_HARMLESS = {  # words before 'token' or 'key' in names of what is no secret: eos_token, prompt_cache_key
    *("bos", "eos", "pad", "unk", "sep", "cls", "mask", "special", "per", "first", "last", "next"),
    *("stop", "start", "begin", "end", "think", "thinking", "image", "audio", "video", "vision", "placeholder"),
    *("cache", "sort", "group", "implicit"),
}
_VALUE = re.compile(r"(?i:bearer|basic)\s+\S{16,}|sk-(?=\S*\d)[\w-]{20,}|(?:hf|gh[opsu])_[A-Za-z0-9]{30,}")
_USER_IN_URL = re.compile(  # a user without a password may be a token at a web server, but a container in abfs://
    r"https?://[^\s/?#@$]+@|[a-z][a-z0-9+.-]*://[^\s/?#@:]*:(?!\$)[^\s/?#]+@", re.IGNORECASE
)
_ASSIGNMENT = re.compile(r"(?:[?&]|\bexport\s+)([\w-]+)=[\"']?[^\s\"'$`&]")  # of a URL's query, or of a shell


def secrets_in(name: str, value: Any) -> Iterator[str]:
    """Yield the dotted paths of secrets in the value of a setting, such as parameters.extra_headers.Authorization.

    Args:
        name: path of the setting.
        value: plain data; names in mappings are read in any case.
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            path = f"{name}.{key}"
            if _is_secret(str(key)) and _has_text(part):
                yield path
            else:
                yield from secrets_in(path, part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from secrets_in(name, part)
    elif isinstance(value, str) and (
        _VALUE.fullmatch(value.strip())
        or _USER_IN_URL.search(value)
        or any(map(_is_secret, _ASSIGNMENT.findall(value)))
    ):
        yield name


def hide_logins(text: str) -> str:
    """Return a text without the user and password of URLs in it."""
    return _USER_IN_URL.sub(lambda login: f"{login[0].partition('://')[0]}://", text)


def _is_secret(name: str) -> bool:
    """Return whether a name is that of a secret, by its last words: hf_token, X-API-Key, clientSecret."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    if _NAME.fullmatch("".join(words)):
        return True
    return words[-1:] in (["token"], ["key"]) and not _HARMLESS.intersection(words[-2:-1])


def _has_text(value: Any) -> bool:
    """Return whether there is a text in a value; true, null and numbers are no secrets."""
    if isinstance(value, Mapping):
        return any(map(_has_text, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_text, value))
    return isinstance(value, str) and bool(value)
