"""DeepSeek-V4.1's processor: images and text to what the model reads.

In a text an image is one placeholder, `<｜deepseek_image｜>`. The processor repeats it for every position the image takes;
which of them are its start, the ends of its rows and its end follows from its grid.
"""

from transformers import AutoProcessor, ProcessorMixin

from .configuration_vision_deepseek_v41 import DeepseekV41VisionConfig
from .image_processing_deepseek_v41 import flatten_images

IMAGE_TOKEN = "<｜deepseek_image｜>"


class DeepseekV41Processor(ProcessorMixin):
    """The image processor and the tokenizer of one model.

    `processor(images=..., text=...)` takes a text or a list of texts, each with one placeholder for each of its images, and images as
    [`DeepseekV41ImageProcessor`] takes them: in one list, in the order of their placeholders, or in one list for each text.
    `apply_chat_template` takes conversations whose messages have image blocks.

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
            raise ValueError(f"The tokenizer has no token {IMAGE_TOKEN}; give the one of a DeepSeek-V4.1 checkpoint.")

    def prepare_inputs_layout(self, images=None, text=None, *args, **kwargs):
        """Open the images and bring them into one list; see `ProcessorMixin`.

        Raises:
            ValueError: a text has another number of placeholders than its list has images.
        """
        images, text, *others = super().prepare_inputs_layout(images, text, *args, **kwargs)
        if images is None:
            return images, text, *others
        texts = text if isinstance(text, list) else []
        if (
            isinstance(images, (list, tuple))
            and len(images) == len(texts) > 0
            and all(isinstance(part, (list, tuple)) for part in images)
        ):
            for index, (part, words) in enumerate(zip(images, texts, strict=True)):
                placeholders = words.count(self.image_token)
                if placeholders != len(part):
                    raise ValueError(
                        f"Text {index} has {placeholders} placeholders {self.image_token}, but {len(part)} images; give "
                        "each image one placeholder, in order."
                    )
        return flatten_images(images) or None, text, *others

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholder, once for every position of image number `image_idx`."""
        ratio = self.image_processor.downsample_ratio
        rows, columns = (-(-int(patches) // ratio) for patches in image_inputs["image_grid_hws"][image_idx])
        return self.image_token * (rows * (columns + 1) + 2)


# Not under the text model's config: a checkpoint of text alone has a tokenizer for its processor.
AutoProcessor.register(DeepseekV41VisionConfig, DeepseekV41Processor, exist_ok=True)
DeepseekV41Processor.register_for_auto_class()

__all__ = ["DeepseekV41Processor"]
