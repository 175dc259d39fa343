"""What networks predict, how predictions convert, and how training weights noise levels.

All of it is arithmetic on x = alpha * x0 + sigma * eps. ``alpha`` and ``sigma`` are tensors that broadcast
against the latents, or floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Num
from torch import Tensor

from stable_diffusion.diffusion.schedule import FLOAT64, Level, Schedule
from stable_diffusion.errors import InputError, unknown_name

Scalar = Tensor | float
Latents = Float[Tensor, "b c h w"]


@runtime_checkable
class Denoiser(Protocol):
    """A network with its schedule, as a sampler sees it: from noisy latents at a level to clean latents."""

    def __call__(self, x: Latents, level: Level) -> Latents: ...


# Targets: (x0, eps, alpha, sigma) -> what the network is trained to output.
# v: Salimans & Ho 2022, appendix D. Flow velocity: Liu et al. 2022, equation 1 (from picture to noise here).
TARGETS: dict[str, Callable[[Latents, Latents, Scalar, Scalar], Latents]] = {
    "epsilon": lambda x0, eps, alpha, sigma: eps,
    "sample": lambda x0, eps, alpha, sigma: x0,
    "v_prediction": lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    "flow_prediction": lambda x0, eps, alpha, sigma: eps - x0,
}

# The inverse: (output, x, alpha, sigma) -> x0, for any alpha and sigma, variance-preserving or not.
_TO_X0: dict[str, Callable[[Latents, Latents, Scalar, Scalar], Latents]] = {
    "epsilon": lambda out, x, alpha, sigma: (x - sigma * out) / alpha,
    "sample": lambda out, x, alpha, sigma: out,
    "v_prediction": lambda out, x, alpha, sigma: (alpha * x - sigma * out) / (alpha**2 + sigma**2),
    "flow_prediction": lambda out, x, alpha, sigma: (x - sigma * out) / (alpha + sigma),
}

# |d output / d x0| at fixed x: how much an error of x0 changes each prediction.
_GAIN: dict[str, Callable[[Scalar, Scalar], Scalar]] = {
    "epsilon": lambda alpha, sigma: alpha / sigma,
    "sample": lambda alpha, sigma: 1.0,
    "v_prediction": lambda alpha, sigma: (alpha**2 + sigma**2) / sigma,
    "flow_prediction": lambda alpha, sigma: (alpha + sigma) / sigma,
}


def target(prediction_type: str, x0: Latents, eps: Latents, alpha: Scalar, sigma: Scalar) -> Latents:
    """What a network of that prediction type should output for x = alpha * x0 + sigma * eps."""
    if prediction_type not in TARGETS:
        raise unknown_name("prediction_type", prediction_type, TARGETS)
    return TARGETS[prediction_type](x0, eps, alpha, sigma)


def to_x0(prediction_type: str, output: Latents, x: Latents, alpha: Scalar, sigma: Scalar) -> Latents:
    """Clean latents from a network's output.

    Raises:
        InputError: an epsilon prediction at alpha = 0, where noise says nothing about the picture.
    """
    if prediction_type not in _TO_X0:
        raise unknown_name("prediction_type", prediction_type, _TO_X0)
    if prediction_type == "epsilon" and isinstance(alpha, float) and alpha == 0:
        raise InputError(
            "a model with prediction_type 'epsilon' cannot start from pure noise (zero terminal SNR);"
            " it needs 'v_prediction', 'sample' or 'flow_prediction'"
        )
    return _TO_X0[prediction_type](output, x, alpha, sigma)


def to_eps(x0: Latents, x: Latents, alpha: Scalar, sigma: Scalar) -> Latents:
    """The noise in `x`, given `x0`; sigma must not be 0."""
    return (x - alpha * x0) / sigma


def convert(output: Latents, x: Latents, alpha: Scalar, sigma: Scalar, *, source: str, to: str) -> Latents:
    """A prediction of type `source` converted to the equivalent one of type `to`."""
    x0 = to_x0(source, output, x, alpha, sigma)
    return target(to, x0, to_eps(x0, x, alpha, sigma), alpha, sigma)


def loss_weight(
    name: str,
    prediction_type: str,
    timesteps: Num[Tensor, " b"],
    schedule: Schedule,
    *,
    snr_gamma: float = 5.0,
) -> Float[Tensor, " b"]:
    """The weight of each sample's squared error, in the units of the prediction type.

    ``simple``: 1 (Ho et al. 2020, equation 14). ``min_snr``: min(SNR, gamma) on the error of x0 (Hang et al.
    2023, section 3.4). ``bound``: the terms of the variational bound for t >= 1, in nats (Ho et al. 2020,
    equation 12; as Kingma et al. 2021, equation 14, half the drop of the SNR, on the error of x0); discrete
    schedules only, and 0 at t = 0, whose term is not a squared error.
    """
    if name not in LOSS_WEIGHTS:
        raise unknown_name("loss weight", name, LOSS_WEIGHTS)
    if name == "simple":
        return torch.ones(len(timesteps), **FLOAT64)
    alpha, sigma = schedule.alpha_sigma(timesteps)
    snr = (alpha / sigma) ** 2
    if name == "min_snr":
        on_x0 = snr.clamp(max=snr_gamma)
    else:
        if schedule.is_flow:
            raise InputError("loss weight 'bound' needs a discrete schedule, not a rectified flow")
        alpha_before, sigma_before = schedule.alpha_sigma((timesteps - 1).clamp(min=0))
        on_x0 = 0.5 * ((alpha_before / sigma_before) ** 2 - snr)
    gain = torch.as_tensor(_GAIN[prediction_type](alpha, sigma), dtype=torch.float64)
    # At a zero terminal SNR the weight and an epsilon's gain are both 0; the limit of min_snr is 1.
    return torch.where(gain > 0, on_x0 / gain**2, torch.ones_like(on_x0))


LOSS_WEIGHTS = ("simple", "min_snr", "bound")


def variational_bound(
    denoise: Denoiser,
    x0: Float[Tensor, "b c h w"],
    schedule: Schedule,
    noise: Callable[[], Float[Tensor, "b c h w"]],
) -> Iterator[Float[Tensor, " b"]]:
    """The terms of the bound on -log p(x0), in bits per dimension, from L_T down to L_0; their sum is the bound.

    For data of 256 values, x0 = value / 127.5 - 1, and the posterior's variance (Ho et al. 2020, equations 5,
    8 and 13; Nichol & Dhariwal 2021, section 3). Each term takes one sample of `noise`.

    Args:
        denoise: the model, from noisy data to clean.
        x0: the data.
        schedule: a discrete schedule.
        noise: gives standard normal samples of the data's shape.
    """
    bits = 1 / (math.log(2) * x0[0].numel())
    last = schedule.level(schedule.num_train_timesteps - 1)
    variance = last.sigma**2
    prior = 0.5 * (variance + (last.alpha * x0) ** 2 - 1 - math.log(variance))
    yield prior.sum(dim=(1, 2, 3)) * bits
    for t in reversed(range(schedule.num_train_timesteps)):
        level = schedule.level(t)
        predicted = denoise(level.alpha * x0 + level.sigma * noise(), level)
        if t > 0:
            before = schedule.level(t - 1)
            weight = 0.5 * ((before.alpha / before.sigma) ** 2 - (level.alpha / level.sigma) ** 2)
            yield weight * ((predicted - x0) ** 2).sum(dim=(1, 2, 3)) * bits
        else:
            # The last step's posterior variance is 0; its decoder takes the next one up, as in the DDPM code.
            std = posterior_std(schedule.level(1), level)
            yield -_discrete_log_likelihood(x0, predicted, std).sum(dim=(1, 2, 3)) * bits


def posterior_std(level: Level, to: Level) -> float:
    """Standard deviation of q(x_s | x_t, x_0), s < t: sqrt(beta-tilde) (Ho et al. 2020, equation 7)."""
    ratio = (to.sigma * level.alpha) / (level.sigma * to.alpha)
    return to.sigma * math.sqrt(max(1 - ratio**2, 0.0))


def _discrete_log_likelihood(x0: Latents, mean: Latents, std: float) -> Latents:
    """log of the Gaussian's mass in the bin of 1/127.5 around x0, open at both ends (equation 13)."""
    lower = torch.special.ndtr((x0 - mean - 1 / 255) / std)
    upper = torch.special.ndtr((x0 - mean + 1 / 255) / std)
    lower = torch.where(x0 < -0.999, torch.zeros_like(lower), lower)
    upper = torch.where(x0 > 0.999, torch.ones_like(upper), upper)
    return (upper - lower).clamp(min=1e-12).log()
