"""The whole job in a few minutes: videos -> shards -> LoRA -> adapter, pictures, video (make demo [VIDEOS=folder])."""

from toolkit.cli import main


def demo(videos: str | None = None) -> None:
    """Run every command of a real run on the tiny base, as a user would type them.

    videos  folder of your own videos; default: signing figures that shards/synth.py renders
    """
    from toolkit.commands.demo import run_demo

    run_demo(videos)


if __name__ == "__main__":
    main(demo)
