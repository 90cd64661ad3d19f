"""Videos -> train and val shards: survey each, plan them all, encode each, write the shards, publish.

Test: pytest tests/authoring/test_pack.py

Every stage leaves files that the next run finds (staging.py), so a killed packing loses what was in the works. Several
machines on one folder each take their part of a stage first and then whatever is missing; none waits for another.
"""

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from toolkit.authoring.captions import Part, Said, Words, read_words
from toolkit.authoring.encode import ShardWork, SourceWork, encode_source, lay_out, write_shard
from toolkit.authoring.plan import Kind, PlannedClip, make_plan, name_hash, read_settings
from toolkit.authoring.report import Card, write_report
from toolkit.authoring.staging import RECORD, REPORT, Job, Record, finish_publishing, load_record, open_staging, publish
from toolkit.authoring.survey import Survey, survey
from toolkit.data.files import local_folder, written_aside
from toolkit.data.sources import find_videos
from toolkit.errors import UserError, printable
from toolkit.parallel import Workers, cores, parse_part

_POOL_BYTES = 1_000_000  # of videos; below this, processes take longer to start than to pack
Item = TypeVar("Item")


@dataclass(frozen=True)
class PackReport:
    """What a packing made and what it left out, with reasons."""

    out: Path
    record: Record

    @property
    def clips(self) -> dict[str, int]:
        return {"train": self.record.train, "val": self.record.val}

    @property
    def seconds(self) -> float:
        return self.record.seconds

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return list(self.record.skipped)

    def summary(self) -> str:
        record, settings = self.record, self.record.job.settings.model_dump()
        lines = [f"skipped {name}: {reason}" for name, reason in record.skipped]
        lines += [f"used in part {name}: {reason}" for name, reason in record.partly]
        dropped = [
            f"{record.dropped.get(kind.words, 0)} {kind.words}"
            + (f" (--{kind.option} {settings[kind.option]:g})" if kind.option else "")
            for kind in Kind
            if kind.option or kind.words in record.dropped
        ]
        lines += [
            f"dropped clips: {', '.join(dropped)}",
            f"{record.train + record.val} clips ({record.train} train, {record.val} val), {record.seconds:.1f} s, "
            f"from {record.sources} videos, {len(record.partly)} used in part, {len(record.skipped)} skipped, "
            f"in {self.out}",
            *([f"look at them: {self.out / REPORT}"] if (self.out / REPORT).exists() else []),
            f"next: python shards/check.py {self.out}",
        ]
        return "\n".join(lines)


def pack(
    videos: str | Path,
    out: str | Path,
    captions: str | Path | None = None,
    part: str = "1/1",
    jobs: int | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> PackReport:
    """Cut every video under a folder into clips, and write those worth training on as shards with indexes.

    settings  as in PackSettings; what each option means stands in shards/pack.py
    raises    UserError if there is nothing to pack or `out` holds something else
    """
    videos, out = local_folder(videos), local_folder(out)
    chosen, (number, parts) = read_settings(settings), parse_part(part)
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs is {jobs}; at least 1 process is needed")
    table = Path(os.path.expanduser(str(captions))) if captions is not None else None
    names, links, others = find_videos(videos)
    said = read_words(videos, names, table)
    job = Job(
        settings=chosen,
        videos={name: _size_bytes(videos / name) for name in names},
        words=_digest([said.of_videos, said.of_parts] if said.of_parts else said.of_videos),
        parts=_digest({name: _times(parts) for name, parts in said.of_parts.items()}) if said.of_parts else "",
    )
    staging = open_staging(out, job, overwrite, alone=parts == 1)
    if staging is None:
        return _report(out, job)
    for link in links:
        print(f"not followed: {link}, a link to a folder")
    used = {Path(name).with_suffix(".txt").as_posix() for name in names}
    used |= {os.path.relpath(table, videos)} if table else set()
    if unused := [name for name in others if name not in used]:
        files = "file" if len(unused) == 1 else "files"
        print(f"passed over {len(unused)} {files}: {_count_endings(unused)}")
    if said.absent:
        shown = ", ".join(said.absent[:10]) + (", ..." if len(said.absent) > 10 else "")
        print(f"passed over rows of {captions} about {len(said.absent)} videos that are not there: {shown}")
    jobs = jobs or (cores() if sum(job.videos.values()) > _POOL_BYTES else 1)
    print(
        f"packing {len(names)} videos on {jobs} {'core' if jobs == 1 else 'cores'} into {staging}; "
        "if it is stopped, the same command goes on",
        flush=True,
    )
    try:
        with Workers(jobs) as workers:
            _Packing(videos, out, staging, job, said, workers, number, parts).run()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE) or staging.exists():
            raise
        finish_publishing(out)  # another part found everything done and published it
    return _report(out, job)


