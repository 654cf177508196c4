"""The recorders that benchmarks/tracing.py compares record the same numbers, so that their times can be compared.

Tolerance 1e-5 of the largest value: SDPA and eager attention differ in the order of float32 sums alone.
"""

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
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import _cases
        import _contestants
        import _measure
        import _report
        import linear_fits
    finally:
        sys.path.remove(str(BENCHMARKS))
    modules = {"cases": _cases, "contestants": _contestants, "measure": _measure, "report": _report}
    return modules | {"linear_fits": linear_fits}


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
    module = benchmark["linear_fits"]
    size = module.Size(layers=2, features=12, samples=300, strengths=(0.1, 10.0, 1e3))
    outcome = module.compare(size, 2, 1)
    assert len(outcome.rounds) == 2
    assert max(outcome.differences) <= module.PROMISED_AUROC
    page = module.markdown(outcome, size, 1)
    assert "scikit-learn, extrapolated from one fold a round" in page
    assert capsys.readouterr().out.count("round") == 2


def test_linear_fits_are_judged(benchmark):
    module = benchmark["linear_fits"]
    fast = module.Outcome(rounds=[(1.0, 11.0)] * 5, differences=[0.004])
    slow = module.Outcome(rounds=[(1.0, 9.0)] * 5, differences=[0.006])
    lines = module.verdicts(fast) + module.verdicts(slow)
    assert [line.split(":")[0] for line in lines] == ["reached", "reached", "MISSED", "MISSED"]
