"""Names to implementations, and checks of numbers: errors name the setting, the value found and what would be right."""

import math
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Implementations by name, for the setting ``setting``."""

    def __init__(self, setting: str):
        self.setting = setting
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator. A second implementation under a name is an error, not an overwrite."""

        def add(item: T) -> T:
            if self._items.get(name, item) is not item:
                raise ValueError(f"{self.setting}={name!r} is registered already, as {self._items[name]}")
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise ValueError(f"{self.setting}={name!r} is unknown; choose from {sorted(self._items)}")
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)


def require_finite(name: str, value: float, *, minimum: float | None = None, above: float | None = None) -> float:
    """``value`` as a finite float within the bound.

    Raises:
        ValueError: names the setting, the value found and the range that would be right.
    """
    wanted = "a finite number"
    if minimum is not None:
        wanted = f"a finite number >= {minimum}"
    if above is not None:
        wanted = f"a finite number > {above}"
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    inside = (minimum is None or number >= minimum) and (above is None or number > above)
    if isinstance(value, bool) or not math.isfinite(number) or not inside:
        raise ValueError(f"{name}={value!r} is not {wanted}")
    return number
