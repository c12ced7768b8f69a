"""Which optional dependency belongs to which extra of the package.

A device installs only the core. Whatever is missing beyond it is named together with the line that installs it, whether
the import failed on the command line or in a script.
"""

from __future__ import annotations

from edgetune.errors import MissingExtraError

# Import name -> extra in pyproject.toml.
EXTRAS = {
    "torch": "train", "bitsandbytes": "train", "onnx": "train", "onnx_ir": "train", "onnxscript": "train",
    "huggingface_hub": "hub",
}  # fmt: skip


def missing_extra(error: ModuleNotFoundError) -> MissingExtraError | None:
    """The error to show for a failed import, or None where the module belongs to no extra."""
    module = (error.name or "").partition(".")[0]
    return MissingExtraError(module, EXTRAS[module]) if module in EXTRAS else None
