"""Which tensors of a model become which tensors on disk, found from shapes alone. Called by `export`.

transformers keeps some weights in another form than its files have (a mixture-of-experts model holds its experts in
one tensor; the files hold each on its own) and turns all of them back at once when it saves. Here the same is
planned in small pieces, each of which can be gathered, converted and written before the next is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Convert = Callable[[Tensors], Tensors]
"""From tensors under the model's names to tensors under the names on disk."""


class Piece(NamedTuple):
    """Tensors of the model (`sources`) that make tensors on disk (`targets`) without any others."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    converted: bool
    """False: one tensor, written as it is."""


class WeightPlan(NamedTuple):
    pieces: list[Piece]
    """In the order in which their tensors stand on disk."""
    tensors: Tensors
    """Meta tensors under the names on disk, in order."""


def _alone(convert: Convert, shapes: Tensors) -> Tensors | None:
    """What `shapes` become without the rest of the model; None where that cannot be done."""
    try:
        return convert(dict(shapes))
    except Exception:
        # Whatever a conversion raises where it lacks a tensor: it then needs the others.
        return None


def _agrees(found: Tensors | None, whole: Tensors) -> bool:
    return found is not None and all(name in whole and whole[name].shape == made.shape for name, made in found.items())


def _groups(convert: Convert, shapes: Tensors, whole: Tensors) -> list[tuple[tuple[str, ...], Tensors]]:
    """`shapes`, which are all converted, in the smallest groups that give what they give in the whole model."""
    alone = {name: _alone(convert, {name: shape}) for name, shape in shapes.items()}
    done = [((name,), made) for name, made in alone.items() if made is not None and _agrees(made, whole)]
    single = {names[0] for names, _ in done}
    together: dict[frozenset[str], list[str]] = {}
    for name, made in alone.items():
        if name not in single:
            together.setdefault(frozenset(made or ()), []).append(name)
    made_together = {
        tuple(names): _alone(convert, {name: shapes[name] for name in names}) for names in together.values()
    }
    if not all(_agrees(made, whole) for made in made_together.values()):
        names = tuple(name for group in made_together for name in group)
        made_together = {names: convert({name: shapes[name] for name in names})}
    return [*done, *((names, made) for names, made in made_together.items() if made is not None)]


def make_plan(shapes: Mapping[str, Tensor], convert: Convert) -> WeightPlan:
    """The plan for `shapes` (meta tensors under the model's names, each a tensor of its own)."""
    whole = convert(dict(shapes))
    names = {id(shape): name for name, shape in shapes.items()}
    pieces = [
        Piece((names[id(made)],), (target,), converted=False) for target, made in whole.items() if id(made) in names
    ]
    kept = {piece.sources[0] for piece in pieces}
    rest = {name: shape for name, shape in shapes.items() if name not in kept}
    pieces += [Piece(group, tuple(made), converted=True) for group, made in _groups(convert, rest, whole) if made]
    place = {target: at for at, target in enumerate(whole)}
    planned = {target for piece in pieces for target in piece.targets}
    assert planned == set(whole), f"not planned: {sorted(set(whole) ^ planned)}"
    # Not the conversions' own: a part of a tensor would count as all of it where sizes are added up.
    tensors = {name: torch.empty(made.shape, dtype=made.dtype, device="meta") for name, made in whole.items()}
    return WeightPlan(sorted(pieces, key=lambda piece: min(place[target] for target in piece.targets)), tensors)
