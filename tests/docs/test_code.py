"""What the documentation shows is run here: Python and what it prints, commands, YAML."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer
from documents import ROOT, blocks, pages, same_output, text_of

from slitlamp.cli import app, main
from slitlamp.experiments.config import find_config, parse_config, read_config
from slitlamp.experiments.yaml_file import YamlFile
from slitlamp.vlm import VLM

ELSEWHERE = {
    "docs/nnsight.md": "tests/tracing/test_nnsight.py",
    "docs/scale.md": "tests/test_estimate.py",
    "docs/transformer_lens.md": "tests/tracing/test_transformer_lens.py",
}
"""Pages whose blocks are run by tests of their own."""
NOT_RUN: dict[str, list[str]] = {}
"""Why blocks of a page are not run, by page."""
UNSHOWN = {"README.md": ["the image shows"], "docs/interventions.md": ["the image shows", "32 image tokens"]}
"""Pages that do not show all that they print, and what is among it."""
RUN = ("list", "inspect")
"""Commands that are run. Of others the options are parsed, and the experiments and settings of `run` looked up."""

HERE = [page for page in pages() if page not in ELSEWHERE and blocks(page, "python")]


@pytest.mark.parametrize("page", HERE)
def test_python_runs_and_prints_what_is_shown(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")  # dataclasses look their module up by name
    monkeypatch.setitem(sys.modules, "page", module)
    for block in blocks(page, "python"):
        if block.skipped:
            continue
        exec(compile(block.code, page, "exec"), module.__dict__)
        printed = capsys.readouterr().out
        if page in UNSHOWN:
            assert [text for text in UNSHOWN[page] if text not in printed] == []
        else:
            assert same_output(block.output or "", printed), f"{page} shows\n{block.output}\nand prints\n{printed}"


def test_what_is_not_run_is_known() -> None:
    skipped = {page: [block.skipped for block in blocks(page, "python") if block.skipped] for page in pages()}
    assert {page: why for page, why in skipped.items() if why} == NOT_RUN


@pytest.mark.parametrize("page", ELSEWHERE)
def test_other_pages_are_run_by_their_own_tests(page: str) -> None:
    text = (ROOT / ELSEWHERE[page]).read_text(encoding="utf-8")
    assert Path(page).name in text
    assert "exec(compile(" in text


def test_outputs_are_compared() -> None:
    assert same_output("chair_i 0.23 [0.1, 0.3]\n", " chair_i  0.24 [0.1,  0.3]")
    assert not same_output("0.23", "0.25")
    assert not same_output("24 captions", "25 captions")
    assert not same_output("layer 1", "head 1")


def commands() -> list[tuple[str, str]]:
    return [
        (page, line)
        for page in pages()
        for block in blocks(page, "bash")
        for line in block.code.splitlines()
        if line.strip()
    ]


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands(
    page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    program, name, *arguments = shlex.split(line, comments=True)
    if program == "make":
        assert f"\n{name}: " in (ROOT / "Makefile").read_text(encoding="utf-8")
        return
    assert program == "slitlamp"
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    context = command.make_context(name, list(arguments))
    if name == "run":
        for experiment in context.params["experiments"]:
            read_config(find_config(experiment, [ROOT / "experiments"]), context.params["changes"] or [])
    elif name in RUN:
        with pytest.raises(SystemExit) as ended:
            main([name, *arguments])
        assert ended.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", [page for page in pages() if blocks(page, "yaml")])
def test_yaml_is_a_configuration(page: str, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        path = tmp_path / "shown.yaml"
        path.write_text(block.code, encoding="utf-8")
        assert parse_config(YamlFile.read(path)).datasets


def test_contributing_examples_run(organism: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("contributing")
    monkeypatch.setitem(sys.modules, "contributing", module)
    names = module.__dict__
    for block in blocks("CONTRIBUTING.md", "python"):
        exec(compile(block.code, "CONTRIBUTING.md", "exec"), names)
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


def test_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) < 200
