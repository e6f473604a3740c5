"""Lazy imports: public names of a package that are imported at their first use."""

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


class LazyPackage(ModuleType):
    """Package with public names that live in other modules.

    An import of a submodule sets an attribute of the package. Here a function wins over the submodule of the same
    name: ``dpa4.simulation.relax`` is the function, also after an import of the module ``dpa4.simulation.relax``.
    """

    _homes: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        home = self._homes.get(name)
        if home is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(home), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._homes and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._homes})


def attach(package: str, homes: Mapping[str, str]) -> None:
    """Let a package import its public names lazily.

    Args:
        package: Full name of the package, its ``__name__``.
        homes: Module of each public name.
    """
    module = sys.modules[package]
    module.__dict__["_homes"] = homes
    module.__class__ = LazyPackage
