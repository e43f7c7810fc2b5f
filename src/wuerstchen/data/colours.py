"""Twelve named colours: their sRGB values, and which of them an image shows."""

import numpy as np
from jaxtyping import Float, UInt8

# sRGB values of backgrounds. `name_colours` gives each its own name.
COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (16, 16, 16),
    "white": (255, 255, 255),
    "gray": (132, 132, 132),
    "red": (222, 42, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 218, 55),
    "green": (60, 168, 72),
    "light blue": (135, 218, 245),
    "blue": (42, 102, 228),
    "purple": (134, 62, 202),
    "pink": (250, 130, 192),
    "brown": (115, 70, 36),
}

NAMES = tuple(COLOURS)

# Thresholds found by coordinate search on an earlier naming of the emoji images. They give 95 % of the
# coloured images the same names (hue in degrees, the rest from 0 to 1).
_HUE_ENDS = (15.0, 42.0, 68.0, 165.0, 200.0, 253.0, 290.0, 344.0, 360.0)
_HUE_NAMES = ("red", "orange", "yellow", "green", "light blue", "blue", "purple", "pink", "red")
_HUE_INDICES = np.array([NAMES.index(name) for name in _HUE_NAMES])
_DARK = 0.3  # value below which every pixel is black
_PALE = 0.18  # saturation below which a pixel has no hue
_LIGHT = 0.85  # value from which a pixel without hue is white
_BROWN_HUES, _BROWN_VALUE = (2.0, 33.0), 0.475  # a dark orange is brown
_PINK_SATURATION, _PINK_VALUE = 0.56, 0.78  # a pale, light red is pink

_MIN_FRACTION = 0.18  # of the opaque pixels for a colour to be named
_MAX_COLOURS = 2


def to_hsv(rgb: UInt8[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """Hue in degrees [0, 360), saturation and value in [0, 1] (Smith 1978, the hexcone model)."""
    channels = rgb.astype(np.float32)
    red, green, blue = channels.T
    value = channels.max(axis=1)
    spread = value - channels.min(axis=1)
    safe = np.maximum(spread, 1)
    hue = np.where(
        value == red,
        (green - blue) / safe % 6,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return np.stack([hue * 60, spread / np.maximum(value, 1), value / 255], axis=1)


def classify(rgb: UInt8[np.ndarray, "n 3"]) -> np.ndarray:
    """The index in ``NAMES`` of each pixel's colour, shape (n,)."""
    hue, saturation, value = to_hsv(rgb).T
    index = _HUE_INDICES[np.searchsorted(_HUE_ENDS[:-1], hue, side="right")]
    is_red = index == NAMES.index("red")
    index[is_red & (saturation < _PINK_SATURATION) & (value >= _PINK_VALUE)] = NAMES.index("pink")
    in_brown = (hue >= _BROWN_HUES[0]) & (hue < _BROWN_HUES[1]) & (value < _BROWN_VALUE)
    index[in_brown] = NAMES.index("brown")
    hueless = saturation < _PALE
    index[hueless] = NAMES.index("gray")
    index[hueless & (value >= _LIGHT)] = NAMES.index("white")
    index[value < _DARK] = NAMES.index("black")
    return index


def name_colours(rgba: UInt8[np.ndarray, "h w 4"]) -> list[str]:
    """The one or two colours that cover most of the opaque pixels, the larger first.

    A colour is named if it covers at least 18 %. A very colourful image has none, and neither has an image
    without opaque pixels.
    """
    opaque = rgba[rgba[..., 3] > 128][:, :3]
    if len(opaque) == 0:
        return []
    fractions = np.bincount(classify(opaque), minlength=len(NAMES)) / len(opaque)
    order = np.argsort(-fractions, kind="stable")[:_MAX_COLOURS]
    return [NAMES[i] for i in order if fractions[i] >= _MIN_FRACTION]


_LINEAR = np.where(
    np.arange(256) <= 0.04045 * 255,
    np.arange(256) / 255 / 12.92,
    ((np.arange(256) / 255 + 0.055) / 1.055) ** 2.4,
).astype(np.float32)
# Rows give X, Y and Z relative to the white point D65 (IEC 61966-2-1).
_TO_XYZ = np.array(
    [
        [0.4124 / 0.9505, 0.3576 / 0.9505, 0.1805 / 0.9505],
        [0.2126, 0.7152, 0.0722],
        [0.0193 / 1.089, 0.1192 / 1.089, 0.9505 / 1.089],
    ],
    dtype=np.float32,
)


def to_lab(rgb: UInt8[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """CIE 1976 L*a*b* of sRGB pixels: L* in [0, 100]; a distance of about 2 is just noticeable."""
    xyz = _LINEAR[rgb] @ _TO_XYZ.T
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = root.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
