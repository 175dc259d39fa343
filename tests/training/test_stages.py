"""The stages: what a batch holds, what the losses are, and that latents get unit standard deviation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stable_diffusion.config import (
    MINILM,
    AutoencoderKLConfig,
    ModelConfig,
)
from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.data.item import Joined
from stable_diffusion.generation.denoise import UNetNetwork
from stable_diffusion.images import layers, to_tensor
from stable_diffusion.nn.text import PromptEmbeds
from stable_diffusion.training.draw import Draw, Samples
from stable_diffusion.training.pictures import on_grounds
from stable_diffusion.training.stages.autoencoder import AutoencoderStage, normalise
from stable_diffusion.training.stages.decoder import DecoderStage, Discriminator
from stable_diffusion.training.stages.denoiser import DenoiserStage
from stable_diffusion.training.workspace import TextCache, Workspace, read_pixels
from tests.tiny import DECODER, FINE, KL, STAGES, TEXT, TINY, UNCONDITIONAL, VQ, tiny_model
from tests.training.test_caches import result, said

CAPTIONS = ["", "a red circle", "a blue square", "a green heart", "a yellow star"]
BATCH = 8


def stage_of(config: ModelConfig = TINY, pictures: int = 4, **settings: Any) -> DenoiserStage:
    """A denoiser's stage on random latents; picture i has the captions i + 1 and, but the last, i + 2."""
    stage = DenoiserStage(tiny_model(config), replace(STAGES[1], batch_size=BATCH, **settings))
    side = config.sample_size // config.vae.factor
    latents = torch.randn(
        pictures, config.vae.latent_channels, side, side, generator=torch.Generator().manual_seed(0)
    )
    stage.latents = latents.half().numpy()
    stage.samples = Samples(pictures)
    stage.captions = CAPTIONS
    stage.captions_of = [[i + 1, i + 2] if i + 2 < len(CAPTIONS) else [i + 1] for i in range(pictures)]
    stage.text_caches = [None] * len(config.text_encoders)
    return stage


TRAINABLE = replace(TINY, text_encoders=(replace(TEXT, trainable=True),))


def draw(step: int = 0, batch: int = BATCH) -> Draw:
    return Draw(0, "denoiser", step, range(batch), batch)


def words(stage: DenoiserStage, ids: torch.Tensor) -> list[str]:
    """The captions that rows of token numbers are."""
    known = {
        tuple(row.tolist()): text
        for row, text in zip(stage.text_encoder.tokenizers[0](CAPTIONS).input_ids, CAPTIONS, strict=True)
    }
    return [known[tuple(row.tolist())] for row in ids]


def drawn_captions(stage: DenoiserStage, steps: int) -> list[tuple[int, str]]:
    """Which picture met which caption."""
    pairs = []
    for step in range(steps):
        *_, ids, _ = stage.batch(draw(step))
        assert stage.latents is not None
        pairs += zip(draw(step).indices(stage.samples), words(stage, ids), strict=True)
    return pairs


def test_weights_say_how_often_a_picture_is_drawn() -> None:
    stage = stage_of()
    stage.samples = Samples(4, (1.0, 0.001, 0.001, 0.001))
    x0, *_ = stage.batch(draw(1))
    assert stage.latents is not None
    assert np.allclose(x0, stage.latents[:1].astype(np.float32))


def test_a_tenth_of_the_captions_is_dropped() -> None:
    pairs = drawn_captions(
        stage_of(TRAINABLE), 250
    )  # 2,000 captions; the standard deviation of the part is 0.0067
    assert 0.08 < sum(caption == "" for _, caption in pairs) / len(pairs) < 0.12
    none, all_ = (stage_of(TRAINABLE, caption_dropout=p) for p in (0.0, 1.0))
    assert "" not in {caption for _, caption in drawn_captions(none, 30)}
    assert {caption for _, caption in drawn_captions(all_, 30)} == {""}


def test_captions_are_those_of_the_picture_and_all_are_met() -> None:
    stage = stage_of(TRAINABLE)
    pairs = {(picture, caption) for picture, caption in drawn_captions(stage, 100) if caption}
    assert pairs == {
        (i, CAPTIONS[number]) for i, numbers in enumerate(stage.captions_of) for number in numbers
    }


