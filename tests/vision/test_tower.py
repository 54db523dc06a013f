"""The vision tower and the aligner equal the golden activations at every stage."""

import pytest
import torch
from reference_weights import tower_name

from engram_hf.configuration_vision_deepseek_v41 import DeepseekV41VisionConfig
from engram_hf.vision_deepseek_v41 import DeepseekV41VisionModel

GRIDS = {"a": (8, 13), "b": (12, 5)}


def pixels(answers, image: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the patches of one image of the case `two`, in float32, and its grid."""
    patches = answers["two.pixel_values"].float().split([104, 60])[list(GRIDS).index(image)]
    return patches, torch.tensor([GRIDS[image]])


def observe(tower) -> dict[str, torch.Tensor]:
    """Record the outputs of the tower's parts under the golden names."""
    seen = {}

    def record(module, name):
        module.register_forward_hook(lambda _, __, output: seen.__setitem__(name, output))

    record(tower.patch_embedding, "patch_embeds")
    for index, layer in enumerate(tower.layers):
        record(layer.self_attn, f"blocks.{index}.attention")
        record(layer.mlp, f"blocks.{index}.mlp")
        record(layer, f"blocks.{index}.out")
    record(tower.post_layernorm, "encoded")
    tower.aligner.linear_1.register_forward_hook(
        lambda _, args, output: seen.update(merged=args[0], aligner_hidden=output)
    )
    record(tower.aligner, "aligned")
    return seen


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("image", GRIDS)
@torch.no_grad()
def test_every_tower_activation_matches_the_oracle(tower, answers, image, implementation):
    tower.set_attn_implementation(implementation)
    seen = observe(tower)
    output = tower(*pixels(answers, image))
    seen["cos"], seen["sin"] = tower._position_embeddings([GRIDS[image]], torch.device("cpu"))
    expected = {
        name.removeprefix(f"vision.{image}."): tensor
        for name, tensor in answers.items()
        if name.startswith(f"vision.{image}.")
    }
    assert seen.keys() == expected.keys() and len(expected) == 16
    for name, tensor in expected.items():
        torch.testing.assert_close(seen[name], tensor, atol=1e-5, rtol=0, msg=name)
    torch.testing.assert_close(output.pooler_output, expected["aligned"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.last_hidden_state, expected["encoded"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_images_do_not_affect_each_other(tower, answers):
    """Two images in one call give the features of each image alone."""
    both = tower(answers["two.pixel_values"].float(), answers["two.image_grid_hws"]).pooler_output
    alone = torch.cat([tower(*pixels(answers, image)).pooler_output for image in GRIDS])
    torch.testing.assert_close(both, alone, atol=2e-6, rtol=0)


def test_norm_uses_its_own_epsilon(tower, answers):
    """On vectors as small as 1e-4, an epsilon of 1e-20, the text model's, would show."""
    output = tower.post_layernorm(answers["probe.vision_norm.input"])
    torch.testing.assert_close(output, answers["probe.vision_norm.output"], atol=1e-6, rtol=0)


@torch.no_grad()
def test_tower_in_bfloat16(tower, answers):
    """Norms stay in float32 when a model is loaded in bfloat16; the error does not exceed that of the oracle's own
    tower.
    """
    patches, grid = pixels(answers, "a")
    tower = tower.to(torch.bfloat16)
    difference = (tower(patches, grid).pooler_output.float() - answers["vision.a.aligned"]).abs()
    assert difference.mean() < 0.006 and difference.max() < 0.03


def test_norms_are_loaded_in_float32(tower, tmp_path):
    tower.save_pretrained(tmp_path)
    loaded = DeepseekV41VisionModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32} == {
        *(f"layers.{layer}.layer_norm{number}.weight" for layer in range(3) for number in (1, 2)),
        "post_layernorm.weight",
    }
    assert loaded.dtype == torch.bfloat16


def test_every_parameter_gets_a_gradient(tower, answers, release):
    """Gradient checkpointing changes none of them."""
    patches, grid = pixels(answers, "a")

    def gradients(model):
        model.zero_grad()
        model(patches, grid).pooler_output.square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients(tower)
    assert expected.keys() == {tower_name(name) for name in release if tower_name(name)}
    tower.gradient_checkpointing_enable()
    tower.train()
    for name, gradient in gradients(tower).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
        assert gradient.abs().max() > 0, name


def test_new_tower_is_initialized():
    config = DeepseekV41VisionConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        patch_size=2,
        out_hidden_size=8,
    )
    model = DeepseekV41VisionModel(config)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert torch.equal(model.post_layernorm.weight, torch.ones(16))


BAD_PIXELS = {
    "flat patches": (lambda x: x.flatten(1), "patches, 3, 4, 4"),
    "another patch size": (lambda x: x[..., :2], "patches, 3, 4, 4"),
    "bytes": (lambda x: x.to(torch.uint8), "floating-point"),
    "a patch too few": (lambda x: x[:-1], "104 patches, but .* holds 103"),
}
BAD_GRIDS = {
    "floats": (torch.tensor([[8.0, 13.0]]), "integers"),
    "three numbers": (torch.tensor([[1, 8, 13]]), "integers"),
    "no rows": (torch.tensor([[8, 13], [0, 5]]), "pass both"),
    "none": (torch.zeros(0, 2, dtype=torch.long), "pass both"),
    "left out": (None, "without `image_grid_hws`"),
}


@pytest.mark.parametrize("case", BAD_PIXELS)
def test_wrong_pixels_are_refused(tower, answers, case):
    change, message = BAD_PIXELS[case]
    patches, grid = pixels(answers, "a")
    with pytest.raises(ValueError, match=message):
        tower(change(patches), grid)


@pytest.mark.parametrize("case", BAD_GRIDS)
def test_wrong_grids_are_refused(tower, answers, case):
    grid, message = BAD_GRIDS[case]
    with pytest.raises(ValueError, match=message):
        tower(pixels(answers, "a")[0], grid)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": 40, "num_attention_heads": 4}, "hidden_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"max_image_tokens": 3}, "max_image_tokens"),
        ({"min_pixels": 0}, "min_pixels"),
        ({"max_wh_ratio": 0.5}, "max_wh_ratio"),
    ],
)
def test_invalid_vision_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DeepseekV41VisionConfig(**fields)
