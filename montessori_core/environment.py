"""Environment variables of this process and its children: proxies and the import path."""

import os
from urllib.request import getproxies_environment

LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
"""Addresses that mean this machine."""


def set_process_defaults() -> None:
    """Let no connection to this machine go through a proxy, and no child process import from the working directory."""
    _exempt_loopback()
    # `python -m` and `python -c` of children would put the working directory first on the import path.
    os.environ.setdefault("PYTHONSAFEPATH", "1")


def _exempt_loopback() -> None:
    """Add the loopback addresses to `no_proxy` and `NO_PROXY`, if there is a proxy; keep what is there."""
    # Without a proxy in the environment, no_proxy alone would hide the proxies of macOS's settings.
    if not getproxies_environment().keys() - {"no"}:
        return
    # Libraries differ in which of the two they prefer.
    hosts = [host.strip() for name in ("no_proxy", "NO_PROXY") for host in os.environ.get(name, "").split(",")]
    exempt = ",".join(dict.fromkeys([*filter(None, hosts), *LOOPBACK]))
    os.environ.update(no_proxy=exempt, NO_PROXY=exempt)