def test_a_batch_is_latents_noise_and_level() -> None:
    stage = stage_of(TRAINABLE)
    assert stage.latents is not None
    x0, noise, timesteps, alpha, sigma, weight, *_ = stage.batch(draw(3))
    assert np.array_equal(x0, stage.latents[draw(3).indices(stage.samples)].astype(np.float32))
    assert noise.shape == x0.shape and noise.std() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(sigma, timesteps / 1000)
    torch.testing.assert_close(alpha, 1 - sigma)
    assert len(set(timesteps.tolist())) == BATCH and torch.equal(weight, torch.ones(BATCH))
    again, other = stage.batch(draw(3)), stage.batch(draw(4))
    assert all(torch.equal(a, b) for a, b in zip(stage.batch(draw(3)), again, strict=True))
    assert not any(torch.equal(again[i], other[i]) for i in range(4))


def times(config: ModelConfig) -> torch.Tensor:
    stage = stage_of(config)
    return torch.cat([stage.batch(draw(step))[2] for step in range(100)]) / 1000


def test_times_cover_the_schedule() -> None:
    """Evenly where steps are discrete; a flow's are logit-normal (Esser et al. 2024, equation 19)."""
    discrete = times(
        replace(UNCONDITIONAL, schedule=replace(TINY.schedule, kind="cosine", prediction_type="epsilon"))
    )
    assert discrete.mean() == pytest.approx(0.5, abs=0.04) and discrete.var() == pytest.approx(
        1 / 12, abs=0.01
    )
    assert 0 <= discrete.min() < 0.02 and 0.98 < discrete.max() < 1
    flow = torch.logit(times(UNCONDITIONAL).double())
    assert flow.mean() == pytest.approx(0, abs=0.12) and flow.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("share", [0, 1])
def test_processes_read_their_part_of_a_batch(share: int) -> None:
    stage = stage_of(TRAINABLE)
    whole = stage.batch(draw(2))
    part = stage.batch(Draw(0, "denoiser", 2, range(share, BATCH, 2), BATCH))
    assert all(torch.equal(a[share::2], b) for a, b in zip(whole, part, strict=True))


def test_the_example_has_the_shapes_of_a_batch() -> None:
    for encoders in (
        (replace(TEXT, trainable=True),),
        (replace(TEXT, trainable=True), replace(TEXT, trainable=True)),
    ):
        unet = replace(TINY.unet, pooled_projection_dim=sum(encoder.hidden_size for encoder in encoders))
        stage = stage_of(replace(TINY, text_encoders=encoders, unet=unet))
        batch, example = stage.batch(draw()), stage.example(BATCH)
        assert [(x.shape, x.dtype, x.stride()) for x in batch] == [
            (x.shape, x.dtype, x.stride()) for x in example
        ]
    for pictures in (autoencoder_stage(), decoder_stage(), decoder_stage(FINE)):
        batch, example = pictures.batch(draw(0, 4)), pictures.example(4)
        assert [(x.shape, x.dtype, x.stride()) for x in batch] == [
            (x.shape, x.dtype, x.stride()) for x in example
        ]


# The loss at the beginning: a U-Net whose last layer is zero predicts zero.


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("flow_prediction", 2.0), ("epsilon", 1.0), ("v_prediction", 1.0), ("sample", 1.0)],
)
def test_the_first_loss_is_the_targets_mean_square(prediction: Any, expected: float) -> None:
    """E|target|^2 for unit latents and noise: 2 for eps - x0, 1 for eps, x0, and alpha eps - sigma x0."""
    kind = "flow" if prediction == "flow_prediction" else "cosine"
    config = replace(UNCONDITIONAL, schedule=replace(TINY.schedule, kind=kind, prediction_type=prediction))
    stage = stage_of(config, pictures=64)
    with torch.no_grad():
        losses = [stage(*stage.batch(draw(step)))["prediction"].item() for step in range(10)]
    assert np.mean(losses) == pytest.approx(expected, rel=0.05)


def test_a_perfect_prediction_has_no_loss() -> None:
    stage = stage_of(UNCONDITIONAL)
    batch = stage.batch(draw())
    stage.unet.forward = lambda *_: batch[1] - batch[0]  # type: ignore[method-assign]
    assert stage(*batch)["prediction"].item() == 0


# What the network reads: the same in training and in sampling.


