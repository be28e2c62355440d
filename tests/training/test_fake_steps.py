"""A training step on a GPU without a GPU: forward, backward, clipping, optimiser and average wait for nothing."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from fake_gpu import WITH_BACKWARD, FakeGPU, HostSync, needs_cuda_build
from small_runs import small_diffusion, text, tiny, tiny_autoencoder

from ldm_edu.data.toy.datasets import ToyCOCO
from ldm_edu.evaluation.judge import reader_targets
from ldm_edu.training.judge import FeaturesTask, ReaderTask
from ldm_edu.training.loop import EMA, Stage, optimise, step_randomness
from ldm_edu.training.recipes import SCENE_READER, TOY_FEATURES, ConditionerRecipe, Training
from ldm_edu.training.run import RunAccelerator
from ldm_edu.training.tasks import DiffusionTask, FirstStageTask, perceptual_distance

pytestmark = needs_cuda_build
B = 4  # samples a batch


class OnFakeGPU(RunAccelerator):
    """What the loop asks of accelerate, for a device that is not there."""

    def __init__(self, gpu: FakeGPU):
        self.gpu = gpu

    device = property(lambda self: self.gpu.device)
    process_index = property(lambda self: 0)

    def no_sync(self, model):
        return nullcontext()

    def backward(self, loss, **kwargs):
        loss.backward()

    def unscale_gradients(self, optimizer=None):
        pass

    def unwrap_model(self, model, *args, **kwargs):
        return model


class Given(Stage):
    """A stage whose batches are made before."""

    def __init__(self, task, batch, **training):
        super().__init__("given", task, Training(**({"steps": 2, "batch_size": B, "lr": 1e-3} | training)))
        self.made = batch

    def batch(self, step):
        return {"step": step} | self.made


def latents(**more):
    return step_randomness(0, 0, range(B), (4, 8, 8)) | {"z": torch.randn(B, 4, 8, 8)} | more


def pictures(kind: str):
    """A first stage's task and batch, the discriminator from the second step on."""
    recipe = replace(tiny_autoencoder(start=1).first_stage, regulariser=kind)
    batch = step_randomness(0, 0, range(B), (4, 8, 8)) | {"image": torch.rand(B, 3, 16, 16) * 2 - 1}
    distance = perceptual_distance("toy-features")
    task = FirstStageTask(recipe, distance)
    task.beside = [distance]  # its weights are no part of the task
    return task, batch


def diffusion(*conditioners: ConditionerRecipe):
    recipe = tiny()
    return DiffusionTask(replace(recipe, diffusion=small_diffusion(recipe.diffusion.training, *conditioners)))


def judge():
    scenes = [ToyCOCO("validation").describe(i)[0] for i in range(B)]
    batch = {"image": torch.rand(B, 3, 64, 64) * 2 - 1} | reader_targets(scenes)
    return ReaderTask(replace(SCENE_READER, channels=(8, 8, 8))), batch


def features():
    batch = {"image": torch.rand(B, 3, 64, 64), "things": torch.zeros(B, 48), "attributes": torch.zeros(B, 16)}
    return FeaturesTask(replace(TOY_FEATURES, channels=(8, 8))), batch | {"scene": torch.tensor([1.0, 1.0, 0.0, 0.0])}


CASES = {
    "unconditional": lambda: (diffusion(), latents()),
    "text": lambda: (diffusion(text()), latents(caption=["a red ball"] * B)),
    "merged": lambda: (diffusion(text(), text()), latents(caption=["a red ball"] * B)),
    "first stage, KL": lambda: pictures("kl"),
    "first stage, VQ": lambda: pictures("vq"),
    "judge": judge,
    "features": features,
}


def steps(stage: Stage):
    """All steps of a stage on the fake device; what they gave, and what was copied to the device."""
    ema = EMA(stage.task, 0.9)
    with FakeGPU(WITH_BACKWARD) as gpu:
        gpu.put(stage.task)
        gpu.put(ema.module)
        for network in getattr(stage.task, "beside", []):
            gpu.put(network)
        # The fused and foreach optimisers know this device as little as accelerate does.
        optimizer = torch.optim.AdamW(stage.task.parameters(), foreach=False)
        accelerator = OnFakeGPU(gpu)
        results = list(optimise(stage, accelerator, stage.task, optimizer, ema))
        assert all(gpu.holds(value) for r in results for value in (r.loss, r.norm, *r.terms.values()))
        return results, gpu.uploads


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_no_step_waits_for_the_device(name, accumulate):
    """Only the batch is copied there, and the ids of captions, without waiting; the schedule's tables once."""
    task, batch = CASES[name]()
    results, uploads = steps(Given(task, batch, accumulate=accumulate))
    assert [r.step for r in results] == [1, 2] and results[0].loss.shape == ()
    sent = [u for u in uploads if u.shape[:1] != (1000,)]
    assert not [u for u in sent if u.waits]
    rows = sum(isinstance(value, torch.Tensor) for value in batch.values())
    ids = 2 * accumulate * {"text": 1, "merged": 2}.get(name, 0)  # of the captions, and of the null
    assert len(sent) == 2 * (rows + ids)
    assert len(uploads) - len(sent) == (2 if "z" in batch else 0)  # alpha and sigma


class Waits(torch.nn.Module):
    """A task with a planted number that the host reads."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch):
        loss = (self.weight * batch["z"]).square().mean()
        return loss, {"mse": torch.tensor(loss.item())}


def test_a_planted_read_is_caught():
    with pytest.raises(HostSync):
        steps(Given(Waits(), latents()))
