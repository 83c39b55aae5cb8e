"""Trees of arrays, by the paths of their leaves."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ping_llm.errors import CheckpointError


def by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths in it, such as `blocks.mlp.up.kernel.value`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def check_shapes(
    where: object, wanted: Mapping[str, Any], stored: Mapping[str, Sequence[int]]
) -> None:
    """Raises a `CheckpointError` where stored shapes are not those of the arrays wanted."""
    if missing := sorted(wanted.keys() - stored.keys()):
        raise CheckpointError(f"{where} lacks {missing[0]}; it is of another model or damaged")
    if extra := sorted(stored.keys() - wanted.keys()):
        raise CheckpointError(f"{where} holds {extra[0]}, which this model does not have")
    for name, leaf in wanted.items():
        have, want = tuple(stored[name]), tuple(leaf.shape)
        if have != want:
            raise CheckpointError(
                f"{where}: {name} has shape {have}, this model's has {want}; "
                "load it with the settings it was trained with"
            )
