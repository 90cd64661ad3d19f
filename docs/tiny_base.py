"""Makes the base that comes with the toolkit: python docs/tiny_base.py start OUT PICTURES, training, and finish.

toolkit/bases/tiny/README.md has the commands in their order, and what came out.
"""

import json
import shutil
import sys
from pathlib import Path

from toolkit.cli import main
from toolkit.errors import UserError

RECIPE = Path(__file__).parents[1] / "launch/recipes/tiny_base.yaml"


def start(out: str, pictures: str, seed: int = 0, count: int = 150) -> str:
    """Write the base that training begins from: networks wired by hand, and the VAE's decoder fitted to pictures.

    Args:
        out: new folder
        pictures: folder of shards, whose clips give the pictures that the decoder is fitted to
        seed: of the weights that are not wired, and of the draw of pictures
        count: of pictures
    """
    import torch
    from diffusers import AutoencoderKLTemporalDecoder

    from toolkit.commands.find_lr import read
    from toolkit.config import load_config
    from toolkit.data.index import open_sources
    from toolkit.data.loader import MicroBatches
    from toolkit.model.tiny import fit_decoder, make_tiny_base
    from toolkit.run.framer import to_signed
    from toolkit.run.job import clip_settings

    if Path(out).exists():
        raise UserError(f"{out} is there already; give a new folder")
    config = load_config(RECIPE, {"data.mix": {pictures: 1}})
    index = open_sources(config.data, "train")
    batches = MicroBatches(index, index.order(seed), clip_settings(config), 1, 1, rank=0, world=1)
    make_tiny_base(Path(out), seed)
    vae = AutoencoderKLTemporalDecoder.from_pretrained(out, subfolder="vae")
    fit_decoder(vae, torch.cat([to_signed(read(batches, k).frames_BTHWC)[:, 0] for k in range(count)]))
    vae.save_pretrained(Path(out) / "vae")
    return f"wrote {out}; next: train its UNet with launch/recipes/tiny_base.yaml"


def finish(unet: str, start: str, out: str) -> str:
    """Write the base as it is shipped: weights in fp16.

    Args:
        unet: a checkpoint of full tuning
        start: what training began from, for everything but the UNet
        out: new folder, or one whose files of these names are replaced
    """
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(start, out, dirs_exist_ok=True)
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
    if sys.argv[1:2] not in (["start"], ["finish"]):
        sys.exit(__doc__)
    main({"start": start, "finish": finish}[sys.argv.pop(1)])
