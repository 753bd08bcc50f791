"""Make an SVG of Vega small: the same picture in less than half of the bytes.

A page shows a figure as one picture with one description, so nobody reaches the names of its parts.
"""

from __future__ import annotations

import re
from collections import Counter
from xml.etree import ElementTree

from mechlens.core.spec import fingerprint

SVG = "http://www.w3.org/2000/svg"
NOT_SEEN = {"aria-label", "aria-hidden", "aria-roledescription", "role", "class", "pointer-events"}
"""attributes that change nothing in the picture"""
PLACED = ("transform", "d", "x", "x2", "y", "y2", "width", "height")
"""attributes with places, in pixels"""
FONT = "sans-serif"
DEFAULTS = {
    "opacity": "1", "stroke-width": "1", "transform": "translate(0,0)", "x2": "0", "y2": "0",
    "font-family": FONT,
}  # fmt: skip
"""attributes at the value that they have if they are left out"""
MANY = 12
"""marks of one shape from which on the shape is written once"""


def shrink(drawn: str) -> str:
    """The picture without the names of its parts, hidden parts and default values, and with one decimal."""
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(drawn)
    for part in root.iter():
        for child in [child for child in part if child.get("display") == "none"]:
            part.remove(child)
        for name in PLACED:
            if name in part.attrib:
                part.attrib[name] = re.sub(r"-?\d+\.\d+(e-?\d+)?", _rounded, part.attrib[name])
        useless = NOT_SEEN if "stroke" in part.attrib else {*NOT_SEEN, "stroke-width"}
        for name, value in part.items():
            if name in useless or DEFAULTS.get(name) == value:
                del part.attrib[name]
    root.attrib["font-family"] = FONT
    _share_shapes(root)
    return ElementTree.tostring(root, encoding="unicode").replace(" />", "/>")


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def _share_shapes(root: ElementTree.Element) -> None:
    """Write a shape that many marks have once, and refer to it."""
    paths = root.findall(f".//{{{SVG}}}path[@d]")
    counts = Counter(path.attrib["d"] for path in paths)
    names = {shape: f"s{fingerprint(shape)[:8]}" for shape, count in counts.items() if count >= MANY}
    for path in paths:
        if path.attrib["d"] in names:
            path.tag = f"{{{SVG}}}use"
            path.attrib["href"] = f"#{names[path.attrib.pop('d')]}"
    if names:
        shapes = ElementTree.Element(f"{{{SVG}}}defs")
        for shape, name in names.items():
            ElementTree.SubElement(shapes, f"{{{SVG}}}path", {"id": name, "d": shape})
        root.insert(0, shapes)
