"""Keeps answers that take seconds to count, for the next start: small JSON files in the user's cache folder.

Test: pytest tests/run/test_recall.py. An answer counts only for the same question, asked of the same code and libraries.
Nothing here is needed: what cannot be read is counted again, what cannot be written is not kept, and any file may go.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from toolkit.data.files import written_aside

Answer = TypeVar("Answer")
# what an answer may come from beside our code
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors")


def recall(question: Any, count: Callable[[], Answer], witness: Any = None) -> Answer:
    """The answer kept for a question, or else a new one, which is kept.

    question  all that the answer depends on, as JSON has it, and so is the answer; one answer is kept for each
    witness   what beside the question must be as it was when the answer was kept
    """
    seen = json.loads(json.dumps({"question": question, "witness": witness, "code": fingerprint_code()}))
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    file = Path(root, "framer-toolkit", "answers", f"{_digest(question)[:32]}.json")
    # missing, torn, or somebody else's
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        kept = json.loads(file.read_text())
        if kept["seen"] == seen and kept["digest"] == _digest(kept["answer"]):
            return kept["answer"]
    answer = count()
    if not file.is_absolute():  # nobody's home
        return answer
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(file) as stream:
            stream.write(json.dumps({"seen": seen, "answer": answer, "digest": _digest(answer)}).encode())
    return answer


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@functools.cache
def fingerprint_code() -> str:
    """Hash the toolkit's source, its DeepSpeed settings, and the versions of Python and LIBRARIES."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256(repr((sys.version, [version(name) for name in LIBRARIES])).encode())
    for file in sorted([*(root / "toolkit").rglob("*.py"), *(root / "ds_configs").glob("*.json")]):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
