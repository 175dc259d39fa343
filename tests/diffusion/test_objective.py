"""Targets, their conversions, loss weights and the variational bound, each against a closed form."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from torch import Tensor

from stable_diffusion.config import ScheduleConfig
from stable_diffusion.diffusion.objective import (
    TARGETS,
    convert,
    loss_weight,
    posterior_std,
    target,
    to_eps,
    to_x0,
    variational_bound,
)
from stable_diffusion.diffusion.schedule import CLEAN, Level, Schedule
from stable_diffusion.errors import InputError

from .reference import FLOW, STABLE_DIFFUSION, ZERO_SNR, noise_source, normal

DDPM = Schedule(ScheduleConfig(kind="linear", beta_start=1e-4, beta_end=0.02))
SHORT = Schedule(ScheduleConfig(kind="linear", beta_start=1e-3, beta_end=0.3, num_train_timesteps=20))
TIMES = torch.tensor([1, 2, 10, 500, 999])
# Variance-preserving, flow, variance-exploding, and neither.
LEVELS = [(0.6, 0.8), (0.3, 0.7), (1.0, 14.6), (1.7, 0.2), (1e-3, 1.0)]


def beta_tilde(schedule: Schedule, t: int) -> float:
    """Ho et al. 2020, equation 7, from betas: (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t."""
    bars = schedule.alphas_cumprod
    return float((1 - bars[t - 1]) / (1 - bars[t]) * (1 - bars[t] / bars[t - 1]))


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("source", TARGETS)
def test_predictions_convert(source: str, to: str, alpha: float, sigma: float) -> None:
    """At any level, variance-preserving or not, each pair of predictions goes to one another and back."""
    x0, eps = normal(1), normal(2)
    x = alpha * x0 + sigma * eps
    output = target(source, x0, eps, alpha, sigma)
    converted = convert(output, x, alpha, sigma, source=source, to=to)
    torch.testing.assert_close(converted, target(to, x0, eps, alpha, sigma), rtol=1e-7, atol=1e-9)
    back = convert(converted, x, alpha, sigma, source=to, to=source)
    torch.testing.assert_close(back, output, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("source", TARGETS)
def test_conversion_with_a_level_for_each_sample(source: str) -> None:
    """alpha and sigma may be tensors that broadcast against the latents, as in training."""
    x0, eps = normal(1), normal(2)
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in STABLE_DIFFUSION.alpha_sigma(torch.tensor([5, 700])))
    output = target(source, x0, eps, alpha, sigma)
    x = alpha * x0 + sigma * eps
    torch.testing.assert_close(to_x0(source, output, x, alpha, sigma), x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(to_eps(x0, x, alpha, sigma), eps, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("source", ["sample", "v_prediction", "flow_prediction"])
def test_pure_noise_converts(source: str) -> None:
    """At alpha = 0 all but eps say what the picture is."""
    x0, eps = normal(1), normal(2)
    output = target(source, x0, eps, 0.0, 1.0)
    torch.testing.assert_close(to_x0(source, output, eps, 0.0, 1.0), x0)


def test_definitions() -> None:
    """v = alpha eps - sigma x0 (Salimans & Ho 2022, as in diffusers); flow: the path's derivative by sigma."""
    x0, eps, t = normal(1), normal(2), torch.tensor([30, 800])
    reference = diffusers.DDPMScheduler()
    reference.alphas_cumprod = STABLE_DIFFUSION.alphas_cumprod
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in STABLE_DIFFUSION.alpha_sigma(t))
    v = target("v_prediction", x0, eps, alpha, sigma)
    torch.testing.assert_close(v, reference.get_velocity(x0, eps, t), rtol=1e-12, atol=1e-12)
    slope = (FLOW.add_noise(x0, eps, 600.0) - FLOW.add_noise(x0, eps, 400.0)) / 0.2
    torch.testing.assert_close(target("flow_prediction", x0, eps, 0.5, 0.5), slope, rtol=1e-12, atol=1e-12)


