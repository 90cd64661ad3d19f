"""Videos of drawn people signing, to try everything on: python shards/synth.py OUT [--clips 24] [--size 128]"""

from typing import Literal

from toolkit.cli import main


def synth(
    out: str, clips: int = 24, seconds: float = 2.0, size: int = 128, seed: int = 0, fps: float = 30.0,
    kind: Literal["signing", "motion"] = "signing",
) -> str:  # fmt: skip
    """Write short MP4 videos, one sign by one signer each; the same seed gives the same videos.

    Args:
        out: new folder for the videos
        clips: how many videos
        seconds: length of each
        size: width and height in pixels
        seed: another seed, other signers and signs
        fps: frames per second
        kind: motion for textured things that move, turn and grow, from which a base learns what motion is
    """
    from toolkit.authoring import synth as synthesis

    return synthesis.synth(out, clips, seconds, size, seed, fps, kind)


if __name__ == "__main__":
    main(synth)
