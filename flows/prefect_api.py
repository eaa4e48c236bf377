"""The API of Prefect's server: is it there, and where is its address set."""

import logging
import os
import re
import ssl
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from montessori_core.environment import LOOPBACK
from montessori_core.errors import UserError

log = logging.getLogger(__name__)

_VARIABLE = "PREFECT_API_URL"
_TIMEOUT = 10.0  # seconds
_PAUSE = 5.0  # seconds between two questions to a server that does not answer
HEARTBEAT = 30  # seconds between heartbeats of a flow run
DRIVER_VARIABLES = {
    "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",  # the answer while the server's database restarts
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT),
}
"""Variables of a process that drives flows on a server."""
_DATABASES = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")


def check_proxies() -> None:
    """Check that Prefect's client can be made: for a SOCKS proxy it needs a package that Prefect does not install.

    Raises:
        UserError: the package is missing; names the variable.
    """
    for name in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"):
        proxy = os.environ.get(name.lower()) or os.environ.get(name, "")
        if proxy.startswith("socks") and find_spec("socksio") is None:
            shown = re.sub("//.*@", "//", proxy)  # without its password
            raise UserError(
                f"{name} is {shown}, a SOCKS proxy, which needs a package: pip install socksio. Or unset {name} and "
                f"{name.lower()}: Prefect is reached without a proxy on this machine"
            )


@contextmanager
def driver_settings() -> Iterator[None]:
    """Have Prefect's client retry for about a minute while the database of a server restarts, and send heartbeats often.

    A driver's temporary server is exempt: its errors, such as a full disk, do not pass, and it ends with its driver.
    """
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_CLIENT_RETRY_EXTRA_CODES,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        temporary_settings,
    )

    if PREFECT_API_URL.value() is None:
        yield
        return
    settings = (PREFECT_CLIENT_RETRY_EXTRA_CODES, PREFECT_FLOWS_HEARTBEAT_FREQUENCY)
    with temporary_settings(set_defaults={setting: DRIVER_VARIABLES[setting.name] for setting in settings}):
        yield


def answers(api: str) -> bool:
    """Whether Prefect's API answers at an address."""
    return problem_of(api) is None


def problem_of(api: str) -> str | None:
    """Say why an address cannot be used as Prefect's API; None if it can."""
    import httpx  # slow, and most commands ask no server
    from prefect.settings import PREFECT_CLIENT_CUSTOM_HEADERS

    address = f"{api.rstrip('/')}/health"
    headers = PREFECT_CLIENT_CUSTOM_HEADERS.value()  # a site's proxy may need them
    try:
        answer = httpx.get(address, headers=headers, timeout=_TIMEOUT, follow_redirects=True, verify=_certificates(api))
    except (httpx.HTTPError, httpx.InvalidURL, ImportError, OSError) as error:
        # ImportError: a SOCKS proxy without socksio; OSError: PREFECT_API_SSL_CERT_FILE cannot be read
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return (
                f"the certificate of that server is not trusted ({error}); if it is your site's own, set "
                "PREFECT_API_SSL_CERT_FILE to the file of the authority that signed it"
            )
        return f"no Prefect server answers there ({str(error).strip() or type(error).__name__})"
    if answer.status_code in (401, 403):
        return None  # it asks for a login
    if answer.status_code >= 500:
        return f"the server there is not ready ({answer.status_code})"
    if answer.status_code != 200 or "json" not in answer.headers.get("content-type", ""):
        return "what answers there is not Prefect's API: its address ends in /api"
    return None


def _certificates(api: str) -> ssl.SSLContext:
    """Return which certificates are trusted, by Prefect's settings for its client."""
    context = ssl.create_default_context()
    if not api.startswith("https:"):
        return context
    from prefect.settings import PREFECT_API_SSL_CERT_FILE, PREFECT_API_TLS_INSECURE_SKIP_VERIFY

    if PREFECT_API_TLS_INSECURE_SKIP_VERIFY.value():
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    elif file := PREFECT_API_SSL_CERT_FILE.value():
        context.load_verify_locations(file)
    return context


class LoginRefused(UserError):
    """The server asks for another login."""


