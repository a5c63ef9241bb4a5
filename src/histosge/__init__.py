"""Super-resolved spatial transcriptomics from H&E images and Visium-like spots, in scverse."""

__version__ = "0.1.0"
