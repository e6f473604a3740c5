"""The DPA4 network: configuration, presets and modules.

docs/theory.md holds the mathematics and names the file of every part.

The compiler traces the sources of this folder, and their bytes are part of the cache key of compiled code. Any change
here, even of a comment, makes every user compile once more.
"""

from dpa4.model.config import Bridging, ModelConfig
from dpa4.model.network import DPA4

__all__ = ["DPA4", "Bridging", "ModelConfig"]