@pytest.mark.parametrize(
    "encoder", [TEXT, MINILM, replace(TEXT, trainable=True)], ids=["clip", "bert", "trained"]
)
def test_a_dropped_caption_is_samplings_unconditional_one(
    tmp_path: Path, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The U-Net's text input at a dropped caption is what guidance reads, and at a kept one what a prompt gives."""
    width = encoder.hidden_size
    unet = replace(TINY.unet, cross_attention_dim=width, pooled_projection_dim=width)
    config = replace(TINY, text_encoders=(encoder,), unet=unet)
    stage = stage_of(config, caption_dropout=0.5)
    parts = tiny_model(config)
    work = said(CAPTIONS, tmp_path, parts)
    stage.text_caches = result(work.text())
    stage.captions = work.captions
    stage.captions_of = [[work.captions.index(caption)] for caption in CAPTIONS[1:]]
    for cache in stage.text_caches:
        if cache is not None:
            cache.change = None  # sampling reads text as it is
    seen: list[tuple[torch.Tensor, ...]] = []

    def spy(self: object, inputs: tuple[Any, ...], *_: Any) -> None:
        seen.append(tuple(None if x is None else x.clone() for x in inputs[2:]))

    prepare = UNetNetwork.prepare

    def preparing(self: UNetNetwork, embeds: PromptEmbeds, *others: Any) -> Any:
        seen.append(tuple(embeds))
        return prepare(self, embeds, *others)

    # A cached caption has no words to read: find the rows of the empty one by their pooled vector.
    stage.unet.register_forward_pre_hook(spy)
    monkeypatch.setattr(UNetNetwork, "prepare", preparing)
    with torch.no_grad():
        stage(*stage.batch(draw(1)))
    prompts = ["a red circle", "a blue square", "a green heart", "a yellow star"]
    parts.generate(prompts, seed=0, num_inference_steps=1, guidance_scale=3.0)
    (tokens, mask, pooled), (sampled_tokens, sampled_mask, sampled_pooled) = seen
    # Sampling's rows: four unconditional ones, then the prompts in the order of CAPTIONS[1:].
    table = torch.cat([sampled_pooled[:1], sampled_pooled[4:]])
    rows = torch.cdist(pooled, table).argmin(dim=1).tolist()
    assert 0 in rows and any(rows), "some are dropped and some are not"
    for place, row in enumerate(rows):
        source = 0 if row == 0 else 3 + row
        torch.testing.assert_close(pooled[place], sampled_pooled[source], rtol=1e-3, atol=1e-3)
        real = torch.ones(len(tokens[place]), dtype=torch.bool) if mask is None else mask[place]
        if mask is not None:
            assert torch.equal(mask[place], sampled_mask[source])
        torch.testing.assert_close(tokens[place][real], sampled_tokens[source][real], rtol=1e-3, atol=1e-3)


def test_text_caches_pad_with_what_is_masked() -> None:
    rows = np.arange(14, dtype=np.float16).reshape(7, 2)
    cache = TextCache(rows, np.array([0, 3, 7]), context_length=5)
    tokens, mask, pooled = cache.read([1, 0])
    assert mask.tolist() == [[True] * 3 + [False] * 2, [True] * 2 + [False] * 3]
    assert tokens[0, :3].tolist() == rows[3:6].tolist() and tokens[1, :2].tolist() == rows[:2].tolist()
    assert pooled.tolist() == [rows[6].tolist(), rows[2].tolist()] and not tokens[~mask].any()


# The autoencoder.


def autoencoder_stage(vae: Any = TINY.vae, count: int = 9) -> AutoencoderStage:
    stage = AutoencoderStage(tiny_model(replace(UNCONDITIONAL, vae=vae)), STAGES[0])
    stage.samples = Samples(count)
    stage.pictures = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return stage


def test_pixels_are_the_whole_range() -> None:
    pixels = read_pixels(np.array([[[[0, 255, 51]]]], dtype=np.uint8), [0])
    assert pixels.flatten().tolist() == pytest.approx([-1, 1, -0.6]) and pixels.shape == (1, 3, 1, 1)


@pytest.mark.parametrize(
    "vae", [TINY.vae, KL, replace(KL, scaling_factor=0.18215), VQ], ids=["tiny", "kl", "scaled", "vq"]
)
def test_latents_have_unit_standard_deviation(
    tmp_path: Path, data: CocoImageLoader, vae: AutoencoderKLConfig
) -> None:
    """Of the training's pictures, and with the finished weights: what the denoiser is trained on."""
    config = replace(UNCONDITIONAL, vae=vae)
    model = tiny_model(config)
    model.train(data, STAGES, output_dir=tmp_path, steps=10)
    latents = model.encode([data[i].image for i in range(len(data))])
    per_channel = latents.transpose(0, 1).flatten(1)
    assert per_channel.mean(dim=1).abs().max() < 0.05
    if vae is VQ:  # a codebook allows one scale for all channels
        assert per_channel.square().mean().sqrt() == pytest.approx(1, abs=0.05)
    else:
        assert (per_channel.std(dim=1) - 1).abs().max() < 0.05
    (file,) = (tmp_path / "cache").glob("latents-*.npy")
    np.testing.assert_allclose(np.load(file), latents, atol=4e-3)


def test_normalising_again_changes_nothing() -> None:
    stage = autoencoder_stage()
    assert stage.pictures is not None
    normalise(stage.vae, stage.pictures, chunk=4)
    before = stage.vae.encode(read_pixels(stage.pictures, [0, 1])).detach()
    normalise(stage.vae, stage.pictures, chunk=5)
    torch.testing.assert_close(
        stage.vae.encode(read_pixels(stage.pictures, [0, 1])).detach(), before, rtol=1e-3, atol=1e-4
    )


def test_the_light_decoder_learns_on_what_it_will_meet() -> None:
    """Unit latents during training too, whatever the encoder's scale, and some noise."""
    stage = autoencoder_stage()
    with torch.no_grad():
        stage.vae.encoder.layers[-1].weight *= 50
        pixels, noise = stage.batch(draw(0, 4))
        latents, penalties = stage._latents(pixels, 0 * noise)
        noisy, _ = stage._latents(pixels, noise)
    assert not penalties
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), rtol=0.01, atol=0)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.01
    torch.testing.assert_close(noisy - latents, noise, rtol=0, atol=1e-5)
    deviations = noise.std(dim=(1, 2, 3))
    assert 0 < deviations.min() < deviations.max() < 0.3, "anew for each picture"


