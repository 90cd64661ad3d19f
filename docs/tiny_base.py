"""Makes the base that comes with the toolkit: python docs/tiny_base.py start OUT, then training, then finish.

toolkit/bases/tiny/README.md has the commands in their order, and what came out.
"""

import json
import shutil
from pathlib import Path

import fire


def start(out: str, seed: int = 0, pictures: int = 150) -> str:
    """Write the base that training begins from: networks wired by hand, and the VAE's decoder fitted to pictures.

    Args:
        out: new folder
        seed: of the weights that are not wired, and of the pictures
        pictures: rendered ones, to which the decoder is fitted
    """
    import torch
    from diffusers import AutoencoderKLTemporalDecoder

    from toolkit.data.synth import render_motion
    from toolkit.model.tiny import fit_decoder, make_tiny_base
    from toolkit.run.framer import to_signed

    make_tiny_base(Path(out), seed)
    vae = AutoencoderKLTemporalDecoder.from_pretrained(out, subfolder="vae")
    fit_decoder(
        vae, torch.stack([to_signed(torch.from_numpy(render_motion(seed, k, 1, 64)[0])) for k in range(pictures)])
    )
    vae.save_pretrained(Path(out) / "vae")
    return f"wrote {out}; next: train its UNet with launch/recipes/tiny_base.yaml"


def finish(unet: str, start: str, out: str) -> str:
    """Write the base as it is shipped: weights in fp16.

    Args:
        unet: a checkpoint of full tuning
        start: what training began from, for everything but the UNet
        out: new folder
    """
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(start, out)
    shutil.copy(Path(unet) / "diffusion_pytorch_model.safetensors", Path(out) / "unet")
    for file in Path(out).rglob("*.safetensors"):
        save_file({name: t.to(torch.float16) for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    for file in Path(out).glob("*/config.json"):  # where it lay when it was made is nobody's concern
        settings = json.loads(file.read_text())
        settings.pop("_name_or_path", None)
        file.write_text(json.dumps(settings, indent=2) + "\n")
    size_mb = sum(file.stat().st_size for file in Path(out).rglob("*.safetensors")) / 1e6
    return f"wrote {out}: {size_mb:.1f} MB"


if __name__ == "__main__":
    fire.Fire({"start": start, "finish": finish})
