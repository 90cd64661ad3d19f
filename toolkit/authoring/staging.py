"""The half-done packing inside the folder it is for: begun once, gone on with by the same command, published whole.

Test: pytest tests/authoring/test_pack.py

    OUT/.packing/   job.json  survey/*.json  clips/*.tar  then the shards, report.html and pack.json
    OUT/.publishing what .packing becomes when all is there: whoever renames it publishes
"""

import errno
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from toolkit.authoring.plan import PackSettings
from toolkit.authoring.survey import Survey
from toolkit.data.files import refuse_files_above, written_aside
from toolkit.data.format import index_path, is_whole
from toolkit.data.index import PACKING, PUBLISHING
from toolkit.errors import UserError

PACK_VERSION = 5  # bump when the same videos and settings would give other clips
RECORD, REPORT, _JOB = "pack.json", "report.html", "job.json"
_SHARD = re.compile(r"(train|val)-\d{6,}\.(tar|index\.json)")  # what a packing names its shards and their indexes


class Job(BaseModel):
    """What decides the bytes of a packing: two commands with one job may work on one folder.

    videos  size in bytes of each, by its path within the folder
    words   sha256 of the captions, labels and splits
    parts   sha256 of where the parts to be packed begin and end; empty where all videos are packed whole
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = PACK_VERSION
    settings: PackSettings
    videos: dict[str, int]
    words: str
    parts: str = ""

    @property
    def surveyed(self) -> tuple[object, ...]:
        """What decides how videos are surveyed."""
        return self.version, self.settings.clip_seconds, self.settings.stride_seconds, self.parts

    def difference(self, other: "Job") -> str:
        """Say what distinguishes another job from this one."""
        settings, others = self.settings.model_dump(), other.settings.model_dump()
        changed = [
            f"{key} {others[key]} instead of {settings[key]}" for key in settings if settings[key] != others[key]
        ]
        names = sorted(name for name, _ in self.videos.items() ^ other.videos.items())
        if names:
            changed.append(f"other videos ({names[0]})")
        if self.words != other.words:
            changed.append("other captions")
        if self.parts != other.parts:
            changed.append("other parts of the videos")
        return ", ".join(changed) or "another version of this program"


class Record(BaseModel):
    """The content of OUT/pack.json: what a finished packing was asked for and made."""

    job: Job
    shards: tuple[str, ...]
    train: int
    val: int
    seconds: float
    dropped: dict[str, int]
    sources: int
    partly: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...]


def open_staging(out: Path, job: Job, overwrite: bool, alone: bool) -> Path | None:
    """Make or find the half-done packing of a job in `out`; None if this very job is finished there.

    alone   no other machine works on it, so that --overwrite may remove what is finished, or the half-done packing of
            another job
    raises  UserError if `out` holds something else
    """
    staging, job_file, anew = out / PACKING, out / PACKING / _JOB, overwrite and alone
    refuse_files_above(out)
    goes_on = finish_publishing(out)
    begun = staging.is_dir() and any(path.suffix != ".tmp" for path in staging.iterdir())
    record = load_record(out)
    if not begun and record is not None and record.job == job and (goes_on or not anew):
        _refuse_broken(out, record, alone)
        return None
    _refuse_foreign(out, overwrite)
    if begun and _load_job(job_file) != job:
        if not anew:
            raise _differs(out, job, alone)
        _start_anew(staging, job)
    staging.mkdir(parents=True, exist_ok=True)
    with written_aside(job_file, first_stays=True) as file:
        file.write(job.model_dump_json(indent=1).encode())
    if _load_job(job_file) != job:  # another command began after our look
        raise _differs(out, job, alone)
    for folder in ("survey", "clips"):
        (staging / folder).mkdir(exist_ok=True)
    return staging


def _differs(out: Path, job: Job, alone: bool) -> UserError:
    staging = out / PACKING
    found = _load_job(staging / _JOB)
    difference = found.difference(job) if found else "another version of this program"
    remedy = "or --overwrite to start anew" if alone else f"or delete {staging} to start anew"
    return UserError(
        f"{out} holds a half-done packing, and this command differs ({difference}); give the same command to go on, {remedy}"
    )


def _start_anew(staging: Path, job: Job) -> None:
    """Remove what another job left, but for what it saw of the videos where that holds for this job too."""
    found = _load_job(staging / _JOB)
    for path in staging.iterdir():
        if path.name == "survey" and found and found.surveyed == job.surveyed:
            for file in path.glob("*.json"):
                seen = Survey.model_validate_json(file.read_bytes())
                if not seen.sha256 or found.videos.get(seen.name) != job.videos.get(seen.name):
                    file.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _refuse_broken(out: Path, record: Record, alone: bool) -> None:
    """Look at what the record says was packed. Raises UserError where a shard is not there, or not whole."""
    for name in record.shards:
        if not is_whole(out / name):
            remedy = "--overwrite to pack anew" if alone else f"delete {out / RECORD} and give --overwrite to pack anew"
            raise UserError(
                f"this command was finished in {out}, but {name} or its index is gone or was changed since; restore it, or "
                f"{remedy}"
            )


def publish(staging: Path, out: Path) -> None:
    """Put a whole packing in place of what is in `out`; of several that try at once, one does."""
    try:
        os.rename(staging, out / PUBLISHING)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise
    finish_publishing(out)


def finish_publishing(out: Path) -> bool:
    """Move what a claimed packing holds into place, from wherever a publisher was stopped: every step may come twice.

    Returns whether there was something to move.
    """
    publishing = out / PUBLISHING
    record = load_record(publishing)
    if record is not None:
        tars = [out / shard for shard in record.shards]
        fresh = {*tars, *map(index_path, tars)}
        for old in {path for path in out.iterdir() if _SHARD.fullmatch(path.name)} - fresh:
            old.unlink(missing_ok=True)
        for path in (*(path for tar in tars for path in (index_path(tar), tar)), out / REPORT, out / RECORD):
            with suppress(FileNotFoundError):
                os.replace(publishing / path.name, path)
    shutil.rmtree(publishing, ignore_errors=True)
    return record is not None


def load_record(folder: Path) -> Record | None:
    """Read the record of a finished packing, if a folder holds one that can be read."""
    try:
        return Record.model_validate_json((folder / RECORD).read_bytes())
    except (OSError, ValidationError):
        return None


def _load_job(path: Path) -> Job | None:
    try:
        return Job.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _refuse_foreign(out: Path, overwrite: bool) -> None:
    present = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    shards = [name for name in present if _SHARD.fullmatch(name)]
    foreign = [name for name in present if name not in (*shards, PACKING, RECORD, REPORT)]
    if foreign:
        raise UserError(
            f"{out} holds files that are not shards of a packing ({foreign[0]}); give a new or empty folder"
        )
    if shards and not overwrite:
        raise UserError(f"{out} already holds shards; give another folder, or --overwrite to replace them")
