"""Which options does a run look at?"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

Note = Callable[[str], None]


def recording(options: Any, note: Note, prefix: str = "") -> Any:
    """An equal object that notes the dotted name of every option when its attribute is read; ``vars()`` notes none."""
    names = {field.name for field in fields(options)}
    leaves = {name for name in names if not is_dataclass(vars(options)[name])}

    class Recording(type(options)):
        def __getattribute__(self, name: str) -> Any:
            if name in leaves:
                note(prefix + name)
            return super().__getattribute__(name)

    copy = object.__new__(Recording)
    for name in names:
        value = vars(options)[name]
        vars(copy)[name] = value if name in leaves else recording(value, note, f"{prefix}{name}.")
    return copy
