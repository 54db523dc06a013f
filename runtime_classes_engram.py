"""Classes that are made at run time: a class of the backbone, with memory in front of it."""

import copyreg
import functools
from typing import Any


class RuntimeSubclass:
    """Goes in front of a class that is known at run time only, such as the decoder layer of any backbone.

    An object that a backbone made becomes an instance of the extended class, and stays one of its own: `isinstance`,
    output recording, plans and settings of its class keep working. Pickle rebuilds the class from the two it is made of.
    """

    _extends: tuple[type, type] | None = None

    @classmethod
    def extending(cls, base: type) -> type:
        """The subclass of `cls` and `base`, in this order; always the same one."""
        return _extended(cls, base)

    @classmethod
    def _members(cls, base: type) -> dict[str, Any]:
        """What the extended class defines itself."""
        return {"__module__": base.__module__, "__name__": f"Engram{base.__name__}"}

    def __reduce_ex__(self, protocol):
        if self._extends is None:
            return super().__reduce_ex__(protocol)
        return _rebuild, self._extends, self.__getstate__()


@functools.cache
def _extended(front: type[RuntimeSubclass], base: type) -> type:
    members = {**front._members(base), "_extends": (front, base)}
    return type(members.pop("__name__"), (front, base), members)


def _rebuild(front: type[RuntimeSubclass], base: type) -> object:
    return copyreg.__newobj__(front.extending(base))
