"""UnZipLoRA on a tiny base: trained and frozen parts, prompts of each LoRA, columns, exact resume."""

import itertools
import os
import signal

import pytest
import tiny
import torch
from diffusers import DDPMScheduler
from splits import build, config, examples, scheduler

from unziplora.errors import UserError
from unziplora.lora.blocks import SDXL_BLOCKS, read_blocks
from unziplora.lora.inject import TARGETS, adapted_layers, remove, target_layers
from unziplora.methods.adapters import TrainingData
from unziplora.methods.unziplora.method import UnZipLora
from unziplora.models.text import Conditioning
from unziplora.runs.folder import RunFolder
from unziplora.training.checkpoint import Checkpoint, newest_checkpoint
from unziplora.training.loss import Examples, denoising_loss, generator, shifted, snr_weights
from unziplora.training.trainer import Trainer, train


def run(method: UnZipLora, start: int = 0, stop: int | None = None) -> Trainer:
    trainer = Trainer(method, method.config)
    for step in range(start, method.config.steps if stop is None else stop):
        trainer.step(step)
    return trainer


SWITCHES = list(itertools.product([True, False], repeat=3))


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "column", "block"), SWITCHES)
def test_every_combination_of_switches_trains_both_loras_and_never_the_base(tiny_base, prompt, column, block):
    frozen = {name: value.clone() for name, value in tiny_base.unet.state_dict().items()}
    switches = {"prompt_separation": prompt, "column_separation": column, "block_separation": block}
    method = build(tiny_base, steps=3, column_periods=1, **switches)
    run(method)
    layers = adapted_layers(tiny_base.unet)
    assert all(layer.base.weight.grad is None for layer in layers.values())
    for name in ("content", "style"):
        moved = {path for path, b in method.branches[name].items() if b.delta().abs().max() > 0}
        if not column and block:
            others = SDXL_BLOCKS.style if name == "content" else SDXL_BLOCKS.content
            assert moved == {p for p in layers if not p.startswith(tuple(f"{b}." for b in others))}
        else:
            assert moved == set(layers)
    remove(tiny_base.unet)
    after = tiny_base.unet.state_dict()
    assert all(torch.equal(after[name], frozen[name]) for name in frozen)


def test_both_loras_learn_all_layers_that_are_targets(tiny_base):
    frozen = {name: value.clone() for name, value in tiny_base.unet.state_dict().items()}
    paths = target_layers(tiny_base.unet, TARGETS)
    method = build(tiny_base, steps=3, column_separation=False, block_separation=False, targets=list(TARGETS))
    run(method)
    for name in ("content", "style"):
        assert [path for path, b in method.branches[name].items() if b.delta().abs().max() > 0] == paths
        for path, (down, up) in method.export()[name].modules.items():
            dense = torch.einsum("or...,ri...->oi...", up, down)
            torch.testing.assert_close(dense, method.branches[name][path].delta().detach())
    remove(tiny_base.unet)
    after = tiny_base.unet.state_dict()
    assert all(torch.equal(after[name], frozen[name]) for name in frozen)


@pytest.mark.parametrize("targets", [["attention"], list(TARGETS)])
def test_untrained_loras_do_not_change_the_loss(tiny_base, targets):
    data = examples(tiny_base)
    plain = Examples(
        data.latents,
        Conditioning(data.conditioning.tokens.chunk(3, -1)[0], data.conditioning.pooled, data.conditioning.time_ids),
    )
    args = {"batch_size": 2}
    before = denoising_loss(tiny_base.unet, scheduler(tiny_base), plain, draw=generator("x"), **args)
    build(tiny_base, column_separation=False, targets=targets)
    after = denoising_loss(tiny_base.unet, scheduler(tiny_base), data, draw=generator("x"), **args)
    assert before.item() == after.item(), "ΔW = 0 at step 0"


