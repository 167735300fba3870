"""Export, import and migrate: from any store to any other."""

from .file import Counts
from .transfer import export_tokens, import_tokens, migrate

__all__ = [
    "Counts",
    "export_tokens",
    "import_tokens",
    "migrate",
]
