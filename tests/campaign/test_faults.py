"""Faults that are planted into the code, one at a time: a test of another file fails for each of them.

These are chosen, since each would give wrong results silently; benchmarks/mutants.py draws its faults.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# what is wrong then: the file, its text, what stands there instead, and tests that find it
FAULTS = {
    "x and y of a tile are swapped": (
        "_image/_tiles.py",
        "block.pixels[:, y : y + tile_px, x : x + tile_px]",
        "block.pixels[:, x : x + tile_px, y : y + tile_px]",
        "test_tiles.py::test_a_place_sees_the_same_pixels_in_any_block",
    ),
    "a tile is a pixel off": (
        "_image/_tiles.py",
        "tile_px / 2 + 0.5)",
        "tile_px / 2 + 1.5)",
        "test_tiles.py::test_a_tile_is_centred_on_its_place",
    ),
    "an image is resampled half a pixel off": (
        "_image/_resample.py",
        "centre, reach = (pixel + 0.5) * scale",
        "centre, reach = (pixel + 1.0) * scale",
        "test_resample.py::test_known_truth",
    ),
    "an image is read upside down": (
        "_image/_lazy.py",
        "self.data[:, top:bottom, left:right]))",
        "self.data[:, top:bottom, left:right]))[:, ::-1]",
        "test_image.py::test_read_is_a_window_of_the_image_on_white",
    ),
    "the scale is doubled": (
        "_section/_section.py",
        "mpp=scale.mpp,",
        "mpp=scale.mpp * 2,",
        "test_section.py::test_known_truth",
    ),
    "rows of a table are matched by their place": (
        "_section/_section.py",
        "element = sdata.shapes[spots_key].loc[instances]",
        "element = sdata.shapes[spots_key].iloc[: len(instances)]",
        "test_section.py::test_known_truth",
    ),
    "spots keep the order of the table": (
        "_section/_section.py",
        "return first[np.lexsort((x, y))]",
        "return np.arange(len(xy_px))",
        "test_section.py::test_order_of_rows_does_not_matter",
    ),
    "a logarithm is taken twice": (
        "_section/_values.py",
        "scaled.log1p())",
        "scaled.log1p().log1p())",
        "test_section.py::test_known_truth",
    ),
    "embeddings of a table are matched by their place": (
        "_section/_write.py",
        "rows = pd.Index(table.obs[_keys.INSTANCE]).get_indexer(pd.Index(targets.instances))",
        "rows = np.arange(len(targets))",
        "test_predict.py::test_embeddings_in_another_order_are_used_by_name",
    ),
    "embeddings of other settings are used": (
        "_section/_write.py",
        "if not all(same.values()) or (rows < 0).any() or moved:",
        "if (rows < 0).any() or moved:",
        "test_predict.py::test_embeddings_of_something_else_are_not_used",
    ),
    "embeddings of places that moved are used": (
        "_section/_write.py",
        "(rows < 0).any() or moved:",
        "(rows < 0).any():",
        "test_predict.py::test_embeddings_of_something_else_are_not_used",
    ),
    "places beside a spot count as inside": (
        "_section/_write.py",
        '["in_spot"] = distance_um <= radius_um',
        '["in_spot"] = distance_um <= 2 * radius_um',
        "test_predict.py::test_obs",
    ),
    "a spot is its own neighbour": (
        "_geometry/_neighbours.py",
        "present = index != np.asarray(exclude)[:, None]",
        "present = index >= 0",
        "test_geometry.py::test_nearest_spots_against_brute_force",
    ),
    "spots of other sections are neighbours": (
        "_geometry/_neighbours.py",
        "not _one_group(groups, spot_groups)",
        "False",
        "test_geometry.py::test_nearest_spots_of_a_group_against_brute_force",
    ),
    "shares of an area do not add up to one": (
        "_geometry/_areas.py",
        "data.append(share / np.bincount(own, share, len(part))[own])",
        "data.append(share)",
        "test_coverage.py::test_square_on_a_cell_is_that_cell_alone",
    ),
    "folds depend on how a section lies on its slide": (
        "_statistics/_splits.py",
        "placed[section == number] = upright(xy_um[section == number])",
        "placed[section == number] = xy_um[section == number]",
        "test_splits.py::test_blocks_turn_with_the_section",
    ),
    "genes are chosen with held-out spots": (
        "_model/_genes.py",
        "known = [fold != f for f in range(n_folds)]",
        "known = [fold >= 0 for f in range(n_folds)]",
        "test_model.py::test_genes_of_a_fold_are_chosen_without_its_spots",
    ),
    "heads are trained on the spots that they are scored on": (
        "_model/_crossfit.py",
        "known = complete(spots.take(torch.as_tensor(np.flatnonzero(~inside), device=device)))",
        "known = complete(spots)",
        "test_model.py::test_a_model_finds_what_can_be_known",
    ),
    "held-out predictions get into other rows": (
        "_model/_crossfit.py",
        "parts[task.name][fold == task.left_out] = each.held_out",
        "parts[task.name][fold == task.left_out] = each.held_out[::-1]",
        "test_model.py::test_a_model_finds_what_can_be_known",
    ),
    "a fold scales its own errors": (
        "_statistics/_intervals.py",
        "_fit(predicted[~inside], error[~inside])",
        "_fit(predicted[inside], error[inside])",
        "test_calibration.py",
    ),
    "ends of an interval are swapped": (
        "_statistics/_intervals.py",
        "    return sd, lower, upper\n",
        "    return sd, upper, lower\n",
        "test_calibration.py::test_constant_predictions_get_the_intervals_of_mapie",
    ),
    "the quantile of the errors forgets the new place": (
        "_statistics/_intervals.py",
        "math.ceil((n + 1) * level - 1e-9)",
        "math.ceil(n * level - 1e-9)",
        "test_calibration.py::test_constant_predictions_get_the_intervals_of_mapie",
    ),
    "sections without spots get intervals of others": (
        "_model/_predict.py",
        "intervals=intervals if section.measured else None",
        "intervals=intervals",
        "test_bare.py::test_no_intervals_where_nothing_was_measured",
    ),
    "a gene is filled in by what is held out": (
        "_model/_crossfit.py",
        "known = complete(spots.take(torch.as_tensor(np.flatnonzero(~inside), device=device)))",
        "known = complete(spots).take(torch.as_tensor(np.flatnonzero(~inside), device=device))",
        "test_union.py::test_held_out_spots_fill_in_nothing",
    ),
    "intervals of genes that a section does not measure": (
        "_model/_predict.py",
        'intervals = intervals.where(var["measured"].to_numpy())',
        "pass",
        "test_union.py::test_no_intervals_for_what_a_section_does_not_measure",
    ),
    "a part of a store is written twice": (
        "_model/_predict.py",
        "if part not in store.done]\n    client",
        "if part not in store.done or part == 0]\n    client",
        "test_bins.py::test_an_interrupted_run_continues",
    ),
    "embeddings of workers get into other rows": (
        "_embedding/_embedder.py",
        "out[parts[i]] = values",
        "out[parts[i][::-1]] = values",
        "test_cluster.py::test_embeddings_are_the_same",
    ),
    "a worker reads another file, or none": (
        "_embedding/_on_workers.py",
        "if found != self.pixels:",
        "if False:",
        "test_cluster.py::test_file_that_workers_do_not_see",
    ),
    "an image travels to the workers": (
        "_embedding/_on_workers.py",
        "if size > _MOST_IN_MEMORY:",
        "if False:",
        "test_cluster.py::test_image_in_memory",
    ),
    "heads learn from more spots than max_spots": (
        "_model/_draw.py",
        "if n >= len(section.xy_px):",
        "if True:",
        "test_drawing.py",
    ),
    "a store lacks parts": (
        "_section/_store.py",
        "if part not in self.done]\n        if missing:",
        "if part not in self.done]\n        if False:",
        "test_store.py::test_incomplete",
    ),
    "the store of another run is continued": (
        "_section/_store.py",
        "if key not in old or key not in new or old[key] != new[key]",
        "if False",
        "test_store.py::test_another_run_is_refused",
    ),
    "a store has two owners": (
        "_section/_claim.py",
        "return same and process.status() != psutil.STATUS_ZOMBIE",
        "return False",
        "test_claim.py::test_the_second_is_refused",
    ),
    "a dead owner keeps a store": (
        "_section/_claim.py",
        "except psutil.NoSuchProcess:\n                return False",
        "except psutil.NoSuchProcess:\n                return True",
        "test_claim.py::test_a_dead_owner_is_replaced",
    ),
    "the pitch in a saved model is a constant": (
        "_model/_files.py",
        '"pitch_um": model.spots.pitch_um',
        '"pitch_um": 100.0',
        "test_model.py::test_round_trip_keeps_the_pitch",
    ),
    "heads of a saved model change places": (
        "_model/_files.py",
        "heads.append((one.weight, head))",
        "heads.insert(0, (one.weight, head))",
        "test_model.py::test_round_trip",
    ),
    "a changed model is loaded": (
        "_model/_files.py",
        'if about.get("sha256") != (found := digest(text, tensors)):',
        'if about.get("sha256") == (found := ""):',
        "test_model_files.py::test_one_byte_is_enough",
    ),
    "a model of another format is loaded": (
        "_model/_files.py",
        'if about["histosge_format"] != FORMAT:',
        "if False:",
        "test_model_files.py::test_loading_a_newer_format",
    ),
    "genes of a context are taken by their place": (
        "_model/_model.py",
        "self.context_genes.get_indexer(self.genes)",
        "np.arange(len(self.genes))",
        "test_predict.py::test_recovers_the_truth_between_the_spots test_model.py::test_predictions_are_expression_of_the_genes_in_order",
    ),
    "expression is below zero": (
        "_model/_model.py",
        "each = expansion(values[rows]).clamp_min_(0)",
        "each = expansion(values[rows])",
        "test_own_head.py::test_expression_is_never_below_zero",
    ),
    "joined encoders change places": (
        "_model/_projection.py",
        "embedding.tensor_split(splits, dim=1)))) if splits",
        "embedding.tensor_split(splits, dim=1)[::-1]))) if splits",
        "test_joined.py::test_each_encoder_gets_the_same_total_variance",
    ),
    "weights of another network are loaded": (
        "_encoders/_weights.py",
        "if not missing and not extra:",
        "if True:",
        "test_encoders.py::test_weights_that_leave_parts_out",
    ),
    "weights that are not finite are loaded": (
        "_encoders/_weights.py",
        "        if broken:",
        "        if False:",
        "test_encoders.py::test_weights_that_are_not_finite",
    ),
    "an encoder is known without its weights": (
        "_encoders/_identity.py",
        "{name: _hash(part) for name, part in sorted(_parts(encoder).items())}",
        "{}",
        "test_encoders.py::test_identity_is_that_of_the_weights",
    ),
    "weights that changed keep their digest": (
        "_encoders/_identity.py",
        "if known is not None and known[0] == looks:",
        "if known is not None:",
        "test_encoders.py::test_digest_is_that_of_the_weights",
    ),
    "embeddings of other areas are used": (
        "_embedding/_block_cache.py",
        "digest.update(self._areas.take(block.rows).digest())",
        "pass",
        "test_dense.py test_cache.py",
    ),
    "spots get the embeddings of other targets": (
        "_embedding/_embedder.py",
        "at_spots[targets.spot_index[at_spot]] = at_targets[at_spot]",
        "at_spots[:] = at_targets[at_spot]",
        "test_predict.py::test_recovers_the_truth_between_the_spots",
    ),
}

# in a process of its own, which has imported all that is not histosge; a fork for each fault
DRIVER = """
import importlib.machinery, json, os, sys, warnings
warnings.simplefilter("ignore")
import anndata, geopandas, hypothesis, pytest, scanpy, spatialdata, timm, torch

