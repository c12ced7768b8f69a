"""The exceptions that edgetune raises on purpose.

    EdgetuneError                  catch this one; the CLI prints it without a traceback and exits with 1
    ├── DeviceError                a device profile is unknown or wrong
    ├── ModelError                 a model or base folder is missing, unsupported or damaged
    ├── DataError                  rows cannot be used; the message lists lines
    ├── ConfigError                a setting is out of its range or contradicts another
    ├── BudgetError                nothing fits the budget, or what was asked for does not
    ├── AdapterError               an adapter does not fit the base it is loaded on
    ├── CheckpointError            a run folder or checkpoint is missing, damaged or in use
    ├── ExportError                a bundle cannot be written
    │   └── ParityError            the exported graph does not compute what was trained
    ├── BundleError                a bundle is missing, damaged or of another version
    ├── GateError                  a benchmark is beyond a limit that was set for it
    └── MissingExtraError          an optional dependency is not installed

Every message says what is wrong with its value, what was expected, and the next step.
`EdgetuneWarning` is what it warns with: something is done as it was asked for, and that has a price.
A failed `assert` in this package is a bug of edgetune, not of its input.
"""

from __future__ import annotations


class EdgetuneError(Exception):
    """Base of every error that edgetune raises on purpose."""


class EdgetuneWarning(UserWarning):
    """Something is done as it was asked for, and that has a price."""


class DeviceError(EdgetuneError):
    """A device profile is unknown or wrong."""


class ModelError(EdgetuneError):
    """A model or base folder is missing, unsupported or damaged."""


class DataError(EdgetuneError):
    """Rows cannot be used; the message lists lines."""


class ConfigError(EdgetuneError):
    """A setting is out of its range or contradicts another."""


class BudgetError(EdgetuneError):
    """Nothing fits the budget, or what was asked for does not."""


class AdapterError(EdgetuneError):
    """An adapter does not fit the base it is loaded on."""


class CheckpointError(EdgetuneError):
    """A run folder or checkpoint is missing, damaged or in use."""


class ExportError(EdgetuneError):
    """A bundle cannot be written."""


class ParityError(ExportError):
    """The exported graph does not compute what was trained."""


class BundleError(EdgetuneError):
    """A bundle is missing, damaged or of another version."""


class GateError(EdgetuneError):
    """A benchmark is beyond a limit that was set for it."""


class MissingExtraError(EdgetuneError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        self.module, self.extra = module, extra
        super().__init__(f"{module} is not installed. It comes with an extra: pip install 'edgetune[{extra}]'")
