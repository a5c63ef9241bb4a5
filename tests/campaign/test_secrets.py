"""A planted token of the hub is in no log, error, store, model or cache."""

from __future__ import annotations

import pytest

import histosge as sge
from histosge._encoders import EncoderAccessError

TOKEN = "hf_" + "PlantedToken" * 3


def test_a_planted_token_stays_where_it_is(sdata, tmp_path, monkeypatch, hub_client, cache_folder, log, capfd, tally):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub_client(HF_HUB_OFFLINE=False, ENDPOINT="http://127.0.0.1:9", HF_HUB_ETAG_TIMEOUT=0.2)
    hub_client(HUGGINGFACE_CO_URL_TEMPLATE="http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}")
    from huggingface_hub import get_token

    assert get_token() == TOKEN
    said = []
    with sge.settings.override(verbosity=3):
        for name in ("uni", "midnight", "hf-hub:org/name"):
            with pytest.raises(EncoderAccessError) as told:
                sge.load_encoder(name)
            said += [str(told.value), repr(told.value)]
        with pytest.raises(ValueError, match="runs code of others") as told:
            sge.load_encoder("hibou-b")
        said.append(str(told.value))
        model = sge.tl.fit(sdata, encoder="stain-texture", head="ridge", genes=5, progress=False)
        model.save(tmp_path / "model")
        sge.tl.predict(sdata, model=model, store=tmp_path / "out.zarr", progress=False)
    said += [log.text, *capfd.readouterr()]
    assert not any(TOKEN in text for text in said)
    written = [p for folder in (tmp_path, cache_folder) for p in folder.rglob("*") if p.is_file()]
    assert len(written) > 10
    assert [p for p in written if TOKEN.encode() in p.read_bytes()] == []
    tally("a planted token")["found nowhere"] += len(said) + len(written)
