"""What an activation store says of itself: the model and the sites, compared when a store is continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slitlamp.errors import InputError, StoreError
from slitlamp.tracing.sites import Site
from slitlamp.tracing.store.format import SCHEMA

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_VOLATILE = ("_name_or_path", "name_or_path", "transformers_version", "_attn_implementation", "_commit_hash")


def config_sha256(config: PreTrainedConfig) -> str:
    """SHA-256 of a model's configuration, without where it came from and what wrote it."""
    return hashlib.sha256(json.dumps(_plain(config.to_dict()), sort_keys=True, default=str).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items() if name not in _VOLATILE}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def describe(
    model: PreTrainedModel, name: str, sites: Sequence[Site], weights_sha256: Callable[[], str] | None
) -> dict[str, Any]:
    """The manifest of a store.

    Args:
        model, name: the model and where it came from.
        sites: what is recorded, layers spelled out.
        weights_sha256: gives the hash of the weights; None to leave it out.

    Raises:
        InputError: a site whose positions are a mask, which belongs to one batch.
    """
    return {
        "schema": SCHEMA,
        **{package: _version(package) for package in ("slitlamp", "torch", "transformers")},
        "model": {
            "name": name,
            "class": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "config_sha256": config_sha256(model.config),
            "weights_sha256": None if weights_sha256 is None else weights_sha256(),
        },
        "sites": {site.label: _site(site) for site in sites},
    }


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _site(site: Site) -> dict[str, Any]:
    for positions in (site.positions, site.queries, site.keys):
        if not isinstance(positions, str):
            raise InputError(
                f"{site.label}: a position mask belongs to one batch, and a store takes many; choose positions by name"
            )
    found = {one.name: getattr(site, one.name) for one in fields(site)}
    return {**found, "axes": site.axes}


def sites_of(manifest: Mapping[str, Any]) -> dict[str, Site]:
    """The sites of a manifest, by label."""
    found = {}
    for label, given in manifest["sites"].items():
        values: dict[str, Any] = {one.name: given[one.name] for one in fields(Site)}
        values = {name: tuple(one) if isinstance(one, list) else one for name, one in values.items()}
        found[label] = Site(**values)
    return found


def check_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to continue a store of another model or of other sites.

    Raises:
        StoreError: names everything that differs.
    """
    differences = []
    for name in ("class", "dtype", "config_sha256", "weights_sha256"):
        there, here = found["model"].get(name), wanted["model"][name]
        hashes = name == "weights_sha256"
        if there != here and not (hashes and None in (there, here)):  # not hashed on one of the two sides
            differences.append(f"the model's {name.replace('_', ' ')} ({_short(there)} there, {_short(here)} now)")
    theirs, ours = found["sites"], json.loads(json.dumps(wanted["sites"]))
    for label in sorted({*theirs, *ours}):
        if label not in ours:
            differences.append(f"{label!r} is recorded there and not asked for now")
        elif label not in theirs:
            differences.append(f"{label!r} is asked for and not recorded there")
        else:
            differences += [
                f"{label!r}: {name} ({theirs[label].get(name)!r} there, {value!r} now)"
                for name, value in ours[label].items()
                if theirs[label].get(name) != value
            ]
    if list(theirs) != list(ours) and not differences:
        differences.append(f"the order of the sites ({', '.join(theirs)} there, {', '.join(ours)} now)")
    if differences:
        raise StoreError(
            f"the store {folder} cannot be continued, because it differs: {'; '.join(differences)}. Give another folder, "
            "or the model and the sites it was made with"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."
