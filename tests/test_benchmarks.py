"""The benchmarks of speed, with the smallest networks on a CPU: what they write. No time is asserted, none could be."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from ldm_edu.measurements import Measurement, load_measurements, measured_here

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts import what lies beside them

import common  # type: ignore[import-not-found]  # noqa: E402
import gpu  # type: ignore[import-not-found]  # noqa: E402
import speed  # type: ignore[import-not-found]  # noqa: E402

RATIO = {"ratio", "lower quartile", "upper quartile"}
MARKED = """
import pytest

@pytest.mark.gpu
def test_marked():
    assert {}

def test_not_marked():
    raise AssertionError
"""


def names(found, **of) -> set[str]:
    """What was measured of something."""
    return {m.name for m in found.of(**of)}


# ---- speed.py


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All pieces but pixels, and the table."""
    folder = tmp_path_factory.mktemp("speed")
    pieces = [name for name in speed.PIECES if name != "pixels"]
    before = torch.get_num_threads()
    arguments = ["--smallest", "--out", str(folder / "s.md"), "--results", str(folder / "s.json"), "--only", *pieces]
    assert speed.main(arguments) == 0
    assert torch.get_num_threads() == before
    return load_measurements(folder / "s.json"), (folder / "s.md").read_text(encoding="utf-8")


def test_every_step_of_equal_networks_has_its_ratio_and_the_networks_were_equal(measured):
    found, _ = measured
    for piece, networks, steps in (
        ("unet", {"text", "without a condition"}, {"training", "sampling"}),
        ("first_stage", {"tiny"}, {"encoding", "decoding"}),
    ):
        some = found.of(piece=piece)
        assert set(some.keys("network")) == networks
        assert {str(step).split(",")[0] for step in some.keys("step")} - {"prediction"} == steps
        timed = [m for m in some if m.name == "ratio"]
        assert len(timed) == len(networks) * len(steps)
        for m in timed:
            assert RATIO | {"time of ours", "time of diffusers"} <= names(found, **m.of)
            assert m.value > 0 and m.low is not None and m.low <= m.value <= m.high and m.n >= 3
    far = found.values("largest difference")
    assert len(far) == 8 and max(far) < 1e-4  # 2 UNets: prediction, two steps of DDIM; 1 first stage; 2 ladders


def test_a_ladder_has_all_rungs_and_its_last_is_our_loop_with_its_defaults(measured):
    found, _ = measured
    for piece, rungs in (("text", speed.TEXT_RUNGS), ("unconditional", speed.UNCONDITIONAL_RUNGS)):
        loops = [str(name) for name in found.of("ratio", piece=piece).keys("loop")]
        assert len(loops) == len(rungs) and all(name.startswith(rung) for name, rung in zip(loops, rungs))
        first, last = list(rungs.values())[0], list(rungs.values())[-1]
        assert first[0] == "fp32" and not first[2] and last == (None, False, True)
        for before, after in zip(list(rungs.values()), list(rungs.values())[1:]):
            assert sum(a != b for a, b in zip(before, after)) == 1, "a rung changes one thing"
        assert all(m.value > 0 for m in found.of(piece=piece) if m.name in RATIO)


def test_shares_of_a_step_sum_to_the_whole(measured):
    found, _ = measured
    for precision in ("fp32", "bf16"):
        shares = found.of("share", precision=precision)
        assert shares.keys("part") == [*speed.PARTS, "all else"]
        assert sum(m.value for m in shares) == pytest.approx(100) and min(m.value for m in shares) >= 0
        assert shares.one("share", part="convolutions").value > 0
        assert shares.one("share", part="optimiser").value > 0


@pytest.mark.parametrize(
    "operator, part",
    [
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::convolution_backward", "convolutions"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::bmm", "attention"),
        ("aten::addmm", "linear layers"),
        ("aten::mm", "linear layers"),
        ("aten::native_group_norm_backward", "norms"),
        ("aten::silu_backward", "activations"),
        ("aten::_fused_adamw_", "optimiser"),
        ("aten::copy_", "copies"),
        ("aten::cat", "copies"),
        ("aten::add_", "sums and products"),
        ("aten::addcmul", "all else"),
    ],
)
def test_an_operator_belongs_to_its_part(operator, part):
    assert speed.part_of(operator) == part


def test_the_table_says_what_was_compared_and_with_what(measured):
    found, page = measured
    assert found.source() in page and "diffusers" in found.versions and found.seed == 0
    for piece in found.keys("piece"):
        assert f"## {piece}" in page and speed.TOLD[str(piece)] in page
    assert page.count("| ratio |") == 4
    assert "--only" not in found.command and "--smallest" in found.command


def test_a_piece_replaces_its_own_numbers_and_none_of_another_setting_stays(measured, tmp_path):
    found, _ = measured
    results, out = tmp_path / "s.json", tmp_path / "s.md"
    found.save(results)
    new = measured_here("t", [Measurement("ratio", 1.0, of={"piece": "unet"})], packages=("diffusers",), command="c")
    same = common.replace(new, **{name: getattr(found, name) for name in common.SETTING})
    kept = speed.keep(same, results, out)
    assert len(kept.of(piece="unet")) == 1 and kept.of(piece="text").numbers == found.of(piece="text").numbers
    assert kept.keys("piece") == found.keys("piece")
    assert speed.keep(new, results, out).numbers == new.numbers == load_measurements(results).numbers


