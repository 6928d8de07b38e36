"""DPM-Solver, DPM-Solver++ and SDE-DPM-Solver++, multistep and singlestep, of order 1 to 3.

From a base node ``s`` to ``t``, with ``h = lambda_t - lambda_s``, ``D0`` the network's prediction at the base and ``D1, D2``
its scaled first and second differences in ``lambda`` (`_differences`):

    dpm     D = eps   x' = alpha_t / alpha_s x - sigma_t ((e^h - 1) D0 + ((e^h - 1) / h - 1) D1 + ...)
    dpm++   D = x0    x' = sigma_t / sigma_s x + alpha_t ((1 - e^-h) D0 + ((e^-h - 1) / h + 1) D1 + ...)
    sde++   D = x0    x' = sigma_t / sigma_s e^-h x + alpha_t ((1 - e^-2h) D0 + ...) + sigma_t sqrt(1 - e^-2h) z

A multistep base is the present node and earlier predictions make the differences; a singlestep one stays for ``order``
evaluations. Order 2 in its midpoint form has half of the weight of ``D0`` on ``D1``. Sources: Lu et al. 2022 (DPM-Solver,
algorithms 1 and 2; DPM-Solver++, algorithms 1 and 2, and its SDE form) and their released code, whose multistep
order 3 halves the second difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal, get_args

from ..errors import unknown
from .nodes import Nodes, check_order
from .table import Table
from .tape import Sum, Tape

Variant = Literal["dpm", "dpm++", "sde-dpm++"]
VARIANTS: Final = get_args(Variant)
Form = Literal["midpoint", "heun"]
FORMS: Final = get_args(Form)


def dpm_multistep(nodes: Nodes, order: int = 2, variant: Variant = "dpm++", form: Form = "midpoint") -> Table:
    """The table of a multistep solver: one evaluation a step, the first steps and the last of lower order.

    Args:
        order: 1 to 3.
        form: Of order 2.

    Raises:
        UserError: An order, a variant or a form that there is not.
    """
    _check(nodes, order, variant, form)
    tape = nodes.tape(f"{variant}-{order}m")
    seen: list[Sum] = []
    for i in range(len(nodes)):
        x, x0 = nodes.evaluate(tape, i)
        seen.append(x0 if variant != "dpm" else tape.keep(nodes.eps_of(i, x, x0)))
        points = [i - j for j in range(nodes.multistep_order(i, order))]
        _advance(tape, nodes, variant, form, x, points, [seen[j] for j in points], i + 1)
    return tape.table()


def dpm_singlestep(nodes: Nodes, order: int = 2, variant: Variant = "dpm++", form: Form = "midpoint") -> Table:
    """The table of a singlestep solver: ``order`` evaluations a step, from one base.

    Steps of the full order come first; the last ones are of lower order so that the evaluations come out even.

    Args:
        order: 1 to 3.
        form: Of order 2 and 3.

    Raises:
        UserError: As `dpm_multistep`.
    """
    _check(nodes, order, variant, form)
    tape = nodes.tape(f"{variant}-{order}s")
    base, held, seen = 0, Sum({}), list[Sum]()
    for i, now in enumerate(_orders(len(nodes), order, ends_in_data=nodes.end == "zero")):
        x, x0 = nodes.evaluate(tape, i)
        seen.append(x0 if variant != "dpm" else tape.keep(nodes.eps_of(i, x, x0)))
        if now == 1:
            base, held = i, x
        points = [base, i] if now == 2 else list(range(base, i + 1))
        _advance(tape, nodes, variant, form, held, points, [seen[j] for j in points], i + 1)
    return tape.table()


def _orders(steps: int, order: int, ends_in_data: bool) -> list[int]:
    """The order of the formula after each evaluation: 1, 2, .., order, again and again."""
    whole, rest = divmod(steps, order)
    orders = [*range(1, order + 1)] * whole + [*range(1, rest + 1)]
    if rest == 0 and order == 3:  # as published: the last whole step is split, so that the run ends on order 1
        orders[-3:] = [1, 2, 1]
    return [*orders[:-1], 1] if ends_in_data else orders


def _check(nodes: Nodes, order: int, variant: Variant, form: Form) -> None:
    check_order(order, 3)
    if variant not in VARIANTS:
        raise unknown("variant of DPM-Solver", variant, VARIANTS)
    if form not in FORMS:
        raise unknown("form", form, FORMS)


def _differences(values: Sequence[Sum], at: Sequence[float]) -> tuple[Sum, Sum]:
    """First derivative and second divided difference at ``at[0] = 0`` of the line or parabola through the values."""
    slope = (values[1] - values[0]) / at[1]
    if len(values) == 2:
        return slope, Sum({})
    bend = ((values[2] - values[0]) / at[2] - slope) / (at[2] - at[1])
    return slope - at[1] * bend, bend


def _advance(
    tape: Tape,
    nodes: Nodes,
    variant: Variant,
    form: Form,
    x: Sum,
    points: Sequence[int],
    values: Sequence[Sum],
    to: int,
) -> None:
    """From ``x`` at node ``points[0]`` to node ``to``, with the predictions ``values`` at ``points``."""
    alpha, sigma, kappa, lam = nodes.alpha, nodes.sigma, nodes.kappa, nodes.lam
    base, multistep = points[0], points[-1] <= points[0]
    decay, noise = kappa[to] / kappa[base], 0.0  # e^-h
    if variant == "dpm":
        x, rate, weight = (alpha[to] / alpha[base]) * x, sigma[to], sigma[to] - alpha[to] * kappa[base]
    else:
        growth = decay if variant == "dpm++" else decay**2
        x, rate, weight = (sigma[to] / sigma[base]) * x, alpha[to], alpha[to] * (1 - growth)
        if variant == "sde-dpm++":
            x, noise = decay * x, sigma[to] * math.sqrt(1 - decay**2)
    out = x + weight * values[0]
    if len(points) > 1:
        h = lam[to] - lam[base]
        q = {"dpm": h, "dpm++": -h, "sde-dpm++": -2 * h}[variant]
        second, third = rate * (1 - math.expm1(q) / q), rate * (0.5 - (math.expm1(q) - q) / q**2)
        at = [(lam[p] - lam[base]) / h for p in points]
        slope, bend = _differences(values, at)
        if form == "heun" or (multistep and len(points) == 3):
            out = out + second * slope + (third if multistep else 2 * third) * bend
        elif len(points) == 2:
            out = out + 0.5 * weight * slope
        else:
            out = out + second * ((values[2] - values[0]) / at[2])
    tape.advance(out, noise)
