"""Names to implementations that own their settings; errors name the setting, the value found, what would be right."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any, ClassVar, Generic, TypeVar

T = TypeVar("T", bound="Component")


def number(
    default: Any = MISSING, *, minimum: float | None = None, above: float | None = None, most: float | None = None
) -> Any:
    """Declare a dataclass field that holds a finite number within these bounds."""
    return field(default=default, metadata={"bounds": {"minimum": minimum, "above": above, "most": most}})


def choice(default: str, choices: Collection[str]) -> Any:
    """Declare a dataclass field that holds one of these names."""
    return field(default=default, metadata={"choices": choices})


def require_finite(
    name: str, value: Any, *, minimum: float | None = None, above: float | None = None, most: float | None = None
) -> float:
    """Return ``value`` as a finite float within the bounds.

    Raises:
        ValueError: names the setting, the value found and the range that would be right.
    """
    bounds = [f" {sign} {x}" for sign, x in ((">=", minimum), (">", above), ("<=", most)) if x is not None]
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    inside = (
        (minimum is None or found >= minimum) and (above is None or found > above) and (most is None or found <= most)
    )
    if isinstance(value, bool | str) or not math.isfinite(found) or not inside:
        raise ValueError(f"{name}={value!r} is not a finite number{' and'.join(bounds)}")
    return found


class Component:
    """An objective, a score or a controller: a dataclass whose fields are its settings."""

    name: ClassVar[str] = ""
    """What it is registered as."""

    def __post_init__(self) -> None:
        for f in settings_of(type(self)).values():
            check(f, getattr(self, f.name))


def check(f: Field, value: Any) -> None:
    """Refuse a value that :func:`number` or :func:`choice` does not allow."""
    if "bounds" in f.metadata:
        require_finite(f"disco.{f.name}", value, **f.metadata["bounds"])
    # A list in YAML is no key of a dict.
    if "choices" in f.metadata and value not in list(f.metadata["choices"]):
        raise ValueError(f"disco.{f.name}={value!r} is unknown; choose from {sorted(f.metadata['choices'])}")


def settings_of(cls: type[Component]) -> dict[str, Field]:
    """The settings that an implementation owns, by name."""
    return {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]


class Registry(Generic[T]):
    """Implementations by name, for the setting ``disco.{setting}``."""

    def __init__(self, setting: str, base: type[T]):
        self.setting = setting
        self.base = base
        self._items: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator. A second implementation under a name is an error, not an overwrite."""

        def add(cls: type[T]) -> type[T]:
            if not (isinstance(cls, type) and issubclass(cls, self.base) and "__dataclass_fields__" in vars(cls)):
                raise TypeError(
                    f"disco.{self.setting}={name}: {cls!r} must be a dataclass that inherits from "
                    f"{self.base.__module__}.{self.base.__name__}; its fields are its settings"
                )
            if self._items.get(name, cls) is not cls:
                raise ValueError(f"disco.{self.setting}={name} is registered already, as {self._items[name]}")
            cls.name = name
            self._items[name] = cls
            return cls

        return add

    def build(self, name: str, settings: Mapping[str, Any]) -> T:
        """An instance of the implementation ``name`` with those of ``settings`` that it owns.

        Raises:
            ValueError: the name is unknown, or a setting is missing or out of range.
        """
        cls = self[name]
        owned = settings_of(cls)
        for setting, f in owned.items():
            if setting not in settings and f.default is MISSING and f.default_factory is MISSING:
                raise ValueError(
                    f"disco.{self.setting}={name} needs the setting {setting!r}; give it (in a run: "
                    f"disco.{setting}=VALUE, or +disco.options.{setting}=VALUE for one of your own)"
                )
        return cls(**{setting: settings[setting] for setting in owned if setting in settings})

    def __getitem__(self, name: str) -> type[T]:
        # YAML may hold a list, which is no key of a dict.
        if name not in list(self._items):
            raise ValueError(f"disco.{self.setting}={name!r} is unknown; choose from {sorted(self._items)}")
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)
