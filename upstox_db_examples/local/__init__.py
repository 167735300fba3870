"""Local stand-ins for Upstox and the database servers."""

from .playground import Playground

__all__ = ["Playground"]
