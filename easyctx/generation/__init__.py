"""Generation under every mode: sharded prefill, sharded keys, several questions over one context."""

from easyctx.generation.generator import Generator
from easyctx.generation.text import Answer

__all__ = ["Answer", "Generator"]