@pytest.mark.slow
def test_columns_grow_by_a_tenth_and_closed_ones_stay_zero(tiny_base):
    method = build(tiny_base)
    trainer = Trainer(method, method.config)
    shares = []
    for step in range(9):
        trainer.step(step)
        if step == 1:  # later, content may take a column that style holds
            for path, style in method.columns.held["style"].items():
                assert not (style & method.columns.held["content"].get(path, torch.zeros_like(style))).any()
        if step % 3 == 2:
            shares.append({(n, p): int(h.sum()) for n, held in method.columns.held.items() for p, h in held.items()})
            for name, path, branch in method.columns.masked():
                closed = ~method.columns.held[name][path]
                assert torch.equal(branch.mask, (~closed).float())
                assert branch.up[closed].abs().max() == 0, "neither decay nor momentum moves a closed column"
                assert branch.up[~closed].abs().max() > 0
        if step % 3 == 0:
            assert all(branch.mask.min() == 1 for _, _, branch in method.columns.masked())
    for period, counts in enumerate(shares):
        for (name, path), count in counts.items():
            assert count == round(len(method.columns.held[name][path]) * (period + 1) / 10), (name, path)
    for name, owner in (("content", SDXL_BLOCKS.content), ("style", SDXL_BLOCKS.style)):
        owned = {path for path in method.branches[name] if path.startswith(tuple(f"{b}." for b in owner))}
        assert owned == set(method.branches[name]) - set(method.columns.held[name])


@pytest.mark.slow
def test_columns_are_chosen_by_the_gradient_of_the_dense_update(tiny_base):
    """The scores equal those of an explicit ΔW in every masked layer, summed over the same noisy latents."""
    method = build(tiny_base)
    run(method, stop=1)
    step, recipe = 1, method.config
    expected = {}
    for name, path, branch in list(method.columns.masked())[::7]:
        leaf = branch.delta().detach().requires_grad_()
        layer = tiny_base.unet.get_submodule(path)
        stream = branch.stream

        def hook(module, args, output, leaf=leaf, branch=branch, stream=stream):
            (x,) = args
            x = (
                x[..., stream * module.in_features :][..., : module.in_features]
                if x.shape[-1] > module.in_features
                else x
            )
            return output + x @ leaf.T - x @ branch.delta().detach().T

        handle = layer.register_forward_hook(hook)
        expected[name, path] = torch.zeros(len(leaf))
        for turn in range(recipe.score_timesteps):
            draw = generator(recipe.seed, "score", step, turn)
            loss = method.denoising_loss(method.data.examples, draw)
            (gradient,) = torch.autograd.grad(loss, leaf)
            expected[name, path] += (gradient * leaf).abs().mean(1).detach()
        handle.remove()
    with method.columns.scored(1.0) as scores:
        for turn in range(recipe.score_timesteps):
            method.denoising_loss(method.data.examples, generator(recipe.seed, "score", step, turn)).backward()
    for (name, path), score in expected.items():
        assert score.max() > 0
        torch.testing.assert_close(scores[name][path].total, score, rtol=1e-3, atol=1e-12)


@pytest.mark.slow
def test_column_choice_does_not_depend_on_loss_scaling(fresh_base):
    held = []
    for scale in (1.0, 4096.0):
        method = build(fresh_base())
        run(method, stop=1)
        method.before_step(1, gradient_scale=scale)
        held.append({name: held.tolist() for name, held in method.columns.state_dict().items()})
    assert held[0] == held[1]


@pytest.mark.slow
def test_official_code_scores_gradients_as_fp16_scales_them_in_every_precision(fresh_base):
    """An entry counts above 1e-5 of gradients times 2^16; without that factor hardly one does."""
    held = {}
    for scale in (1.0, 2.0**16, 2.0**10):
        method = build(fresh_base(), official_code=True)
        run(method, stop=1)
        method.before_step(1, gradient_scale=scale)
        held[scale] = {name: held.tolist() for name, held in method.columns.state_dict().items()}
    assert held[1.0] == held[2.0**16]
    assert held[1.0] != held[2.0**10]