@dataclass(frozen=True)
class _Packing:
    """One run of the stages over a staging folder, part `number` of `parts`."""

    videos: Path
    out: Path
    staging: Path
    job: Job
    said: Said
    workers: Workers
    number: int
    parts: int

    def run(self) -> None:
        settings = self.job.settings
        task = partial(
            survey_into,
            videos=self.videos,
            folder=self.staging,
            clip_seconds=settings.clip_seconds,
            stride_seconds=settings.stride_seconds,
        )
        whole = [(name, _times(self.said.of_parts.get(name, ()))) for name in self.job.videos]
        self._do("survey", task, whole, lambda item: self.job.videos[item[0]], "B")
        surveys = [_without_pictures(self._survey(name)) for name in self.job.videos]
        plan = make_plan(surveys, settings, self._asked())
        sources = self._sources(surveys, plan)
        self._refuse_empty(surveys, plan)
        self._do("encode", encode_source, sources, lambda work: work.frames, " frames")
        split_of = {clip.key: clip.split for clip in plan}
        shards = lay_out(self.staging, (work.target for work in sources), split_of, settings.shard_mb)
        self._do("write", write_shard, shards, lambda work: work.size_bytes, "B")
        self._describe(surveys, plan, shards)
        publish(self.staging, self.out)

    def _do(
        self, what: str, task: Callable[[Item], None], items: Sequence[Item], weight: Callable[[Item], int], unit: str
    ) -> None:
        """Do a stage, the heaviest first: this part's share, then, from the other end, what others have not done.

        Each part begins the rest at a place of its own, so that those who are done do not all do the same.
        """
        heaviest = sorted(items, key=weight, reverse=True)
        share = heaviest[self.number - 1 :: self.parts]
        rest = [item for i, item in enumerate(heaviest) if i % self.parts != self.number - 1][::-1]
        begin = len(rest) * (self.number - 1) // self.parts
        with tqdm(desc=what, total=sum(map(weight, items)), unit=unit, unit_scale=True) as bar:
            for item, _ in self.workers.run(task, [*share, *rest[begin:], *rest[:begin]]):
                bar.update(weight(item))

    def _survey(self, name: str) -> Survey:
        return Survey.model_validate_json(_survey_path(self.staging, name).read_bytes())

    def _sources(self, surveys: list[Survey], plan: list[PlannedClip]) -> list[SourceWork]:
        kept: dict[str, list[PlannedClip]] = {}
        for clip in plan:
            if clip.reason is None:
                kept.setdefault(clip.source, []).append(clip)
        sha256 = {found.name: found.sha256 for found in surveys}
        return [
            SourceWork(
                video=self.videos / name,
                sha256=sha256[name],
                clips=tuple(clips),
                words=tuple(self._words(clip) for clip in clips),
                gop=self.job.settings.gop,
                target=self.staging / "clips" / f"{name_hash(name)}.tar",
            )
            for name, clips in kept.items()
        ]

    def _asked(self) -> dict[tuple[str, int | None], str]:
        """Splits that people gave, by video and part."""
        said = self.said
        words = {(name, None): words for name, words in said.of_videos.items()} | {
            (name, number): part.words for name, parts in said.of_parts.items() for number, part in enumerate(parts)
        }
        return {place: own.split for place, own in words.items() if own.split is not None}

    def _words(self, clip: PlannedClip) -> Words:
        if clip.facts.part is not None:
            return self.said.of_parts[clip.source][clip.facts.part].words
        return self.said.of_videos.get(clip.source, Words())

    def _refuse_empty(self, surveys: list[Survey], plan: list[PlannedClip]) -> None:
        reasons = [clip.reason for clip in plan if clip.reason is not None]
        if len(reasons) < len(plan):
            return
        fault = f"none of the {len(surveys)} videos in {self.videos} gave a clip to train on"
        if reasons:
            remedy = "give larger pictures, or other --aspects"
            if option := reasons[0].kind.option:
                remedy = f"lower --{option} and give --overwrite, which does not look through them again"
            raise UserError(f"{fault} ({plan[0].source}: {reasons[0]}); {remedy}")
        shutil.rmtree(self.staging, ignore_errors=True)
        raise UserError(f"{fault} ({surveys[0].name}: {surveys[0].fault}); give videos that play")

    def _describe(self, surveys: list[Survey], plan: list[PlannedClip], shards: list[ShardWork]) -> None:
        """Write the report for people and the record for programs."""
        partly = [(found.name, found.fault) for found in surveys if found.fault is not None and found.clips]
        skipped = [(found.name, found.fault) for found in surveys if found.fault is not None and not found.clips]
        sizes_bytes = {piece.name: piece.size_bytes for shard in shards for piece in shard.pieces}
        settings = {f"--{name}": str(value) for name, value in self.job.settings.model_dump().items()}
        title, cards = self.videos.resolve().name, self._cards(plan, sizes_bytes)
        write_report(self.staging / REPORT, title, settings, cards, partly, skipped)
        kept = [clip for clip in plan if clip.reason is None]
        splits = Counter(clip.split for clip in kept)
        record = Record(
            job=self.job,
            shards=tuple(shard.target.name for shard in shards),
            train=splits["train"],
            val=splits["val"],
            seconds=sum(clip.facts.frames / clip.facts.fps for clip in kept),
            dropped=dict(sorted(Counter(clip.reason.kind.words for clip in plan if clip.reason).items())),
            sources=len({clip.source for clip in plan}),
            partly=tuple(partly),
            skipped=tuple(skipped),
        )
        with written_aside(self.staging / RECORD) as file:
            file.write(record.model_dump_json(indent=1).encode())

    def _cards(self, plan: list[PlannedClip], sizes_bytes: dict[str, int]) -> Iterator[Card]:
        name, pictures = "", iter([b""])
        for clip in plan:
            if clip.source != name:
                name = clip.source
                pictures = iter(facts.picture for facts in self._survey(name).clips)
            facts, words = clip.facts, self._words(clip)
            yield Card(
                key=clip.key,
                source=clip.source,
                start_s=facts.start_s,
                fps=facts.fps,
                frames=facts.frames,
                height_px=clip.size_px[0],
                width_px=clip.size_px[1],
                motion=facts.motion,
                split=clip.split,
                size_bytes=sizes_bytes.get(f"{clip.key}.mp4", 0),
                reason=clip.reason,
                picture=next(pictures),
                text=words.caption or words.label or "",
            )


