"""DeepSeek-V4.1's image processing: one grid of patches for an image of any shape, resized by Pillow.

The release resizes with Pillow's bicubic filter on bytes, and other resamplers give other bytes, so this is the only
back end. Pillow 13 resizes some images with rows and columns in another order than its predecessors, which changes
single bytes by a few units. An alpha channel is dropped and gray repeated, as Pillow converts to RGB. The EXIF
rotation of a photograph is ignored.

Letters used for shapes: N patches of all images, I images, P pixels on a patch's side.
"""

import base64
import binascii
import contextlib
import io
import math
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlparse
from urllib.request import url2pathname

import numpy as np
import torch
from transformers import AutoImageProcessor, BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.processing_utils import ImagesKwargs

from .configuration_vision_deepseek_v41 import DeepseekV41VisionConfig
from .fields_deepseek_v41 import check_limits
from .safetensors_engram import EngramError

try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError:  # transformers says so when a processor is made
    Image = None

_GRAY = (127, 127, 127)
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


class ImagePlan(NamedTuple):
    """The plan of an image: its target size, its patches, and its text positions."""

    width: int
    height: int
    patch_rows: int
    patch_columns: int
    rows: int  # of text positions
    columns: int

    @property
    def tokens(self) -> int:
        """The number of positions in the text, with the start, every row's end, and the end."""
        return self.rows * (self.columns + 1) + 2


def plan_image(
    width: int,
    height: int,
    patch_size: int,
    downsample_ratio: int,
    max_image_tokens: int,
    min_pixels: int,
    max_wh_ratio: float | None = None,
) -> ImagePlan:
    """Return the plan of an image of `width` x `height` pixels; see [`DeepseekV41VisionConfig`] for the limits."""
    wide, high = float(width), float(height)
    if max_wh_ratio is not None:
        wide = min(wide, high * max_wh_ratio)
    if wide * high < min_pixels:
        factor = (min_pixels / (wide * high)) ** 0.5
        # The value is truncated, not rounded. A side below one pixel still fills one patch.
        wide, high = max(1, int(wide * factor)), max(1, int(high * factor))
    plan = _plan(math.ceil(wide / patch_size), math.ceil(high / patch_size), patch_size, downsample_ratio)
    if plan.tokens > max_image_tokens:
        columns, rows = _shrink(wide, high, patch_size, downsample_ratio, max_image_tokens)
        plan = _plan(columns, rows, patch_size, downsample_ratio)
    return plan