def total(losses: dict[str, torch.Tensor]) -> float:
    return sum(value.item() for value in losses.values())


def test_the_loss_is_of_pixels_edges_and_the_pooled_picture() -> None:
    stage = autoencoder_stage()
    pixels, noise = stage.batch(draw(0, 4))
    loss = total(stage(pixels, noise))
    stage.vae.decode = lambda z: pixels if z.shape[-1] == 8 else torch.nn.functional.avg_pool2d(pixels, 2)  # type: ignore[method-assign]
    assert total(stage(pixels, noise)) == 0 < loss
    stage.vae.decode = lambda z: (
        0.1 + (pixels if z.shape[-1] == 8 else torch.nn.functional.avg_pool2d(pixels, 2))
    )  # type: ignore[method-assign]
    losses = {name: value.item() for name, value in stage(pixels, noise).items()}
    assert losses == pytest.approx({"pixels": 0.1, "edges": 0, "pooled": 0.25 * 0.1}, rel=1e-4, abs=1e-7)


def decoder_stage(config: ModelConfig = TINY) -> DecoderStage:
    """On four random pictures and their latents."""
    model = tiny_model(config)
    stage = DecoderStage(model, DECODER)
    stage.samples = Samples(4)
    shape = (4, config.sample_size, config.sample_size, 3 + config.alpha)
    stage.pictures = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with torch.no_grad():
        latents = model.vae.encode(read_pixels(stage.pictures, list(range(4))))
    stage.latents = latents.half().numpy()
    return stage


def test_a_ground_shows_where_a_picture_is_transparent() -> None:
    """The picture on a colour, from the picture on white, is what PIL makes of the picture itself."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels, "RGBA")
    layered = torch.from_numpy(layers(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    for colour in ("white", "black", "teal"):
        ground = Image.new("RGBA", (16, 16), colour)
        shown = on_grounds(layered, to_tensor([ground])[..., :1, :1])
        expected = to_tensor([Image.alpha_composite(ground, picture)])
        assert (shown - expected).abs().max() < 3 / 127.5


def test_opacity_is_learnt_on_white_and_on_other_grounds() -> None:
    """Half of the grounds are white, others differ; a decoder without mistakes has no loss but the discriminator's."""
    stage = decoder_stage(FINE)
    pixels, latents, grounds = stage.batch(draw(0, 4))
    assert pixels.shape == (4, 4, 64, 64) and latents.shape == (4, 4, 8, 8) and grounds.shape == (4, 3, 1, 1)
    many = torch.cat([stage.batch(draw(step, 4))[2] for step in range(100)]).flatten(1)
    white = (many == 1).all(dim=1)
    assert 0.4 < white.float().mean() < 0.6 and len(many[~white].unique(dim=0)) == (~white).sum()
    losses = stage(pixels, latents, grounds)
    assert all(losses[name] > 0 for name in ("pixels", "edges", "alpha", "ground"))
    stage.vae[0].decode = lambda z: pixels
    losses = stage(pixels, latents, grounds)
    assert not any(losses[name] for name in ("pixels", "edges", "alpha", "ground"))
    transparent = pixels.clone()
    transparent[:, 3] = -1
    stage.vae[0].decode = lambda z: transparent
    losses = stage(pixels, latents, -torch.ones(4, 3, 1, 1))
    assert not losses["pixels"] and losses["alpha"] > 0.2 and losses["ground"] > 0.2