def survey_into(
    item: tuple[str, tuple[tuple[float, float], ...]],
    videos: Path,
    folder: Path,
    clip_seconds: float,
    stride_seconds: float | None,
) -> None:
    """Survey one video, or the parts of it that are named, into its file, unless that is there."""
    name, parts = item
    path = _survey_path(folder, name)
    if not path.exists():
        found = survey(videos / name, name, clip_seconds, stride_seconds, path.parent, parts)
        with written_aside(path) as file:
            file.write(found.model_dump_json().encode())


def _times(parts: Sequence[Part]) -> tuple[tuple[float, float], ...]:
    return tuple((part.begin_s, part.end_s) for part in parts)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _without_pictures(found: Survey) -> Survey:
    """Pictures are for the report alone and read again then: a hundred thousand would take a gigabyte."""
    return found.model_copy(update={"clips": tuple(clip.model_copy(update={"picture": b""}) for clip in found.clips)})


def _survey_path(staging: Path, name: str) -> Path:
    return staging / "survey" / f"{name_hash(name)}.json"


def _count_endings(names: Sequence[str]) -> str:
    """Say how many files there are of each ending, the most first: "12 .zip, 3 .png"."""
    endings = Counter(Path(name).suffix.lower() or "without an ending" for name in names)
    counts = [f"{count} {ending}" for ending, count in endings.most_common()]
    return printable(", ".join(counts[:10]) + (", ..." if len(counts) > 10 else ""))


def _report(out: Path, job: Job) -> PackReport:
    record = load_record(out)
    if record is None or record.job != job:
        raise UserError(f"{out} was changed while it was packed; start the same command again")
    return PackReport(out, record)


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
