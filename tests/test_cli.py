"""The command: what it prints, and one message with exit code 2 for everything that is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from pandas.testing import assert_frame_equal
from rich.console import Console

import slitlamp
from slitlamp.cli import _listing, main
from slitlamp.experiments import Experiment, load_run
from slitlamp.experiments.runner import Runner
from slitlamp.organism.stages import STAGES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The working directory is empty; a model this small runs no faster on several threads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slitlamp.cli._silence_libraries", lambda: None)
    torch.set_num_threads(1)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    code = ended.value.code
    return 0 if code is None else int(code)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert command(*arguments) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return " ".join(shown.err.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--version") == 0
    assert capsys.readouterr().out.strip() == slitlamp.__version__


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("probes", ["HeadDivergence", "contrast='deleted'"]),
        ("interventions", ["HeadReinforcement", "alpha=2.0"]),
        ("datasets", ["emoji_scenes/pope_adversarial", "emoji_scenes/captions"]),
        ("families", ["LLaVA-1.5", "llava_next"]),
        ("experiments", ["demo"]),
    ],
)
def test_lists(what: str, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("list", what) == 0
    shown = capsys.readouterr().out
    assert all(one in shown for one in expected)


def test_inspect_needs_no_weights(capsys: pytest.CaptureFixture[str], organism: slitlamp.VLM, tmp_path: Path) -> None:
    source = Path(slitlamp.__file__).parent / "organism" / "weights" / "seed0"
    shutil.copy(source / "config.json", tmp_path / "config.json")
    assert command("inspect", str(tmp_path)) == 0
    without = capsys.readouterr().out
    assert command("inspect", "organism") == 0
    shown = capsys.readouterr().out
    for text in (
        "LLaVA-1.5",
        "6 layers, 8 heads of 24, d_model 192",
        "64 per image",
        "resid_post",
        "model.vision_tower",
    ):
        assert text in shown
        assert text in without
    assert f"{sum(one.numel() for one in organism.model.parameters()):,}" in without


def test_an_estimate_needs_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """Every number that is printed is that of `estimate_model`, for the sites that were asked for."""
    config = str(ROOT / "docs" / "qwen2_5_vl_72b.json")
    options = ["--site", "resid_post:image:mean:layers=0-3", "--site", "attention:last:image"]
    options += ["--image-tokens", "300", "--gpus", "8", "--items", "1000000", "--batch", "2"]
    assert command("inspect", config, "--estimate", *options) == 0
    shown = " ".join(capsys.readouterr().out.split())
    attention = 80 * 64 * 300 * 2
    for text in (
        "float32 294 GB",
        "bfloat16 147 GB",
        "300 image tokens, 64 text tokens",
        f"per token {80 * 2 * 8 * 128 * 2 / 1000:.3g} kB",
        "resid_post:image:mean:layers=0-3 131 kB",
        f"attention:last:image {attention / 1e6:.3g} MB",
        "one model on 8 GPUs (device_map)",
        f"store of 1,000,000 items resid_post:image:mean:layers=0-3 {4 * 8192 * 4 / 1e3:.3g} GB",
        f"together {(attention + 4 * 8192 * 4) / 1e6:.3g} TB",
    ):
        assert text in shown, text


def test_all_families_are_listed_with_their_classes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from slitlamp.models import FAMILIES

    rows = {row[1]: row for row in _listing("families")}
    assert set(rows) == set(FAMILIES)
    for model_type, (name, _, cls, tokens, notes) in rows.items():
        family = FAMILIES[model_type]
        assert (name, tokens, notes) == (family.name, family.image_tokens, family.notes)
        assert hasattr(transformers, cls)
    monkeypatch.setattr("slitlamp.cli.out", Console(width=200))
    assert command("list", "families") == 0
    shown = capsys.readouterr().out
    assert all(title in shown for title in ("family", "model_type", "class", "image tokens"))
    assert all(row[2] in shown for row in rows.values()), "no class is cut short"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "prbes"], "error: unknown list 'prbes'; did you mean 'probes'?"),
        (["run", "dmo"], "no experiment 'dmo': it is neither a file nor a known name; did you mean 'demo'?"),
        (
            ["run", "demo", "--set", "batchsize=3"],
            "--set batchsize=3: unknown key 'batchsize'; did you mean 'batch_size'?",
        ),
        (["run", "demo", "--set", "model=organism/seed7"], "there is no embedded model of seed 7"),
        (["run", "broken.yaml"], "broken.yaml:2: malformed YAML"),
        (["run", "demo", "--output", "broken.yaml"], "the output broken.yaml is a file"),
        (["run", "demo", "--set", "output=/elsewhere/run"], "output: /elsewhere/run lies outside the folders"),
        (["run", "demo", "demo", "--output", "out"], "--output takes one experiment"),
        (["run", "demo", "dmo"], "no experiment 'dmo'"),
        (["publish", "nowhere"], "nowhere is not a run folder"),
        (["report", "nowhere"], "nowhere is not a run folder"),
        (["inspect", "organism/seed7"], "no embedded model of seed 7"),
        (["inspect", "organism", "--gpus", "8"], "these options belong to an estimate; add --estimate"),
        (["inspect", "organism", "--estimate", "--site", "resid_pots"], "unknown site 'resid_pots'; did you mean"),
        (["inspect", "organism", "--estimate", "--image-size", "64"], "takes width x height in pixels"),
        (["inspect", "."], "cannot read the configuration of '.'"),
        (["train-organism", "--width", "20"], "width must be a positive multiple of 16"),
        (["demo", "--nonsense"], "No such option"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.yaml").write_text("datasets: [a\nseed: 1\n")
    assert message in failure(capsys, *arguments)
    assert {path.name for path in Path().iterdir()} <= {"broken.yaml"}, "nothing is written before all is checked"


def test_a_run_from_a_file_and_its_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, organism: slitlamp.VLM
) -> None:
    """Small enough for a test, with every part of the demo: conditions, controls, probe, showcase, report."""
    content = yaml.safe_load((ROOT / "experiments" / "demo.yaml").read_text())
    content |= {"datasets": ["emoji_scenes/captions", "emoji_scenes/pope_random"], "controls": ["random"]}
    content |= {"take": 2, "n_resamples": 100, "output": "out"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))

    assert command("run", "mine.yaml", "--set", "seed=3") == 0
    shown = capsys.readouterr()
    assert "report: out/report.html" in shown.out
    assert "CHAIR_i against baseline: vhr" in shown.out
    run = load_run("out")
    assert run.config["seed"] == 3
    assert (run.folder / "report.html").stat().st_size > 10_000

    assert "seed: the folder has 3, this run has 0" in failure(capsys, "run", "mine.yaml")
    assert command("publish", "out", "--to", "results") == 0
    assert (tmp_path / "results" / "out" / "head_divergence.png").is_file()
    assert (tmp_path / "results" / "out" / "chair.png").is_file()
    shutil.copy(run.folder / "figures" / "chair.png", run.folder / "figures" / "dose_response.png")
    assert command("publish", "out", "--to", "results") == 0
    kept = {path.stem for path in (tmp_path / "results" / "out").glob("*.png")}
    assert {"dose_response", "head_divergence"} <= kept
    assert not kept & {"chair", "differences", "recall_curve"}, "what a sweep shows is in one figure"
    assert command("run", "mine.yaml", "mine.yaml", "--set", "seed=3") == 0  # both have ended
    (run.folder / "report.html").unlink()
    assert command("report", "out") == 0
    assert (run.folder / "report.html").is_file()
    assert run.figure("head_divergence").get_axes()
    with pytest.raises(slitlamp.errors.UnknownNameError, match="did you mean 'head_divergence'"):
        run.figure("head_divergenc")


def small(name: str, **changes: object) -> str:
    """A file with the smallest experiment of the embedded model."""
    content = {"datasets": ["emoji_scenes/pope_random"], "take": 1, "n_resamples": 100, "output": name, **changes}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
    return f"{name}.yaml"


def test_without_its_checkpoints_an_experiment_says_what_makes_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slitlamp.experiments.runner.load_model", lambda *_: pytest.fail("a model was loaded"))
    said = failure(capsys, "run", "ima_fig7_checkpoints")
    assert "no such folder: runs/organism/checkpoints/step-00000 (`slitlamp train-organism`" in said
    assert list(Path().iterdir()) == []


def test_an_experiment_whose_model_is_not_there_does_not_keep_the_others_from_running(
    capsys: pytest.CaptureFixture[str],
) -> None:
    absent = small("absent", models=["organism", "./checkpoints/none"])
    assert command("run", absent, small("present")) == 2
    shown = capsys.readouterr()
    said = "absent is left out: no such folder: ./checkpoints/none"
    assert shown.err.count(said) == 2  # before the others run, and at the end
    assert f"error: {said}" in " ".join(shown.err.split())
    assert load_run("present").environment["finished"]
    assert not Path("absent").exists()


def test_jobs_run_experiments_at_a_time_and_leave_the_same_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the three ends in an error that only the model can tell of; the others run, as they would by themselves."""
    bad = small("bad", probes=[{"LogitLens": {"layers": [99]}}])
    names = ["one", "two"]
    assert command("run", bad, *(small(name, take=2) for name in names), "--jobs", "2") == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert "bad: " in shown.err
    assert "99" in shown.err
    assert [f"report: {name}/report.html" in shown.out for name in ("bad", *names)] == [False, True, True]
    assert command("run", small("alone", take=2)) == 0
    alone = load_run("alone").table("conditions")
    for name in names:
        assert_frame_equal(load_run(name).table("conditions"), alone)

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "leave it out under accelerate launch" in failure(capsys, "run", bad, *names, "--jobs", "2")


