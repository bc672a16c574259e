"""Q&C: quantization and caching that work together for diffusion transformers, as ComfyUI nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    # Imported here, so that pytest and pip can import this package where ComfyUI is not installed,
    # and one by one, so that an old ComfyUI is told so before anything asks it for what it lacks.
    from .nodes.version import require_comfyui

    require_comfyui()
    from .nodes.extension import QandCExtension

    return QandCExtension()
