"""GPTQ against a float64 reference that solves the Hessian anew for every column, and through the command."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from plain_gptq import Plain
from plain_gptq import gptq as plain_gptq
from torch.utils._python_dispatch import TorchDispatchMode
from words import add_tokenizer, text

from moeconv.errors import InputError
from moeconv.families.model import open_model
from moeconv.plan.kernels.pack import pack_nf4, relative_rms
from moeconv.plan.kernels.pack.float_grids import float8_grid, int8_grid, mxfp4_grid, mxfp8_grid, nvfp4_grid
from moeconv.plan.kernels.pack.levels import Coded, Grid, round_to_nearest
from moeconv.plan.kernels.pack.scales import search_scales
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.gptq.grids import grid_of, on_disk
from moeconv.quantize.gptq.moments import PRIOR, expert_tokens, moments
from moeconv.quantize.gptq.solve import cholesky, damped, gptq, loss, retarget
from moeconv.quantize.planner import plan_quantize
from moeconv.tensors import decode_weight

INT4 = Grid(torch.arange(-8.0, 8.0), 7.5, torch.bfloat16)


pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(seed: int, *, tokens: int = 400, width: int = 32) -> torch.Tensor:
    """Correlated inputs [tokens, width]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=draw) @ torch.randn(width, width, generator=draw)