def test_a_mistake_in_a_later_experiment_is_found_before_the_first_one_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no embedded model of seed 9" in failure(
        capsys, "run", small("first"), small("second", model="organism/seed9")
    )
    assert {path.name for path in Path().iterdir()} == {"first.yaml", "second.yaml"}


def test_files_that_come_with_an_experiment_are_found_from_any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    runners: list[Runner] = []
    monkeypatch.setattr(Runner, "run", lambda self: runners.append(self))
    monkeypatch.setattr("slitlamp.cli._report", lambda run: None)
    assert command("run", "ima_fig12_subnet") == 0
    (runner,) = runners
    (mask,) = runner.plan.condition("alpha_0.3").interventions
    assert Path(mask.masks).is_file()  # type: ignore[attr-defined]
    recorded = runner.plan.config()["conditions"]["alpha_0.3"][0]["SubnetMask"]["masks"]
    assert recorded == "masks/alpha_0.3.safetensors"
    assert recorded in runner.plan.fingerprints()


def test_ctrl_c_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Runner) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "run", interrupted)
    assert command("demo", "--quick") == 130
    assert "the same command goes on from here (runs/demo-quick)" in capsys.readouterr().err


def test_the_demo_compares_vhr_with_its_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own file: what it promises is in it, and everything that can be checked without a model is right."""
    plans = []
    monkeypatch.setattr(Experiment, "run", lambda self: plans.append(self.check()))
    monkeypatch.setattr("slitlamp.cli._report", lambda run: None)
    assert command("demo") == 0
    (plan,) = plans
    assert [one.name for one in plan.conditions] == ["baseline", "vhr", "vhr_random", "vhr_least", "vhr_all"]
    assert {one.task for one in plan.datasets} == {"pope", "captions"}
    assert len(plan.datasets) == 4
    assert ("vhr", "vhr_random") in plan.comparisons
    assert plan.folder.path == Path("runs/demo")


def test_train_organism_is_wired(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def train(output: Path, config: object) -> Path:
        calls.append((output, config))
        return output / "final"

    monkeypatch.setattr("slitlamp.organism.training.train_organism", train)
    assert command("train-organism", "--seed", "4", "--steps", "30", "--card-images", "0", "--output", "there") == 0
    ((output, config),) = calls
    assert (output, config.seed) == (Path("there"), 4)
    assert sum(config.stage_steps(stage) for stage in STAGES) == 30
    assert "there/final" in capsys.readouterr().out
