"""Which class each folder of images stands for.

Two conventions, in this order: folders named by numbers are the classes of these numbers; otherwise, where there are
as many folders as classes, they count from 0 in the order of their names as text, as torchvision's ImageFolder counts.
"""

from __future__ import annotations

from collections.abc import Sequence

Numbering = tuple[dict[str, int] | None, str]


def numbering(folders: Sequence[str], classes: int | None) -> Numbering:
    """Return the class of each folder, or None, and what to say of it. ``folders`` are sorted as text."""
    if classes is None:
        return None, "no labels: the network's first output is no table of classes"
    if not folders:
        return None, "no labels: the images are in no folders named by their classes"
    numbered = {folder: int(folder) for folder in folders if folder.isascii() and folder.isdecimal()}
    sorted_ = {folder: index for index, folder in enumerate(folders)}
    if len(numbered) < len(folders):
        return _sorted(sorted_, classes)
    return _numbered(numbered, sorted_, classes)


def _sorted(sorted_: dict[str, int], classes: int) -> Numbering:
    if len(sorted_) != classes:
        folders = "1 folder" if len(sorted_) == 1 else f"{len(sorted_)} folders"
        return None, f"no labels: {folders} for a network of {classes} classes"
    return sorted_, f"labels: the {classes} folders in the order of their names"


def _numbered(numbered: dict[str, int], sorted_: dict[str, int], classes: int) -> Numbering:
    """Take the numbers, and say so where ImageFolder would count otherwise; where they are none of the network's
    classes, count the folders, but only where the order of numbers and of texts is the same.
    """
    values = list(numbered.values())
    if len(set(values)) < len(values):
        return None, "no labels: two folders are named by the same number"
    if max(values) < classes:
        other = len(values) == classes and numbered != sorted_
        doubt = "; torchvision's ImageFolder would count them otherwise, in the order of their names as text"
        return numbered, "labels: the numbers that the folders are named by" + (doubt if other else "")
    if values != sorted(values):
        return None, f"no labels: the folders are named by numbers to {max(values)}, the classes are 0 to {classes - 1}"
    return _sorted(sorted_, classes)
