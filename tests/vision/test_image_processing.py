"""Image processing against the golden plans and pixels, and the images it refuses."""

import base64
import io

import numpy as np
import pytest
import torch
from deepseek_v41_reference import needs_auto_image_processor
from PIL import Image
from transformers import AutoImageProcessor

from engram_hf.configuration_vision_deepseek_v41 import DeepseekV41VisionConfig
from engram_hf.image_processing_deepseek_v41 import DeepseekV41ImageProcessor, plan_image

pytestmark = pytest.mark.any_version

GOLDEN = ("a", "b", "small", "large", "wide", "tall", "gray", "alpha", "exact")


@pytest.fixture
def processor(config):
    return DeepseekV41ImageProcessor.from_vision_config(config.vision_config)


def picture(width: int = 30, height: int = 40, mode: str = "RGB") -> Image.Image:
    channels = len(mode) if mode != "L" else 1
    noise = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(noise if channels > 1 else noise[..., 0])


# --- the oracle


@pytest.mark.parametrize("limits", ["release", "tiny"])
def test_every_resize_plan_matches_the_oracle(answers, config, limits):
    processor = DeepseekV41ImageProcessor.from_vision_config(
        config.vision_config if limits == "tiny" else DeepseekV41VisionConfig()
    )
    for width, height, *expected in answers[f"plan.{limits}"].tolist():
        plan = processor.plan(width, height)
        found = [plan.width, plan.height, plan.patch_columns, plan.patch_rows, plan.columns, plan.rows]
        assert found == expected, (width, height)
        assert plan.tokens <= processor.max_image_tokens


@pytest.mark.parametrize("name", GOLDEN)
def test_every_pixel_matches_the_oracle(answers, processor, name):
    array = answers[f"processing.{name}.image"].numpy()
    for image in (Image.fromarray(array), array, torch.from_numpy(array)):
        result = processor(image, return_tensors="pt")
        assert result.keys() == {"pixel_values", "image_grid_hws"}
        assert result["pixel_values"].dtype == torch.bfloat16 and result["image_grid_hws"].dtype == torch.int64
        assert torch.equal(result["pixel_values"], answers[f"processing.{name}.pixel_values"])
        assert result["image_grid_hws"].tolist() == [answers[f"processing.{name}.grid"].tolist()]


def test_several_images_are_concatenated(answers, processor):
    images = [Image.fromarray(answers[f"processing.{name}.image"].numpy()) for name in GOLDEN]
    result = processor([images[:4], images[4:]], return_tensors="pt")
    expected = torch.cat([answers[f"processing.{name}.pixel_values"] for name in GOLDEN])
    assert torch.equal(result["pixel_values"], expected)
    assert result["image_grid_hws"].tolist() == [answers[f"processing.{name}.grid"].tolist() for name in GOLDEN]


def test_numpy_output_has_the_same_values(answers, processor):
    image = answers["processing.a.image"].numpy()
    for kind in ("np", None):
        values = processor(image, return_tensors=kind)["pixel_values"]
        assert values.dtype == np.float32
        assert np.array_equal(values, answers["processing.a.pixel_values"].float().numpy())


def test_channels_first_images(answers, processor):
    image = answers["processing.a.image"]
    first, last = (processor(x, return_tensors="pt")["pixel_values"] for x in (image.permute(2, 0, 1), image))
    assert torch.equal(first, last)


# --- limits at the call


