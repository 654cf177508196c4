"""Claims of the papers: verdicts from tables whose answer is known, and the page that is made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import PIL.Image
import pytest
import yaml

from slitlamp import cli
from slitlamp.experiments.places import data_folders
from slitlamp.reports.papers import CLAIMS, FolderTables, paper_findings, run_findings
from slitlamp.reports.papers.claims import AGREES, DIFFERS, OPEN, Claim, Finding, apart, changes, lies, together
from slitlamp.reports.papers.page import page, write_page
from slitlamp.reports.wording import Estimate

EXPERIMENTS = data_folders("experiments")[0]
Rows = list[dict[str, Any]]


def claim(paper: str, figure: str) -> Claim:
    (found,) = (one for one in CLAIMS if (one.paper, one.figure) == (paper, figure))
    return found


def row(value: float, half: float = 0.01, **more: Any) -> dict[str, Any]:
    return {**more, "value": value, "low": value - half, "high": value + half}


def tables(**rows: Rows) -> dict[str, pd.DataFrame]:
    return {name: pd.DataFrame(found) for name, found in rows.items()}


@pytest.mark.parametrize(
    ("low", "high", "above", "below"),
    [(0.1, 0.3, AGREES, DIFFERS), (-0.3, -0.1, DIFFERS, AGREES), (-0.1, 0.1, OPEN, OPEN), (0.0, 0.2, OPEN, OPEN)],
)
def test_an_interval_decides_only_where_it_lies_on_one_side(low: float, high: float, above: str, below: str) -> None:
    estimate = Estimate((low + high) / 2, low, high)
    assert lies(estimate, "above", 0.0, "x").verdict == changes(estimate, "above", "x").verdict == above
    assert lies(estimate, "below", 0.0, "x").verdict == below


def test_without_an_interval_nothing_is_decided() -> None:
    assert lies(Estimate(5.0), "above", 0.0, "x") == Finding(OPEN, "x 5.000 (no interval)")
    assert apart(Estimate(5.0), "above", Estimate(1.0, 0.9, 1.1), "").verdict == OPEN


@pytest.mark.parametrize(("first", "verdict"), [(2.0, AGREES), (0.0, DIFFERS), (1.15, OPEN)])
def test_two_numbers_are_apart_only_by_whole_intervals(first: float, verdict: str) -> None:
    """Intervals of 0.2 around the first and around 1: they touch at a distance of 0.2."""
    found = apart(Estimate(first, first - 0.1, first + 0.1), "above", Estimate(1.0, 0.9, 1.1), "{first} and {second}")
    assert found.verdict == verdict
    assert " and 1.000 [.900" in found.text
    other = apart(Estimate(first, first - 0.1, first + 0.1), "below", Estimate(1.0, 0.9, 1.1), "")
    assert other.verdict == {AGREES: DIFFERS, DIFFERS: AGREES, OPEN: OPEN}[found.verdict]


def test_parts_agree_together_and_one_is_enough_to_differ() -> None:
    yes, no, unknown = (Finding(verdict, verdict) for verdict in (AGREES, DIFFERS, OPEN))
    assert together(yes, yes).verdict == AGREES
    assert together(yes, unknown).verdict == OPEN
    assert together(yes, unknown, no) == Finding(DIFFERS, f"{AGREES}; {OPEN}; {DIFFERS}")


@pytest.mark.parametrize("one", CLAIMS, ids=lambda one: f"{one.paper} {one.figure}")
def test_a_run_that_lacks_the_tables_says_so(one: Claim) -> None:
    found = one.finding({})
    assert found.verdict == OPEN
    assert found.text.startswith("the run has no ")


class Differences(Mapping[str, pd.DataFrame]):
    """A table `differences` in which every pair that is asked for, and its opposite, has given changes."""

    def __init__(self, *rows: tuple[str, str, float], half: float = 0.01) -> None:
        every: Rows = []
        for condition, reference, value in rows:
            for metric, captions in (
                *((metric, True) for metric in ("chair_i", "recall", "f1")),  # captions have an F1 of their own
                *((metric, False) for metric in ("accuracy", "f1")),
            ):
                change = 0.0 if captions and metric != "chair_i" else value
                every.append(
                    row(
                        change,
                        half,
                        condition=condition,
                        reference=reference,
                        metric=metric,
                        task="captions" if captions else "pope",
                        dataset="captions" if captions else "set/pope_all",
                    )
                )
        self.frame = pd.DataFrame(every)

    def __getitem__(self, name: str) -> pd.DataFrame:
        return {"differences": self.frame}[name]

    def __iter__(self) -> Any:
        return iter(["differences"])

    def __len__(self) -> int:
        return 1


VHR = "VHR"
AGREEING: list[tuple[str, str, list[tuple[str, str, float]], list[tuple[str, str, float]]]] = [
    (VHR, "main table, CHAIR", [("vhr", "greedy", -0.1), ("vhr", "vcd", -0.1)], [("vhr", "vhr_random", 0.0)]),
    (VHR, "main table, POPE", [("vhr", "greedy", 0.1)], []),
    (VHR, "ablation, choice of heads", [("one_sample", "vhr", 0.1), ("no_outlier_rule", "vhr", 0.1)], []),
    (VHR, "ablation, layers", [("both", "second", -0.1), ("both", "last", -0.1)], []),
    (
        VHR,
        "ablation, alpha",
        [(f"alpha_{a}", "baseline", 0.1 if float(a) < 1 else -0.1) for a in ("0.2", "0.5", "2", "3", "4")],
        [],
    ),
    (
        "TruthPrInt",
        "main table",
        [("fpr_0.01", "greedy", -0.1)],
        [("fpr_0.1", "greedy", 0.0), ("fpr_0.1", "fpr_0.1_random_places", 0.0)],
    ),
    ("DAMRO", "main table, POPE", [("damro", "original", 0.1)], []),
    ("DAMRO", "main table, CHAIR", [("damro", "original", -0.1), ("damro", "m3id", -0.1)], [("damro", "vcd", 0.0)]),
    (
        "DAMRO",
        "ablation, alpha",
        [("alpha_0.5", "baseline", -0.1)],
        [("alpha_0.5", "alpha_0.5_random", 0.0), *((f"alpha_{a}", "baseline", 0.0) for a in ("0.25", "1", "2", "4"))],
    ),
    (
        "DAMRO",
        "ablation, top-k",
        [("top_k_6", "baseline", -0.1), ("top_k_6", "top_k_6_random", -0.1)],
        [(f"top_k_{k}", "baseline", 0.0) for k in (1, 3, 10, 20)],
    ),
    (
        "IMA",
        "figure 12",
        [("alpha_0.5", "alpha_0.5_random", 0.1), ("alpha_0.5", "alpha_0.5_magnitude", 0.1)],
        [],
    ),
]


@pytest.mark.parametrize(("paper", "figure", "decide", "beside"), AGREEING, ids=[" ".join(one[:2]) for one in AGREEING])
def test_tables_of_differences(
    paper: str, figure: str, decide: list[tuple[str, str, float]], beside: list[tuple[str, str, float]]
) -> None:
    """The paper's direction agrees, the opposite differs, wide intervals decide nothing; and each part is needed."""
    one = claim(paper, figure)
    assert one.finding(Differences(*decide, *beside)).verdict == AGREES
    assert one.finding(Differences(*((*pair, -value) for *pair, value in decide), *beside)).verdict == DIFFERS  # type: ignore[arg-type]
    assert one.finding(Differences(*decide, *beside, half=0.5)).verdict == OPEN
    for place in range(len(decide)):
        condition, reference, _ = decide[place]
        part = [*decide[:place], (condition, reference, 0.0), *decide[place + 1 :]]
        assert one.finding(Differences(*part, *beside)).verdict == OPEN