def _plan(columns: int, rows: int, patch: int, ratio: int) -> ImagePlan:
    return ImagePlan(columns * patch, rows * patch, rows, columns, -(-rows // ratio), -(-columns // ratio))


def _shrink(wide: float, high: float, patch: int, ratio: int, limit: int) -> tuple[int, int]:
    """Return columns and rows of patches that keep the aspect as far as `limit` text positions allow."""
    aspect, cell = high / wide, patch * ratio
    across = ((limit - 2) / aspect + 0.25) ** 0.5 - 0.5  # text positions in a row, if they could be fractions
    down = across * aspect
    if across < 1:
        return ratio, (limit - 2) // 2 * ratio
    if down < 1:
        return (limit - 3) * ratio, ratio
    factor = min(math.floor(across) * cell / wide, math.floor(down) * cell / high)
    return max(1, math.floor(wide * factor / patch)), max(1, math.floor(high * factor / patch))


class DeepseekV41ImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    max_image_tokens (`int`):
        The most text positions an image may take.
    min_pixels (`int`):
        Smaller images are enlarged to about this many pixels.
    max_wh_ratio (`float`, *optional*):
        The largest width for a height of 1.
    patch_size, downsample_ratio (`int`):
        Of the vision tower; not to be changed at a call.
    """

    max_image_tokens: int
    min_pixels: int
    max_wh_ratio: float | None
    patch_size: int
    downsample_ratio: int


class DeepseekV41ImageProcessor(PilBackend):
    """Cuts images into the patches that [`DeepseekV41VisionModel`] reads.

    Args:
        max_image_tokens, min_pixels, max_wh_ratio: limits; they can be passed to a call too.
        patch_size, downsample_ratio: sizes of the vision tower.
    """

    valid_kwargs = DeepseekV41ImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_hws"]  # noqa: RUF012 (transformers' spelling)

    patch_size = DeepseekV41VisionConfig.patch_size
    downsample_ratio = DeepseekV41VisionConfig.downsample_ratio
    max_image_tokens = DeepseekV41VisionConfig.max_image_tokens
    min_pixels = DeepseekV41VisionConfig.min_pixels
    max_wh_ratio = None
    # These are the steps of the processing, in transformers' terms. None of them can be turned off or changed.
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_pad = True
    rescale_factor = 1 / 255
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    resample = _BICUBIC

    _FIXED = (
        "do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_pad", "rescale_factor", "image_mean",
        "image_std", "resample",
    )  # fmt: skip
    _UNUSED = ("size", "default_to_square", "crop_size", "do_center_crop", "pad_size")

    @classmethod
    def from_vision_config(cls, config: DeepseekV41VisionConfig) -> "DeepseekV41ImageProcessor":
        """Return the image processor of a tower; the release has no file for it."""
        names = ("patch_size", "downsample_ratio", "max_image_tokens", "min_pixels", "max_wh_ratio")
        return cls(**{name: getattr(config, name) for name in names})

    def plan(self, width: int, height: int, **limits) -> ImagePlan:
        """Return the plan of an image of `width` x `height` pixels; `limits` replace this processor's."""
        names = ("patch_size", "downsample_ratio", "max_image_tokens", "min_pixels", "max_wh_ratio")
        return plan_image(width, height, **{name: limits.get(name, getattr(self, name)) for name in names})

    def get_number_of_image_tokens(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Return the number of text positions of an image of this size."""
        return self.plan(width, height, **(images_kwargs or {})).tokens

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Return the number of patches of an image of this size."""
        plan = self.plan(width, height, **(images_kwargs or {}))
        return plan.patch_rows * plan.patch_columns

    def fetch_images(self, image_url_or_urls):
        """Return images, file names and data URLs, in lists nested as they are given, as Pillow images.

        Raises:
            ValueError: for a web address (no network is used), and for values that are not readable images.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        return load_image(image_url_or_urls)

    def process_image(self, image, **kwargs) -> "Image.Image":
        """Return the image in RGB, unchanged if it is so already."""
        try:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise EngramError(f"{_name_of(image)} cannot be decoded ({error}); give another image.") from error

    def _validate_preprocess_kwargs(self, **kwargs):
        for name in self._FIXED:
            if kwargs.get(name) != getattr(type(self), name, None):
                raise EngramError(
                    f"`{name}` is {kwargs[name]!r}, but DeepSeek-V4.1 was trained with {getattr(type(self), name)!r}; leave "
                    "it out."
                )
        for name in self._UNUSED:
            if kwargs.get(name) not in (None, getattr(type(self), name, None)):
                raise EngramError(
                    f"`{name}` means nothing here, because an image's size follows from its shape; set `max_image_tokens` "
                    "and `min_pixels`."
                )
        for name in ("patch_size", "downsample_ratio"):
            if kwargs[name] != getattr(self, name):
                raise EngramError(f"`{name}` must be the vision tower's, {getattr(self, name)}; leave it out.")
        check_limits(kwargs["max_image_tokens"], kwargs["min_pixels"], kwargs["max_wh_ratio"])

    def _prepare_images_structure(self, images, expected_ndims: int = 3) -> list["Image.Image"]:
        return flatten_images(self.fetch_images(images))

    def _preprocess(self, images: list["Image.Image"], return_tensors=None, **kwargs) -> BatchFeature:
        if not images:
            raise EngramError("There are no images; leave `images` out, or give at least one.")
        plans = [self.plan(image.width, image.height, **kwargs) for image in images]
        patches = [
            self._patches(fit(image, plan, kwargs["max_wh_ratio"]), plan)
            for image, plan in zip(images, plans, strict=True)
        ]
        values = as_bfloat16(torch.cat(patches))
        data = {
            # numpy has no bfloat16; the values are those of bfloat16 all the same.
            "pixel_values": values
            if str(getattr(return_tensors, "value", return_tensors)) == "pt"
            else values.float().numpy(),
            "image_grid_hws": np.array([(plan.patch_rows, plan.patch_columns) for plan in plans], dtype=np.int64),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _patches(self, image: "Image.Image", plan: ImagePlan) -> torch.Tensor:
        """Return the bytes `[patches, 3, P, P]` of an image that has the plan's size, row by row."""
        size = self.patch_size
        picture = torch.from_numpy(np.array(image)).view(plan.patch_rows, size, plan.patch_columns, size, 3)
        return picture.permute(0, 2, 4, 1, 3).reshape(-1, 3, size, size)


def fit(image: "Image.Image", plan: ImagePlan, max_wh_ratio: float | None) -> "Image.Image":
    """Return the image in the plan's size: scaled with its aspect kept and gray bars added, or squeezed where it is
    too wide.
    """
    size = (plan.width, plan.height)
    if max_wh_ratio is not None and image.width >= max_wh_ratio * image.height:
        return image.resize(size, _BICUBIC)
    # This is how Pillow computes the short side.
    if min(round(image.height / image.width * plan.width), round(image.width / image.height * plan.height)) < 1:
        raise EngramError(
            f"{_name_of(image)} is too thin: scaled to the {plan.width} x {plan.height} pixels that fit the "
            "model, its short side would vanish; cut it into pieces."
        )
    return ImageOps.pad(image, size, _BICUBIC, color=_GRAY)


def as_bfloat16(pixels: torch.Tensor) -> torch.Tensor:
    """Return bytes as numbers from -1 to 1, computed in float32 and rounded to bfloat16."""
    return pixels.float().div_(255).sub_(0.5).div_(0.5).to(torch.bfloat16)


def flatten_images(images) -> list:
    """Return the images of nested lists, in order."""
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in flatten_images(part)]
    return [images]


def load_image(image) -> "Image.Image":
    """Make a Pillow image from a Pillow image, array, tensor, file name, `file:` or `data:` URL."""
    if isinstance(image, (str, Path)):
        image = _open_image(str(image))
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        image = _image_of_array(image)
    elif not isinstance(image, Image.Image):
        raise EngramError(
            f"An image is a {type(image).__name__}; give a Pillow image, a byte array, a file name or a data URL."
        )
    if not image.width or not image.height:
        raise EngramError(f"{_name_of(image)} is empty ({image.width} x {image.height} pixels); give another image.")
    return image


def _open_image(place: str) -> "Image.Image":
    scheme = urlparse(place).scheme.lower()
    if scheme in ("http", "https", "ftp"):
        raise EngramError(
            f"The image {_shortened(place)} is a web address, and images are not fetched from the network; download it and "
            "give the file, or the image itself."
        )
    try:
        if scheme == "data":
            return Image.open(io.BytesIO(_decode_data_url(place)))
        path = Path(url2pathname(urlparse(place).path)) if scheme == "file" else Path(place)
        return Image.open(path)
    except Image.DecompressionBombError as error:
        raise EngramError(
            f"The image {_shortened(place)} has more pixels than Pillow opens ({error}); if you trust it, raise "
            "PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except UnidentifiedImageError as error:
        raise EngramError(
            f"The image {_shortened(place)} is of no format that Pillow reads, or is damaged; give a PNG or JPEG."
        ) from error
    except (OSError, ValueError) as error:
        raise EngramError(f"The image {_shortened(place)} cannot be opened ({error}); give another image.") from error


def _decode_data_url(url: str) -> bytes:
    """Return the bytes of `data:image/png;base64,...`."""
    header, comma, content = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise EngramError("a data URL must read data:image/...;base64,...")
    try:
        return base64.b64decode(unquote(content), validate=True)
    except binascii.Error as error:
        raise EngramError(f"its base64 is damaged ({error})") from error


def _image_of_array(array: np.ndarray | torch.Tensor) -> "Image.Image":
    """Make a Pillow image from bytes `[height, width]`, or `[height, width, C]` or `[C, height, width]` with C 1, 3 or 4."""
    array = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array
    if array.dtype != np.uint8:
        raise EngramError(
            f"An image is an array of {array.dtype}; give bytes (uint8, 0 to 255), because images are resized as bytes."
        )
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if 0 in array.shape or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise EngramError(
            f"An image is an array of shape {list(array.shape)}; give [height, width], or [height, width, channels] or "
            "[channels, height, width] with 1, 3 or 4 channels."
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _name_of(image: "Image.Image") -> str:
    name = getattr(image, "filename", "")
    return f"The image {_shortened(str(name))}" if name else "An image"


def _shortened(place: str) -> str:
    return repr(place if len(place) <= 80 else f"{place[:60]}...")


# If Pillow (with some releases of transformers, torchvision) is missing, there is no AutoImageProcessor to register
# with.
with contextlib.suppress(ImportError):
    AutoImageProcessor.register(
        DeepseekV41VisionConfig, image_processor_classes={"pil": DeepseekV41ImageProcessor}, exist_ok=True
    )
DeepseekV41ImageProcessor.register_for_auto_class()

__all__ = ["DeepseekV41ImageProcessor"]
