"""What is compared gives the same numbers: the recorders of benchmarks/tracing.py, the fits of benchmarks/probes.py; and the
ratios of benchmarks/decoding.py are those of its runs.

Tolerance of the recorders 1e-5 of the largest value: SDPA and eager attention differ in the order of float32 sums alone.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUANTITIES = {"image_mean", "last", "z", "attention"}
LAYERS, WIDTH, HEADS, IMAGE_TOKENS, STEPS = 3, 32, 4, 32, 4


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark's modules, imported as its script imports them."""
    sys.path.append(str(BENCHMARKS))
    try:
        import _cases
        import _contestants
        import _measure
        import _report

        scripts = {}
        for name in ("probes", "decoding"):
            spec = importlib.util.spec_from_file_location(f"benchmark_of_{name}", BENCHMARKS / f"{name}.py")
            scripts[name] = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = scripts[name]  # dataclasses look their module up
            spec.loader.exec_module(scripts[name])
    finally:
        sys.path.remove(str(BENCHMARKS))
    modules = {"cases": _cases, "contestants": _contestants, "measure": _measure, "report": _report}
    return modules | scripts


def test_no_script_hides_the_package_probes():
    """Python puts a script's folder first on its path, where it would find probes.py. Whatever imports `_first` finds both."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import _first, _measure, probes; print(probes.__path__[0])"
    found = subprocess.run([sys.executable, "-c", code, str(BENCHMARKS)], capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == BENCHMARKS.parent / "probes"
    scripts = [one for one in BENCHMARKS.glob("*.py") if not one.name.startswith("_")]
    assert len(scripts) >= 4
    for one in scripts:
        imported = [line.split()[1] for line in one.read_text().splitlines() if line.startswith(("import ", "from "))]
        ours = [name for name in imported if name.split(".")[0] not in sys.stdlib_module_names]
        assert ours[0] == "_first", one.name


@pytest.fixture(scope="module")
def setup(benchmark):
    vlm = benchmark["cases"].random_llava(layers=LAYERS, width=WIDTH, heads=HEADS, mlp=48, words=20, side=4)
    return vlm, benchmark["cases"].prompt(vlm, images=2, length=40)


def recorded(benchmark, setup, name, new_tokens):
    vlm, batch = setup
    contestant = benchmark["contestants"].CONTESTANTS[name](vlm)
    with torch.no_grad():
        if new_tokens:
            result = contestant.generate(batch, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        else:
            result = contestant.prefill(batch)
        return contestant.tensors(result)


@pytest.mark.parametrize(
    ("name", "new_tokens"),
    [
        ("hf-eager", 0),
        ("hf-eager", STEPS),
        ("nnsight-trace", 0),
        ("nnsight-trace", STEPS),
        ("nnsight-cache", 0),
        ("nnsight-cache", STEPS),
        ("transformer-bridge", 0),  # it has no cache while generating
    ],
)
def test_recorders_agree(benchmark, setup, name, new_tokens):
    wanted = recorded(benchmark, setup, "slitlamp", new_tokens)
    found = recorded(benchmark, setup, name, new_tokens)
    steps = new_tokens or 1
    assert {key: tuple(one.shape) for key, one in wanted.items()} == {
        "image_mean": (1, LAYERS, 1, WIDTH),
        "last": (steps, LAYERS, 1, WIDTH),
        "z": (steps, LAYERS, 1, HEADS, WIDTH // HEADS),
        "attention": (steps, LAYERS, 1, HEADS, IMAGE_TOKENS),
    }
    assert set(found) == QUANTITIES
    for key, one in wanted.items():
        torch.testing.assert_close(found[key], one, rtol=0, atol=1e-5 * float(one.abs().max()))


def test_the_benchmark_finds_the_ratio_and_its_interval(benchmark):
    rounds = [(1.0, 1.1), (2.0, 2.4), (1.0, 1.3), (3.0, 3.3), (1.0, 9.0)]  # the last was disturbed
    ratio = benchmark["measure"].ratio(rounds)
    assert ratio.value == pytest.approx(1.2)
    assert ratio.low == pytest.approx(1.1)
    assert 1.3 < ratio.high <= 9.0  # five rounds cannot rule the disturbed one out


def test_peak_memory_is_that_of_the_watched_lines(benchmark):
    measure, device = benchmark["measure"], torch.device("cpu")
    with measure.peak(device) as idle:
        pass
    if idle.bytes is None:
        pytest.skip("the peak of memory cannot be reset on this system")
    megabytes = 96
    with measure.peak(device) as busy:
        torch.ones(megabytes * 2**18)  # float32; gone after this line, but its peak is not
    with measure.peak(device) as after:
        pass
    assert busy.bytes - idle.bytes > 0.9 * megabytes * 2**20
    assert after.bytes - idle.bytes < 0.5 * megabytes * 2**20


def test_promises_are_judged(benchmark):
    row = {"case": "prefill-600", "contestant": "slitlamp", "status": "measured", "note": "", "predicted_bytes": 0}
    row |= {"ratio": 1.09, "ratio_low": 1.0, "ratio_high": 1.2, "rounds": 5, "seconds": 1.0, "plain_seconds": 1.0}
    row |= {"extra_bytes": 34_000_000, "recorded_bytes": 2_000_000}
    met = benchmark["report"].judge(dict(row))
    assert (met["time_met"], met["memory_met"]) == (True, True)
    missed = benchmark["report"].judge(row | {"ratio": 1.11, "extra_bytes": 37_000_000})
    assert (missed["time_met"], missed["memory_met"]) == (False, False)
    lines = benchmark["report"].verdicts([met]) + benchmark["report"].verdicts([missed])
    assert [line.split(":")[0] for line in lines] == ["reached", "reached", "MISSED", "MISSED"]


def test_linear_fits_and_scikit_learn_solve_the_same_problems(benchmark, capsys):
    """A small size through the whole script: equal AUROC at every fold and penalty; times are not judged here."""
    module = benchmark["probes"]
    size = module.Size(layers=2, features=12, samples=300, strengths=(0.1, 10.0, 1e3))
    outcome = module.compare(size, 2, 1)
    assert len(outcome.rounds) == 4
    assert outcome.fits == 4 * 15
    assert max(outcome.differences) <= module.PROMISED_AUROC
    page = module.markdown([outcome], module.peaks(size, 1), size)
    assert "| 1 | 2 |" in page
    assert [row["layer"] for row in module.rows([outcome], size)] == [0, 1, 0, 1]
    assert capsys.readouterr().out.count("round") == 4


def test_linear_fits_are_judged(benchmark):
    module = benchmark["probes"]
    fast = module.Outcome(1, 0.0, rounds=[(1.0, 11.0)] * 5, differences=[0.004])
    slow = module.Outcome(2, 0.0, rounds=[(1.0, 9.0)] * 5, differences=[0.006])
    uneven = module.Outcome(2, 0.0, rounds=[(1.0, 9.0), (1.0, 12.0)] * 4, differences=[0.0])  # 10.5 in all
    lines = module.verdicts([fast, slow, uneven])
    assert [line.split(":")[0] for line in lines] == ["reached", "reached", "MISSED", "MISSED", "MISSED", "reached"]


def test_decoding_under_every_method_beside_the_plain_run(benchmark, setup):
    """A small size through the whole script; times are not judged here."""
    module, (vlm, _) = benchmark["decoding"], setup
    batch = benchmark["cases"].prompt(vlm, images=1, length=24, rows=2)
    names = list(module.METHODS)
    outcomes = module.compare(vlm, batch, names, 3, budget=0.0, most=5)
    assert [one.method for one in outcomes] == names
    for one in outcomes:
        assert len(one.rounds) == 5
        assert all(0 < times.later < times.whole for pair in one.rounds for times in pair)
        assert {times for times, _ in one.rounds} == {times for times, _ in outcomes[0].rounds}  # the plain runs
    mlp, attention, score = 2 * 3 * WIDTH * 48, 2 * 4 * WIDTH * WIDTH, 2 * 2 * WIDTH

    def block(n_tokens):
        return n_tokens * (mlp + attention) + score * n_tokens * (n_tokens + 1) // 2

    # 24 positions and 2 tokens fed back; 16 image tokens skip the MLP of one block of three, or 12 of them are pruned from all
    saved = {one.method: one.saved for one in outcomes if one.saved is not None}
    assert saved == {
        "skip": pytest.approx(16 * mlp / (LAYERS * block(26))),
        "prune": pytest.approx(1 - block(14) / block(26)),
    }
    page = module.markdown(outcomes, {"date": "today"})
    assert all(f"| {module.METHODS[name].title} | 2 | 3 |" in page for name in names)
    assert len(module.rows(outcomes)) == 5 * len(names)


def test_the_plain_run_of_decoding_says_what_no_intervention_does(benchmark, setup):
    vlm, batch = setup
    options = {"max_new_tokens": 4, "min_new_tokens": 4}
    plain = vlm.model.generate(**batch.inputs(), do_sample=False, **options)
    assert plain[:, batch.length :].tolist() == [list(one) for one in vlm.generate(batch, **options).tokens]


def test_promises_of_decoding_are_judged(benchmark, tmp_path):
    module = benchmark["decoding"]

    def outcome(method, rows, whole, later):
        rounds = [(module.Times(1.0, 1.0), module.Times(whole, later))] * 5
        return module.Outcome(method, rows, 8, rounds, saved=0.2 if method == "skip" else None)

    vhr, pair = outcome("vhr", 1, 3.0, 1.09), outcome("deleted", 1, 1.71, 1.69)
    many, skip = outcome("deleted", 8, 3.0, 3.0), outcome("skip", 1, 0.99, 1.0)
    lines = module.verdicts([vhr, pair, many, skip])
    assert [line.split(":")[0] for line in lines] == ["reached", "MISSED", "reached"]
    (line,) = module.savings([vhr, pair, many, skip])
    assert "20.0% of the operations" in line
    assert "+1.0% of the time" in line
    module.draw([vhr, pair, many, skip], tmp_path)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["decoding.png", "decoding.svg"]
