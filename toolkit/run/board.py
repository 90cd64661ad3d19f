"""A run's TensorBoard folder: scalars, charts put together of them, histograms, pictures, and the recipe beside the result.

Test: pytest tests/run/test_monitor.py. What the run is compared with stands under the same tags in runs of its own below the
folder: TensorBoard gives each run a colour and puts equal tags in one chart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from contextlib import closing
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from toolkit.data.video import write_gif
from toolkit.run.timings import PHASES

if TYPE_CHECKING:  # it takes a second
    from torch.utils.tensorboard import SummaryWriter

# of a row of log.jsonl
TAGS = {
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/lr",
    "clips": "progress/clips_seen",
    "eta_s": "progress/eta_s",
    "skipped_steps": "optimizer/skipped_steps",
    "bad_clips": "data/bad_clips",
    "clips_per_s": "speed/clips_per_s",
    "data_wait_share": "speed/data_wait_share",
    "memory_gib": "memory/peak_gib",
}
# each a mapping there; a tag is the group and the name in it
GROUPS = ("time_s", "loss_by_sigma", "validation_by_sigma", "adapter_norm", "update_ratio")
# what stands in another run, and beside what: the loss of predicting zero, and that of clips trained on
BESIDE = {
    "zero_baseline": ("zero", "loss"),
    "zero_by_sigma": ("zero", "loss_by_sigma"),
    "validation_zero_by_sigma": ("zero", "validation_by_sigma"),
    "seen_loss": ("trained_on", "validation_loss"),
}
OWN = ""  # the run itself
STACK = "time_stacked_s"  # of phases: the seconds to the end of each, since TensorBoard draws lines and no areas
HISTOGRAM_BINS = 30  # as many as are drawn; numpy's own choice is without bound where one loss is far off
RECIPE_SUFFIX = ".recipe"  # of the file that holds what TensorBoard lists of the recipe
FIGURES = "validation"  # of figure, a contender a run; the tuned network is the run itself


class Board:
    """Writes from a step on; what an earlier start wrote beyond it is shown no more.

    bins     names of the ranges of sigma that losses are given for
    blocks   names of the blocks that norms are given for
    figures  that are shown already
    """

    def __init__(
        self, folder: Path, start: int, bins: Iterable[str], blocks: Iterable[str], figures: Iterable[str]
    ) -> None:
        self.folder, self.purge_step = folder, start + 1 if start else 0
        self.writers: dict[str, SummaryWriter] = {}  # by run
        self.writer = self._open(OWN)
        for beside in sorted(path.name for path in folder.iterdir() if path.is_dir()):
            self._open(beside)
        self.bins, self.blocks, self.figures = [*bins], [*blocks], [*figures]
        self.shown: set[str] = set()  # tags of the run's own scalars
        self._lay_out()

    def add_row(self, step: int, row: Mapping[str, Any]) -> None:
        """Show what stands in a row of log.jsonl, but for what is None."""
        rows: dict[str, dict[str, Any]] = {OWN: dict(row)}
        for key, (run, beside) in BESIDE.items():
            if key in row:
                rows.setdefault(run, {})[beside] = row[key]
        for run, own in rows.items():
            values = {tag: own.get(key) for key, tag in TAGS.items()}
            values |= {f"{group}/{name}": value for group in GROUPS for name, value in own.get(group, {}).items()}
            so_far_s = accumulate(own.get("time_s", {}).values())
            values |= {f"{STACK}/{phase}": end_s for phase, end_s in zip(PHASES, so_far_s, strict=False)}
            for tag, value in values.items():
                self._add_scalar(step, run, tag, value)

    def add_histogram(self, step: int, tag: str, values: Tensor) -> None:
        """Show how finite values are spread; none are passed over."""
        if len(values):
            self.writer.add_histogram(tag, values, step, bins=HISTOGRAM_BINS)

    def add_figures(self, step: int, figures: Mapping[str, Mapping[str, float]]) -> None:
        """Show {figure: {contender: value}}, a chart a figure."""
        for figure, contenders in figures.items():
            for contender, value in contenders.items():
                self._add_scalar(step, OWN if contender == "tuned" else contender, f"{FIGURES}/{figure}", value)
        new = [figure for figure in figures if figure not in self.figures]
        if new:
            self.figures += new
            self._lay_out()

    def add_text(self, step: int, tag: str, text: str) -> None:
        """Show a sentence, on the tab of texts."""
        self.writer.add_text(tag, text, step)

    def add_picture(self, step: int, tag: str, picture: Path) -> None:
        """Show a PNG file."""
        with Image.open(picture) as image:
            self._add_image(step, tag, image.size, picture.read_bytes())

    def add_video(self, step: int, tag: str, frames_TCHW: Tensor, fps: float) -> None:
        """Show uint8 frames moving: a browser plays a GIF where TensorBoard has it show a picture."""
        content = io.BytesIO()
        write_gif(content, frames_TCHW.movedim(1, 3).cpu().numpy(), fps)
        self._add_image(step, tag, (frames_TCHW.shape[3], frames_TCHW.shape[2]), content.getvalue())

    def add_recipe(self, recipe: Mapping[str, Any]) -> None:
        """List a recipe's fields beside those of others, with the last values of losses and figures.

        In the run's own folder: add_hparams of torch makes a run of its own for it, whose metrics are copies. And in a file
        of its own, for of several recipes TensorBoard shows the first.
        """
        from torch.utils.tensorboard import FileWriter
        from torch.utils.tensorboard.summary import hparams

        metrics = [tag for tag in self.shown if tag.startswith(("loss/", f"{FIGURES}/"))]
        given = {name: value for name, value in recipe.items() if value is not None}
        fields = {name: value if isinstance(value, int | float) else str(value) for name, value in given.items()}
        self.drop_recipe()
        self.writer.flush()  # TensorBoard reads a file no further once there is a newer one
        with closing(FileWriter(str(self.folder), filename_suffix=RECIPE_SUFFIX)) as writer:
            for summary in hparams(fields, dict.fromkeys(sorted(metrics), 0.0)):
                writer.add_summary(summary)

    def drop_recipe(self) -> None:
        """List it no more: a run that was finished goes on, perhaps by another."""
        for file in self.folder.glob(f"*{RECIPE_SUFFIX}"):
            file.unlink()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()

    def _open(self, run: str) -> SummaryWriter:
        if run not in self.writers:
            from torch.utils.tensorboard import SummaryWriter

            self.writers[run] = SummaryWriter(str(self.folder / run), purge_step=self.purge_step)
        return self.writers[run]

    def _add_scalar(self, step: int, run: str, tag: str, value: float | None) -> None:
        if value is None:  # as JSON has what is not finite
            return
        self._open(run).add_scalar(tag, value, step)
        if run == OWN:
            self.shown.add(tag)

    @property
    def _writer(self) -> Any:
        return self.writer._get_file_writer()

    def _add_image(self, step: int, tag: str, size_px: tuple[int, int], content: bytes) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        width_px, height_px = size_px
        image = Summary.Image(height=height_px, width=width_px, colorspace=3, encoded_image_string=content)
        self._writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def _lay_out(self) -> None:
        """Put scalars together in charts, on the tab of custom scalars; of several layouts the last counts."""
        charts = {
            "loss": {
                "against predicting zero": ["loss/train"],
                "held-out clips against those trained on": ["loss/validation"],
            },
            "figures": {figure: [f"{FIGURES}/{figure}"] for figure in self.figures},
            "loss by noise level": {
                f"sigma {name.partition('_')[2].replace('_', ' ')}": [
                    f"loss_by_sigma/{name}", f"validation_by_sigma/{name}",
                ]
                for name in self.bins
            },
            "time of a step": {"seconds, a phase on another": [f"{STACK}/{phase}" for phase in PHASES]},
            "adapter": {
                group: [f"{group}/{block}" for block in self.blocks]
                for group in ("adapter_norm", "update_ratio") if self.blocks
            },
        }  # fmt: skip
        self.writer.add_custom_scalars({  # which takes tags as regular expressions of how they begin
            category: {title: ["Multiline", [f"{re.escape(tag)}$" for tag in tags]] for title, tags in own.items()}
            for category, own in charts.items() if own
        })  # fmt: skip
