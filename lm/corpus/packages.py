"""Source code of installed Python packages: a real corpus that needs no download."""

import base64
import hashlib
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, PackagePath, distribution

from lm.base.errors import EnvironmentFault, InputError

# Tests repeat what the code says; benchmarks and _antlr are generated tables and parsers
LEFT_OUT = {"tests", "conftest.py", "benchmarks", "_antlr"}
LICENSE_FILES = ("licen", "copying", "notice")  # how their names begin: LICENSE, LICENCE.txt, ...


def python_sources(requirement: str) -> Iterator[tuple[str, str]]:
    """Yield path and text of each .py file of an installed package, name==version, by path.

    Files are checked against the hashes that the package was published with, so the same
    requirement gives the same bytes on every machine. Raises InputError for a malformed
    requirement, EnvironmentFault if the package is not installed in this version or was altered.
    """

    def wanted(file: PackagePath) -> bool:
        return file.suffix == ".py" and not LEFT_OUT.intersection(file.parts)

    for path, data in _files(requirement, wanted):
        yield path, data.decode()


def license_of(requirement: str) -> tuple[str, str]:
    """Return name and text of the licence of an installed package, from its metadata.

    Raises the same errors as `python_sources`.
    """

    def wanted(file: PackagePath) -> bool:
        metadata = file.parts[0].endswith(".dist-info")
        return metadata and file.name.lower().startswith(LICENSE_FILES)

    text = "\n".join(data.decode(errors="replace") for _, data in _files(requirement, wanted))
    metadata = distribution(requirement.partition("==")[0].strip()).metadata
    stated = metadata.get_all("License-Expression") or metadata.get_all("License")
    name = stated[0].partition("\n")[0].strip() if stated else ""
    return name or "see its text", text or "The package has no text of it.\n"


def _files(requirement: str, wanted: Callable[[PackagePath], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of each wanted file of a package, sorted and checked."""
    name, pinned, version = (part.strip() for part in requirement.partition("=="))
    if not (name and pinned):
        raise InputError(f"corpus.packages: {requirement} pins no version; write name==version")
    reinstall = f"run `pip install --force-reinstall {requirement}`"
    try:
        package = distribution(name)
    except PackageNotFoundError:
        raise EnvironmentFault(f"corpus.packages: {name} is not installed; {reinstall}") from None
    if package.version != version:
        raise EnvironmentFault(
            f"corpus.packages: expected {requirement}, found {package.version}; {reinstall} "
            "or change params.yaml"
        )
    for file in sorted(package.files or [], key=lambda file: file.as_posix()):
        if not wanted(file):
            continue
        data = file.read_binary()
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        if file.hash is None or file.hash.value != digest:
            raise EnvironmentFault(f"{file.locate()}: differs from {requirement}; {reinstall}")
        yield file.as_posix(), data