def test_the_decoder_learns_without_a_discriminator() -> None:
    stage = DecoderStage(tiny_model(), replace(DECODER, adversarial_weight=0))
    assert stage(*stage.example(2)).keys() == {"pixels", "edges"} and stage.players().keys() == {"decoder"}
    against = decoder_stage()
    assert against.players().keys() == {"decoder", "discriminator"}
    assert against(*against.example(2)).keys() == {"pixels", "edges", "fooling", "discriminator"}


def test_a_sets_opacity_is_read_where_the_decoder_gives_it(tmp_path: Path) -> None:
    """Also of sets that are joined; elsewhere pictures lie on white."""
    sources = []
    for name, colour in (("a", (0, 128, 0, 51)), ("b", (0, 0, 0))):
        (tmp_path / name).mkdir()
        Image.new("RGBA" if len(colour) == 4 else "RGB", (64, 64), colour).save(
            tmp_path / name / f"{name}.png"
        )
        said = {
            "images": [{"id": 1, "file_name": f"{name}.png"}],
            "annotations": [{"image_id": 1, "caption": "x"}],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(said))
        sources.append(CocoImageLoader(tmp_path / name, tmp_path / f"{name}.json"))
    data = Joined(sources)
    read = {}
    for config in (FINE, replace(FINE, vae=replace(FINE.vae, alpha=False))):
        work = Workspace(tiny_model(config), data, data.entries(), tmp_path)
        read[config.alpha] = result(work.pictures())[:, 5, 5].tolist()
    assert read == {True: [[204, 230, 204, 51], [0, 0, 0, 255]], False: [[204, 230, 204], [0, 0, 0]]}


def test_the_decoder_bears_noise_of_any_standard_deviation_up_to_the_encoders() -> None:
    stage = decoder_stage()
    deviations = []
    for step in range(50):
        _, noisy = stage.batch(draw(step, 4))
        assert stage.latents is not None
        clean = torch.from_numpy(stage.latents[draw(step, 4).indices(stage.samples)].astype(np.float32))
        deviations += (noisy - clean).flatten(1).std(dim=1).tolist()
    assert 0 <= min(deviations) < 0.02 and 0.22 < max(deviations) < 0.28


def test_two_players_in_one_backward_pass() -> None:
    """Each player's gradient is that of its own loss, the other taken as it is."""
    stage = decoder_stage()
    pixels, latents = stage.batch(draw(0, 4))
    sum(stage(pixels, latents).values()).backward()  # type: ignore[union-attr]
    found = {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}
    assert not any(name.startswith("vae") for name in found)
    stage.zero_grad()

    decoded = stage.vae[0].decode(latents)
    error = decoded - pixels
    edges = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3))
    (error.abs().mean() + 0.5 * edges - 0.15 * stage.discriminator(decoded).mean()).backward()
    for name, parameter in stage.decoder.named_parameters():
        torch.testing.assert_close(found[f"decoder.{name}"], parameter.grad)
    stage.zero_grad()

    real, fake = stage.discriminator(pixels), stage.discriminator(decoded.detach())
    (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()).backward()
    for name, parameter in stage.discriminator.named_parameters():
        torch.testing.assert_close(found[f"discriminator.{name}"], parameter.grad)


def test_the_discriminator_learns_to_tell_soft_from_sharp() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator()
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-3)
    for step in range(61):
        sharp = (torch.rand(8, 3, 8, 8) * 2 - 1).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        soft = torch.nn.functional.avg_pool2d(sharp, 3, stride=1, padding=1, count_include_pad=False)
        real, fake = discriminator(torch.cat([sharp, soft])).chunk(2)
        if step == 60:
            break
        (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (real > 0).float().mean() > 0.9 and (fake < 0).float().mean() > 0.9


def test_the_kl_samples_its_posterior() -> None:
    stage = autoencoder_stage(KL)
    pixels, noise = stage.batch(draw(0, 4))
    mode, penalties = stage._latents(pixels, 0 * noise)
    drawn, _ = stage._latents(pixels, noise)
    posterior = stage.vae.posterior(pixels)  # type: ignore[union-attr]
    torch.testing.assert_close(drawn - mode, noise * (posterior.logvar / 2).exp())
    torch.testing.assert_close(penalties["kl"], 1e-6 * posterior.kl().mean())