def test_bad_predictions() -> None:
    """Unknown names list the choices; eps at alpha = 0 says what to use."""
    x = normal()
    with pytest.raises(InputError, match="epsilon, flow_prediction, sample, v_prediction"):
        target("noise", x, x, 0.6, 0.8)
    with pytest.raises(InputError, match="did you mean 'epsilon'"):
        to_x0("epsilo", x, x, 0.6, 0.8)
    with pytest.raises(InputError, match="'v_prediction', 'sample' or 'flow_prediction'"):
        to_x0("epsilon", x, x, 0.0, 1.0)
    with pytest.raises(InputError, match="bound, min_snr, simple"):
        loss_weight("snr", "epsilon", TIMES, DDPM)


def test_loss_of_a_network_that_says_zero() -> None:
    """A zero-initialised output has the loss E|target|²: 1, m, alpha² + sigma² m, 1 + m, with m = E x0²."""
    shape, alpha, sigma = (4, 4, 100, 100), 0.6, 0.8
    x0, eps = 2 * normal(1, shape) + 0.5, normal(2, shape)
    m = 4.25
    expected = {
        "epsilon": 1.0,
        "sample": m,
        "v_prediction": alpha**2 + sigma**2 * m,
        "flow_prediction": 1 + m,
    }
    for name, value in expected.items():
        loss = target(name, x0, eps, alpha, sigma).square().mean()
        assert float(loss) == pytest.approx(value, rel=0.02), name


@pytest.mark.parametrize("schedule", [DDPM, ZERO_SNR, FLOW])
@pytest.mark.parametrize("prediction", TARGETS)
def test_simple_weight(prediction: str, schedule: Schedule) -> None:
    """Ho et al. 2020, equation 14: every level counts 1."""
    assert loss_weight("simple", prediction, TIMES, schedule).tolist() == [1.0] * 5


@pytest.mark.parametrize("gamma", [5.0, 1.0])
def test_min_snr_weights(gamma: float) -> None:
    """Hang et al. 2023, section 3.4: min(SNR, gamma) for x0, that over SNR for eps and over SNR + 1 for v."""
    bars = DDPM.alphas_cumprod[TIMES]
    snr = bars / (1 - bars)
    clipped = snr.clamp(max=gamma)
    for prediction, expected in {
        "sample": clipped,
        "epsilon": clipped / snr,
        "v_prediction": clipped / (snr + 1),
    }.items():
        weight = loss_weight("min_snr", prediction, TIMES, DDPM, snr_gamma=gamma)
        torch.testing.assert_close(weight, expected, rtol=1e-10, atol=0)


def test_bound_weight_of_eps() -> None:
    """Ho et al. 2020, equation 12: beta² / (2 sigma² alpha (1 - alpha_bar)), sigma² = beta-tilde."""
    weight = loss_weight("bound", "epsilon", TIMES, DDPM)
    for t, value in zip(TIMES.tolist(), weight.tolist(), strict=True):
        bar = float(DDPM.alphas_cumprod[t])
        alpha = bar / float(DDPM.alphas_cumprod[t - 1])
        expected = (1 - alpha) ** 2 / (2 * beta_tilde(DDPM, t) * alpha * (1 - bar))
        assert value == pytest.approx(expected, rel=1e-9)
    assert float(loss_weight("bound", "epsilon", torch.tensor([0]), DDPM)) == 0.0


@pytest.mark.parametrize(("name", "schedule"), [("min_snr", DDPM), ("min_snr", FLOW), ("bound", DDPM)])
def test_weighted_losses_agree_between_predictions(name: str, schedule: Schedule) -> None:
    """An error of x0 costs the same, whatever the network predicts."""
    x0, eps, wrong = normal(1), normal(2), normal(3)
    for t in TIMES.tolist():
        level = schedule.level(t)
        x = level.alpha * x0 + level.sigma * eps
        costs = []
        for prediction in TARGETS:
            truth = target(prediction, x0, eps, level.alpha, level.sigma)
            guess = convert(wrong, x, level.alpha, level.sigma, source="sample", to=prediction)
            weight = float(loss_weight(name, prediction, torch.tensor([t]), schedule))
            costs.append(weight * float((guess - truth).square().mean()))
        assert costs == pytest.approx([costs[0]] * len(costs), rel=1e-9)


