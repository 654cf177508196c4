"""Are the vision-aware heads the same everywhere: between items, decoding steps, and measuring points (figure 10)?"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from probes.head_agreement import agreement_of_means, pairwise_agreement
from probes.head_tokens import Bootstrap
from slitlamp.tracing import ProbeResult
from slitlamp.tracing.probe import Part

Array = NDArray[Any]
MAX_STEPS = 5
"""How many object mentions of a caption are looked at one by one, as in the paper's figure 10."""


def consistency_tables(
    first: Array, groups: Array, maps: Array, map_groups: Array, index: Array, *, k: int, bootstrap: Bootstrap
) -> dict[str, pd.DataFrame]:
    """Tables `consistency` and `consistency_steps`.

    Args:
        first: VHD [item, layer, head] at the first token.
        groups: [item].
        maps: VHD [mention, layer, head] at object mentions.
        map_groups: [mention], their items.
        index: [mention], from 1: which mention of its caption each is.
        k: size of the sets of top heads.
        bootstrap: over items.
    """
    options: dict[str, Any] = {"k": k, "n_resamples": bootstrap.n_resamples, "seed": bootstrap.seed}
    found = {"first token, between items": pairwise_agreement(first, groups, same_item=False, **options)}
    if len(maps):
        crossed = first, groups, maps, map_groups
        found |= {
            "object mentions, between items": pairwise_agreement(maps, map_groups, same_item=False, **options),
            "object mentions, within an item": pairwise_agreement(maps, map_groups, same_item=True, **options),
            "first token against object mentions, of an item": pairwise_agreement(*crossed, same_item=True, **options),
            "first token against object mentions, mean maps": agreement_of_means(*crossed, **options),
        }
    rows = [{"comparison": name, **one.columns()} for name, one in found.items()]
    steps = {0: (first, groups)} | {
        step: (maps[index == step], map_groups[index == step])
        for step in range(1, MAX_STEPS + 1)
        if (index == step).any()
    }
    pairs = []
    for one in steps:
        for two in steps:
            if one > two:
                continue
            for same_item in (False, True) if one != two else (False,):
                other = () if one == two else steps[two]
                agreement = pairwise_agreement(*steps[one], *other, same_item=same_item, **options)
                pairs.append({"step": one, "other": two, "same_item": same_item, **agreement.columns()})
    return {"consistency": pd.DataFrame(rows), "consistency_steps": pd.DataFrame(pairs)}


def compare_points(
    name: str, points: Mapping[tuple[Part, str], tuple[Array, Array]], *, k: int, bootstrap: Bootstrap
) -> ProbeResult | None:
    """Agreement of the mean maps of several measuring points: table `points`.

    Points are compared that differ in their place (data set and kind of token), or in the condition, or in the model, but
    in one of the three only. Heads of two models have no common order: their agreement shows chance.

    Args:
        name: of the probe.
        points: (part, kind of token) -> maps [map, layer, head], and the item of each.
        k: size of the sets of top heads.
        bootstrap: over items; an item of two points is resampled for both together.
    """
    options: dict[str, Any] = {"k": k, "n_resamples": bootstrap.n_resamples, "seed": bootstrap.seed}
    rows = []
    for (one, kind), (two, other) in combinations(points, 2):
        place, other_place = f"{one.dataset}: {kind}", f"{two.dataset}: {other}"
        differs = (one.model != two.model, one.condition != two.condition, place != other_place)
        sides = *points[one, kind], *points[two, other]
        if sum(differs) != 1 or sides[0].shape[1:] != sides[2].shape[1:]:
            continue
        varied = ("model", "condition", "place")[differs.index(True)]
        side = {"model": one.model, "condition": one.condition, "place": place}
        across = {"other_model": two.model, "other_condition": two.condition, "other_place": other_place}
        rows.append({"varied": varied, **side, **across, **agreement_of_means(*sides, **options).columns()})
    if not rows:
        return None
    table = pd.DataFrame(rows)
    parts = [
        f"between {'places' if varied == 'place' else f'{varied}s'} from {each['spearman'].min():.2f} to "
        f"{each['spearman'].max():.2f} ({len(each)} {'pair' if len(each) == 1 else 'pairs'})"
        for varied, each in table.groupby("varied", sort=False)
    ]
    text = f"Rank correlation of the heads' mean VHD (chance 0): {'; '.join(parts)}."
    return ProbeResult(name=name, tables={"points": table}, summary=text)