def reference(weight: np.ndarray, hessian: np.ndarray, scales: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Optimal brain quantization in a fixed order, by its definition: after each column the rest moves to the minimum
    of the quadratic form over what is still free. All float64; levels [out, in]."""
    w, levels = weight.copy(), np.zeros_like(weight)
    for at, column in enumerate(order):
        free = order[at + 1 :]
        levels[:, column] = np.clip(np.round(w[:, column] / scales[:, column]), -8, 7)
        error = w[:, column] - levels[:, column] * scales[:, column]
        if len(free):
            move = np.linalg.solve(hessian[np.ix_(free, free)], hessian[free, column])
            w[:, free] += np.outer(error, move)
    return levels


def hessians(seed: int, count: int, *, width: int = 32, damping: float = 0.01) -> torch.Tensor:
    """Damped second moments of correlated inputs, [count, width, width]."""
    given = [inputs(seed + i, width=width) for i in range(count)]
    return damped(torch.stack([(x.T @ x).double() for x in given]), damping)


def weights(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("width", [32, 160])  # 160 crosses the blocks in which feedback is applied
def test_feedback_is_the_minimum_over_the_free_columns(ordered, width):
    weight, hessian = weights(1, 3, 12, width), hessians(2, 3, width=width)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    scales = search_scales(weight, diagonal, INT4, group=32)
    found = gptq(weight, hessian, INT4, group=32, sweeps=0, ordered=ordered)
    assert torch.equal(found.scales, scales)
    for e in range(3):
        order = torch.argsort(diagonal[e], descending=True) if ordered else torch.arange(width)
        per_column = scales[e].repeat_interleave(32, 1).double().numpy()
        wanted = reference(weight[e].double().numpy(), hessian[e].numpy(), per_column, order.numpy())
        # a value in the middle of two levels may fall to either side in float32, and shifts what comes after it
        assert (found.levels[e].double().numpy() == wanted).mean() > 0.995


def _uneven(quant_type: str) -> torch.Tensor:
    return pack_nf4(torch.zeros(1, 64), quant_type=quant_type)["quant_map"].sort().values


GRIDS = {
    "int4": (Grid(torch.arange(-8.0, 8.0), 7.5, torch.bfloat16), 32),
    "int8": (Grid(torch.arange(-128.0, 128.0), 127.5, torch.bfloat16), 96),
    "bitsandbytes int8": (Grid(torch.arange(-127.0, 128.0), 127.0, torch.float32), 96),
    "nf4": (Grid(_uneven("nf4"), 1.0, torch.float32), 32),
    "fp4": (Grid(_uneven("fp4"), 1.0, torch.float32), 32),
    "nvfp4": (nvfp4_grid(), 16),
    "mxfp4": (mxfp4_grid(), 32),
    "mxfp8": (mxfp8_grid(), 32),
    "fp8": (float8_grid(torch.bfloat16), 96),
    "w8a8": (int8_grid(torch.bfloat16), 96),
}


@pytest.mark.parametrize("kind", GRIDS)
def test_a_batch_is_what_each_matrix_is_alone_in_float64(kind):
    """Three sweeps, columns in the order of the diagonal, matrices of different experts and one without inputs."""
    grid, group = GRIDS[kind]
    weight, hessian = weights(3, 4, 24, 96) * 0.02, hessians(4, 4, width=96)
    hessian[3] = damped(torch.zeros(1, 96, 96), 0.01)
    coded = gptq(weight, hessian, grid, group=group)
    plain = Plain(grid.levels, grid.top, grid.dtype, grid.ratios)
    unit = weight.abs().amax((1, 2)) / (grid.top * 448) if kind == "nvfp4" else torch.ones(4)
    alone = [plain_gptq(w / u, h, plain, group=group) for w, u, h in zip(weight, unit, hessian, strict=True)]
    wanted = Coded(
        torch.stack([one for one, _ in alone]), torch.stack([scales for _, scales in alone]), unit[:, None, None]
    )
    assert (coded.levels == wanted.levels).double().mean() >= 0.999
    found, least = loss(weight, hessian, coded), loss(weight, hessian, wanted)
    # of so few weights each that falls to the other side of a tie counts
    assert float(found.sum() / least.sum() - 1) == pytest.approx(0, abs=3e-4)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_nearest_of_uneven_levels_is_that_of_a_search(kind):
    grid, _ = GRIDS[kind]
    middle = (grid.levels[1:] + grid.levels[:-1]) / 2
    ends = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30, 1.0, -1.0, 0.0, -0.0, 1e-38])
    near = [torch.nextafter(middle, torch.tensor(end)) for end in (-9.0, 9.0)]
    x = torch.cat([middle, *near, ends, weights(1, 20_000)])
    assert torch.equal(grid.nearest(x.clone()), grid.levels[torch.bucketize(x, middle)])


def test_every_part_lowers_the_error():
    weight, x = weights(3, 1, 24, 64), inputs(4, width=64)
    hessian = hessians(4, 1, width=64)
    losses = [float(loss(weight, hessian, round_to_nearest(weight, INT4, group=32)))]
    losses += [float(loss(weight, hessian, gptq(weight, hessian, INT4, group=32, sweeps=s))) for s in (0, 1, 3)]
    assert losses == sorted(losses, reverse=True) and losses[3] < 0.45 * losses[0]
    # and it is the loss on the inputs that the Hessian is of
    kinds = gptq(weight, hessian, INT4, group=32), round_to_nearest(weight, INT4, group=32)
    given, plain = (float(((weight - c.decoded())[0].double() @ x.T.double()).square().sum()) for c in kinds)
    assert given < 0.5 * plain


def test_no_code_of_the_result_can_be_bettered_alone():
    weight, hessian = weights(5, 1, 4, 32), hessians(6, 1)
    coded = gptq(weight, hessian, INT4, group=32, sweeps=30)
    least = float(loss(weight, hessian, coded))
    for row, column in np.ndindex(4, 32):
        for step in (-1, 1):
            levels = coded.levels.clone()
            levels[0, row, column] = (levels[0, row, column] + step).clamp(-8, 7)
            assert float(loss(weight, hessian, dataclasses.replace(coded, levels=levels))) >= least * (1 - 1e-5)


def test_retarget_solves_for_what_the_lost_inputs_gave():
    weight, x = weights(7, 2, 8, 32), torch.stack([inputs(8), inputs(10)]).double()
    given = x + 0.1 * torch.stack([inputs(9), inputs(11)]).double()
    hessian, gap = given.mT @ given, (x - given).mT @ given
    best = torch.linalg.lstsq(given, x @ weight.double().mT).solution.mT
    assert torch.allclose(retarget(weight, gap, hessian).double(), best, atol=1e-4)


def test_an_unseen_input_is_still_rounded():
    weight = torch.randn(1, 8, 32)
    zero = damped(torch.zeros(1, 32, 32), 0.01)
    coded = gptq(weight, zero, INT4, group=32)
    assert relative_rms(weight, coded.decoded()) < 0.11
    with pytest.raises(InputError, match="NaN or infinite"):
        damped(torch.full((1, 32, 32), torch.nan), 0.01)


def test_a_moment_that_is_not_positive_definite_gets_the_damping_it_needs_alone():
    good = hessians(1, 3)
    bad = good.clone()
    bad[1] -= 0.02 * torch.eye(32, dtype=torch.float64)  # below zero in some direction
    assert float(torch.linalg.eigvalsh(bad[1])[0]) < 0
    factor = cholesky(bad)
    assert torch.equal(factor[[0, 2]], torch.linalg.cholesky(good[[0, 2]]))
    assert torch.allclose(factor[1] @ factor[1].T, bad[1], atol=0.2) and bool(torch.isfinite(factor).all())
    coded = gptq(weights(2, 3, 8, 32), bad, INT4, group=32)
    assert bool(torch.isfinite(coded.decoded()).all())


def test_moments_of_experts_with_few_many_and_no_tokens():
    counts = [300, 0, 7, 700]
    a, b, share = weights(1, sum(counts), 5), weights(2, sum(counts), 3), weights(3, sum(counts)).abs()
    found = moments(lambda at: (a[at], b[at]), share, counts)
    ranges = zip(a.split(counts), b.split(counts), share.split(counts), strict=True)
    wanted = torch.stack([(x.double() * w.double()[:, None]).T @ y.double() for x, y, w in ranges])
    assert found.dtype == torch.float64 and torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    unseen = moments(lambda at: (a[:0][at], b[:0][at]), share[:0], [0, 0])
    assert unseen.dtype == torch.float64 and torch.equal(unseen, torch.zeros(2, 5, 3, dtype=torch.float64))


def test_what_an_expert_is_shown_follows_the_router_and_the_pool():
    index = torch.tensor([[0, 2], [2, 0], [0, 1], [2, 1], [0, 2]])
    scores = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.5, -0.5], [0.9, 0.1], [0.2, 0.8]])
    free = torch.tensor([True, True, True, True, False])
    seen = expert_tokens(index, scores, free, experts=[0, 1, 3], pooled=4)
    assert [seen[e].rows.tolist() for e in (0, 1, 3)] == [[0, 1, 2], [2, 3], []]
    share = 3 / (3 + PRIOR)
    assert torch.allclose(seen[0].weights, torch.tensor([0.6, 0.3, 0.5]) / 1.4 * share)
    assert torch.allclose(seen[1].weights, torch.tensor([0.0, 0.1]) / 0.1 * (2 / (2 + PRIOR)))
    for one in seen.values():
        assert float(one.weights.sum()) + 4 * one.rest == pytest.approx(1)


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_operations_do_not_depend_on_the_number_of_experts():
    counts = []
    for experts in (8, 128):
        weight, hessian = weights(1, experts, 8, 64), damped(torch.eye(64).expand(experts, 64, 64), 0.01)
        with _Counted() as counted:
            gptq(weight, hessian, INT4, group=32)
        counts.append(counted.count)
    assert counts[1] <= 1.1 * counts[0]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GRIDS)
def test_on_cuda_the_codes_are_those_of_the_cpu(kind, device):
    grid, group = GRIDS[kind]
    weight, hessian = weights(3, 4, 24, 96) * 0.02, hessians(4, 4, width=96)
    one = gptq(weight, hessian, grid, group=group)
    other = gptq(weight.to(device), hessian.to(device), grid, group=group)
    assert (one.levels == other.levels.cpu()).double().mean() >= 0.99
    found, wanted = (loss(weight, hessian, Coded(c.levels.cpu(), c.scales.cpu())).sum() for c in (other, one))
    assert float(found / wanted - 1) == pytest.approx(0, abs=1e-3)


KINDS = [
    (f.name, s.name)
    for f in FORMATS.values()
    for s in f.schemes
    if "gptq" in f.methods_of(s) and not s.inputs  # what stores measured inputs packs weights as another scheme does
]


@pytest.mark.parametrize(("format", "scheme"), KINDS)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_codes_on_disk_decode_to_what_was_chosen(tmp_path, format, scheme, dtype):
    model = open_model(tiny.make_moe(tmp_path / "m", hidden=64, intermediate=128, layers=1, dtype=dtype))
    plan = plan_quantize(model, format=format, scheme=scheme, method="gptq")
    item = next(i for i in plan.items() if i.changed == "expert")
    ref = item.inputs[0]
    weight = decode_weight(model, ref.tensor).float()
    grid, group = grid_of(item)
    batch = gptq(weight[None], hessians(1, 1, width=ref.shape[1]), grid, group=group)
    coded = Coded(batch.levels[0], batch.scales[0], None if batch.unit is None else batch.unit[0])
    parts = on_disk(item, coded)
    from moeconv.checkpoint.safetensors_file import TensorRef
    from moeconv.families.methods import encodings
    from moeconv.families.packed import fit, split_part
    from moeconv.plan.kernels.decode import decode_parts
    from moeconv.plan.kernels.stored import SAFETENSORS_DTYPES
    from moeconv.quantize.spec import Scheme

    for spec in item.outputs:
        assert tuple(parts[spec.name].shape) == spec.shape and SAFETENSORS_DTYPES[parts[spec.name].dtype] == spec.dtype
    refs = {split_part(s.name)[1]: TensorRef(s.name, s.dtype, s.shape, "", 0, s.nbytes) for s in item.outputs}
    forms = encodings(
        FORMATS[format].config(Scheme(scheme, FORMATS[format].scheme(scheme).bits, group), [], "bfloat16", "experts")
    )
    stored = fit(ref.tensor, refs, ref.shape, forms, stacked=False, method=format)
    by_part = {part: parts[name] for part, name in stored.parts.items()}
    decoded = decode_parts(by_part, name=ref.tensor, how=stored.how, dtype=torch.float32)
    assert relative_rms(coded.decoded(), decoded) < 2e-3  # one rounding to bf16 at most
    assert float(coded.levels.abs().max()) > 0


# -- through the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny MoE whose router is decided, so that some experts see few tokens, and a text."""
    folder = tmp_path_factory.mktemp("gptq")
    path = tiny.make_moe(folder / "moe", "qwen2_moe", experts=6, top_k=2, dtype="BF16", hidden=32, intermediate=64,
                         mlp_only_layers=[1], layers=3)  # fmt: skip
    tensors = tiny.read_tensors(path)
    for name, (dtype, shape, data) in tensors.items():
        if shape == (6, 32):
            tensors[name] = (dtype, shape, tiny.encode(tiny.decode(data, dtype, shape) * 40, dtype))
    tiny.write_shards(path, tensors)
    (folder / "text.txt").write_text(text(900, seed=1))
    return add_tokenizer(path), folder / "text.txt"


def quantized(cli, case, out, *flags):
    path, data = case
    done = cli("quantize", path, out, "--data", data, "--seq-len", 16, "--method", "gptq", "--json", *flags)
    assert done.code == 0, done.out
    return done.json


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--format", "bitsandbytes", "--scheme", "int8")])
def test_every_expert_is_packed_and_layers_err_less(cli, case, tmp_path, flags):
    result = quantized(cli, case, tmp_path / "out", *flags)
    block = result["quantize"]
    assert block["method"] == "gptq" and [row["layer"] for row in block["error"]["layers"]] == [0, 2]
    rows = block["error"]["output"]["layers"]
    assert [row["layer"] for row in rows] == [0, 2] and all(r["output_rms"] < r["output_rms_rtn"] for r in rows)
    model, source = open_model(tmp_path / "out"), open_model(case[0])
    dry = cli(
        "quantize", case[0], tmp_path / "dry", "--data", case[1], "--method", "gptq", "--dry-run", "--json", *flags
    )
    assert dry.json["bytes"] == result["bytes"] and dry.json["changed"] == result["changed"]
    for name, ref in source.checkpoint.tensors.items():
        if source.roles[name].group == "expert":
            limit = 0.03 if "int8" in flags else 0.4
            assert 0 < relative_rms(decode_weight(source, name).float(), decode_weight(model, name).float()) < limit
        else:
            assert model.checkpoint.read(name) == source.checkpoint.read(name), ref


@pytest.mark.slow
def test_too_little_text_is_warned_of_and_no_layer_is_worse_than_the_nearest_codes(cli, case, tmp_path):
    fell = 0
    for i, tokens in enumerate((16, 32, 48)):
        (tmp_path / f"{i}.txt").write_text(text(tokens, seed=i))
        given = (case[0], tmp_path / f"{i}.txt")
        result = quantized(cli, given, tmp_path / f"out{i}", "--scheme", "int8", "--damping", 1e-6)
        found = result["quantize"]["error"]["output"]
        assert found["held_out"] == tokens // 4
        for row in found["layers"]:
            assert row["output_rms"] <= row["output_rms_rtn"]
            short = row["tokens_per_expert"] < row["tokens_needed"]
            assert (row["output_rms_gptq"] is None) == short  # too few tokens: no codes are chosen
            assert not row["kept"] or (not short and row["output_rms_gptq"] < row["output_rms_rtn"])
        back = [row["layer"] for row in found["layers"] if not row["kept"]]
        fell += len(back)
        assert sum("tokens per expert on average" in w for w in result["warnings"]) == 1
        assert sum("keep round-to-nearest" in w for w in result["warnings"]) == bool(back)
        plain = tmp_path / f"plain{i}"
        assert cli("quantize", case[0], plain, "--scheme", "int8").code == 0
        written, nearest = open_model(tmp_path / f"out{i}"), open_model(plain)
        for name, role in written.roles.items():
            if role.layer in back:  # to the byte what a plain run writes
                assert written.checkpoint.read(name) == nearest.checkpoint.read(name), name
    assert fell, "codes that 12 to 36 tokens choose err more on others, in some layer"


@pytest.mark.slow
def test_bits_that_differ_by_layer_are_chosen_once(cli, case, tmp_path):
    stats = tmp_path / "stats.safetensors"
    assert cli("calibrate", case[0], stats, "--data", case[1], "--seq-len", 16).code == 0
    flags = ("--scheme", "mixed", "--average-bits", 7, "--target", "vllm")
    result = quantized(cli, case, tmp_path / "out", *flags, "--stats", stats)
    assert sorted(result["quantize"]["bits_by_layer"].values()) == [4, 8]
    assert all(r["output_rms"] < r["output_rms_rtn"] for r in result["quantize"]["error"]["output"]["layers"])
    model = open_model(tmp_path / "out")
    decoded = [decode_weight(model, f"model.layers.{at}.mlp.experts.3.down_proj.weight") for at in (0, 2)]
    assert all(bool(w.abs().sum() > 0) for w in decoded)


def test_codes_do_not_depend_on_which_experts_are_coded_together(cli, tmp_path, monkeypatch):
    path = tiny.make_moe(tmp_path / "moe", "qwen3_moe", experts=12, top_k=3, hidden=32, intermediate=64, layers=1)
    tiny.write_shards(path, dict(sorted(tiny.read_tensors(path).items())))  # expert 10 in front of expert 2
    (tmp_path / "text.txt").write_text(text(400, seed=2))
    case = add_tokenizer(path), tmp_path / "text.txt"
    for out, together in (("all", 1 << 30), ("alone", 0)):
        monkeypatch.setattr("moeconv.quantize.gptq.run.CODED_BYTES", together)
        quantized(cli, case, tmp_path / out, "--group-size", 32)
    one, other = open_model(tmp_path / "all"), open_model(tmp_path / "alone")
    for part in ("gate", "up", "down"):
        names = [one.expert_name(part, layer=0, expert=e) for e in range(12)]
        same = [(decode_weight(one, n) == decode_weight(other, n)).double().mean() for n in names]
        assert min(same) > 0.98 and sum(same) / 12 > 0.999


@pytest.mark.slow
def test_same_command_same_bytes_and_damping_counts(cli, case, tmp_path):
    one = quantized(cli, case, tmp_path / "a")["files"]["model.safetensors"]
    assert quantized(cli, case, tmp_path / "b", "--jobs", 1)["files"]["model.safetensors"] == one
    assert quantized(cli, case, tmp_path / "c", "--damping", 10)["files"]["model.safetensors"] != one
    plain = quantized(cli, case, tmp_path / "d", "--actorder", "none")["files"]
    assert plain["model.safetensors"] != one
    # groups and layout do not depend on the order, so that a reader needs no index of groups
    config = (tmp_path / "d" / "config.json").read_text()
    assert config == (tmp_path / "a" / "config.json").read_text() and '"actorder": null' in config
    assert not any("g_idx" in name for name in open_model(tmp_path / "a").checkpoint.tensors)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--format", "bitsandbytes", "--scheme", "int8")])
def test_auto_keeps_the_method_of_least_error_of_each_layer(cli, case, tmp_path, flags):
    """On the tokens that are held out, and with what that method alone writes for the first layer."""
    result = quantized(cli, case, tmp_path / "auto", "--method", "auto", *flags)
    rows = result["quantize"]["error"]["output"]["layers"]
    tried = {"rtn", "awq", "gptq"} if flags else {"rtn", "mse", "awq", "gptq"}
    for row in rows:
        errors = row["output_rms_by_method"]
        assert {*errors} == tried and row["output_rms"] == errors[row["method"]] == min(errors.values())
    alone = {}
    for method in ("awq", "gptq"):
        found = quantized(cli, case, tmp_path / method, "--method", method, *flags)
        alone[method] = found["quantize"]["error"]["output"]["layers"]
    for method, layers in alone.items():  # the first layer has the same inputs
        assert layers[0]["output_rms_by_method"][method] == rows[0]["output_rms_by_method"][method]
        assert rows[0]["output_rms"] <= layers[0]["output_rms"]
    chosen = rows[0]["method"]
    written, single = open_model(tmp_path / "auto"), open_model(tmp_path / chosen)
    for name, role in written.roles.items():
        if role.layer == rows[0]["layer"]:
            assert written.checkpoint.read(name) == single.checkpoint.read(name), name


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--method", "gptq"), "needs --data"),
        (("--data", "text.txt"), "does not use --data"),
        (("--method", "gptq", "--data", "text.txt", "--damping", 0), "--damping"),
        (("--method", "mse", "--format", "bitsandbytes"), "--method mse"),
        (("--method", "auto"), "--method auto needs --data"),
        (("--method", "awq", "--data", "x", "--format", "bitsandbytes"), "--method awq needs rows of whole blocks"),
        (("--method", "awq", "--data", "x", "--format", "gguf"), "--method awq"),
        (("--method", "gptq", "--data", "x", "--format", "bitsandbytes", "--double-quant"), "--double-quant"),
        (("--method", "gptq", "--data", "x", "--format", "bitsandbytes"), "rows of whole blocks"),
    ],
)
def test_refused_before_any_work(cli, case, tmp_path, left_over, flags, says, monkeypatch):
    monkeypatch.chdir(case[1].parent)
    done = cli("quantize", case[0], tmp_path / "out", "--json", *flags)
    assert done.code == 2 and says in done.json["error"]["message"] and not left_over(tmp_path)