def test_tracebacks_few_are_best_only_if_more_lower_it_no_further() -> None:
    one, first = claim("TruthPrInt", "tracebacks against CHAIR"), ("max_tracebacks_1", "baseline", -0.1)
    pair = ("max_tracebacks_5", "max_tracebacks_1")
    assert one.finding(Differences(first, (*pair, 0.05))).verdict == AGREES
    assert one.finding(Differences(first, (*pair, -0.05))).verdict == DIFFERS
    assert one.finding(Differences(first, (*pair, 0.0))).verdict == OPEN


def test_skipping_may_lose_less_than_five_points() -> None:
    one, more = claim("IMA", "figure 11"), ("ffn_every", "baseline", -0.2)
    for change, verdict in ((-0.02, AGREES), (-0.1, DIFFERS), (-0.05, OPEN)):
        assert one.finding(Differences(("ffn_half", "baseline", change), more)).verdict == verdict


@pytest.mark.parametrize(("gap", "verdict"), [(-0.5, AGREES), (0.5, DIFFERS), (0.0, OPEN)])
def test_the_modality_gap_is_asked_of_every_layer(gap: float, verdict: str) -> None:
    pairs = {"image-text": 0.3 + gap, "image-image": 0.3, "text-text": 0.3}
    found = [
        row(value, variant="raw", dataset="captions", layer=layer, pair=pair)
        for pair, value in pairs.items()
        for layer in range(3)
    ]
    one = claim("IMA", "figure 2")
    assert one.finding(tables(implicit_alignment_similarity=found)).verdict == verdict
    found[0] |= row(0.3)  # one layer of image-text like the others: no longer at every layer
    expected = {AGREES: OPEN}.get(verdict, verdict)
    assert one.finding(tables(implicit_alignment_similarity=found)).verdict == expected


