"""Draws a person: looks and a room from a seed, then one frame for each pose of the hands and sway of the body.

Test: pytest tests/authoring/test_synth.py

Lengths are shares of the frame's side, x to the right, y down; angles in radians.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from toolkit.authoring.shapes import Draws, muted_colour, noise_texture, pattern

Colour = np.ndarray  # (3,), 0 to 255
Point = np.ndarray  # (x, y)

_SKINS = np.array([[241, 206, 180], [224, 178, 145], [198, 145, 108], [160, 108, 76], [116, 75, 52], [82, 54, 40]])
_HAIRS = np.array([[28, 22, 20], [62, 40, 26], [104, 66, 36], [168, 124, 70], [140, 138, 136], [122, 52, 30]])


@dataclass(frozen=True)
class Look:
    """One signer: colours, build and the room behind."""

    skin: Colour
    hair: Colour
    hair_style: int  # 0 short, 1 long, 2 bun, 3 nearly none
    sleeve: Colour
    short_sleeves: bool
    glasses: bool
    beard: bool
    build: float  # width of the body, about 1
    head: float  # size of the head, about 1
    cloth: Image.Image
    room: Image.Image


def draw_look(draws: Draws, side_px: int) -> Look:
    """Draw a signer's looks for a canvas of side_px."""
    tone = draws.integer(0, len(_SKINS) - 1)
    skin = _SKINS[tone] * draws.number(0.92, 1.04)
    cloth_HWC = pattern(draws)
    tiles = draws.integer(1, 3)
    cloth = Image.fromarray(np.tile(cloth_HWC, (tiles, tiles, 1)).astype(np.uint8))
    return Look(
        skin=np.clip(skin, 0, 250),
        hair=_HAIRS[draws.integer(0, len(_HAIRS) - 1 if tone < 2 else 2)] * draws.number(0.85, 1.1),
        hair_style=draws.integer(0, 3),
        sleeve=cloth_HWC.mean((0, 1)) * draws.number(0.9, 1.1),
        short_sleeves=draws.chance(0.4),
        glasses=draws.chance(0.25),
        beard=draws.chance(0.2),
        build=draws.number(0.88, 1.12),
        head=draws.number(0.92, 1.08),
        cloth=cloth.resize((side_px, side_px), Image.Resampling.BICUBIC),
        room=_draw_room(draws, side_px),
    )


def draw_person(look: Look, hands: np.ndarray, sway: np.ndarray, side_px: int) -> Image.Image:
    """Paint one frame, RGB side_px square.

    hands  (2, 10), right then left: wrist x (outward from the middle) and y, turn of the hand, how broad it looks,
           extension of thumb, index, middle, ring and little finger, spread of the fingers
    sway   (5,): x and y of the body, turn of the head -1 to 1, mouth and brows 0 to 1, lids 0 open to 1 closed
    """
    canvas = look.room.copy()
    pen = _Pen(ImageDraw.Draw(canvas), side_px)
    body = np.array([0.5 + sway[0], sway[1]])
    head = body + [0.6 * sway[0], 0.25]
    if look.hair_style == 1:
        pen.ellipse(head + [0, 0.05], 0.105 * look.head, 0.17 * look.head, look.hair * 0.8)
    pen.limb(head + [0, 0.06], body + [0, 0.44], 0.05, 0.055, look.skin * 0.86)
    _paint_torso(canvas, look, body, side_px)
    pen.limb(body + [-0.035, 0.415], body + [0.035, 0.415], 0.024, 0.024, look.skin * 0.92)
    _paint_head(pen, look, head, sway)
    for hand, outward in ((hands[1], -1), (hands[0], 1)):
        _paint_arm(pen, look, body, hand, outward)
    return canvas


