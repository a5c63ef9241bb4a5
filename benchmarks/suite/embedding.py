"""`tl.embed` with a tiny network: what is around the forward passes."""

from __future__ import annotations


class Embed:
    """Spots of a synthetic section."""

    params = ([10, 30],)
    param_names = ("rows",)
    timeout = 120

    def setup(self, rows: int) -> None:
        import timm
        import torch

        import histosge as sge

        sge.settings.verbosity = 0
        if hasattr(sge.settings, "cache_gb"):
            sge.settings.cache_gb = 0
        torch.manual_seed(0)
        module = timm.create_model("test_vit", pretrained=False, num_classes=0)
        spec = sge.EncoderSpec(name="tiny", mpp=1.0, tile_px=160, embed_dim=module.num_features)
        self.encoder = sge.load_encoder(module, spec=spec)
        self.sdata = sge.datasets.synthetic(n_rows=rows, n_cols=rows, n_genes=3)

    def time_embed(self, rows: int) -> None:
        self._embed()

    def time_embed_densely(self, rows: int) -> None:
        self._embed(dense=True)

    def peakmem_embed(self, rows: int) -> None:
        self._embed()

    def _embed(self, **options: bool) -> None:
        import histosge as sge

        options |= {"inplace": False, "progress": False}
        sge.tl.embed(self.sdata, encoder=self.encoder, device="cpu", **options)
