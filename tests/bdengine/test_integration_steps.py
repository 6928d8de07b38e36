"""A step of our schedulers: its noise, its tensors, its host cost, and what it refuses."""

import copy
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DDPMPipeline
from diffusers.schedulers import DDPMScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bdkernels
from bdengine.errors import UserError
from bdengine.integrations import _fused
from bdengine.integrations import diffusers as fused

from .schedulers_for_tests import PAIRS, SHAPE, TRAILING, ElementwiseUNet, generators, images, loop, network, seeds_from

# Noise and seeds


def test_image_k_of_a_list_of_generators_is_the_same_in_any_batch() -> None:
    pipeline = DDPMPipeline(ElementwiseUNet(), fused.FusedDDPMScheduler())
    batch = images(pipeline, batch_size=3, num_inference_steps=5, generator=generators(7, 8, 9))
    assert not torch.equal(batch[0], batch[1])
    for k, seed in enumerate((7, 8, 9)):
        assert torch.equal(images(pipeline, num_inference_steps=5, generator=generators(seed))[0], batch[k])
    swapped = images(pipeline, batch_size=2, num_inference_steps=5, generator=generators(9, 8))
    assert torch.equal(swapped, batch[[2, 1]])


def test_without_a_generator_runs_differ_and_follow_torchs_seed() -> None:
    scheduler = fused.FusedDDPMScheduler()
    x = torch.zeros(2, *SHAPE)

    def once() -> Tensor:
        scheduler.set_timesteps(5)
        return loop(scheduler, x)

    torch.manual_seed(4)
    first, second = once(), once()
    torch.manual_seed(4)
    assert torch.equal(once(), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("name", ["ddim", "dpm", "unipc"])
def test_samplers_without_noise_leave_torchs_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    scheduler = PAIRS[name][0]()
    scheduler.set_timesteps(5)
    loop(scheduler, torch.zeros(2, *SHAPE))
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_are_drawn_once_a_run() -> None:
    scheduler = fused.FusedDDPMScheduler()
    generator, once = generators(1, 1)
    scheduler.set_timesteps(5)
    loop(scheduler, torch.zeros(2, *SHAPE), generator=generator)
    torch.randint(-(2**63), 2**63 - 1, (2,), generator=once)
    assert torch.equal(generator.get_state(), once.get_state())


@pytest.mark.parametrize(("name", "step"), [("ddpm", {}), ("ddim", {"eta": 1.0})])
def test_another_run_over_the_same_timesteps_has_new_noise(name: str, step: dict[str, float]) -> None:
    """What stock users write: ``set_timesteps`` once, then batch after batch."""
    ours, again = (PAIRS[name][0]() for _ in range(2))
    one, other = generators(3, 3)
    x = torch.zeros(2, *SHAPE)
    ours.set_timesteps(5)
    first, second = (loop(ours, x, generator=one, **step) for _ in range(2))
    assert not torch.equal(first, second)
    for expected in (first, second):
        again.set_timesteps(5)
        assert torch.equal(loop(again, x, generator=other, **step), expected)


def test_no_noise_is_used_twice_by_batches_that_take_turns_or_by_rows_that_are_taken_again() -> None:
    scheduler = fused.FusedDDPMScheduler()
    scheduler.set_timesteps(5)
    x, drawn = torch.zeros(2, *SHAPE), []
    for t in (*scheduler.timesteps[:3], *scheduler.timesteps[1:4]):
        drawn += [scheduler.step(x, t, x).prev_sample for _ in range(3)]  # of zeros: the noise alone
    each = torch.cat(drawn).flatten(1)
    correlation = torch.corrcoef(each)
    assert len(each) == 36
    assert float((correlation - torch.eye(36)).abs().max()) < 0.8  # of 64 independent pairs: six deviations


# Tensors


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_layouts(name: str, dtype: torch.dtype) -> None:
    """A narrow step is the float32 step of the same values, rounded once; layouts change no bit; inputs are kept."""
    x = bdkernels.normal(seeds_from(0, 2), (3, 8, 8), dtype=dtype)
    forms = {
        "float": lambda v: v.float(),
        "plain": lambda v: v,
        "last": lambda v: v.contiguous(memory_format=torch.channels_last),
        "slice": lambda v: torch.cat([v, v], 1)[:, :3],
    }
    schedulers = {form: PAIRS[name][0]() for form in forms}
    noise = {} if name == "unipc" else {form: torch.Generator().manual_seed(0) for form in forms}
    for scheduler in schedulers.values():
        scheduler.set_timesteps(4)
    for t in schedulers["plain"].timesteps.tolist():
        m, after = network(x, t), {}
        for form, make in forms.items():
            given = make(x)
            drawn = {"generator": noise[form]} if noise else {}
            after[form] = schedulers[form].step(make(m), t, given, **drawn).prev_sample
            assert torch.equal(given, make(x))
            assert after[form].dtype == given.dtype
        assert after["last"].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(after["plain"], after["float"].to(dtype))
        assert torch.equal(after["last"], after["plain"])
        assert torch.equal(after["slice"], after["plain"])
        x = after["plain"]


def test_the_output_reads_like_stocks_and_predicts_when_asked() -> None:
    scheduler = fused.FusedDDPMScheduler()
    scheduler.set_timesteps(4)
    x, t = bdkernels.normal(seeds_from(0, 2), SHAPE), scheduler.timesteps[0]
    with mock.patch.object(bdkernels, "fused_step", wraps=bdkernels.fused_step) as calls:
        out = scheduler.step(x, t, x, *generators(0))
        assert calls.call_count == 1
        pair = scheduler.step(x, t, x, *generators(0), return_dict=False)
        assert calls.call_count == 3
    assert torch.equal(out[0], pair[0])
    assert torch.equal(out["prev_sample"], pair[0])
    assert torch.equal(out[1], pair[1])
    assert torch.equal(out["pred_original_sample"], out.pred_original_sample)
    multistep = fused.FusedUniPCMultistepScheduler()
    multistep.set_timesteps(4)
    (only,) = multistep.step(x, multistep.timesteps[0], x, return_dict=False)
    assert only.shape == x.shape


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_run_that_began_in_inference_mode_can_go_on_with_a_gradient(name: str) -> None:
    scheduler = PAIRS[name][0](clip_sample=False)
    scheduler.set_timesteps(4)
    x = bdkernels.normal(seeds_from(0, 2), SHAPE)
    step = {"eta": 1.0} if name == "ddim" else {}
    with torch.inference_mode():
        scheduler.step(x, scheduler.timesteps[0], x, **step)
    leaf = x.clone().requires_grad_()
    scheduler.step(x, scheduler.timesteps[1], leaf, **step).prev_sample.sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad == leaf.grad[0, 0, 0, 0]).all()
    assert leaf.grad[0, 0, 0, 0] > 0.5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_copy_in_the_middle_of_a_run_goes_on_alone(name: str, copied: Any) -> None:
    scheduler = PAIRS[name][0]()
    scheduler.set_timesteps(8)
    x = loop(scheduler, bdkernels.normal(seeds_from(0, 2), SHAPE), scheduler.timesteps[:3])
    other = copied(scheduler)
    assert torch.equal(loop(scheduler, x, scheduler.timesteps[3:]), loop(other, x, other.timesteps[3:]))