@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("schedule", [ZERO_SNR, FLOW])
def test_weights_are_finite_at_the_ends(schedule: Schedule, prediction: str) -> None:
    """No weight is infinite or negative at alpha = 0 or, of a flow, at sigma = 0."""
    last = 1000 if schedule.is_flow else 999
    weight = loss_weight("min_snr", prediction, torch.tensor([0, 1, last]), schedule)
    assert bool((torch.isfinite(weight) & (weight >= 0)).all())
    with pytest.raises(InputError, match="discrete schedule"):
        loss_weight("bound", prediction, TIMES, FLOW)


@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_posterior_std(t: int) -> None:
    """Ho et al. 2020, equation 7: beta-tilde of neighbouring timesteps; 0 to clean latents."""
    deviation = posterior_std(DDPM.level(t), DDPM.level(t - 1))
    assert deviation**2 == pytest.approx(beta_tilde(DDPM, t), rel=1e-9)
    assert posterior_std(DDPM.level(t), CLEAN) == 0.0


def test_posterior_variances_of_ddpm_against_the_reference() -> None:
    """beta-tilde of all timesteps against diffusers' fixed_small."""
    reference = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type="fixed_small")
    reference.alphas_cumprod = DDPM.alphas_cumprod
    for t in range(1, 1000, 37):
        ours = posterior_std(DDPM.level(t), DDPM.level(t - 1)) ** 2
        assert ours == pytest.approx(float(reference._get_variance(t)), rel=1e-9)


def test_posterior_from_pure_noise_is_a_fresh_draw() -> None:
    """From alpha = 0 q(x_s | x_t, x_0) forgets x_t: its deviation is sigma_s."""
    assert posterior_std(Level(999, 0.0, 1.0), Level(500, 0.6, 0.8)) == 0.8


def grid(values: list[int]) -> Tensor:
    """Data of 256 values, as images of one pixel."""
    return (torch.tensor(values, dtype=torch.float64) / 127.5 - 1).view(-1, 1, 1, 1)


def bound_terms(denoise, x0: Tensor, schedule: Schedule) -> list[Tensor]:
    return list(variational_bound(denoise, x0, schedule, noise_source(4, tuple(x0.shape))))


def test_bound_of_a_perfect_denoiser() -> None:
    """L_T in closed form, L_{t-1} = 0 for 1 <= t < T, and L_0 the mass of a bin around its own centre."""
    x0 = grid([0, 60, 128, 255])
    terms = bound_terms(lambda x, level: x0, x0, SHORT)
    assert len(terms) == 21 and all(term.shape == (4,) for term in terms)
    bar = float(SHORT.alphas_cumprod[-1])
    prior = torch.distributions.kl_divergence(
        torch.distributions.Normal(math.sqrt(bar) * x0, math.sqrt(1 - bar)),
        torch.distributions.Normal(torch.zeros_like(x0), 1.0),
    )
    torch.testing.assert_close(terms[0], prior.flatten() / math.log(2), rtol=1e-9, atol=0)
    assert all(float(term.abs().max()) == 0 for term in terms[1:-1])
    half = math.erf(1 / 255 / math.sqrt(beta_tilde(SHORT, 1)) / math.sqrt(2))
    inner, edge = -math.log2(half), -math.log2(0.5 + half / 2)
    assert terms[-1].tolist() == pytest.approx([edge, inner, inner, edge], rel=1e-9)


