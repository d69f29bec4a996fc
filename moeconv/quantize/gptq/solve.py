"""GPTQ for a batch of matrices: codes and scales of small output error, for one Hessian per matrix and any grid of
levels.

Codes are chosen column by column with error feedback (GPTQ, arXiv 2210.17323). Coordinate descent over scales and codes
follows, which never raises the error (QuantEase, arXiv 2309.01885). These are pure tensor functions: every step is done
for all matrices at once, so that the number of operations does not depend on the number of matrices.

The feedback is computed from a factor H = R R^T with R upper triangular, instead of from the Cholesky factor of H^-1.
With d = W - Q, the error is the sum over columns k of (sum over j <= k of d_j R[j, k])^2, and each q_k in turn
minimises its own term. The rule is the same, with a third of the work, and it is better conditioned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moeconv.errors import InputError
from moeconv.plan.kernels.pack.levels import Coded, Grid, divided
from moeconv.plan.kernels.pack.scales import search_scales
from moeconv.tensors import all_finite

_LEAF = 16  # columns that are solved one by one; matrix products connect larger blocks
_FACTOR_BYTES = {"cpu": 1 << 26}  # bytes of float64 Hessians that are factored at once
_LARGE_FACTOR_BYTES = 1 << 30
_TRIES = 12  # each adds ten times as much to the diagonal as the one before


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Float64 Hessians [E, in, in], each divided by the mean of its diagonal and with `damping` added to the diagonal.
    A zero Hessian becomes the identity.

    Raises InputError for NaN or infinite entries."""
    hessian = hessian.double()
    if not all_finite(hessian):
        raise InputError(
            "the inputs of an expert contain NaN or infinite values",
            hint="The checkpoint is damaged, or its activations overflow.",
        )
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    zero = mean <= 0
    result = hessian / mean.masked_fill(zero, 1.0)[:, None, None]
    diagonal = result.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(torch.where(zero, 1.0, damping)[:, None])
    return result


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, *, group: int, sweeps: int = 3, ordered: bool = True) -> Coded:
    """Codes and scales for `weight` [E, out, in] that keep weight @ x, for inputs x whose damped second moments are
    `hessian` [E, in, in]. Each scale belongs to `group` adjacent weights of a row.

    With `ordered`, the columns with the largest diagonal are chosen first (actorder). Groups still consist of adjacent
    columns, with scales that are fixed before the first column, so that any reader of the format loads the result.
    `sweeps` is the number of rounds of coordinate descent that follow, over the scales and then over the codes.
    """
    unit = grid.unit(weight)
    weight = divided(weight.float(), unit)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    scales = search_scales(weight, diagonal, grid, group=group).permute(2, 0, 1).contiguous()  # [groups, E, out]
    columns = torch.arange(weight.shape[2], device=weight.device)
    order = torch.argsort(diagonal, descending=True, stable=True) if ordered else columns.expand_as(diagonal)
    work = _Work(hessian, grid, group, order)
    levels, left = work.feedback(weight.permute(2, 0, 1).contiguous(), scales)
    if sweeps:
        plain = hessian.float()
        slope = torch.empty_like(left)  # [in, E, out], -1/2 of the gradient
        torch.bmm(plain, left.transpose(0, 1), out=slope.transpose(0, 1))
        taken = _permuted(plain, order) if ordered else plain
        for sweep in range(sweeps):
            work.refit_scales(plain, levels, scales, slope, left)
            levels = work.refit_levels(taken, levels, scales, slope, left, last=sweep + 1 == sweeps)
    return Coded(levels.permute(1, 2, 0).contiguous(), scales.permute(1, 2, 0).contiguous(), unit)


def loss(weight: Tensor, hessian: Tensor, coded: Coded) -> Tensor:
    """The output error tr((W - Q) H (W - Q)^T) of each matrix, float64 [E]."""
    left = weight.double() - coded.decoded().double()
    return ((left @ hessian.double()) * left).sum((-2, -1))