class NoHostRead(TorchDispatchMode):
    """Raises on what would wait for an accelerator: a scalar read, a place found by content, a copy to another device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "_to_copy", "copy_")
        assert func.name().removeprefix("aten::") not in reads, f"{func.name()} in a step"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PAIRS)
def test_a_step_reads_nothing_back(name: str) -> None:
    ours, stock = (scheduler() for scheduler in PAIRS[name])
    x = bdkernels.normal(seeds_from(0, 2), SHAPE)
    m = network(x, 3)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(20)
    x = ours.step(m, ours.timesteps[0], x).prev_sample  # the first step sends the table
    with NoHostRead():
        for t in ours.timesteps[1:]:
            x = ours.step(m, t, x).prev_sample
    with pytest.raises(AssertionError, match="in a step"), NoHostRead():
        stock.step(m, stock.timesteps[0], x)


@pytest.mark.parametrize("name", PAIRS)
def test_on_another_device_too_the_first_step_included(name: str) -> None:
    """The meta device stands for an accelerator: nothing can be read from it, and any attempt raises."""
    ours, _ = (scheduler() for scheduler in PAIRS[name])
    ours.set_timesteps(20)
    x = torch.zeros(2, *SHAPE, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        x.cpu()
    rows = []
    with mock.patch.object(_fused, "_Run", side_effect=_fused._Run) as runs:
        for t in ours.timesteps:
            x = ours.step(x, t.to("meta"), x).prev_sample
            rows.append(ours._step_index)
    assert x.device.type == "meta"
    assert rows == list(range(1, 21))
    assert runs.call_count == 1


# Refusals


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("ddpm", {"thresholding": True}, "thresholding is True with FusedDDPMScheduler: expected False"),
        ("ddpm", {"variance_type": "learned_range"}, "variance_type is 'learned_range' .* expected 'fixed_small' or"),
        ("ddpm", {"variance_type": "fixed_large_log"}, "variance_type is 'fixed_large_log'"),
        ("ddpm", {"beta_schedule": "laplace"}, "unknown beta schedule 'laplace'"),
        ("ddpm", {"prediction_type": "score"}, "unknown prediction type 'score'"),
        ("ddim", {"thresholding": True}, "thresholding is True with FusedDDIMScheduler"),
        ("dpm", {"thresholding": True}, "thresholding"),
        ("dpm", {"variance_type": "learned"}, "variance_type is 'learned'"),
        (
            "dpm",
            {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
            "algorithm_type is 'sde-dpmsolver' .* 'sde-dpmsolver\\+\\+'",
        ),
        ("dpm", {"solver_order": 4}, "solver_order is 4 .* expected 1 or 2 or 3"),
        ("dpm", {"lower_order_final": False}, "lower_order_final is False .* expected True"),
        ("dpm", {"euler_at_final": True}, "euler_at_final is True"),
        ("dpm", {"use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ("dpm", {"prediction_type": "flow_prediction"}, "unknown prediction type 'flow_prediction'"),
        ("unipc", {"disable_corrector": [0]}, r"disable_corrector is \[0\]"),
        ("unipc", {"solver_p": DDPMScheduler()}, "solver_p is DDPMScheduler"),
    ],
)
def test_what_a_table_cannot_do_is_refused(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        PAIRS[name][0](**options)


@pytest.mark.parametrize(
    ("name", "options", "steps", "sentence"),
    [
        ("ddpm", {"rescale_betas_zero_snr": True, **TRAILING}, 10, "not finite .* other than epsilon"),
        ("ddpm", {"steps_offset": 1}, 1000, "timestep 1000 is not of training: expected 0 to 999"),
        # Stock's 61 trailing timesteps are 62, the last of them -1, which it takes for the noisiest.
        (
            "ddim",
            TRAILING,
            61,
            "timestep -1 is not of training: expected 0 to 999, .* at some numbers of steps; try another",
        ),
        ("dpm", {"solver_type": "heun"}, 1000, "dpm\\+\\+-2m-1000 has coefficients that are not finite"),
    ],
)
def test_grids_that_have_no_table_are_refused(name: str, options: Any, steps: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        PAIRS[name][0](**options).set_timesteps(steps)


def test_what_a_step_cannot_do_is_refused() -> None:
    x = torch.zeros(2, *SHAPE)
    one, two = fused.FusedDDIMScheduler(), fused.FusedDPMSolverMultistepScheduler()
    for scheduler in (one, two):
        with pytest.raises(UserError, match="step was called on a new scheduler: expected set_timesteps first"):
            scheduler.step(x, 999, x)
        scheduler.set_timesteps(4)
        with pytest.raises(UserError, match="timestep has 2 elements: expected one for the whole batch"):
            scheduler.step(x, scheduler.timesteps[:2], x)
        with pytest.raises(UserError, match="variance_noise was given"):
            scheduler.step(x, scheduler.timesteps[0], x, variance_noise=x)
        with pytest.raises(UserError, match=r"timestep 1 is not of this run: expected one of scheduler.timesteps"):
            scheduler.step(x, 1, x)
    with pytest.raises(UserError, match="3 generators were given for 2 samples"):
        one.step(x, one.timesteps[0], x, eta=1, generator=generators(1, 2, 3))
    with pytest.raises(UserError, match="use_clipped_model_output is True"):
        one.step(x, one.timesteps[0], x, use_clipped_model_output=True)
    with pytest.raises(UserError, match="eta is 2"):
        one.step(x, one.timesteps[0], x, eta=2)
    with pytest.raises(UserError, match="keeps no graph"):
        two.step(x.clone().requires_grad_(), two.timesteps[0], x)
    loop(two, x)
    with pytest.raises(UserError, match="step 5 of a run of 4: expected set_timesteps before another run"):
        two.step(x, two.timesteps[0], x)
    spread = fused.FusedDPMSolverMultistepScheduler(use_karras_sigmas=True)
    spread.set_timesteps(4)
    spread.timesteps = spread.timesteps[1:]
    with pytest.raises(UserError, match="3 timesteps were assigned to 4 noise levels of stock's"):
        spread.step(x, spread.timesteps[0], x)
