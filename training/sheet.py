"""Contact sheets: images in rows with their prompts beneath, for a reader to look at."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 8  # pixels around each image
GAP = 4  # pixels between the frames of a video
FONT = 13  # pixels
LINES = 4  # of a caption; the rest is cut with an ellipsis


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int, size: int = 160
) -> Image.Image:
    """Pictures, scaled to `size` pixels square, in rows of `columns` on white with their captions beneath.

    ValueError unless each image has one caption.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    font = ImageFont.load_default(FONT)
    characters = int(size / font.getlength("abcdefghij ") * 11)
    line = FONT + 3
    wide, high = size + 2 * MARGIN, size + 2 * MARGIN + LINES * line
    sheet = Image.new("RGB", (columns * wide, -(-len(images) // columns) * high), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = i % columns * wide + MARGIN, i // columns * high + MARGIN
        sheet.paste(image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS), (left, top))
        draw.rectangle((left - 1, top - 1, left + size, top + size), outline="lightgray")
        for row, text in enumerate(
            textwrap.wrap(caption, characters, max_lines=LINES, placeholder=" \u2026")
        ):
            draw.text((left, top + size + 2 + row * line), text, fill="black", font=font)
    return sheet


def filmstrip(frames: Sequence[Image.Image], count: int = 4) -> Image.Image:
    """`count` evenly spaced frames of a video, the first and the last among them, two by two in one square
    image.
    """
    chosen = [frames[round(i * (len(frames) - 1) / (count - 1))] for i in range(count)]
    wide, high = (side + GAP for side in chosen[0].size)
    columns = max(1, round(count**0.5))
    strip = Image.new("RGB", (columns * wide - GAP, -(-count // columns) * high - GAP), "white")
    for i, frame in enumerate(chosen):
        strip.paste(frame, (i % columns * wide, i // columns * high))
    return strip
