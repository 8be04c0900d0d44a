"""Values that were read from a file, compared with a plain description before anything is made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Form = Any
"""What a JSON value has to be.

- a type: such a value (``float`` takes whole numbers too, ``int`` no booleans); ``object``: anything
- a tuple of forms: one of them; a form in a list: a list of such values
- a dict of forms by name: an object with these names; one that ends in "?" may be absent, "*" stands for all others
- any other value: that value; a function of the value: whatever it takes, its docstring says what
"""

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "an object"}


def check_form(value: Any, form: Form, name: str) -> None:
    """Refuse a value of another form.

    Raises
    ------
    ValueError
        It says where, as ``name`` and a path below it, what was allowed and what came.
    """
    if isinstance(form, list) and isinstance(value, list):
        for i, element in enumerate(value):
            check_form(element, form[0], f"{name}[{i}]")
    elif isinstance(form, dict) and isinstance(value, dict):
        _check_names(value, form, name)
        for key, element in value.items():
            check_form(element, form.get(key, form.get(f"{key}?", form.get("*"))), f"{name}.{key}")
    elif not _fits(value, form, name):
        raise ValueError(f"{name} must be {_in_words(form)}; got {_shortened(value)}.")


def whole(least: int, most: int | None = None) -> Callable[[Any], bool]:
    """The form of whole numbers within bounds."""

    def fits(value: Any) -> bool:
        return type(value) is int and least <= value and (most is None or value <= most)

    fits.__doc__ = f"a whole number, at least {least}" + ("" if most is None else f" and at most {most}")
    return fits


def _check_names(value: dict[str, Any], form: dict[str, Form], name: str) -> None:
    needed = {key for key in form if not key.endswith("?") and key != "*"}
    if absent := sorted(needed - set(value)):
        raise ValueError(f"{name} must have {', '.join(absent)}; it has not.")
    unknown = sorted(set(value) - needed - {key.removesuffix("?") for key in form})
    if unknown and "*" not in form:
        raise ValueError(f"{name} must have nothing but {', '.join(sorted(form))}; it has {', '.join(unknown)}.")


def _fits(value: Any, form: Form, name: str) -> bool:
    if isinstance(form, tuple):
        return any(_is_of(value, choice, name) for choice in form)
    if form is object:
        return True
    if isinstance(form, type):
        return type(value) is form or (form is float and type(value) is int)
    if isinstance(form, (list, dict)):
        return False
    if callable(form):
        return bool(form(value))
    return type(value) is type(form) and bool(value == form)


def _is_of(value: Any, form: Form, name: str) -> bool:
    try:
        check_form(value, form, name)
    except ValueError:
        return False
    return True


def _in_words(form: Form) -> str:
    if isinstance(form, tuple):
        return " or ".join(_in_words(choice) for choice in form)
    if isinstance(form, list):
        return "a list"
    if isinstance(form, dict):
        return f"an object with {', '.join(sorted(form))}"
    if isinstance(form, type):
        return _NAMES.get(form, form.__name__)
    if callable(form):
        return form.__doc__ or form.__name__
    return "null" if form is None else repr(form)


def _shortened(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]} ..."
