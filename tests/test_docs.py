"""What README and CONTRIBUTING show is run here, and what they say of families is made from the entries."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import interventions
from slitlamp.models.families import families_table
from slitlamp.vlm import VLM

ROOT = Path(__file__).parents[1]


def python_blocks(name: str) -> list[str]:
    """The Python blocks of a Markdown file."""
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks("README.md")
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert "the image shows" in printed
    assert (tmp_path / "runs/readme/report.html").exists() or (tmp_path / "runs/readme/config.yaml").exists()


def test_the_page_on_interventions_runs_and_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = python_blocks("docs/interventions.md")
    exec(compile(block, "docs/interventions.md", "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out
    assert "the image shows" in printed
    assert "32 image tokens" in printed
    text = (ROOT / "docs/interventions.md").read_text(encoding="utf-8")
    table = "".join(line for line in text.splitlines() if line.startswith("|"))
    assert [name for name in interventions.__all__ if f"`{name}`" not in table] == []


def test_contributing_examples_run(organism: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("contributing")  # dataclasses look their module up by name
    monkeypatch.setitem(sys.modules, "contributing", module)
    names = module.__dict__
    for block in python_blocks("CONTRIBUTING.md"):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    image = next((ROOT / "datasets/emoji_scenes/images").glob("*.png"))
    batch = organism.encode(images=[image], prompts=["Describe this image in detail."])
    probe = names["ImageNorm"]()
    organism.measure(probe, batch)
    assert len(probe.result().tables["norms"]) == organism.anatomy.n_layers
    before = organism.forward(batch).logits
    with organism.apply(names["ScaleMLP"]()):
        assert (organism.forward(batch).logits - before).abs().max() > 1e-3
    plain = organism.generate(batch, max_new_tokens=12).tokens
    with organism.apply(names["AgainstNoImage"](3.0)):
        assert organism.generate(batch, max_new_tokens=12).tokens != plain


def test_readme_table_of_families_is_that_of_the_entries() -> None:
    assert families_table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_of_the_documents_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{name} links to {target}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
