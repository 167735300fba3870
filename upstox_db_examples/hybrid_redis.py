"""The earlier place of `hybrid.runtime_acl`."""

from .hybrid import runtime_acl

__all__ = ["runtime_acl"]