@pytest.mark.parametrize(("rise", "verdict"), [(0.2, AGREES), (-0.2, DIFFERS), (0.0, OPEN)])
def test_training_compares_the_first_with_the_last_checkpoint(rise: float, verdict: str) -> None:
    own = {"difference": 0.1, "difference_low": 0.0, "difference_high": 0.2}
    found = [
        row(value, kind="same_layer", variant="raw", step=step, order=order, **own)
        for order, (step, value) in enumerate([(0, 0.3), (40, 0.9), (100, 0.3 + rise), (None, 0.9)])
    ]
    one = claim("IMA", "figure 7")
    assert one.finding(tables(implicit_alignment_compare_model_scores=found)).verdict == verdict


def test_correlations_have_the_sign_of_the_paper() -> None:
    common = {"kind": "same_layer", "variant": "raw", "method": "spearman", "n_models": 9}
    found = [
        {**common, "of": of, "metric": metric, "r": r, "low": r - 0.1, "high": r + 0.1}
        for metric in ("accuracy", "chair_i")
        for of, r in (("training step", 0.5), ("alignment", -0.8))
    ]
    both = tables(implicit_alignment_compare_correlations=found)
    assert claim("IMA", "figure 9").finding(both).verdict == DIFFERS
    assert claim("IMA", "figure 10").finding(both).verdict == AGREES
    assert "over 9 models \N{MINUS SIGN}.800" in claim("IMA", "figure 10").finding(both).text
    assert (
        claim("IMA", "figure 10")
        .finding(both)
        .text.endswith("(of the training step alone .500 [.400,\N{NO-BREAK SPACE}.600])")
    )


def test_blocks_in_which_alignment_rises_are_counted() -> None:
    def of(*rises: float) -> str:
        found = [
            row(0.0 if tap == "ln1" else rise, variant="raw", layer=layer, tap=tap)
            for layer, rise in enumerate(rises)
            for tap in ("ln1", "mlp_out", "resid_post")
        ]
        return claim("IMA", "figure 8").finding(tables(implicit_alignment_inside_similarity=found)).verdict

    assert of(0.2, 0.2, -0.2) == AGREES
    assert of(0.2, 0.0, -0.2) == DIFFERS
    assert of(0.2, 0.0, 0.0) == OPEN


def test_task_overlap_leaves_out_questions_that_share_their_images() -> None:
    def pair(first: str, second: str, iou: float) -> dict[str, Any]:
        found = {"type": "all", "sparsity": 0.5, "random": 1 / 3, "tokens_a": "image", "tokens_b": "image"}
        return {**found, "dataset_a": first, "dataset_b": second, "iou": iou, "low": iou - 0.01, "high": iou + 0.01}

    same, other = pair("a/pope_random", "a/pope_popular", 1.0), pair("a/captions", "a/pope_random", 0.2)
    one = claim("IMA", "figure 22")
    assert one.finding(tables(subnetworks_compare_tasks=[same, other])).verdict == DIFFERS
    assert one.finding(tables(subnetworks_compare_tasks=[same])).text == "the run has no pair of captions and questions"


