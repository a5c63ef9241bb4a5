"""The model: gene choice, fit, cross-fit, prediction, evaluation."""

from __future__ import annotations

from histosge._model._conservation import check_conservation
from histosge._model._context import UNMEASURED, Context, stack_sections
from histosge._model._crossfit import Scores, compare, cross_fit, score, summary
from histosge._model._draw import check_max_spots, drawn_rows, spots_to_draw
from histosge._model._evaluate import evaluate, predict_trial, score_genes
from histosge._model._files import MODEL_FILE, ModelError, contents, write_file
from histosge._model._fit import check_arguments, fit_model
from histosge._model._genes import MIN_SHARE, choose_genes
from histosge._model._model import Model
from histosge._model._predict import (
    Predictor,
    check_memory,
    load_fitted,
    open_store,
    save_fitted,
    write_parts,
)
from histosge._model._projection import Projection
from histosge._model._trials import PROTOCOLS, SPLITS, Measured, Plan, Trial, pseudo_trial, trials