class _Pen:
    """Paints rounded shapes with light from the upper left."""

    def __init__(self, draw: ImageDraw.ImageDraw, side_px: int) -> None:
        self.draw, self.side_px = draw, side_px

    def ellipse(self, centre: Point, radius_x: float, radius_y: float, colour: Colour) -> None:
        for size, shade, shift in ((1.0, 0.82, 0.0), (0.86, 0.95, 0.07), (0.62, 1.04, 0.14)):
            (x, y), rx, ry = centre - [shift * radius_x, shift * radius_y], size * radius_x, size * radius_y
            self.draw.ellipse(self._px(x - rx, y - ry, x + rx, y + ry), fill=_rgb(colour * shade))

    def flat(self, centre: Point, radius_x: float, radius_y: float, colour: Colour) -> None:
        x, y = centre
        self.draw.ellipse(self._px(x - radius_x, y - radius_y, x + radius_x, y + radius_y), fill=_rgb(colour))

    def limb(self, start: Point, end: Point, radius_start: float, radius_end: float, colour: Colour) -> None:
        """A tapered capsule, darker at its rim."""
        along = (end - start) / max(1e-6, float(np.hypot(*(end - start))))
        across = np.array([-along[1], along[0]])
        for size, shade, shift in ((1.0, 0.76, 0.0), (0.8, 0.93, 0.12), (0.45, 1.05, 0.3)):
            a, b = start - shift * radius_start * 0.7, end - shift * radius_end * 0.7
            ra, rb = size * radius_start, size * radius_end
            corners = [a + across * ra, b + across * rb, b - across * rb, a - across * ra]
            fill = _rgb(colour * shade)
            self.draw.polygon(self._px(*np.concatenate(corners)), fill=fill)
            for (x, y), r in ((a, ra), (b, rb)):
                self.draw.ellipse(self._px(x - r, y - r, x + r, y + r), fill=fill)

    def curve(self, points: list[Point], width: float, colour: Colour) -> None:
        flat = self._px(*np.concatenate(points))
        self.draw.line(flat, fill=_rgb(colour), width=max(1, round(width * self.side_px)), joint="curve")

    def arc(self, centre: Point, rx: float, ry: float, first_deg: float, last_deg: float, colour: Colour) -> None:
        """A filled cap of an ellipse between two angles, clockwise from the right."""
        x, y = centre
        self.draw.chord(self._px(x - rx, y - ry, x + rx, y + ry), first_deg, last_deg, fill=_rgb(colour))

    def _px(self, *coordinates: float) -> list[float]:
        return [float(value) * self.side_px for value in coordinates]


def _paint_torso(canvas: Image.Image, look: Look, body: Point, side_px: int) -> None:
    """Lay the cloth, which moves with the body, through a mask of shoulders and trunk."""
    half = 0.185 * look.build
    outline = [(-0.05, 0.395), (0.05, 0.395), (half - 0.03, 0.445), (half, 0.5), (half - 0.02, 1.1)]
    outline += [(0.02 - half, 1.1), (-half, 0.5), (0.03 - half, 0.445)]
    mask = Image.new("L", canvas.size, 0)
    pen = _Pen(ImageDraw.Draw(mask), side_px)
    pen.draw.polygon(pen._px(*np.concatenate([body + np.array(point) for point in outline])), fill=255)
    for side in (-1, 1):
        x, y = body + [side * (half - 0.06), 0.5]
        pen.draw.ellipse(pen._px(x - 0.06, y - 0.06, x + 0.06, y + 0.06), fill=255)
    offset = (round((body[0] - 0.5) * side_px), round(body[1] * side_px))
    canvas.paste(ImageChops.offset(look.cloth, *offset), (0, 0), mask)


def _paint_head(pen: _Pen, look: Look, head: Point, sway: np.ndarray) -> None:
    """Face over skull, hair over both; features shift with the turn of the head, so it looks round."""
    wide, high, turn = 0.085 * look.head, 0.115 * look.head, 0.022 * sway[2]
    for side in (-1, 1):
        pen.flat(head + [side * wide - turn * 0.4, 0.01], 0.014, 0.026, look.skin * 0.8)
    if look.hair_style == 2:
        pen.ellipse(head + [0.3 * turn, -high - 0.02], 0.045, 0.04, look.hair)
    pen.ellipse(head, wide, high, look.skin)
    if look.beard:
        pen.arc(head, wide, high, 25, 155, look.hair * 1.1)
    middle = head + [turn, 0]
    dark = np.array([30.0, 24, 24])
    for side in (-1, 1):
        eye = middle + [side * 0.036 * look.head, -0.012]
        pen.flat(eye, 0.0155, 0.0085 * (1 - sway[4]) + 0.001, np.array([238.0, 236, 232]))
        pen.flat(eye + [0.2 * turn, 0], 0.0075, 0.0075 * (1 - sway[4]) + 0.001, dark)
        brow = middle + [side * 0.036 * look.head, -0.036 - 0.012 * sway[3]]
        pen.curve([brow + [-0.018, 0.003], brow + [0, -0.003], brow + [0.018, 0.003]], 0.009, look.hair * 0.7)
        if look.glasses:
            rim = [eye + 0.026 * np.array([math.cos(a), 0.8 * math.sin(a)]) for a in np.linspace(0, 2 * math.pi, 15)]
            pen.curve(rim, 0.006, dark)
    nose = [[0.4 * turn, -0.005], [0.6 * turn + 0.008, 0.028], [0.5 * turn - 0.006, 0.031]]
    pen.curve([middle + point for point in nose], 0.007, look.skin * 0.72)
    pen.flat(
        middle + [0, 0.062], 0.03, 0.006 + 0.014 * sway[3], np.array([150.0, 70, 66]) * (look.skin.mean() / 255 + 0.3)
    )
    pen.flat(middle + [0, 0.063], 0.02, 0.001 + 0.010 * sway[3], np.array([70.0, 24, 26]))
    if look.hair_style < 3:
        pen.arc(head + [0, -0.012], wide * 1.06, high * 1.02, 196, 344, look.hair)
        pen.arc(head + [0.2 * turn, -0.022], wide * 0.9, high * 0.98, 202, 338, look.hair * 1.25)
        for side in (-1, 1):
            length = 0.16 if look.hair_style == 1 else 0.0
            pen.limb(
                head + [side * wide * 0.97, -0.055],
                head + [side * wide * 1.02, -0.01 + length],
                0.017,
                0.017,
                look.hair,
            )