def test_limits_can_be_passed_to_the_call(processor):
    image = picture(300, 200)
    grid = processor(image, return_tensors="pt")["image_grid_hws"]
    finer = processor(image, max_image_tokens=60, return_tensors="pt")["image_grid_hws"]
    assert finer.prod() > grid.prod()
    rows, columns = -(-finer[0] // 3)
    assert 40 < rows * (columns + 1) + 2 <= 60
    small = picture(8, 8)
    assert processor(small, min_pixels=64, return_tensors="pt")["image_grid_hws"].tolist() == [[2, 2]]
    assert processor(small, return_tensors="pt")["image_grid_hws"].tolist() == [[6, 6]]
    assert processor.max_image_tokens == 22 and processor.min_pixels == 600


def test_too_wide_images_are_resized_to_the_bound(processor):
    image = picture(120, 20)
    squeezed = processor(image, max_wh_ratio=2.0, return_tensors="pt")
    rows, columns = squeezed["image_grid_hws"][0].tolist()
    resized = image.resize((columns * 4, rows * 4), Image.Resampling.BICUBIC)
    expected = (torch.from_numpy(np.array(resized)) / 255 - 0.5) / 0.5
    first_patch = expected[:4, :4].permute(2, 0, 1).to(torch.bfloat16)
    assert torch.equal(squeezed["pixel_values"][0], first_patch)
    assert columns <= 2 * rows + 1


def test_number_of_tokens_is_known_before_processing(processor):
    for size in ((50, 31), (20, 45), (150, 10)):
        grid = processor(picture(*size), return_tensors="pt")["image_grid_hws"]
        assert processor.get_number_of_image_patches(size[1], size[0]) == grid.prod()
        rows, columns = -(-grid[0] // 3)
        assert processor.get_number_of_image_tokens(size[1], size[0]) == rows * (columns + 1) + 2


@pytest.mark.parametrize("limit", range(4, 40))
def test_no_shape_exceeds_a_limit(limit):
    for width in (1, 2, 7, 50, 333, 10000):
        for height in (1, 3, 12, 90, 701, 99999):
            plan = plan_image(width, height, 4, 3, limit, 600)
            assert 0 < plan.tokens <= limit and plan.width > 0 and plan.height > 0, (width, height)


# --- sources of images


def test_files_and_data_urls(processor, tmp_path):
    image = picture()
    path = tmp_path / "a picture.png"
    image.save(path)
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    expected = processor(image, return_tensors="pt")["pixel_values"]
    for place in (str(path), path, path.as_uri(), url):
        assert torch.equal(processor(place, return_tensors="pt")["pixel_values"], expected)


def test_network_is_never_used(processor, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    for place in ("https://example.com/cat.png", "http://example.com/cat.png", "HTTPS://example.com/cat.png"):
        with pytest.raises(ValueError, match="web address"):
            processor(place)


def test_exif_does_not_rotate_an_image(processor, tmp_path):
    image, exif = picture(40, 20), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    turned = processor(str(tmp_path / "turned.png"), return_tensors="pt")
    assert torch.equal(turned["pixel_values"], processor(image, return_tensors="pt")["pixel_values"])


@needs_auto_image_processor
def test_image_processor_saves_and_loads(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is DeepseekV41ImageProcessor and loaded.to_dict() == processor.to_dict()
    assert (loaded.max_image_tokens, loaded.patch_size, loaded.max_wh_ratio) == (22, 4, None)
    changed = AutoImageProcessor.from_pretrained(tmp_path, max_image_tokens=50, max_wh_ratio=3.0)
    changed.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert (again.max_image_tokens, again.max_wh_ratio) == (50, 3.0)


# --- bad input


def damaged(tmp_path, content: bytes) -> str:
    (tmp_path / "damaged.png").write_bytes(content)
    return str(tmp_path / "damaged.png")


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


BAD_IMAGES = {
    "no file": (lambda path: str(path / "none.png"), "cannot be opened"),
    "a folder": (str, "cannot be opened"),
    "empty file": (lambda path: damaged(path, b""), "no format"),
    "no image": (lambda path: damaged(path, b"hello" * 100), "no format"),
    "cut off": (lambda path: damaged(path, png(picture(200, 200))[:5000]), "cannot be decoded"),
    "data URL without base64": (lambda path: "data:image/png,abc", "data URL"),
    "data URL with bad base64": (lambda path: "data:image/png;base64,@@@", "base64"),
    "floats": (lambda path: np.zeros((4, 4, 3), np.float32), "float32"),
    "two channels": (lambda path: np.zeros((5, 5, 2), np.uint8), "channels"),
    "four axes": (lambda path: np.zeros((1, 4, 4, 3), np.uint8), "channels"),
    "no pixels": (lambda path: np.zeros((0, 4, 3), np.uint8), "shape"),
    "an empty Pillow image": (lambda path: Image.new("RGB", (0, 5)), "empty"),
    "a number": (lambda path: 3, "is a int"),
    "nothing": (lambda path: None, "NoneType"),
    "no images": (lambda path: [], "no images"),
    "too thin": (lambda path: Image.new("RGB", (100_000, 1)), "too thin"),
    "too thin, upright": (lambda path: Image.new("RGB", (1, 100_000)), "too thin"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused(processor, tmp_path, case):
    make, message = BAD_IMAGES[case]
    with pytest.raises(ValueError, match=message):
        processor(make(tmp_path), return_tensors="pt")


def test_decompression_bomb_is_refused(processor, tmp_path, monkeypatch):
    path = damaged(tmp_path, png(picture(100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="MAX_IMAGE_PIXELS"):
        processor(path)


BAD_OPTIONS = {
    "max_image_tokens": 3,
    "min_pixels": 0,
    "max_wh_ratio": 0.5,
    "do_resize": False,
    "image_mean": [0.4, 0.4, 0.4],
    "size": {"height": 4, "width": 4},
    "patch_size": 8,
    "rescale_factor": 1.0,
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_without_effect_are_refused(processor, name):
    with pytest.raises(ValueError, match=name):
        processor(picture(), **{name: BAD_OPTIONS[name]})


def test_unknown_option_is_refused(processor):
    with pytest.raises((TypeError, ValueError), match="max_tokens"):
        processor(picture(), max_tokens=5)
