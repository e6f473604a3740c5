"""The DPA4 network: configuration, presets and modules."""

from dpa4.model.config import Bridging, ModelConfig
from dpa4.model.network import DPA4

__all__ = ["DPA4", "Bridging", "ModelConfig"]