def work(path, text, instead, tests, ended):
    source = open(path, encoding="utf-8").read()
    if source.count(text) != 1:
        return f"cannot be planted: its text occurs {source.count(text)} times"
    code = compile(source.replace(text, instead), path, "exec")
    read = importlib.machinery.SourceFileLoader.get_code
    importlib.machinery.SourceFileLoader.get_code = lambda self, name: code if self.path == path else read(self, name)

    class Failed:
        by = ""
        def pytest_runtest_logreport(self, report):
            if report.when == "call" and report.failed:
                self.by = report.nodeid

    for fd in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
    # the libraries are imported already, and their assertions cannot be rewritten
    quiet = "-x -q --tb=no --assert=plain -p no:cacheprovider -p no:xdist -W ignore::pytest.PytestAssertRewriteWarning"
    failed = Failed()
    status = pytest.main([*quiet.split(), "-m", "not slow", *tests], plugins=[failed])
    return f"found by {failed.by}" if status == 1 and failed.by else f"not found ({status})"

for what, *fault in json.loads(sys.argv[1]):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, work(*fault, writing).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        print(json.dumps([what, answer.read()]), flush=True)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_planted_faults(tries, tally):
    cases = [
        [what, str(ROOT / "src" / "histosge" / file), text, instead, [f"tests/{test}" for test in tests.split()]]
        for what, (file, text, instead, tests) in FAULTS.items()
    ][:: tries(8, 1)]
    _, path, text, _, tests = cases[0]
    without = ["nothing", path, text, text, tests]
    ours = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, json.dumps([without, *cases])]
    done = subprocess.run(command, cwd=ROOT, env=ours, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert found.pop("nothing") == "not found (0)"
    assert list(found) == [what for what, *_ in cases]
    for outcome in found.values():
        tally("planted faults")["found" if outcome.startswith("found") else "not found"] += 1
    assert {what: outcome for what, outcome in found.items() if not outcome.startswith("found")} == {}


def test_faults_can_be_planted():
    """Where this fails the code has moved on: plant the fault where it is now."""
    texts = {what: (ROOT / "src" / "histosge" / file).read_text(encoding="utf-8").count(text)
             for what, (file, text, _, _) in FAULTS.items()}  # fmt: skip
    assert {what: n for what, n in texts.items() if n != 1} == {}
