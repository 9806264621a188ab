"""The command line, `taps-ext` and `python -m taps_ext`."""

from __future__ import annotations

from .main import app, main

__all__ = ["app", "main"]