@pytest.mark.parametrize(("hallucinated", "verdict"), [(0.29, AGREES), (0.15, DIFFERS), (0.22, OPEN)])
def test_pmc_has_the_direction_of_the_papers_table(hallucinated: float, verdict: str) -> None:
    found = [
        row(hallucinated - 0.22, quantity="hallucinated minus true"),
        row(hallucinated, quantity="mean before hallucinated objects"),
        row(0.22, quantity="mean before true objects"),
    ]
    assert claim("TruthPrInt", "table 7").finding(tables(truthful_direction_pmc=found)).verdict == verdict


def test_transfers_are_asked_of_every_pair() -> None:
    def transfer(source: str, alignment: str, auroc: float) -> dict[str, Any]:
        pair = {"varies": "model", "source_model": source, "target_model": "c", "alignment": alignment}
        return {**pair, "auroc": auroc, "low": auroc - 0.01, "high": auroc + 0.01}

    one = claim("TruthPrInt", "transfer, model x model")
    found = [transfer("a", "none", 0.5), transfer("a", "subspace", 0.6), transfer("a", "subspace", 0.7)]
    assert one.finding(tables(truthful_direction_compare_transfer=found)).verdict == AGREES
    found += [transfer("b", "none", 0.7), transfer("b", "subspace", 0.6)]
    finding = one.finding(tables(truthful_direction_compare_transfer=found))
    assert finding.verdict == DIFFERS
    assert "better in 1 and worse in 1 of 2 transfers" in finding.text
    found[-1]["alignment"] = "coral"
    assert one.finding(tables(truthful_direction_compare_transfer=found)).verdict == OPEN


def test_the_middle_number_of_layers_must_beat_both_ends() -> None:
    def of(*values: float) -> str:
        found = [row(one, condition=f"last_{n}", metric="chair_i") for n, one in enumerate(values, 1)]
        found.append(row(0.9, condition="last_1_random", metric="chair_i"))
        return claim(VHR, "figure 5").finding(tables(conditions=found)).verdict

    assert of(0.3, 0.1, 0.2, 0.3) == AGREES
    assert of(0.3, 0.2, 0.1) == DIFFERS
    assert of(0.3, 0.2, 0.2) == OPEN


def test_influence_has_to_show_within_and_between_images() -> None:
    def of(within: float, between: float) -> str:
        values = {"within images": within, "between images": between, "between true neighbours": 0.0}
        found = [
            {
                "features": True,
                "tokens": "influence",
                "compared": one,
                "difference": d,
                "low": d - 0.01,
                "high": d + 0.01,
            }
            for one, d in values.items()
        ]
        return claim("DAMRO", "influence F").finding(tables(cls_outliers_influence_difference=found)).verdict

    assert of(0.05, 0.05) == AGREES
    assert of(0.05, 0.0) == OPEN
    assert of(0.05, -0.05) == DIFFERS


def test_times_of_one_run_decide_nothing() -> None:
    timing = [{"step": f"generate {name}", "seconds": s} for name, s in (("baseline", 2.0), ("vhr", 3.0), ("vcd", 5.0))]
    finding = claim(VHR, "figure 6").finding(tables(timing=timing))
    assert finding.verdict == OPEN
    assert finding.text.startswith("1.50 times the plain time with VHR and 2.50 times with VCD")


def published(folder: Path, title: str = "") -> Path:
    """A copy of a run with one table, in which a name is that of nothing."""
    (folder / "tables").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"title": title}))
    (folder / "environment.json").write_text(json.dumps({"timing": {"generate baseline": 2.0, "total": 3.0}}))
    (folder / "tables" / "pairs.csv").write_text("alignment,value\nnone,0.5\n,\n")
    return folder


