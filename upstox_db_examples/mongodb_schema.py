"""The earlier place of `mongodb.runtime_role`."""

from .mongodb import runtime_role

__all__ = ["runtime_role"]