def check_api(api: str) -> None:
    """Check that the server of Prefect's settings answers, and accepts this user.

    Raises:
        UserError: it does not answer; names the variable and where it is set. Or it asks for another login.
    """
    problem = problem_of(api)
    if problem is not None:
        place, remedy = _setting()
        raise UserError(
            f"{_VARIABLE} is {api}, but {problem}; it is set in {place}. Start the server, correct the address, or {remedy}: "
            "without it, the command starts a server of its own"
        )
    check_login(api)


def wait_for_api(api: str, seconds: float) -> None:
    """Check the server of Prefect's settings as `check_api` does; while it fails, again for some time.

    Raises:
        UserError: see `check_api`.
    """
    import httpx

    deadline, waits = time.monotonic() + seconds, False
    while True:
        try:
            check_api(api)
            return
        except LoginRefused:
            raise
        except (UserError, httpx.HTTPError) as error:
            if time.monotonic() >= deadline:
                raise
            if not waits:
                log.warning("%s. Trying again for %.0f minutes", error, seconds / 60)
            waits = True
        time.sleep(_PAUSE)


def is_local(api: str | None) -> bool:
    """Whether an address is this machine's own, which other machines cannot reach."""
    return api is not None and urlsplit(api).hostname in LOOPBACK


def refuse_local_api(api: str | None) -> None:
    """Check that a process of another machine can reach the server of Prefect's settings, if they name one.

    Raises:
        UserError: the address is this machine's own; names where it is set.
    """
    if is_local(api):
        place, remedy = _setting()
        raise UserError(
            f"{_VARIABLE} is {api}, which the nodes of the cluster cannot reach; it is set in {place}. Name an address that "
            f"they reach, or {remedy}: without it, the driver starts a server of its own"
        )


def own_database(folder: Path) -> dict[str, str]:
    """Return variables that give the temporary server of a driver's job a database in the run folder, unless one is set.

    By default, all servers of a user share a SQLite file in the home folder, which must not be opened on several hosts.
    """
    if any(name in os.environ for name in _DATABASES):
        return {}
    return {_DATABASES[0]: f"sqlite+aiosqlite:///{folder / 'prefect.db'}"}


def check_login(api: str) -> None:
    """Check that the server of Prefect's settings accepts this user.

    Raises:
        UserError: it asks for another login, or cannot read its database.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    with get_client(sync_client=True) as client:
        try:
            client.read_work_pools(limit=1)
        except PrefectHTTPStatusError as error:
            if error.response.status_code not in (401, 403):
                reason = str(error).partition("\n")[0]
                raise UserError(f"the Prefect server at {api} is not ready: {reason}; see its log") from error
            raise LoginRefused(
                f"the Prefect server at {api} asks for a login; set PREFECT_API_AUTH_STRING=user:password (or "
                "PREFECT_API_KEY for Prefect Cloud)"
            ) from None


def _setting() -> tuple[str, str]:
    """Return where PREFECT_API_URL is set, and how it is unset; the first of Prefect's sources that sets it counts."""
    return next(_settings(), ("Prefect's settings", f"run prefect config unset {_VARIABLE}"))


def _settings() -> Iterator[tuple[str, str]]:
    from dotenv import dotenv_values
    from prefect.settings import PREFECT_PROFILES_PATH

    if _sets(os.environ):
        yield "the environment", f"unset {_VARIABLE}"
    if _sets(dotenv_values(".env")):
        yield str(Path(".env").resolve()), "remove it from that file"
    for name, keys in (("prefect.toml", ("api",)), ("pyproject.toml", ("tool", "prefect", "api"))):
        if "url" in _table(Path(name), *keys):
            yield f"{Path(name).resolve()} ({'.'.join((*keys, 'url'))})", "remove it from that file"
    profiles = PREFECT_PROFILES_PATH.value()
    profile = os.environ.get("PREFECT_PROFILE") or _table(profiles).get("active")
    if profile is not None and _sets(_table(profiles, "profiles", str(profile))):
        yield f"the profile {profile} of {profiles}", f"run prefect config unset {_VARIABLE}"


def _sets(variables: Mapping[str, Any]) -> bool:
    return _VARIABLE in {name.upper() for name in variables}


def _table(path: Path, *keys: str) -> dict[str, Any]:
    """Return a table of a TOML file; empty if there is none."""
    table: Any = tomllib.loads(path.read_text()) if path.is_file() else {}
    for key in keys:
        table = table.get(key, {}) if isinstance(table, dict) else {}
    return table if isinstance(table, dict) else {}