def test_tables_of_a_copy_keep_the_names_that_pandas_takes_for_nothing(tmp_path: Path) -> None:
    found = FolderTables(published(tmp_path / "run"))
    assert found["pairs"]["alignment"].fillna("missing").tolist() == ["none", "missing"]
    assert found["pairs"]["value"].isna().tolist() == [False, True]
    assert found["timing"].set_index("step")["seconds"].to_dict() == {"generate baseline": 2.0, "total": 3.0}
    assert sorted(found) == ["pairs", "timing"]
    assert len(found) == 2


def test_a_run_of_another_name_is_known_by_its_title(tmp_path: Path) -> None:
    title = yaml.safe_load((EXPERIMENTS / "ima_fig8.yaml").read_text())["title"]
    (sentence,) = run_findings(published(tmp_path / "mine", title))
    assert sentence.startswith(
        "IMA, figure 8. The paper: image-text alignment rises within blocks. Here: the run has no"
    )
    assert sentence.endswith(f": {OPEN}.")
    assert run_findings(published(tmp_path / "other", "Something else")) == []
    assert run_findings(published(tmp_path / "untitled")) == []


def test_findings_of_a_run_are_those_of_its_own_claims() -> None:
    said = paper_findings(CLAIMS, "vhr_table1", Differences(("vhr", "greedy", 0.1)))
    assert len(said) == 2
    assert said[1].startswith("VHR, main table, POPE. The paper: F1 of LLaVA-1.5 rises")
    assert said[1].endswith(f": {AGREES}.")


def test_the_page_is_that_of_the_published_results() -> None:
    assert (EXPERIMENTS / "README.md").read_text(encoding="utf-8") == page(EXPERIMENTS, CLAIMS), (
        "experiments/README.md is not what slitlamp publish writes of experiments/results"
    )


def test_every_row_has_an_experiment_that_was_published_and_a_verdict_from_its_tables() -> None:
    for one in CLAIMS:
        assert (EXPERIMENTS / f"{one.experiment}.yaml").is_file()
        finding = one.finding(FolderTables(EXPERIMENTS / "results" / one.experiment))
        assert not finding.text.startswith("the run has no"), f"{one.paper}, {one.figure}: {finding.text}"


def test_every_experiment_is_on_the_page_once() -> None:
    shown = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    in_claims = {one.experiment for one in CLAIMS}
    for path in EXPERIMENTS.glob("*.yaml"):
        rows = sum(f"`slitlamp run {path.stem}`" in line for line in shown.splitlines())
        assert rows == sum(one.experiment == path.stem for one in CLAIMS) if path.stem in in_claims else rows == 1


def test_publishing_elsewhere_writes_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only beside slitlamp's own experiments is README.md anybody's to overwrite."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    (run / "figures").mkdir(parents=True)
    (run / "tables").mkdir()
    PIL.Image.new("RGB", (4, 4)).save(run / "figures" / "chair.png")
    (run / "config.yaml").write_text(yaml.safe_dump({"conditions": {"baseline": []}}))
    environment = {"finished": True, "timing": {"total": 1.0}, "device": "cpu", "seed": 0}
    (run / "environment.json").write_text(json.dumps(environment))
    info = {"condition": ["baseline"], "role": ["reference"], "control_of": [None], "description": [""]}
    pd.DataFrame(info).to_parquet(run / "tables" / "condition_info.parquet")
    level = row(0.2, condition="baseline", dataset="captions", task="captions", metric="chair_i", n_images=7)
    scores = pd.DataFrame([level, {**level, "metric": "recall"}])
    scores.to_parquet(run / "tables" / "conditions.parquet")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "mine.yaml").write_text("title: mine")

    with pytest.raises(SystemExit) as ended:
        cli.main(["publish", "run", "--to", "results"])
    assert ended.value.code == 0
    assert (tmp_path / "README.md").read_text() == "mine"
    copy = (tmp_path / "results" / "run" / "README.md").read_text()
    assert "n = 7 images" in copy.split("![chair](chair.png)")[1], "the caption is under its figure"

    for name in {one.experiment for one in CLAIMS}:
        (tmp_path / f"{name}.yaml").write_text(f"title: {name}")
    with pytest.raises(SystemExit):
        cli.main(["publish", "run", "--to", "results"])
    assert (tmp_path / "README.md").read_text() == page(tmp_path, CLAIMS)
    assert write_page(tmp_path, CLAIMS) == tmp_path / "README.md"
