"""Averages of what trains over the updates of a run, whose length is chosen when the run is over.

Test: pytest tests/run/test_ema.py. Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models"
(EDM2), section 3 and appendix C. After t updates, an average weighs what update s left as tau^power does between s - 1 and
s, of t; its length is sigma_rel, the standard deviation of that profile over t. Two of them move along in training. Each
checkpoint holds both, to go on from, and shares the file with the folder ema/, a snapshot that stays when the checkpoint
is pruned. Another length is the sum of snapshots whose profile comes nearest to its own. A LoRA's A and B are averaged
one by one, as all that trains.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.errors import UserError, in_one_line
from toolkit.model.flat import FlatAdapter
from toolkit.model.formats import METADATA_KEY

TRACKS = {"ema_0.05": 0.05, "ema_0.1": 0.10}  # sigma_rel of the two, by what they are called in files
SNAPSHOT = "ema.safetensors"  # of a checkpoint: {parameter name}/{track}, fp32
LARGEST_ERROR = 0.1  # of a profile that is put together, over the norm of the wanted one
SHORTEST, LONGEST = 1e-3, 12**-0.5  # sigma_rel of any profile: the longest weighs all updates alike


class Averages:
    """The two that move along, for an adapter that lies whole on this rank."""

    def __init__(self, adapter: FlatAdapter, updates: int = 0, saved: Mapping[str, Tensor] | None = None) -> None:
        """
        updates  made so far
        saved    what `copy` gave after them
        """
        self.adapter, self.updates = adapter, updates
        self.powers = {name: find_power(sigma_rel) for name, sigma_rel in TRACKS.items()}
        flat = adapter.flat.detach()
        self.tracks = {name: (flat if saved is None else saved[name].to(flat.device)).clone() for name in TRACKS}

    @torch.no_grad()
    def follow(self, updates: int) -> None:
        """Count in what a step has left, unless it was skipped: time is that of updates.

        updates  made so far, this step's included
        source   section 3.1: beta = (1 - 1/t)^(power + 1)
        """
        if updates == self.updates:
            return
        self.updates = updates
        for name, power in self.powers.items():
            beta = (1 - 1 / updates) ** (power + 1)
            self.tracks[name].lerp_(self.adapter.flat, 1 - beta)

    def copy(self) -> dict[str, Tensor]:
        """Both on the CPU, {track: (n,)}, laid out as the adapter's flat parameter."""
        return {name: track.cpu().clone() for name, track in self.tracks.items()}


def find_power(sigma_rel: float) -> float:
    """The power whose profile has a length between SHORTEST and LONGEST.

    source  appendix C: sigma_rel^2 = (power + 1) / ((power + 2)^2 (power + 3)), here as a polynomial of the power
    """
    c = sigma_rel**-2
    return max(np.roots([1, 7, 16 - c, 12 - c]).real)


def fit_profile(updates: Sequence[int], sigma_rel: float) -> tuple[Tensor, float]:
    """Weigh snapshots so that their sum has the profile of an average of this length at the last of them.

    updates  of each snapshot, ascending
    returns  weights (n, 2), a column per track, fp64, that sum to one: what never moved stays as it is; and the distance of
             the two profiles over the norm of the wanted one
    source   section 3.2 and appendix C: least squares, in closed form; the sum of one, by a Lagrange multiplier, is ours
    """
    ends = torch.tensor(updates, dtype=torch.float64) / updates[-1]
    ends_N = ends.repeat_interleave(len(TRACKS))
    powers_N = ends.new_tensor([find_power(own) for own in TRACKS.values()]).repeat(len(updates))
    end, power = ends[-1], ends.new_tensor(find_power(sigma_rel))
    gram_NN = _inner_product(ends_N[:, None], powers_N[:, None], ends_N, powers_N)
    shared_N = _inner_product(ends_N, powers_N, end, power)
    system = torch.nn.functional.pad(gram_NN, (0, 1, 0, 1), value=1)
    system[-1, -1] = 0
    weights_N = torch.linalg.solve(system, torch.cat([shared_N, ends.new_ones(1)]))[:-1]
    square = _inner_product(end, power, end, power)
    distance = square - 2 * weights_N @ shared_N + weights_N @ gram_NN @ weights_N
    return weights_N.view(-1, len(TRACKS)), (distance.clamp(min=0) / square).sqrt().item()


def _inner_product(end: Tensor, power: Tensor, other_end: Tensor, other_power: Tensor) -> Tensor:
    """Of two profiles, (power + 1) tau^power / end^(power + 1) on [0, end]: the integral of their product."""
    shorter, longer = torch.minimum(end, other_end), torch.maximum(end, other_end)
    power_of_longer = torch.where(end > other_end, power, other_power)
    scale = (power + 1) * (other_power + 1) / (power + other_power + 1)
    return scale * (shorter / longer) ** power_of_longer / longer