@pytest.mark.slow
def test_each_lora_is_blind_to_the_others_prompt(tiny_base):
    method = build(tiny_base)
    run(method)
    data = examples(tiny_base, seed=5)
    full, content, style = data.conditioning.tokens.chunk(3, -1)

    def predict(*streams: torch.Tensor) -> torch.Tensor:
        added = {"text_embeds": data.conditioning.pooled, "time_ids": data.conditioning.time_ids}
        tokens = torch.cat(streams, -1)
        with torch.no_grad():
            return tiny_base.unet(data.latents, 500, tokens, added_cond_kwargs=added).sample

    other = torch.randn_like(full)
    with method.only("content"):
        assert torch.equal(predict(full, content, style), predict(full, content, other))
        assert not torch.equal(predict(full, content, style), predict(full, other, style))
    with method.only("style"):
        assert torch.equal(predict(full, content, style), predict(full, other, style))
        assert not torch.equal(predict(full, content, style), predict(full, content, other))


@pytest.mark.slow
def test_scales_train_only_where_both_hold_a_column_and_stay_within_bounds(tiny_base):
    method = build(tiny_base, scale_learning_rate=0.9)
    run(method)
    for path, content in method.branches["content"].items():
        style = method.branches["style"][path]
        both = (content.mask * style.mask).bool()
        for branch in (content, style):
            assert branch.scale[~both].eq(1).all()
            assert branch.scale.min() >= 0
            assert branch.scale.max() <= 1
    owned = method.branches["content"]["up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert owned.scale.lt(1).any(), "content owns this layer, style holds columns in it: they overlap"


def test_a_scale_above_one_comes_back(tiny_base):
    method = build(tiny_base)
    branch = next(iter(method.branches["content"].values()))
    with torch.no_grad():
        branch.scale.fill_(1.5)
    method.after_step(0)
    assert torch.equal(branch.scale, torch.ones_like(branch.scale))


def test_scores_leave_no_gradients(tiny_base):
    method = build(tiny_base)
    run(method, stop=1)
    method.before_step(1, 1.0)
    assert method.columns.masked()
    assert all(parameter.grad is None for parameter in tiny_base.unet.parameters())


def test_orthogonality_is_the_mean_over_all_layers(tiny_base):
    method = build(tiny_base)
    run(method, stop=1)
    method.before_step(1, 1.0)
    content, style = method.branches["content"], method.branches["style"]
    by_layer = [(content[p].mask * content[p].scale * style[p].mask * style[p].scale).abs().mean() for p in content]
    torch.testing.assert_close(method.columns.orthogonality(), torch.stack(by_layer).mean())


def test_both_learn_in_every_step_of_a_warm_up(tiny_base):
    recipe = config(content_alone=0.5, style_alone=0.4)
    method = UnZipLora(tiny_base.unet, scheduler(tiny_base), TrainingData(examples(tiny_base)), recipe)
    warm = [step for step in range(recipe.steps) if method.phase(step).warm]
    assert warm
    assert {method.solo(step) for step in warm} == {None}
    draw = generator(recipe.seed, "train", 0)
    loss = denoising_loss(tiny_base.unet, method.scheduler, method.data.examples, draw=draw, **recipe.noising())
    assert next(method.losses(0)).item() == pytest.approx(loss.item())  # without L⊥


def test_scales_are_frozen_during_a_warm_up(tiny_base):
    method = build(tiny_base, column_warmup=2, scale_learning_rate=0.5)
    trainer = run(method, stop=2)
    assert all(b.scale.eq(1).all() for name in method.branches for b in method.branches[name].values())
    trainer.step(2)
    assert any(b.scale.lt(1).any() for name in method.branches for b in method.branches[name].values())


def test_paper_preset_reproduces_the_published_start(tiny_base):
    method = build(tiny_base, preset="paper", optimizer="adamw", precision="fp32", rank=4)
    assert method.config.official_code
    assert method.config.score_timesteps == 2  # what the caller sets wins over the preset
    ups = torch.cat([b.up.flatten() for b in method.branches["content"].values()])
    assert ups.std().item() == pytest.approx(1 / 4, rel=0.05)


@pytest.mark.slow
def test_export_is_what_the_run_computes(fresh_base):
    from unziplora.lora.inject import add_lora

    base = fresh_base()
    method = build(base, alpha=1.0)
    run(method)
    plain = fresh_base()
    for name, lora in method.export().items():
        add_lora(plain.unet, name, lora.modules, stream=name)
    data = examples(base, seed=3)
    added = {"text_embeds": data.conditioning.pooled, "time_ids": data.conditioning.time_ids}
    outputs = [
        b.unet(data.latents, 300, data.conditioning.tokens, added_cond_kwargs=added).sample for b in (base, plain)
    ]
    torch.testing.assert_close(*outputs)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 4, 5, 8])  # 1: before a choice; 4: inside the second warm-up's choice
