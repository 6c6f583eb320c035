"""The one error for a package that only the `simulation` extra installs."""

from fedofa.types.errors import DatasetError


def missing_extra(package: str, purpose: str) -> DatasetError:
    """Return the error to raise when `package` cannot be imported although `purpose` needs it."""
    return DatasetError(
        f"the package {package!r} is needed to {purpose}, but it is not installed: run pip install 'fedofa[simulation]'"
    )
