"""How surely a mirrored or turned image is seen, on real sections: by a thumbnail, and by tissue and expression alone.

    python benchmarks/alignment.py

The images of ../shared/data in eight orientations; each is the right one once. Where spots would lie beyond a turned image it is left out.
"""

from __future__ import annotations

import logging
from time import perf_counter

import numpy as np
from PIL import Image
from sections import DATA, load, require_data

from histosge._image import LazyImage, thumbnail
from histosge._section import EVIDENCE_PX, ORIENTATIONS, UPRIGHT, compare, likelier_orientation, read_section

# what turns an image back
BACK = {name: name for name in ORIENTATIONS}
LEFT, RIGHT = "turned by 90 degrees to the left", "turned by 90 degrees to the right"
BACK[LEFT], BACK[RIGHT] = RIGHT, LEFT


def main() -> None:
    require_data()
    logging.getLogger("histosge").setLevel(logging.ERROR)
    print("| section | spots | right, by thumbnail | best wrong | right image warned of | wrong images named | s |")
    print("|---|---|---|---|---|---|---|")
    for path in sorted(DATA.glob("**/counts.h5ad")):
        name = str(path.parent.relative_to(DATA))
        section = read_section(load(name), report=False)
        pixels = np.moveaxis(section.image.read(0, 0, section.image.width_px, section.image.height_px), 0, -1)
        small = np.asarray(Image.fromarray(pixels).resize((600, round(600 * pixels.shape[0] / pixels.shape[1]))))
        scores = {}
        for how, orient in ORIENTATIONS.items():
            turned = np.ascontiguousarray(orient(pixels))
            if turned.shape == pixels.shape:
                agreement = compare(LazyImage(np.moveaxis(turned, -1, 0)), small)
                scores[how] = float("nan") if agreement is None else agreement.upright
        right, wrong = scores.pop(UPRIGHT), max(scores.values())
        tiny, factor = thumbnail(section.image, max_px=EVIDENCE_PX)
        xy, spot = section.xy_px / factor, section.spot_um / section.mpp / factor
        false, named, tried, start = "no", 0, 0, perf_counter()
        for how, orient in ORIENTATIONS.items():
            turned = np.ascontiguousarray(orient(tiny))
            if (xy >= turned.shape[1::-1]).any():
                continue
            found = likelier_orientation(turned, xy, section.expression, spot_cells=spot)
            if how == UPRIGHT:
                false = found or "no"
            else:
                tried, named = tried + 1, named + (found == BACK[how])
        seconds = (perf_counter() - start) / (tried + 1)
        print(
            f"| {name} | {len(xy)} | {right:.3f} | {wrong:.2f} | {false} | {named} of {tried} | {seconds:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