def test_resume_equals_uninterrupted(fresh_base, tmp_path, stop):
    changes = {"column_warmup": 2, "steps": 11, "schedule": "cosine", "schedule_warmup": 3}
    whole = build(fresh_base(), **changes)
    run(whole)
    first = build(fresh_base(), **changes)
    state = run(first, stop=stop).state_dict()
    RunFolder(tmp_path).checkpoint(stop, Checkpoint(stop, state, {}).write)
    second = build(fresh_base(), seed=0, **changes)
    trainer = Trainer(second, second.config)
    checkpoint = newest_checkpoint(RunFolder(tmp_path))
    assert checkpoint is not None
    trainer.load_state_dict(checkpoint.state)
    for step in range(checkpoint.step, 11):
        trainer.step(step)
    one, two = whole.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_results_depend_on_the_seed_alone(fresh_base):
    states = []
    for seed in (0, 0, 1):
        method = build(fresh_base(), seed=seed)
        run(method)
        states.append(method.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(fresh_base):
    states = []
    for checkpointing in (False, True):
        base = fresh_base()
        if checkpointing:
            base.unet.enable_gradient_checkpointing()
        method = build(base)
        run(method)
        states.append(method.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)


def test_prior_preservation_trains_one_lora_only(tiny_base):
    recipe = config(content_prior=1.0, column_separation=False, block_separation=False)
    data = TrainingData(examples(tiny_base), priors={"content": examples(tiny_base, seed=9)})
    method = UnZipLora(tiny_base.unet, scheduler(tiny_base), data, recipe)
    terms = method.losses(0)
    next(terms)
    next(terms).backward()
    assert any(b.up.grad is not None and b.up.grad.abs().max() > 0 for b in method.branches["content"].values())
    assert all(b.up.grad is None for b in method.branches["style"].values())
    assert next(terms, None) is None
    assert all(b.strength == 1.0 for b in method.branches["style"].values())


def test_steps_alone_train_one_lora_only(tiny_base):
    recipe = config(content_alone=0.4, style_alone=0.3)
    style_examples = examples(tiny_base, seed=9)
    data = TrainingData(examples(tiny_base), alone={"style": style_examples})
    method = UnZipLora(tiny_base.unet, scheduler(tiny_base), data, recipe)
    for branch in [*method.branches["content"].values(), *method.branches["style"].values()]:
        torch.nn.init.normal_(branch.up, std=0.1)
    turns = [method.solo(step) for step in range(400)]
    shares = [turns.count(name) / 400 for name in ("content", "style", None)]
    assert shares == pytest.approx([0.4, 0.3, 0.3], abs=0.08)  # more than three standard errors
    for name, shown in (("content", data.examples), ("style", style_examples)):
        step = turns.index(name)
        terms = list(method.losses(step))
        with method.only(name):
            draw = generator(recipe.seed, "train", step)
            expected = denoising_loss(tiny_base.unet, method.scheduler, shown, draw=draw, **recipe.noising())
        assert len(terms) == 1
        torch.testing.assert_close(terms[0], expected)
        terms[0].backward()
        other = "style" if name == "content" else "content"
        assert any(b.up.grad is not None and b.up.grad.abs().max() > 0 for b in method.branches[name].values())
        assert all(b.up.grad is None for b in method.branches[other].values())
        tiny_base.unet.zero_grad()


def test_bundled_map_gives_every_layer_an_owner_and_preset_paper_keeps_the_published_map(tiny_base):
    assert config(base="bundled").blocks == "bundled"
    assert config(base="bundled", preset="paper").blocks == config().blocks == "sdxl"
    method = build(tiny_base, blocks="bundled", column_separation=False)
    for path in method.branches["content"]:
        last = path.startswith("up_blocks.1.")
        owned = (
            method.branches["style" if last else "content"][path],
            method.branches["content" if last else "style"][path],
        )
        assert [bool(branch.mask.any()) for branch in owned] == [True, False]


def test_shares_of_steps_alone_must_leave_steps_together():
    with pytest.raises(UserError, match="no step in which the LoRAs train together"):
        config(content_alone=0.5, style_alone=0.5)


def test_columns_of_convolutional_projections_are_refused_before_the_training(tiny_base, tiny_folder):
    """Some bases project by 1×1 convolutions before and after their attentions, which SDXL does with linear layers."""
    recipe = config(targets=["attention", "projections"], base=str(tiny_folder))
    UnZipLora.check(recipe)
    tiny_base.pipe.unet = tiny.unet(use_linear_projection=False)
    with pytest.raises(UserError, match=r"projections are convolutions: take 'projections' out of targets, or switch"):
        UnZipLora.check(recipe, tiny_base)
    for changes in ({"targets": ["attention"]}, {"column_separation": False}):
        run(build(tiny_base, **{"targets": recipe.targets, "steps": 3, "column_periods": 1, **changes}), stop=2)
        remove(tiny_base.unet)


def test_stop_request_finishes_the_step_and_saves(tiny_base):
    method = build(tiny_base)
    trainer = Trainer(method, method.config)
    saved: list[int] = []

    def report(step):
        if step.done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    assert train(trainer, 0, report, saved.append, lambda step: None) == 3
    assert saved == [3]


def test_stop_request_ends_a_sample_sheet_and_saves_the_steps_before_it(tiny_base):
    method = build(tiny_base, sample_every=2)
    saved: list[int] = []

    def sample(done: int) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        pytest.fail("the sheet went on")

    assert train(Trainer(method, method.config), 0, lambda step: None, saved.append, sample) == 2
    assert saved == [2]


def test_block_maps_are_read_from_files_and_checked(tmp_path, tiny_base, tiny_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "map.toml"
    file.write_text('content = ["mid_block"]\nstyle = ["up_blocks.1"]')
    assert read_blocks("~/map.toml") == read_blocks(str(file))
    blocks = read_blocks(str(file))
    assert blocks.owner("mid_block.attentions.0.x") == "content"
    assert blocks.owner("up_blocks.1.attentions.2.x") == "style"
    assert blocks.owner("up_blocks.10.attentions.2.x") is None
    file.write_text('content = ["up_blocks.7"]\nstyle = []')
    for base in (tiny_base, None):  # before anything is learned
        recipe = config(blocks=str(file), base=str(tiny_folder))
        with pytest.raises(UserError, match=r"the LoRAs have no layers in 'up_blocks\.7'"):
            UnZipLora.check(recipe, base)
    file.write_text('content = ["mid_block"]\nstyle = ["mid_block"]')
    with pytest.raises(UserError, match="both content and style"):
        read_blocks(str(file))
    file.write_text('contents = ["mid_block"]')
    with pytest.raises(UserError, match="two lists"):
        read_blocks(str(file))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_matches_the_value_by_hand(tiny_base, kind):
    noise_schedule = DDPMScheduler.from_config({**tiny_base.scheduler.config, "prediction_type": kind})
    data = examples(tiny_base, joined=False)
    draw = generator("by hand")
    loss = denoising_loss(tiny_base.unet, noise_schedule, data, batch_size=1, draw=draw, min_snr_gamma=5.0)
    draw = generator("by hand")
    torch.randint(1, (1,), generator=draw)
    t = int(torch.randint(1000, (1,), generator=draw))
    noise = torch.randn(data.latents.shape, generator=draw)
    alpha = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[t]
    noisy = alpha.sqrt() * data.latents + (1 - alpha).sqrt() * noise
    added = {"text_embeds": data.conditioning.pooled, "time_ids": data.conditioning.time_ids}
    guess = tiny_base.unet(noisy, t, data.conditioning.tokens, added_cond_kwargs=added).sample
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * data.latents
    snr = alpha / (1 - alpha)
    weight = min(snr, torch.tensor(5.0)) / (snr if kind == "epsilon" else snr + 1)
    expected = weight * (guess - (noise if kind == "epsilon" else velocity)).square().mean()
    torch.testing.assert_close(loss, expected)


def test_noise_offset_is_one_number_for_each_channel(tiny_base):
    inputs = []

    def predict(sample: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        inputs.append(sample)
        return (torch.zeros_like(sample),)

    method = build(tiny_base, noise_offset=0.5, batch_size=2, prompt_separation=False)
    method.predict, clean = predict, method.data.examples.latents
    loss = method.denoising_loss(method.data.examples, generator("by hand"))
    draw = generator("by hand")
    torch.randint(1, (1,), generator=draw)
    times = torch.randint(1000, (2,), generator=draw)
    noise = torch.randn(2, *clean.shape[1:], generator=draw)
    noise = noise + 0.5 * torch.randn(2, clean.shape[1], 1, 1, generator=draw)
    alpha = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[times].view(2, 1, 1, 1)
    torch.testing.assert_close(inputs[0], alpha.sqrt() * clean + (1 - alpha).sqrt() * noise)
    assert loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-5)


def test_shift_moves_timesteps_towards_noise_within_their_range():
    every = torch.arange(1000)
    assert torch.equal(shifted(every, 1000, 1.0), every)
    moved = shifted(every, 1000, 3.0)
    assert moved[[0, 500, 999]].tolist() == [1, 750, 999]  # 3u / (1 + 2u) at u = 0.0005, 0.5005, 0.9995
    assert (moved >= every).all()
    assert moved.max() == 999
    assert shifted(every, 1000, 1 / 3)[moved].sub(every).abs().max() <= 2


def test_min_snr_weights_are_finite_at_zero_terminal_snr(tiny_base):
    options = {**tiny_base.scheduler.config, "rescale_betas_zero_snr": True}
    for kind, weight in (("epsilon", 1.0), ("v_prediction", 0.0)):
        noise_schedule = DDPMScheduler.from_config({**options, "prediction_type": kind})
        assert snr_weights(noise_schedule, torch.tensor([999]), 5.0).item() == pytest.approx(weight, abs=1e-6)


def test_mask_weighs_the_loss_and_keeps_its_size(tiny_base):
    data = examples(tiny_base, joined=False)
    size = data.latents.shape[-1]
    left = torch.zeros(1, 1, size, size)
    left[..., : size // 2] = 1

    def loss(weights: torch.Tensor | None) -> float:
        masked = Examples(data.latents, data.conditioning, weights)
        return denoising_loss(tiny_base.unet, scheduler(tiny_base), masked, batch_size=1, draw=generator(1)).item()

    assert loss(torch.full_like(left, 0.3)) == pytest.approx(loss(None), rel=1e-5)
    assert (loss(left) + loss(1 - left)) / 2 == pytest.approx(loss(None), rel=1e-5)
    assert loss(left) != pytest.approx(loss(1 - left), rel=1e-5)