def test_without_diffusers_nothing_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "is_installed", lambda package: False)
    assert speed.main(["--out", str(tmp_path / "s.md"), "--results", str(tmp_path / "s.json")]) == 2
    assert "needs diffusers" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---- timing


def clocked(seconds: dict[str, float]):
    """Steps that take exactly so long on a clock of their own."""
    now = [0.0]

    def step(name):
        def take():
            now[0] += seconds[name]
            taken.append(name)

        return take

    taken: list[str] = []
    return {name: step(name) for name in seconds}, common.Pace(0.0, 12, 400, 0.0, 2, lambda: now[0]), taken


def test_a_ratio_is_the_ratio_of_times():
    steps, pace, _ = clocked({"ours": 3.0, "diffusers": 2.0})
    ratio, *others = common.ratios(common.side_by_side(steps, pace), "diffusers", {"k": 1})
    assert (ratio.name, ratio.value, ratio.low, ratio.high, ratio.n, ratio.of) == ("ratio", 1.5, 1.5, 1.5, 12, {"k": 1})
    told = {m.name: m.value for m in others}
    assert told["time of ours"] == 3000 and told["time of diffusers"] == 2000 and told["lower quartile"] == 1.5


def test_a_ratio_is_taken_within_a_round():
    times = {"ours": np.array([1.0, 10, 100]), "theirs": np.array([2.0, 20, 200])}
    assert common.ratios(times, "theirs", {})[0].value == 0.5
    times["theirs"] = times["theirs"][[2, 0, 1]]  # medians are as they were, pairs are not
    assert common.ratios(times, "theirs", {})[0].value == 5


@pytest.mark.parametrize("n", [2, 3, 5])
def test_no_step_always_comes_first(n):
    steps, pace, taken = clocked({str(k): 1.0 for k in range(n)})
    common.side_by_side(steps, pace)
    rounds = np.array(taken[2 * n :]).reshape(-1, n)
    assert len(rounds) == 14 and all(set(row) == set(steps) for row in rounds)
    first = Counter(rounds[2:, 0])
    assert set(first) == set(steps) if n <= 3 else len(first) >= 4
    assert max(first.values()) <= 6


def test_a_fast_step_is_repeated():
    steps, pace, taken = clocked({"a": 0.01, "b": 0.02})
    times = common.side_by_side(steps, common.replace(pace, unit=0.2))
    assert len(taken) > 14 * 2 * 10 and times["a"] == pytest.approx(0.01)


def test_a_network_that_differs_is_not_timed():
    x = torch.randn(2, 3)
    assert common.equal(x, x + 1e-6, {}).value < 1e-4
    for other in (1.01 * x, x + float("nan"), x.flip(0)):
        with pytest.raises(SystemExit, match="nothing is timed"):
            common.equal(x, other, {})
    with pytest.raises(SystemExit, match="nothing is timed"):
        common.equal(torch.zeros(3), torch.zeros(3), {})


def test_a_twin_has_the_same_weights():
    from ldm_edu.denoiser.unet import UNet

    ours = common.randomised(UNet(channels=32, multipliers=(1,), blocks=1, attention_factors=(1,), context_dim=8))
    theirs, g = common.twin(ours), common.given(ours, 2, 4)
    with torch.no_grad():
        common.equal(common.ours_predicts(ours, g)(), common.theirs_predicts(theirs, g)(), {})
        theirs.conv_in.bias += 1
        with pytest.raises(SystemExit):
            common.equal(common.ours_predicts(ours, g)(), common.theirs_predicts(theirs, g)(), {})


def test_the_format_in_which_a_network_computes_is_seen():
    layer, x = nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2)

    def half():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)

    assert speed.number_format(layer, lambda: layer(x)) == "float32"
    assert speed.number_format(layer, half) == "bfloat16"
    speed.number_format_checked(layer, lambda: layer(x))
    with pytest.raises(SystemExit, match="float32, not bfloat16"):
        speed.number_format_checked(layer, half)


