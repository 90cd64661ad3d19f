"""What an MP4 claims to hold, read before a demuxer makes room for it.

Test: pytest tests/data/test_security.py

Some bytes can claim a billion frames: FFmpeg then fills gigabytes with a table of them, or walks it for hours.
"""

import re

# The box that counts the samples of a track, or of a part of it, and where in the box its count stands.
_COUNTS = {b"stsz": 12, b"stz2": 12, b"trun": 8}


def claimed_samples(data: bytes) -> int:
    """Count the samples that all tracks of an MP4 claim: frames, or pieces of sound. A compressed header is a ValueError.

    Boxes are looked for wherever a demuxer might find one: everywhere but in the frames themselves, and there too
    where fragments point into them.
    """
    heads = b"".join(_outside_frames(data))
    text = data if re.search(b"moof|sidx|mfra", heads) else heads
    if b"cmov" in text:
        raise ValueError("a compressed header")
    found = (box.start() + _COUNTS[box[0]] for box in re.finditer(b"stsz|stz2|trun", text))
    return sum(int.from_bytes(text[count : count + 4]) for count in found)


def _outside_frames(data: bytes) -> list[bytes]:
    """The boxes of the top level but mdat; what is no box counts as one."""
    boxes, start = [], 0
    while start < len(data):
        size_bytes = int.from_bytes(data[start : start + 4])
        if size_bytes == 1:
            size_bytes = int.from_bytes(data[start + 8 : start + 16])
        if size_bytes < 8:  # 0: up to the end of the file
            size_bytes = len(data) - start
        if data[start + 4 : start + 8] != b"mdat":
            boxes.append(data[start : start + size_bytes])
        start += size_bytes
    return boxes