def _paint_arm(pen: _Pen, look: Look, body: Point, hand: np.ndarray, outward: int) -> None:
    """Upper arm, forearm and hand from the shoulder to a wrist; the elbow falls outward and down."""
    shoulder = body + [outward * (0.185 * look.build - 0.035), 0.475]
    wrist = np.array([body[0] + outward * hand[0], body[1] + hand[1]])
    upper, lower = 0.27, 0.25
    reach = wrist - shoulder
    distance = float(np.clip(np.hypot(*reach), 0.05, 0.99 * (upper + lower)))
    along = reach / max(1e-6, float(np.hypot(*reach)))
    first = (distance**2 + upper**2 - lower**2) / (2 * distance)
    # The elbow hangs towards the pole, outward and down, by the part of it across the arm; the rest of the bend is
    # taken to leave the picture plane. Choosing a side instead would make the elbow jump when the arm passes the pole.
    pole = np.array([0.7 * outward, 0.71])
    normal = pole - along * float(pole @ along)
    bend = 0.9 * math.sqrt(max(0.0, upper**2 - min(first, upper) ** 2))
    elbow = shoulder + along * float(np.clip(first, -0.05, upper)) + normal * bend
    pen.limb(elbow, wrist, 0.041, 0.028, look.skin if look.short_sleeves else look.sleeve)
    pen.limb(shoulder, elbow, 0.058, 0.045, look.sleeve)
    _paint_hand(pen, look.skin, wrist, (wrist - elbow) / max(1e-6, float(np.hypot(*(wrist - elbow)))), hand, outward)


def _paint_hand(pen: _Pen, skin: Colour, wrist: Point, arm: Point, hand: np.ndarray, outward: int) -> None:
    """Palm and five fingers; an extended finger is long and light, a folded one a short dark knuckle."""
    angle = math.atan2(arm[1], arm[0]) - outward * hand[2]
    forward = np.array([math.cos(angle), math.sin(angle)])
    sideways = np.array([-forward[1], forward[0]]) * outward * hand[3]
    palm = wrist + forward * 0.045
    pen.limb(wrist, palm, 0.028, 0.024 + 0.018 * hand[3], skin)
    thumb_tip = palm - sideways * (0.04 + 0.035 * hand[4]) + forward * 0.04 * hand[4]
    pen.limb(wrist - sideways * 0.02 + forward * 0.015, thumb_tip, 0.0145, 0.0115, skin * 0.96)
    for finger in range(4):
        place = (finger - 1.5) / 1.5
        root = palm + sideways * place * 0.031 + forward * (0.022 - 0.006 * abs(place))
        spread = 0.45 * hand[9] * place
        direction = forward + np.array([-forward[1], forward[0]]) * outward * spread
        length = (0.072 - 0.014 * abs(place - 0.2)) * (0.22 + 0.78 * hand[5 + finger])
        pen.limb(root, root + direction * length, 0.0135, 0.0105, skin * (0.88 + 0.12 * hand[5 + finger]))


def _draw_room(draws: Draws, side_px: int) -> Image.Image:
    """A wall with a gradient and a few framed surfaces, and the soft shadow of whoever sits before it."""
    wall_HW = noise_texture(draws)
    wall_HWC = muted_colour(draws) * 0.6 + 70 + 45 * (wall_HW[..., None] - 0.5)
    room = Image.fromarray(np.clip(wall_HWC, 0, 255).astype(np.uint8)).resize(
        (side_px, side_px), Image.Resampling.BICUBIC
    )
    pen = ImageDraw.Draw(room)
    for _ in range(draws.integer(1, 4)):
        left, top = (draws.uniform(-0.1, 0.9, 2) * side_px).astype(int)
        wide, high = (draws.uniform(0.15, 0.45, 2) * side_px).astype(int)
        picture = Image.fromarray(pattern(draws).astype(np.uint8)).resize(
            (int(wide), int(high)), Image.Resampling.BICUBIC
        )
        rim = side_px // 50
        pen.rectangle(
            (left - rim, top - rim, left + wide + rim, top + high + rim), fill=_rgb(muted_colour(draws) * 0.5)
        )
        room.paste(picture, (int(left), int(top)))
    y_HW, x_HW = np.mgrid[:side_px, :side_px] / side_px
    shadow_HW = 1 - 0.45 * np.exp(-(((x_HW - 0.53) / 0.28) ** 2) - ((y_HW - 0.75) / 0.5) ** 2)
    return Image.fromarray((np.asarray(room) * shadow_HW[..., None]).astype(np.uint8))


def _rgb(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (int(min(255, max(0, part))) for part in colour)
    return red, green, blue