def snapshot_file(checkpoint: Path) -> Path:
    """Where the snapshot stays of a checkpoint in its run's folder."""
    return checkpoint.absolute().parent.parent / f"ema/{checkpoint.name}.safetensors"


def write_snapshot(file: Path, tensors: Mapping[str, Mapping[str, Tensor]], updates: int) -> None:
    """Write the tracks among what a checkpoint holds, {parameter name: {track: fp32}}, with a hash of all of it."""
    flat = {f"{name}/{key}": saved[key].contiguous() for name, saved in tensors.items() for key in TRACKS}
    save_file(flat, file, {METADATA_KEY: json.dumps({"updates": updates, "sha256": _hash(flat, updates)})})


def cut_snapshots(run: Path, step: int) -> None:
    """Delete the snapshots after the step that a run goes on from; it makes them anew."""
    for own, file in _list_snapshots(run / "ema").items():
        if own > step:
            file.unlink()


def plan_average(checkpoint: Path, sigma_rel: float) -> dict[Path, Tensor]:
    """Choose the snapshots that an average at a checkpoint is put together of, each with its tracks' weights.

    raises  UserError where the checkpoint has none, or they do not suffice for this length
    """
    last = snapshot_file(checkpoint)
    found = _list_snapshots(last.parent)
    of_checkpoint = next((step for step, file in found.items() if file == last), 0)
    known = {_read_header(file)[0]: file for step, file in found.items() if step <= of_checkpoint}
    known.pop(0, None)  # nothing was averaged yet
    if not known:
        raise UserError(
            f"{checkpoint} has no averages in its run's folder ema, as one saved with checkpoint.ema has; leave ema out, or "
            "train with --checkpoint.ema"
        )
    updates = sorted(known)
    weights_NK, error = fit_profile(updates, sigma_rel) if SHORTEST <= sigma_rel <= LONGEST else (None, math.inf)
    if weights_NK is None or error > LARGEST_ERROR:
        hundredths = (i / 100 for i in range(1, math.ceil(LONGEST * 100)))
        possible = [own for own in hundredths if fit_profile(updates, own)[1] <= LARGEST_ERROR]
        raise UserError(
            f"ema {sigma_rel:g} cannot be put together of the {len(updates)} snapshots up to {last.stem}; give a sigma_rel "
            f"from {min(possible):g} to {max(possible):g}, or 0 for the weights themselves (a lower checkpoint.every_steps "
            "keeps more snapshots, which suffice for more)"
        )
    return {known[own]: weights_K for own, weights_K in zip(updates, weights_NK, strict=True)}


def put_together(checkpoint: Path, sigma_rel: float) -> dict[str, Tensor]:
    """The average of a length at a checkpoint: {parameter name: fp32 tensor}. Raises UserError as plan_average does."""
    sums: dict[str, Tensor] = {}
    for file, weights_K in plan_average(checkpoint, sigma_rel).items():
        weights = dict(zip(TRACKS, weights_K.tolist(), strict=True))
        for full_name, tensor in _read_snapshot(file).items():
            name, _, track = full_name.rpartition("/")
            part = weights[track] * tensor.double()
            sums[name] = sums[name] + part if name in sums else part
    return {name: total.float() for name, total in sums.items()}


def _list_snapshots(folder: Path) -> dict[int, Path]:
    """Those of a folder by their steps, ascending."""
    named = ((re.fullmatch(r"step_(\d+)\.safetensors", file.name), file) for file in folder.glob("step_*"))
    return dict(sorted((int(match[1]), file) for match, file in named if match))


def _read_header(file: Path) -> tuple[int, str]:
    """Updates made before a snapshot, and its hash."""
    try:
        with safe_open(file, "pt") as opened:
            header = json.loads(opened.metadata()[METADATA_KEY])
        return int(header["updates"]), str(header["sha256"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(file, in_one_line(error)) from None


def _read_snapshot(file: Path) -> dict[str, Tensor]:
    (updates, wanted), tensors = _read_header(file), load_file(file)
    if _hash(tensors, updates) != wanted:
        raise _damaged(file, "it differs from what was written")
    return tensors


def _damaged(file: Path, what: str) -> UserError:
    return UserError(f"{file} is damaged: {what}; delete it, and averages are put together of the others")


def _hash(tensors: Mapping[str, Tensor], updates: int) -> str:
    digest = hashlib.sha256(str(updates).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()
