"""Files of instruments → ``SpatialData``, one file a family."""

from __future__ import annotations

from histosge._readers._images import image_size, names_other_image, open_pixels, orientation, parse_image
from histosge._readers._open import open_section
from histosge._readers._opened import Source, are_many, name_of, opened, path_of
from histosge._readers._orientation import Turn