def retarget(weight: Tensor, gap: Tensor, hessian: Tensor) -> Tensor:
    """W + W gap H^-1, float32 [E, out, in]: the weight that reproduces W h from the inputs h' = h - d. `gap` [E, in,
    in] is the sum of d h'^T in the units of `hessian`, the damped sum of h' h'^T (GPTAQ, arXiv 2504.02692, in closed
    form)."""
    solved = torch.cholesky_solve(gap.double().mT, cholesky(hessian.double())).mT  # gap H^-1, H symmetric
    return (weight.double() + weight.double() @ solved).float()


def cholesky(hessian: Tensor) -> Tensor:
    """The lower factors of float64 [E, n, n] with a mean diagonal of about 1. A matrix that is not positive definite,
    which rounding causes where the damping is too small, gets more on its diagonal until it is."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(hessian)
    more = 1e-9
    for _ in range(_TRIES):
        if not bool(failed.any()):
            break
        some = failed.nonzero().flatten()
        raised = hessian[some]
        raised.diagonal(dim1=-2, dim2=-1).add_(more)
        factor[some], failed[some] = torch.linalg.cholesky_ex(raised)
        more *= 10
    return factor


class _Work:
    """The passes over the columns of one batch. All matrices are stored transposed, [in, E, out], so that one column of
    every matrix is contiguous in memory. `order` int64 [E, in] is the order in which columns are chosen."""

    def __init__(self, hessian: Tensor, grid: Grid, group: int, order: Tensor) -> None:
        self.hessian, self.grid, self.group, self.order = hessian, grid, group, order
        self.place = order.argsort(1)

    def feedback(self, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """One GPTQ pass with fixed `scales` [groups, E, out]. Returns the levels and the remaining errors, both [in, E,
        out]."""
        share = self._shares()  # [E, in, in]
        weight = self._taken(weight, self.order)
        target, levels = weight.clone(), torch.empty_like(weight)

        def columns(first: int, last: int) -> None:
            scale = self._scales_of(scales, first, last)
            for at in range(first, last):
                levels[at] = self.grid.nearest(target[at] / scale[at - first])
                torch.addcmul(weight[at], levels[at], scale[at - first], value=-1, out=target[at])
                if at + 1 < last:
                    target[at + 1 : last].addcmul_(_column(share, at, at + 1, last), target[at])

        def push(into: slice, source: slice) -> None:
            _add(target[into], share[:, source, into].mT, target[source], 1.0)

        _blocked(0, len(weight), columns, push)
        return self._taken(levels, self.place), self._taken(target, self.place)

    def refit_scales(self, hessian: Tensor, levels: Tensor, scales: Tensor, slope: Tensor, room: Tensor) -> None:
        """Set each scale to its optimum with all others fixed, group by group. Changes `scales` and `slope`; `room` is
        temporary memory."""
        group = self.group

        def groups(first: int, last: int) -> None:
            assert last - first == group  # a leaf is a group
            rows, g = slice(first, last), first // group
            part = levels[rows]
            reach = torch.bmm(hessian[:, rows, rows], part.transpose(0, 1)).transpose(0, 1)
            energy, along = (reach * part).sum(0), (slope[rows] * part).sum(0)
            wanted = self.grid.stored(scales[g] + torch.where(energy > 0, along / energy, 0.0))
            step = wanted - scales[g]
            step = torch.where((step * step * energy < 2 * step * along) & (wanted * scales[g] > 0), step, 0.0)
            scales[g] += step
            slope[rows].addcmul_(reach, step, value=-1)
            torch.mul(part, step, out=room[rows])

        def push(into: slice, source: slice) -> None:
            _add(slope[into], hessian[:, into, source], room[source], -1.0)

        _blocked(0, len(levels), groups, push, leaf=group, back=push)

    def refit_levels(
        self, hessian: Tensor, levels: Tensor, scales: Tensor, slope: Tensor, room: Tensor, *, last: bool
    ) -> Tensor:
        """Set the levels of each column to their optimum with all others fixed, column by column, and return the new
        levels. `hessian` is in the order of the columns. Updates `slope`, except in the `last` pass, after which
        nothing reads it."""
        levels, moved = self._taken(levels, self.order), self._taken(slope, self.order)

        def columns(first: int, stop: int) -> None:
            scale = self._scales_of(scales, first, stop)
            diagonal = hessian.diagonal(dim1=1, dim2=2)[:, first:stop].T[..., None]
            rate = (diagonal * scale).reciprocal_()
            for at in range(first, stop):
                new = self.grid.nearest(torch.addcmul(levels[at], moved[at], rate[at - first]))
                torch.mul(levels[at].sub_(new), scale[at - first], out=room[at])  # the step, negative
                levels[at] = new
                moved[first:stop].addcmul_(_column(hessian, at, first, stop), room[at])

        def push(into: slice, source: slice) -> None:
            _add(moved[into], hessian[:, into, source], room[source], 1.0)

        _blocked(0, len(levels), columns, push, back=None if last else push)
        if not last:
            slope.copy_(self._taken(moved, self.place))
        return self._taken(levels, self.place)

    def _shares(self) -> Tensor:
        """R[j, k] / R[k, k] for j < k, of H = R R^T in the order of the columns: the share of the error of column j
        that column k compensates. float32 [E, in, in]."""
        experts, width = self.order.shape
        result = torch.empty(experts, width, width, device=self.order.device)
        limit = _FACTOR_BYTES.get(self.order.device.type, _LARGE_FACTOR_BYTES)
        backward = self.order.flip(1)
        for some in torch.arange(experts).split(max(1, limit // (8 * width * width))):
            part = slice(int(some[0]), int(some[-1]) + 1)
            factor = cholesky(_permuted(self.hessian[part], backward[part]))  # of the matrix turned around
            factor = factor / factor.diagonal(dim1=1, dim2=2)[:, None]
            result[part] = factor.flip(1, 2)
        return result

    def _taken(self, rows: Tensor, order: Tensor) -> Tensor:
        """`rows` [n, E, out] in an order [E, m] per matrix: [m, E, out]."""
        experts = torch.arange(rows.shape[1], device=rows.device)
        columns = rows.flatten(0, 1).index_select(0, (order.T * len(experts) + experts).flatten())
        taken: Tensor = columns.unflatten(0, (-1, len(experts)))
        return taken

    def _scales_of(self, scales: Tensor, first: int, last: int) -> Tensor:
        """The scales of the columns at positions `first` to `last` of the order, [last - first, E, out]."""
        return self._taken(scales, self.order[:, first:last] // self.group)


def _blocked(
    first: int,
    last: int,
    solve: Callable[[int, int], None],
    push: Callable[[slice, slice], None],
    *,
    leaf: int = _LEAF,
    back: Callable[[slice, slice], None] | None = None,
) -> None:
    """Solve the columns `first` to `last` in order, one leaf at a time. The changes of one half are applied to the
    other in one product: to the later half before it is solved (`push`), and to the earlier half afterwards
    (`back`)."""
    if last - first <= leaf:
        return solve(first, last)
    middle = first + -(-(last - first) // (2 * leaf)) * leaf
    _blocked(first, middle, solve, push, leaf=leaf, back=back)
    push(slice(middle, last), slice(first, middle))
    _blocked(middle, last, solve, push, leaf=leaf, back=back)
    if back is not None:
        back(slice(first, middle), slice(middle, last))
    return None


def _add(into: Tensor, factor: Tensor, steps: Tensor, sign: float) -> None:
    """into [b, E, out] += sign * factor [E, b, c] @ steps [c, E, out], in place."""
    into.transpose(0, 1).baddbmm_(factor, steps.transpose(0, 1), alpha=sign)


def _column(factor: Tensor, at: int, first: int, last: int) -> Tensor:
    """factor[:, at, first:last] of [E, in, in] in the shape that multiplies columns: [last - first, E, 1]."""
    return factor[:, at, first:last].T[..., None]


def _permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """A symmetric matrix [E, n, n] with rows and columns in the order [E, n]."""
    experts, width = order.shape
    rows = (order + width * torch.arange(experts, device=order.device)[:, None]).flatten()
    half = matrix.reshape(-1, width).index_select(0, rows).view(matrix.shape)
    return half.mT.reshape(-1, width).index_select(0, rows).view(matrix.shape)
