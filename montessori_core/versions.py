"""Which versions of what we import are fit: the ranges that the package declares, and no second list of them.

Another version may import well and fail hours into a run, or change a result; it is refused before a job is started.
"""

from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from montessori_core.errors import UserError


def declared(extras: Collection[str] = ()) -> dict[str, str]:
    """Ranges of versions, such as '<4,>=3.8', by package: what the driver needs, and what the extras add.

    Empty if this code was not installed but only put on Python's path.
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


def misfit(package: str, fit: str) -> str | None:
    """What is installed in place of a version in the range `fit`, as words; None if all is well."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        return f"{package} is not installed"
    if SpecifierSet(fit).contains(installed, prereleases=True):
        return None
    return f"{package} {installed} is installed, {package}{fit} is needed"


def check_versions(extras: Collection[str] = ()) -> None:
    """See that this environment holds fit versions of what the driver, and jobs that need `extras`, import.

    Raises:
        UserError: it does not; the message names the packages and the command that mends it.
    """
    package = f"montessori[{','.join(extras)}]" if extras else "montessori"
    found = [words for name, fit in declared(extras).items() if (words := misfit(name, fit))]
    if found:
        raise UserError(
            f"this Python environment does not fit Montessori: {'; '.join(found)}. Mend it with pip install '{package}'; "
            "versions known to work together are in docs/containers.md"
        )
