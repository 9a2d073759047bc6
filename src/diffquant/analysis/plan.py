"""A plan as people read it: a row for every layer, and what each costs where that was measured."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from diffquant.analysis.estimate import Inspection
from diffquant.analysis.sensitivity import Sensitivity
from diffquant.core.spec import AttentionSpec, LayerSpec


def plan_table(found: Inspection, measured: Sensitivity | None = None) -> Table:
    """What becomes of every layer, its share of the multiplications, and with `measured` of the last sample's error."""
    names = ["shape", "weight", "input", "MACs", *(["error of weight", "of input"] if measured else []), "decided by"]
    others = (Column(name, overflow="fold") for name in names)
    # names whole, on several lines where it is narrow
    table = Table(Column("layer", overflow="fold", min_width=24), *others, box=SIMPLE_HEAD, padding=0)
    for row in found.layers:
        share = _percent(found.shares.get(row.name))
        errors = [_percent(measured.of_layer(row.name, weight)) for weight in (True, False)] if measured else []
        table.add_row(escape(row.name), "x".join(map(str, row.shape)), *_described(row.spec), share, *errors, escape(row.reason))
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _described(spec: LayerSpec | AttentionSpec | None) -> tuple[str, str]:
    if spec is None:
        return "float", "float"
    halves = " per branch" if spec.guidance_sets else ""
    if isinstance(spec, AttentionSpec):
        return f"softmax {spec.softmax or 'float'}{halves}", f"q, k, v {spec.query or 'float'}{halves}"
    splits = f" split {'+'.join(map(str, spec.splits))}" if spec.splits else ""
    return str(spec.weight or "float"), f"{spec.input or 'float'}{splits}{halves}"