@pytest.mark.parametrize("mean", [-1.2, -1.0, 0.0, 0.337, 0.99, 5.0])
def test_discrete_likelihood_is_a_distribution(mean: float) -> None:
    """Ho et al. 2020, equation 13: the masses of the 256 bins sum to 1, wherever the mean is."""
    x0 = grid(list(range(256)))
    masses = 2 ** -bound_terms(lambda x, level: torch.full_like(x0, mean), x0, SHORT)[-1]
    assert float(masses.sum()) == pytest.approx(1, abs=1e-9)
    if abs(mean) < 0.9:
        assert float((masses * x0.flatten()).sum()) == pytest.approx(mean, abs=1e-3)


def test_bound_of_a_constant_error() -> None:
    """L_{t-1} is the KL of two posteriors with the means of Ho et al. 2020, equation 7, from betas."""
    x0, error = normal(1, (2, 3, 4, 4)), 0.3
    terms = bound_terms(lambda x, level: x0 + error, x0, SHORT)
    bars = SHORT.alphas_cumprod
    x = normal(5, (2, 3, 4, 4))
    for t, term in zip(range(19, 0, -1), terms[1:-1], strict=True):
        beta = 1 - bars[t] / bars[t - 1]
        on_x0 = bars[t - 1].sqrt() * beta / (1 - bars[t])
        on_x = (1 - beta).sqrt() * (1 - bars[t - 1]) / (1 - bars[t])
        deviation = math.sqrt(beta_tilde(SHORT, t))
        kl = torch.distributions.kl_divergence(
            torch.distributions.Normal(on_x0 * x0 + on_x * x, deviation),
            torch.distributions.Normal(on_x0 * (x0 + error) + on_x * x, deviation),
        )
        torch.testing.assert_close(term, kl.mean(dim=(1, 2, 3)) / math.log(2), rtol=1e-8, atol=0)


def test_bound_of_a_denoiser_that_says_zero() -> None:
    """The sum telescopes: (alpha_bar_T x0² - alpha_bar_T - log(1 - alpha_bar_T) + (SNR_1 - SNR_T) x0²) / 2 + L_0."""
    x0 = grid([100, 127, 150])
    total = sum(bound_terms(lambda x, level: torch.zeros_like(x), x0, SHORT))
    bars = SHORT.alphas_cumprod
    snr = bars / (1 - bars)
    square = x0.flatten() ** 2
    prior = (bars[-1] * square - bars[-1] - torch.log(1 - bars[-1])) / 2
    middle = (snr[0] - snr[-1]) * square / 2
    normal_law = torch.distributions.Normal(0.0, math.sqrt(beta_tilde(SHORT, 1)))
    mass = normal_law.cdf(x0.flatten() + 1 / 255) - normal_law.cdf(x0.flatten() - 1 / 255)
    expected = (prior + middle - mass.clamp(min=1e-12).log()) / math.log(2)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


def test_bound_is_in_bits_per_dimension() -> None:
    """A picture of equal pixels costs what each of its pixels costs."""
    pixel, picture = grid([77]), grid([77]).expand(1, 3, 5, 7)
    one, many = (bound_terms(lambda x, level: torch.zeros_like(x), x0, SHORT) for x0 in (pixel, picture))
    torch.testing.assert_close(torch.cat(one), torch.cat(many), rtol=1e-12, atol=0)


def test_bound_weighs_as_the_loss_does() -> None:
    """The bound's terms are the weighted squared errors of eps that training takes under `bound`."""
    x0, draw = normal(1), noise_source(4)
    terms = bound_terms(lambda x, level: 0.5 * x, x0, SHORT)
    for t, term in zip(range(19, 0, -1), terms[1:-1], strict=True):
        level, eps = SHORT.level(t), draw()
        x = level.alpha * x0 + level.sigma * eps
        wrong = to_eps(0.5 * x, x, level.alpha, level.sigma)
        weight = float(loss_weight("bound", "epsilon", torch.tensor([t]), SHORT))
        expected = weight * (wrong - eps).square().mean(dim=(1, 2, 3)) / math.log(2)
        torch.testing.assert_close(term, expected, rtol=1e-9, atol=0)
