"""Local scaling of cosines: a likeness counts by how much it exceeds what is usual around both images."""

from __future__ import annotations

from torch import Tensor

NEIGHBORS = 10
"""Nearest reference images that decide what is usual; all of them if there are fewer."""


def csls(features: Tensor, truths: Tensor, reference: Tensor, neighbors: int = NEIGHBORS) -> Tensor:
    """Return cross-domain similarity local scaling, csls(x, y) = 2 cos(x, y) − r(x) − r(y) (arXiv 1710.04087, eq. 9).

    r is the mean cosine to the nearest reference images, so that a point that is close to everything gains nothing
    from it (for style features: arXiv 2605.09030). 0 is a usual likeness.

    Args:
        features: x, [N, D]; like all arguments, rows of unit length.
        truths: y, [M, D].
        reference: [R, D], R ≥ 1, without x and y.

    Returns:
        [N, M]
    """

    def usual(rows: Tensor) -> Tensor:
        return (rows @ reference.T).topk(min(neighbors, len(reference)), dim=1).values.mean(1)

    return 2 * features @ truths.T - usual(features)[:, None] - usual(truths)[None, :]
