"""What the reference of docs/api shows says all of it: every argument with what it may be, what comes back, what is raised."""

import dataclasses
import importlib
import inspect
import re

import pytest
from places import ROOT

ENTRY = re.compile(r"^::: ([\w.]+)\n    options: \{(.*)\}$", re.M)
SECTION = re.compile(r"^(Parameters|Attributes|Returns|Raises)\n-+$", re.M)


def shown():
    """(name, what it is, its class or None) of all that the pages of docs/api show."""
    found = []
    for page in sorted((ROOT / "docs/api").glob("*.md")):
        for name, options in ENTRY.findall(page.read_text(encoding="utf-8")):
            module, _, last = name.rpartition(".")
            thing = getattr(importlib.import_module(module), last)
            found.append((last, thing))
            for member in re.search(r"members: \[(.*)\]", options)[1].split(", ") if "members: [" in options else ():
                found.append((f"{last}.{member}", inspect.getattr_static(thing, member)))
    return found


def sections(text):
    """Name of a section -> its lines, of a docstring by numpydoc."""
    _, *parts = SECTION.split(text)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def documented(lines):
    """(names, type or None) of each entry of a section of parameters."""
    entries = re.findall(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: : (.+))?$", lines, re.M)
    return [([name.lstrip("*") for name in names.split(", ")], kind) for names, kind in entries]


@pytest.mark.parametrize(("name", "thing"), shown(), ids=[name for name, _ in shown()])
def test_what_the_reference_shows_is_told_whole(name, thing):
    text = inspect.getdoc(thing)
    assert text, f"{name} has no docstring"
    call = thing.__func__ if isinstance(thing, classmethod) else thing
    if not callable(call):
        return  # a property, or a field that its class tells
    signature, told = inspect.signature(call), sections(text)
    wanted = [argument for argument in signature.parameters if argument not in ("self", "cls")]
    entries = documented(told.get("Parameters", "") + told.get("Attributes", ""))
    assert [argument for argument in wanted if argument not in [one for names, _ in entries for one in names]] == []
    assert [names for names, kind in entries if not kind] == []
    assert not wanted or "Raises" in told or dataclasses.is_dataclass(thing)
    if not inspect.isclass(thing) and signature.return_annotation not in ("None", inspect.Signature.empty):
        assert "Returns" in told
