"""Tables as people hand them on: counts or what was made of them, in any type, beside antibodies, in X, a layer or raw."""

from __future__ import annotations

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import TableModel
from tests.listed import read_as_listed

import histosge as sge
from histosge._section import UNIT, UNIT_AS_GIVEN

LEARN = {"encoder": "stain-texture", "head": "ridge", "n_folds": 2}
FAST = LEARN | {"target_key": "spots"}


def with_table(sdata: SpatialData, table: ad.AnnData, *, region: str = "spots") -> SpatialData:
    """The section with another table; its elements are shared."""
    link = {"region": region, "region_key": "region", "instance_key": "spot_id"}
    table.uns.pop("spatialdata_attrs", None)
    return SpatialData(
        images=dict(sdata.images),
        shapes=dict(sdata.shapes),
        tables=dict(sdata.tables) | {"table": TableModel.parse(table, **link)},
    )


def holding(sdata: SpatialData, x, *, genes=None, uns=None, dtype=None) -> SpatialData:
    """The section with other values in X, of some of its genes."""
    table = sdata["table"].copy()
    if genes is not None:
        table = table[:, genes].copy()
    table.X = np.asarray(x, dtype=dtype) if dtype is not None else x
    table.uns.update(uns or {})
    return with_table(sdata, table)


def per_10k(x) -> np.ndarray:
    """By hand: log1p of counts per 10,000."""
    return np.log1p(x / x.sum(1, keepdims=True) * 1e4)


@pytest.fixture(scope="module")
def embedding(_section_once):
    return sge.tl.embed(_section_once, encoder="stain-texture", inplace=False)


@pytest.fixture
def embedded(sdata, embedding):
    """The section with embeddings of its spots, at which everything is predicted then."""
    sdata["spots_stain-texture"] = embedding
    return sdata


@pytest.fixture
def counts(sdata):
    return sdata["table"].X.toarray().astype(float)


@pytest.fixture
def shallow(counts):
    """One count in two hundred: most genes have none, one or two in a spot."""
    few = np.random.default_rng(0).binomial(counts.astype(int), 0.005).astype(float)
    assert (few == 0).mean() > 0.1
    return few


# ----------------------------------------------------------------------------------- normalised, and logarithms of it

