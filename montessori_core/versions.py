"""Check installed packages against the version ranges that this package declares.

An unsupported version may import well and fail hours into a run, or change a result. So it is an error before any job.
"""

from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from montessori_core.errors import UserError


def declared(extras: Collection[str] = ()) -> dict[str, str]:
    """Return version ranges such as '<4,>=3.8' by package: the driver's requirements and those of `extras`.

    Empty if this package is not installed but only on Python's path.
    """
    try:
        lines = requires("montessori") or []
    except PackageNotFoundError:
        return {}
    ranges: dict[str, str] = {}
    for requirement in map(Requirement, lines):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        if requirement.name == "montessori":  # an extra that includes another
            ranges |= declared(requirement.extras)
        else:
            ranges[requirement.name] = str(requirement.specifier)
    return ranges


def misfit(package: str, supported: str) -> str | None:
    """Describe the installed version if it is not in the range `supported`; None if it is."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        return f"{package} is not installed"
    if SpecifierSet(supported).contains(installed, prereleases=True):
        return None
    return f"{package} {installed} is installed, {package}{supported} is needed"


def check_versions(extras: Collection[str] = ()) -> None:
    """Check that this environment has supported versions of the packages of the driver and of `extras`.

    Raises:
        UserError: it does not; the message names the packages and the command that fixes it.
    """
    package = f"montessori[{','.join(extras)}]" if extras else "montessori"
    misfits = [text for name, supported in declared(extras).items() if (text := misfit(name, supported))]
    if misfits:
        raise UserError(
            f"this Python environment is incompatible with Montessori: {'; '.join(misfits)}. Fix it with pip install "
            f"'{package}'; docs/containers.md lists versions that work together"
        )
