import pytest
import torch

from qandc_core import DiT, DiTConfig, SamplingConfig, apply_cache_to_dit, generate, optimal_schedule
from qandc_core.caching.attach import feature_cache
from qandc_core.calibration.distances import feature_distances, prediction_distances

STEPS = 6


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DiT(DiTConfig(8, 2, 3, 32, 2, 4, num_classes=10, learn_sigma=False)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def branch_outputs(model, labels, config):
    """Every branch's whole output at every step, through the public callback and hooks of our own."""
    outputs, step = {}, []
    for i, block in enumerate(model.blocks):
        for part in ("attn", "mlp"):
            getattr(block, part).register_forward_hook(
                lambda _, args, out, name=f"{i}.{part}": outputs.setdefault(name, []).append(out.flatten().double())
            )
    generate(model, labels, config.steps, config.cfg_scale, config.sampler, callback=step.append)
    for block in model.blocks:
        block.attn._forward_hooks.clear()
        block.mlp._forward_hooks.clear()
    return {name: torch.stack(values) for name, values in outputs.items()}


def test_distances_equal_those_of_the_whole_outputs(model):
    config, labels = SamplingConfig(steps=STEPS), [1, 2]
    expected = torch.zeros(STEPS, STEPS, dtype=torch.float64)
    outputs = branch_outputs(model, labels, config)
    for f in outputs.values():
        for i in range(STEPS):
            for j in range(i + 1, STEPS):
                expected[i, j] += (f[i] - f[j]).norm() / f[j].norm() / len(outputs)
    found = feature_distances(model, labels, config, values=200_000)
    assert torch.equal(found, torch.triu(found, diagonal=1))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-3)


def test_distances_ignore_an_attached_cache_and_leave_no_hook(model):
    config = SamplingConfig(steps=STEPS)
    plain = feature_distances(model, [3], config)
    apply_cache_to_dit(model, 2)
    assert torch.equal(feature_distances(model, [3], config), plain)
    assert feature_cache(model).enabled
    assert not any(block.attn._forward_hooks or block.mlp._forward_hooks for block in model.blocks)


def test_the_schedule_of_the_distances_can_be_attached(model):
    distances = feature_distances(model, [3], SamplingConfig(steps=STEPS))
    steps = optimal_schedule(distances, 3)
    apply_cache_to_dit(model, steps=steps)
    _, report = generate(model, [1], STEPS)
    assert tuple(i for i, computed in enumerate(report.computed) if computed) == steps


def test_distances_between_predictions_equal_brute_force():
    generator = torch.Generator().manual_seed(3)
    predictions, sigmas = torch.randn(5, 40, generator=generator), torch.tensor([9.0, 4.0, 2.0, 1.0, 0.3, 0.0])
    found = prediction_distances(predictions, sigmas)
    for i in range(5):
        for j in range(5):
            error = float((predictions[i] - predictions[j]).norm() / predictions[j].norm())
            expected = error * float(1 - sigmas[j + 1] / sigmas[j])
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-5)