UNDONE = {
    "x": lambda y: y,
    "log1p": np.log1p,
    "log2": lambda y: np.log2(1 + y),
    "log10": lambda y: np.log10(1 + y),
    "log to base 3": lambda y: np.log(1 + y) / np.log(3),
    "square root": np.sqrt,
    "log1p twice": lambda y: np.log1p(np.log1p(y)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("total", [1.0, 150.0, 1e4, 1e6])
@pytest.mark.parametrize("done", UNDONE)
def test_what_was_done_to_normalised_counts_is_undone(sdata, counts, shallow, done, total, dtype):
    """By the sums of spots alone; only an odd base has to be named."""
    uns = {"log1p": {"base": 3}} if "3" in done else {}
    for k in (counts, shallow):
        y = k / k.sum(1, keepdims=True) * total
        x = UNDONE[done](y)
        if dtype == np.float16 and (y.max() > 60_000 or y[y > 0].min() < 1e-4 or ("twice" in done and total > 1e4)):
            continue  # beyond what half precision holds
        if dtype == np.float16 and (done, total) == ("square root", 1):
            continue  # refused, below: as well rows of unit length
        section = read_as_listed(holding(sdata, x, dtype=dtype, uns=uns), report=False)
        # x (at most 20) is off by half a unit in the last place, so its exponential by x times as much, and that of a twice
        # taken logarithm once more; both, of the value and of its spot's sum, and a few roundings on the way
        atol = 4 * 20 * np.finfo(dtype).eps
        np.testing.assert_allclose(section.expression.toarray(), per_10k(k), atol=atol)
        assert section.values.unit == UNIT
        assert section.log_normalised == ("log" in done)


@pytest.mark.parametrize("marked", [True, False])
def test_values_in_our_unit_are_taken_as_they_are(sdata, counts, marked, log):
    x = per_10k(counts).astype(np.float32)
    section = read_as_listed(holding(sdata, x, uns={"log1p": {}} if marked else None), report=False)
    np.testing.assert_array_equal(section.expression.toarray(), x)
    assert section.values.input == "log-normalised"
    assert "log-normalised already (every spot sums to 10,000 before log1p)" in log.text


def test_what_is_found_is_said(sdata, counts, log):
    y = counts / counts.sum(1, keepdims=True)
    for x, said in (
        (np.log2(1 + 1e4 * y), "table 'table' holds log2(1 + x) of counts scaled to 10,000: converted to log1p of counts per"),
        (np.log1p(1e6 * y), "table 'table' holds log1p of counts scaled to 1,000,000: converted"),
        (np.sqrt(1e4 * y), "table 'table' holds the square root of counts scaled to 10,000: converted"),
        (150 * y, "table 'table' holds counts scaled to 150: scaled to 10,000, then log1p"),
        (np.log1p(counts), "table 'table' holds log1p of counts: converted"),
        (counts / 100, "table 'table': values that are not whole numbers (largest "),
    ):  # fmt: skip
        log.clear()
        read_as_listed(holding(sdata, x), report=False)
        assert said in log.text


def test_the_sums_tell_whatever_uns_says(sdata, counts):
    """uns["log1p"] stays behind where X was replaced."""
    for x, uns in (
        (np.log1p(counts / counts.sum(1, keepdims=True) * 1e4), {"base": 2}),
        (counts, {}),
        (counts * 0.93, {}),
    ):
        section = read_as_listed(holding(sdata, x, uns={"log1p": uns}), report=False)
        np.testing.assert_allclose(section.expression.toarray(), per_10k(counts), atol=1e-5)


def test_logarithms_of_counts_that_were_not_normalised(sdata, counts, shallow):
    for k in (counts, shallow):
        for done in ("log1p", "log2", "square root"):
            section = read_as_listed(holding(sdata, UNDONE[done](k), dtype=np.float32), report=False)
            np.testing.assert_allclose(section.expression.toarray(), per_10k(k), atol=2e-5)
            assert not section.log_normalised


def test_rounded_to_two_decimals(sdata, counts, shallow):
    """As text files have them: of logarithms a value is off by 0.005, and a sum by no more."""
    for k in (counts, shallow):
        for x, atol in ((np.round(per_10k(k), 2), 0.01), (np.round(k / 100, 2), 1e-5)):
            section = read_as_listed(holding(sdata, x), report=False)
            np.testing.assert_allclose(section.expression.toarray(), per_10k(k), atol=atol)


# ------------------------------------------------------------------------------------------------- corrected counts


@pytest.mark.parametrize("largest", [None, 15.0, 3.0, 0.5])
def test_corrected_counts_are_no_logarithms_however_small(sdata, counts, shallow, largest, log):
    """As ambient correction leaves them: fractions, and most of them below 20 on a shallow section."""
    rng = np.random.default_rng(1)
    for k in (counts, shallow):
        x = np.maximum(k - 0.1 * k.mean(0), 0) * rng.uniform(0.9, 1, k.shape)
        x *= 1 if largest is None else largest / x.max()
        log.clear()
        section = read_as_listed(holding(sdata, x), report=False)
        np.testing.assert_allclose(section.expression.toarray(), per_10k(x), atol=1e-5)
        assert section.values.input == "corrected counts, normalised to 10,000 and log1p"
        assert "are treated as corrected counts" in log.text
        if largest is not None:  # nothing but their kind speaks for it
            assert 'if they are, name the base, uns["log1p"]' in log.text


def test_counts_times_a_factor(sdata, counts, log):
    for factor in (0.0093, 0.93, 1.5, np.random.default_rng(0).uniform(0.1, 2, (len(counts), 1))):
        section = read_as_listed(holding(sdata, counts * factor), report=False)
        assert section.counts is None  # their noise is not that of counts
        np.testing.assert_allclose(section.expression.toarray(), per_10k(counts), atol=1e-5)
    assert "holds counts times a factor" in log.text


def test_nothing_but_zeros_and_ones(sdata, counts, log):
    read_as_listed(holding(sdata, (counts > np.median(counts)).astype(float)), report=False)
    assert "holds nothing but 0 and 1: these are read as counts. Are they counts?" in log.text


# ---------------------------------------------------------------------------------- logarithms without all their genes


@pytest.mark.parametrize("uns", [{}, {"log1p": {}}, {"log1p": {"base": None}}])
@pytest.mark.parametrize("base", [np.e, 2.0, 10.0])
def test_genes_left_out_after_the_logarithm(sdata, counts, shallow, base, uns, log):
    """What spots were scaled to is not known any more: their scale is kept, in natural logarithms, and said to be given."""
    genes = np.arange(0, 20, 2)
    for k in (counts, shallow):
        wanted = per_10k(k)[:, genes]
        written = {"log1p": {"base": np.float64(base)}} if uns and base != np.e else uns
        section = read_as_listed(
            holding(sdata, (wanted / np.log(base)).astype(np.float32), genes=genes, uns=written), report=False
        )
        np.testing.assert_allclose(section.expression.toarray(), wanted, atol=2e-5)
        assert section.values.unit == UNIT_AS_GIVEN
        assert section.values.input.endswith("of normalised counts, total unknown")
        assert "the scale is kept as given" in log.text


def test_of_corrected_counts_only_uns_tells(sdata, counts, shallow):
    rng = np.random.default_rng(1)
    genes = np.arange(0, 20, 2)
    for k in (counts, shallow):
        wanted = per_10k(k * rng.uniform(0.7, 1, k.shape))[:, genes]
        section = read_as_listed(holding(sdata, wanted, genes=genes, uns={"log1p": {"base": None}}), report=False)
        np.testing.assert_allclose(section.expression.toarray(), wanted, rtol=1e-6)
        with pytest.raises(
            ValueError, match=r"are no counts, since .*Name the layer .*uns\[\"log1p\"\] = {\"base\": None}"
        ):
            read_as_listed(holding(sdata, wanted, genes=genes), report=False)


def test_genes_are_the_lower_the_more_of_them_a_spot_has(sdata, counts):
    """What tells logarithms from counts of a very shallow section, whose sums differ."""
    rng = np.random.default_rng(0)
    depth = rng.uniform(0.002, 0.03, (len(counts), 1))
    k = rng.binomial(counts.astype(int), depth) * rng.uniform(0.7, 1, counts.shape)
    k[k.sum(1) == 0, 0] = 1
    genes = np.arange(0, 20, 2)
    with pytest.raises(ValueError, match=r"since genes are the lower, the more of them a spot has"):
        read_as_listed(holding(sdata, per_10k(k)[:, genes], genes=genes), report=False)
    section = read_as_listed(holding(sdata, k / 10), report=False)
    assert section.values.input.startswith("corrected counts")


def test_square_roots_and_millions_without_all_their_genes(sdata, counts):
    """Their counts are found, and so the sum of the genes that are left."""
    genes = np.arange(0, 20, 2)
    y = counts / counts.sum(1, keepdims=True) * 1e6
    for x in (y, np.sqrt(y)):
        section = read_as_listed(holding(sdata, x[:, genes].astype(np.float32), genes=genes), report=False)
        np.testing.assert_allclose(section.expression.toarray(), per_10k(counts[:, genes]), atol=2e-5)
        assert section.values.unit == UNIT


def test_rows_of_unit_length_are_no_square_roots(sdata, counts):
    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    section = read_as_listed(holding(sdata, unit(counts)), report=False)
    np.testing.assert_allclose(section.expression.toarray(), per_10k(counts), atol=1e-5)
    with pytest.raises(ValueError, match="are no counts"):
        read_as_listed(holding(sdata, unit(per_10k(counts))), report=False)


# --------------------------------------------------------------------------------------------------------- refused


def test_scaled_genes_are_refused(sdata, counts):
    x = per_10k(counts)
    for scaled, match in (
        (
            (x - x.mean(0)) / x.std(0),
            r"hold \d+ negative values .*Pass raw counts or log-normalised values, not scaled ones",
        ),
        (
            x / x.std(0),
            r"nearly all genes have the standard deviation 1\. They were scaled gene by gene\. Name the layer",
        ),
        (x / x.max(0), r"nearly all genes have the maximum 1\. They were scaled gene by gene"),
    ):
        for uns in ({}, {"log1p": {}}):
            with pytest.raises(ValueError, match=match + r".*this table has no other"):
                read_as_listed(holding(sdata, scaled, uns=uns), report=False)


@pytest.mark.parametrize("dtype", [object, str, bool, complex])
def test_types_that_are_no_counts(sdata, counts, dtype):
    table = sdata["table"].copy()
    table.layers["other"] = counts.astype(dtype) if dtype is not str else counts.astype(str).astype(object)
    with pytest.raises(
        ValueError, match=r"layer 'other' holds values of type .*Name the layer that holds numbers, layer="
    ):
        read_as_listed(with_table(sdata, table), layer="other", report=False)


def test_an_error_names_the_layers_that_hold_whole_numbers(sdata, counts):
    table = sdata["table"].copy()
    table.layers["counts"], table.layers["log"] = counts, per_10k(counts)
    table.raw = table.copy()
    table.X = counts - counts.mean(0)
    told = r"whole numbers are in layer='counts' and layer='raw' \(table\.raw\.X\)"
    with pytest.raises(ValueError, match=told):
        read_as_listed(with_table(sdata, table), report=False)
    del table.layers["counts"], table.raw
    with pytest.raises(ValueError, match=r"the others, \['log'\], hold no whole numbers"):
        read_as_listed(with_table(sdata, table), report=False)
    table.layers["log"] = table.X
    table.X = counts
    with pytest.raises(ValueError, match=r"whole numbers are in X \(layer=None\)"):
        read_as_listed(with_table(sdata, table), layer="log", report=False)


# ------------------------------------------------------------------------------------------------------------- raw


def scaled_with_raw(sdata: SpatialData) -> SpatialData:
    """As scanpy's first tutorial leaves it, but with counts in raw: half of the genes, scaled."""
    import scanpy as sc

    table = sdata["table"].copy()
    table.raw = table.copy()
    sc.pp.normalize_total(table, target_sum=1e4)
    sc.pp.log1p(table)
    table = table[:, ::2].copy()
    table.X = table.X.toarray()
    sc.pp.scale(table, max_value=10)
    return with_table(sdata, table)


def test_raw_is_read_as_a_layer(sdata):
    wanted = read_as_listed(sdata, report=False)
    other = scaled_with_raw(sdata)
    with pytest.raises(ValueError, match=r"negative values .*whole numbers are in layer='raw' \(table\.raw\.X\)"):
        read_as_listed(other, report=False)
    found = read_as_listed(other, layer="raw", report=False)
    assert list(found.genes) == list(wanted.genes)  # all of them, not those of X
    np.testing.assert_array_equal(found.expression.toarray(), wanted.expression.toarray())
    np.testing.assert_array_equal(found.counts.toarray(), wanted.counts.toarray())


def test_raw_from_end_to_end(embedded):
    other = scaled_with_raw(embedded)
    ask = FAST | {"genes": ["GENE001", "GENE002"]}  # the first is in raw only
    for s, layer in ((embedded, None), (other, "raw")):
        sge.tl.predict(s, layer=layer, **ask)
    np.testing.assert_array_equal(other["histosge"].X, embedded["histosge"].X)
    assert other["histosge"].uns["histosge"]["layer"] == "raw"
    drawn = [
        sge.pl.expression(s, "GENE001", panels="measured")[0, 0].collections[-1].get_array() for s in (embedded, other)
    ]
    np.testing.assert_array_equal(*drawn)
    scores = [
        sge.tl.evaluate(
            s, heads=["mean"], layer=layer, encoder="stain-texture", genes=ask["genes"], n_splits=2, n_folds=2
        )
        for s, layer in ((embedded, None), (other, "raw"))
    ]
    pd.testing.assert_frame_equal(*scores)


def test_raw_may_hold_logarithms(sdata, counts):
    table = sdata["table"].copy()
    table.X = np.log2(1 + counts / counts.sum(1, keepdims=True) * 1e4)
    table.raw = table.copy()
    table = table[:, ::2].copy()
    table.X = table.X - table.X.mean(0)
    section = read_as_listed(with_table(sdata, table), layer="raw", report=False)
    np.testing.assert_allclose(section.expression.toarray(), per_10k(counts), atol=1e-5)


def test_a_layer_called_raw_comes_first(sdata, counts):
    table = sdata["table"].copy()
    table.raw = table.copy()
    table.layers["raw"] = 2 * counts + 1
    found = read_as_listed(with_table(sdata, table), layer="raw", report=False)
    np.testing.assert_allclose(found.expression.toarray(), per_10k(2 * counts + 1), rtol=1e-5)


def test_no_raw(sdata):
    with pytest.raises(
        KeyError, match=r"layer='raw' is not among the layers of table 'table': \[\] \(and there is no table\.raw\)"
    ):
        read_as_listed(sdata, layer="raw", report=False)


# -------------------------------------------------------------------------------------------- features that are no genes


def with_antibodies(
    sdata: SpatialData, *, column: str = "feature_types", gene="Gene Expression", other="Antibody Capture"
):
    """The section with 3 antibodies between its genes, each of more counts than all genes together."""
    genes = sdata["table"]
    x = genes.X.toarray()
    more = np.random.default_rng(0).poisson(3 * x.sum(1, keepdims=True), (len(x), 3))
    kinds = [gene] * 10 + [other] * 3 + [gene] * 10
    names = [*genes.var_names[:10], "CD3E", "CD4", "IgG", *genes.var_names[10:]]
    table = ad.AnnData(
        sparse.csr_matrix(np.hstack([x[:, :10], more, x[:, 10:]]).astype(np.float32)),
        obs=genes.obs.copy(),
        var=pd.DataFrame({column: kinds}, index=names),
        obsm={"spatial": genes.obsm["spatial"]},
    )
    return with_table(sdata, table)


@pytest.mark.parametrize(
    ("column", "gene", "other"),
    [
        ("feature_types", "Gene Expression", "Antibody Capture"),
        ("feature_types", "Gene Expression", "Multiplexing Capture"),
        ("feature_types", "Gene Expression", "CRISPR Guide Capture"),
        ("feature_types", "Gene Expression", "Custom"),
        ("feature_types", "Gene Expression", "Negative Control Codeword"),
        ("feature_types", "Gene Expression", ""),
        ("feature_types", "Gene Expression", None),
        ("feature_types", np.nan, "Antibody Capture"),  # joined with a table that had no such column
        ("feature_type", "gene expression", "protein"),
        ("Feature-Type", "Gene_Expression", "Unassigned Codeword"),
        ("modality", "rna", "prot"),
        ("modality", "GEX", "ADT"),
        ("CodeClass", "Endogenous", "Negative"),
    ],
)
def test_gene_expression_only(sdata, column, gene, other, log):
    wanted = read_as_listed(sdata, report=False)
    for text in (False, True):
        mixed = with_antibodies(sdata, column=column, gene=gene, other=other)
        if text:
            mixed["table"].var[column] = mixed["table"].var[column].astype("category")
        log.clear()
        found = read_as_listed(mixed)
        assert list(found.genes) == list(wanted.genes)
        np.testing.assert_array_equal(found.expression.toarray(), wanted.expression.toarray())
        assert f"leaving out 3 features that are no gene expression: 3 {other or 'of no kind'}" in log.text
        assert found.counts.shape == (138, 20)


@pytest.mark.parametrize(
    "values",
    [
        ["Gene Expression"] * 20,
        [None] * 20,
        [""] * 20,
        ["protein_coding"] * 15 + ["lncRNA"] * 5,  # a biotype under the name that cellxgene gives it
        [1.5] * 20,
    ],
)
def test_nothing_is_left_out_where_nothing_else_is_said(sdata, values, log):
    wanted = read_as_listed(sdata, report=False)
    table = sdata["table"].copy()
    table.var["feature_type"] = values
    found = read_as_listed(with_table(sdata, table))
    np.testing.assert_array_equal(found.expression.toarray(), wanted.expression.toarray())
    assert "leaving out" not in log.text


def test_nothing_but_antibodies(sdata):
    table = sdata["table"].copy()
    table.var["feature_types"] = "Antibody Capture"
    with pytest.raises(
        ValueError, match=r"holds no gene expression: .*20 Antibody Capture\. Pass the table .*table_key="
    ):
        read_as_listed(with_table(sdata, table), report=False)
    with pytest.raises(
        ValueError, match=r"holds no gene expression: its var says so of all features\. Pass a table of genes"
    ):
        sge.tl.domains(table)


def test_an_antibody_and_a_gene_of_one_name(sdata):
    mixed = with_antibodies(sdata)
    table = mixed["table"].copy()
    table.var_names = [*table.var_names[:10], "GENE000", *table.var_names[11:]]
    found = read_as_listed(with_table(sdata, table), report=False)  # genes alone have names of their own
    assert list(found.genes) == list(sdata["table"].var_names)
    table.var_names_make_unique()
    assert table.var_names[10] == "GENE000-1"
    other = with_table(sdata, table)
    with pytest.raises(
        ValueError, match=r"genes: {'GENE000-1': 'Antibody Capture'} are no gene expression.*Leave them out"
    ):
        sge.tl.predict(other, **FAST, genes=["GENE000", "GENE000-1"])
    with pytest.raises(ValueError, match=r"genes: {'CD4': 'Antibody Capture'}"):
        sge.tl.fit([with_antibodies(sdata), sdata], encoder="stain-texture", head="ridge", genes=["CD4"])


def test_antibodies_that_were_normalised_with_the_genes(sdata, counts):
    """Sums over everything are constant, those over genes are not; and antibodies may be negative beside genes."""
    mixed = with_antibodies(sdata)
    table = mixed["table"].copy()
    x = table.X.toarray().astype(float)
    table.X = np.log1p(x / x.sum(1, keepdims=True) * 1e4)
    section = read_as_listed(with_table(sdata, table), report=False)
    np.testing.assert_allclose(section.expression.toarray(), per_10k(counts), atol=1e-5)
    antibody = (table.var["feature_types"] != "Gene Expression").to_numpy()
    x[:, ~antibody] = per_10k(counts)
    x[:, antibody] = np.log(x[:, antibody] + 1) - np.log(x[:, antibody] + 1).mean(1, keepdims=True)
    x[0, antibody] = np.nan
    table.X = x
    section = read_as_listed(with_table(sdata, table), report=False)
    np.testing.assert_allclose(section.expression.toarray(), per_10k(counts), rtol=1e-6)


def test_antibodies_from_end_to_end(embedded):
    mixed = with_antibodies(embedded)
    for s in (embedded, mixed):
        sge.tl.predict(s, **FAST, genes=20)
    np.testing.assert_array_equal(mixed["histosge"].X, embedded["histosge"].X)
    assert list(mixed["histosge"].var_names) == list(embedded["histosge"].var_names)
    drawn = [
        sge.pl.expression(s, "GENE012", panels="measured")[0, 0].collections[-1].get_array() for s in (embedded, mixed)
    ]
    np.testing.assert_array_equal(*drawn)


# ------------------------------------------------------------------------------------------------ types of matrices


def test_matrices_of_any_type(sdata, counts, tmp_path):
    """And the user's own stays as it is."""
    wanted = read_as_listed(sdata, report=False).expression.toarray()
    few = np.minimum(counts, 2000)  # up to where half precision has all whole numbers
    small = per_10k(few)
    makes = {
        "float16": lambda: few.astype(np.float16),
        "float16, dask": lambda: da.from_array(few.astype(np.float16), chunks=(50, 7)),
        "uint16": lambda: sparse.csr_matrix(counts.astype(np.uint16)),
        "int64": lambda: counts.astype(np.int64),
        "by columns": lambda: np.asfortranarray(counts),
        "csc": lambda: sparse.csc_array(counts),
        "sparse, dask": lambda: da.from_array(counts, chunks=(50, 20)).map_blocks(sparse.csr_matrix),
    }
    for name, make in makes.items():
        other = holding(sdata, make())
        before = type(other["table"].X), other["table"].X.dtype
        found = read_as_listed(other, report=False).expression.toarray()
        np.testing.assert_allclose(found, small if "float16" in name else wanted, atol=1e-6, err_msg=name)
        assert (type(other["table"].X), other["table"].X.dtype) == before
    for name, x in {"dense": counts, "half": few.astype(np.float16), "sparse": sparse.csr_matrix(counts)}.items():
        table = sdata["table"].copy()
        table.X = x
        table.write_h5ad(tmp_path / f"{name}.h5ad")
        lazy = ad.read_h5ad(tmp_path / f"{name}.h5ad", backed="r")
        found = read_as_listed(with_table(sdata, lazy), report=False).expression.toarray()
        np.testing.assert_allclose(found, small if name == "half" else wanted, atol=1e-6, err_msg=name)
        lazy.file.close()


def test_duplicate_entries_add_up(sdata, counts):
    """As some programs write sparse matrices; the user's own is not tidied."""
    k = sparse.coo_matrix(counts)
    twice = sparse.csr_matrix(
        (np.r_[k.data - 1, np.ones(k.nnz)], (np.r_[k.row, k.row], np.r_[k.col, k.col])), shape=k.shape
    )
    halves = sparse.vstack([sparse.csr_matrix(row) for row in counts]).tocsr()
    data, indices = np.c_[halves.data - 1, np.ones(halves.nnz)].ravel(), np.repeat(halves.indices, 2)
    twice = sparse.csr_matrix((data, indices, 2 * halves.indptr), shape=halves.shape)
    other = holding(sdata, twice)
    n = other["table"].X.nnz
    found = read_as_listed(other, report=False)
    np.testing.assert_allclose(found.expression.toarray(), per_10k(counts), rtol=1e-5)
    assert other["table"].X.nnz == n == 2 * halves.nnz


# ------------------------------------------------------------------------------------------------------------ units


def test_units_are_written_and_do_not_mix(embedded, counts, log):
    given = holding(embedded, per_10k(counts)[:, ::2].astype(np.float32), genes=np.arange(0, 20, 2), uns={"log1p": {}})
    ask = FAST | {"genes": 5}
    table = sge.tl.predict(given, inplace=False, **ask)
    made = table.uns["histosge"]
    assert made["unit"] == "log1p of normalised counts, scaled as given"
    assert made["input"] == "log1p of normalised counts, total unknown"
    assert "kept as given" in log.text
    learn = LEARN | {"genes": 5}
    with pytest.raises(
        ValueError, match=r"do not hold expression in one unit: 'spots' in log1p of counts per 10,000; .*layer="
    ):
        sge.tl.fit([embedded, given], **learn)
    model = sge.tl.fit(given, **learn)
    assert model.info["unit"] == UNIT_AS_GIVEN
    with pytest.raises(
        ValueError, match=r"the model predicts log1p of normalised counts, scaled as given, but section 'spots'"
    ):
        sge.tl.predict(embedded, model=model)
    alone = SpatialData(images=dict(embedded.images), shapes=dict(embedded.shapes))
    assert (
        sge.tl.predict(alone, model=model, mpp=2.0, target_key="spots", inplace=False).uns["histosge"]["unit"]
        == UNIT_AS_GIVEN
    )
    sge.tl.predict(given, **FAST, genes=5)
    ax = sge.pl.expression(given, given["histosge"].var_names[0], panels="predicted")[0, 0]
    assert [bar.get_ylabel() for bar in ax.child_axes] == ["log1p expression, scale as given"]


def test_sections_of_different_kinds_are_brought_to_one_unit(embedded, counts):
    logs = holding(embedded, np.log2(1 + counts / counts.sum(1, keepdims=True) * 1e6))
    learn = LEARN | {"genes": 5}
    a, b = (sge.tl.fit([embedded, other], **learn) for other in (embedded, logs))
    np.testing.assert_allclose(a.spots.expression, b.spots.expression, atol=1e-5)
    assert b.info["unit"] == UNIT