# ---- gpu.py


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """All sections of gpu.py on a CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "test_marked.py").write_text(MARKED.format(True))
    arguments = ["--device", "cpu", "--smallest", "--out", str(folder / "new" / "gpu.json")]
    assert gpu.main([*arguments, "--tests", str(folder / "test_marked.py")]) == 0
    return load_measurements(folder / "new" / "gpu.json")


def test_a_step_has_its_time_operations_and_share(on_cpu):
    timed = {"weights", "time of a step", "operations of a step", "operations a second", "share of the matrix product"}
    for how in ("eager", "eager, channels last"):
        assert names(on_cpu, step="training", how=how) == timed | {"images a second"}
    for step in ("sampling", "sampling, guided"):
        assert names(on_cpu, step=step, how="eager") == timed | {"steps of an image a second"}
    assert all(m.value > 0 for m in on_cpu if "outcome" not in m.of and m.name != "largest difference")
    assert len(on_cpu.of("ratio")) == 4 and max(on_cpu.values("largest difference")) < 1e-4


def test_what_is_left_out_is_said_with_its_reason(on_cpu):
    assert "Left out: training, compiled (only on a GPU)" in on_cpu.about


def test_only_tests_that_are_marked_run(on_cpu, tmp_path):
    outcomes = {m.of["outcome"]: m.value for m in on_cpu.of("tests marked gpu")}
    assert outcomes == {"passed": 1, "skipped": 0, "failures": 0, "errors": 0}
    (tmp_path / "test_marked.py").write_text(MARKED.format(False))
    arguments = ["--device", "cpu", "--smallest", "--only", "tests", "--tests", str(tmp_path / "test_marked.py")]
    assert gpu.main([*arguments, "--out", str(tmp_path / "gpu.json")]) == 1
    assert load_measurements(tmp_path / "gpu.json").one("tests marked gpu", outcome="failures").value == 1


def test_operations_are_counted():
    layer = nn.Conv2d(3, 5, 3, padding=1)
    assert gpu.flops_of(lambda: layer(torch.zeros(2, 3, 4, 4))) == 2 * 2 * 16 * 3 * 5 * 9
    a = torch.zeros(4, 6)
    assert gpu.flops_of(lambda: a @ a.mT) == 2 * 4 * 6 * 4


def test_a_share_is_of_the_matrix_product():
    options = gpu.Options(torch.device("cpu"), True, 0.0, product=1e12)
    found = {m.name: m.value for m in gpu.speed_of(np.array([0.5]), 4, 1e11, options, {})}
    assert found["share of the matrix product"] == pytest.approx(20) and found["images a second"] == 8


def test_the_model_is_that_of_table_12():
    from ldm_edu.denoiser.unet import UNet

    recipe = gpu.recipe_of(gpu.Options(torch.device("cpu"), False, 0.0), 48)
    with torch.device("meta"):
        unet = gpu.DiffusionTask(recipe).unet
        assert sum(p.numel() for p in unet.parameters()) == 274_056_163
        assert sum(p.numel() for p in UNet(3, 3, **gpu.CELEBA).parameters()) == 274_056_163
    assert gpu.Options(torch.device("cpu"), False, 0.0).side == 64 and gpu.BATCHES[0] == 48


def test_the_largest_batch_that_fits_is_taken(monkeypatch):
    def train(options, batch, how):
        if batch > 24:
            raise torch.cuda.OutOfMemoryError
        return [Measurement("weights", float(batch))]

    monkeypatch.setattr(gpu, "train", train)
    options = gpu.Options(torch.device("cpu"), False, 0.0)
    assert gpu.train_what_fits(options, "eager")[0].value == 24
    monkeypatch.setattr(gpu, "BATCHES", (48, 32))
    with pytest.raises(gpu.LeftOut, match="not even 32"):
        gpu.train_what_fits(options, "eager")


def test_a_section_that_there_is_no_time_for_is_left_out(tmp_path):
    options = gpu.Options(torch.device("cpu"), False, gpu.time.monotonic() + 60)
    assert gpu.measure(options, tmp_path / "gpu.json", ["sampling"], "c") == 0
    assert "Left out: sampling (" in json.loads((tmp_path / "gpu.json").read_text())["about"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_status_2(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---- on a GPU


@pytest.fixture
def device() -> torch.device:
    """The GPU; skips where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")


@pytest.mark.gpu
def test_on_a_gpu_no_training_step_waits(device):
    options = gpu.Options(device, True, 0.0)
    with gpu.training_of(options, 4) as (step, _, _):
        for _ in range(3):
            step()
        assert gpu.host_waits(step, 5) == 0
    number = torch.ones((), device=device)
    assert gpu.host_waits(lambda: number.item(), 5) == 1, "a wait that is there is seen"


@pytest.mark.gpu
@pytest.mark.parametrize("text", [False, True])
def test_on_a_gpu_a_unet_predicts_what_it_predicts_on_a_cpu(device, text):
    from ldm_edu.denoiser.unet import UNet

    unet = common.randomised(UNet(3, 3, **gpu.TINY, context_dim=16 if text else None))
    with torch.no_grad():
        here = common.ours_predicts(unet, common.given(unet, 2, 8))()
        there = common.ours_predicts(unet.to(device), common.given(unet, 2, 8, device=device))()
    torch.testing.assert_close(there.cpu(), here, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_on_a_gpu_every_section_is_measured(device, tmp_path):
    (tmp_path / "test_marked.py").write_text(MARKED.format(True))
    arguments = ["--smallest", "--out", str(tmp_path / "gpu.json"), "--tests", str(tmp_path / "test_marked.py")]
    sections = [name for name in gpu.SECTIONS if name != "training, compiled"]
    assert gpu.main([*arguments, "--only", *sections]) == 0
    found = load_measurements(tmp_path / "gpu.json")
    waits = found.of("host synchronisations")
    assert len(waits) == 4 and all(m.value == 0 for m in waits.of(step="training"))
    assert all(m.value > 0 for m in found.of("peak memory"))
