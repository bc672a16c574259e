"""A custom node pack for tests: prompts without a text encoder, images without a VAE, ComfyUI's networks in tiny sizes.

The text encoders of the official graphs take gigabytes and are not what is tested. $QANDC_TINY names the folder of the
programs that define the tiny models.
"""

import os
import sys
from contextlib import ExitStack

sys.path.append(os.environ["QANDC_TINY"])

import families  # noqa: E402
import stock_models  # noqa: E402

sizes = ExitStack()  # for as long as the server runs
for name in ("Qwen-Image", "Z-Image", "SDXL"):
    sizes.enter_context(stock_models.SAMPLED[name].sizes())


class TinyText:
    """Random conditioning of the shapes that a family's text encoder gives, from the text as the seed."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "encode", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {}), "family": ("STRING", {})}}

    def encode(self, text, family):
        return (families.conditioning(stock_models.SAMPLED[family].family, len(text)),)


class TinyDecode:
    """The first three channels of a video's latent as the colours of its frames."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "decode", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",)}}

    def decode(self, samples):
        return (samples["samples"][:, :3].permute(0, 2, 3, 4, 1).flatten(0, 1).sigmoid(),)


NODE_CLASS_MAPPINGS = {"TinyText": TinyText, "TinyDecode": TinyDecode}
