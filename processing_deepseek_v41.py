"""DeepSeek-V4.1's processor: from images and text to the inputs of the model.

In a text an image is one placeholder, `<｜deepseek_image｜>`. The processor repeats it for every position of the image;
its grid determines which of them are its start, the ends of its rows and its end.
"""

from transformers import AutoProcessor, ProcessorMixin

from .configuration_vision_deepseek_v41 import DeepseekV41VisionConfig
from .image_processing_deepseek_v41 import flatten_images
from .safetensors_engram import EngramError

IMAGE_TOKEN = "<｜deepseek_image｜>"


class DeepseekV41Processor(ProcessorMixin):
    """The image processor and the tokenizer of one model.

    `processor(images=..., text=...)` takes a text or a list of texts, each with one placeholder for each of its
    images, and images as [`DeepseekV41ImageProcessor`] takes them: in one list, in the order of their placeholders, or
    in one list for each text. `apply_chat_template` takes conversations whose messages have image blocks.

    Args:
        image_processor: a [`DeepseekV41ImageProcessor`].
        tokenizer: the model's tokenizer.
        chat_template: a Jinja template; the converted checkpoint has one.

    Raises:
        ValueError: the tokenizer has no placeholder for images.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template: str | None = None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.get_vocab().get(IMAGE_TOKEN)
        if self.image_token_id is None:
            raise EngramError(f"The tokenizer has no token {IMAGE_TOKEN}; give the one of a DeepSeek-V4.1 checkpoint.")

    def prepare_inputs_layout(self, images=None, text=None, *args, **kwargs):
        """Open the images and collect them in one list; see `ProcessorMixin`.

        Raises:
            ValueError: texts and images do not match.
        """
        images, text, *others = super().prepare_inputs_layout(images, text, *args, **kwargs)
        if text is not None:
            self._check_counts(images, text)
        return flatten_images([] if images is None else images) or None, text, *others

    def _check_counts(self, images, texts: list[str]) -> None:
        """Require an image for every placeholder, in its own text if there is a list of images for each text."""
        placeholders = [text.count(self.image_token) for text in texts if isinstance(text, str)]
        given = images if isinstance(images, (list, tuple)) else [] if images is None else [images]
        if len(given) == len(placeholders) and all(isinstance(part, (list, tuple)) for part in given):
            counts = [len(part) for part in given]
        else:
            placeholders, counts = [sum(placeholders)], [len(flatten_images(given))]
        for number, (expected, count) in enumerate(zip(placeholders, counts, strict=True)):
            if expected != count:
                where = f"Text {number} has" if len(counts) > 1 else "The text has"
                raise EngramError(
                    f"{where} {expected} placeholders {self.image_token} for {count} images; give each image one, in order."
                )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Return the placeholder, once for every position of image number `image_idx`."""
        ratio = self.image_processor.downsample_ratio
        rows, columns = (-(-int(patches) // ratio) for patches in image_inputs["image_grid_hws"][image_idx])
        return self.image_token * (rows * (columns + 1) + 2)


# It is not registered for the text model's config: a checkpoint of text alone has a tokenizer for its processor.
AutoProcessor.register(DeepseekV41VisionConfig, DeepseekV41Processor, exist_ok=True)
DeepseekV41Processor.register_for_auto_class()

__all__ = ["DeepseekV41Processor"]
