"""Framer Toolkit: tune Framer to a domain, and use it: `from toolkit import FramerPipeline`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.model.unet import FramerUNet as FramerUNet
    from toolkit.pipeline import FramerPipeline as FramerPipeline

# FramerUNet and FramerControlNet too: diffusers writes into model_index.json that they are found here
_PLACES = {
    "FramerPipeline": "toolkit.pipeline",
    "FramerUNet": "toolkit.model.unet",
    "FramerControlNet": "toolkit.model.controlnet",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the commands start at once, before PyTorch is loaded."""
    if name not in _PLACES:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)
