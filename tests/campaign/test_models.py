"""Mutated files of models: each is refused by name, or predicts bit for bit what the whole one predicts.

Some mutations keep the sha256 of the whole file, as a disk, a network or a careless hand does. Others have the right
one, as a program that edits models would write it: then schema and cross checks are on their own. Left out are edits to
another model that is consistent in itself, such as one finite weight or another valid option with the right sha256:
nothing can know that it is not meant. Fields that no prediction depends on may change there.
"""

from __future__ import annotations

import json
import resource
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tests.test_model import FILE, embed_by_hand, fit

import histosge as sge
from histosge._model import Model, contents, write_file
from histosge._section import read_section

CPU = torch.device("cpu")
VALUES = [None, True, "x", "", -1, -1.5, float("nan"), float("inf"), 10**30, 1e300, 10**400, [], {}, [[]], {"a": 1}]
MEMORY_KB = 600_000
"""Far above what a small model takes, far below what a wide network would"""


class Whole:
    """A model, its file, and what it predicts."""

    def __init__(self, model, folder):
        model.save(folder)
        self.content = (folder / FILE).read_bytes()
        self.text, self.tensors = contents(model)
        self.found = outcome_of(Model.load(folder))

    @property
    def header(self):
        """Where the tensors begin."""
        return 8 + int.from_bytes(self.content[:8], "little")

    def about(self):
        return json.loads(self.content[8 : self.header])["__metadata__"]


def outcome_of(model):
    """What a prediction would write, at places near the model's spots and without an image."""
    rng = np.random.default_rng(0)
    raw = sum(len(one.mean) for one in model.projection.encoders) or model.spots.embedding.shape[1]
    context = model.condition(model.spots, device=CPU)
    low, high = (model.spots.xy_um.numpy().min(0), model.spots.xy_um.numpy().max(0))
    predicted = model.predict_from(
        context,
        embedding=rng.standard_normal((20, raw)).astype(np.float32),
        xy_um=rng.uniform(low, high, (20, 2)),
        spot_index=np.full(20, -1),
    )
    return [list(model.genes), list(model.context_genes), predicted, model.intervals.numbers, model.scores.to_numpy()]


def same(found, wanted):
    return all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.fixture(scope="module")
def models(_section_once, tmp_path_factory):
    """Networks and kriging; baselines on joined encoders."""
    section = read_section(_section_once)
    embedding = embed_by_hand(sge.datasets.synthetic_truth(_section_once).loc[section.instances].to_numpy())
    first = fit(section, embedding, head="in-context+kriging+nearest", n_folds=2)
    run = {"genes": 7, "n_folds": 2, "rng": 0, "progress": False}
    second = sge.tl.fit(_section_once, encoder="stain-texture+rgb", head="ridge+mean", **run)
    third = fit(section, embedding, head="aggregate+coordinates", n_folds=2, genes=6)
    return [Whole(model, tmp_path_factory.mktemp("whole")) for model in (first, second, third)]


# --------------------------------------------------------------------------------------------------- mutations
# each takes a whole model, another one and a generator, and gives content, or text and tensors for the right sha256


def flip_a_bit(whole, _, rng):
    """In the header as often as in the tensors, of which there are many more."""
    content = bytearray(whole.content)
    at = rng.integers(whole.header) if rng.random() < 0.5 else rng.integers(len(content))
    content[at] ^= 1 << rng.integers(8)
    return bytes(content)


def cut_off(whole, _, rng):
    return whole.content[: rng.integers(len(whole.content))]


def append(whole, _, rng):
    return whole.content + rng.bytes(rng.integers(1, 100))


def lose_some_bytes(whole, _, rng):
    start, stop = np.sort(rng.integers(len(whole.content), size=2))
    return whole.content[:start] + whole.content[stop + 1 :]


def empty_a_block(whole, _, rng):
    at, n = rng.integers(len(whole.content)), 4096
    return whole.content[:at] + bytes(len(whole.content[at : at + n])) + whole.content[at + n :]


def exchange_blocks(whole, _, rng):
    a, b = np.sort(rng.integers(whole.header, len(whole.content) - 64, size=2))
    c = bytearray(whole.content)
    c[a : a + 32], c[b : b + 32] = c[b : b + 32], c[a : a + 32]
    return bytes(c)


def half_of_another(whole, other, rng):
    """As a write in place leaves it: the header of one model, the tensors of another."""
    return other.content[: other.header] + whole.content[whole.header :]


def text_of_another(whole, other, rng):
    about = whole.about() | {"text": other.text} | ({"sha256": other.about()["sha256"]} if rng.random() < 0.5 else {})
    return save(whole.tensors, about)


def spaces_in_the_header(whole, _, rng):
    """No other model: it must be refused, or predict the same."""
    header = json.dumps(json.loads(whole.content[8 : whole.header]), indent=int(rng.integers(5))).encode()
    return struct.pack("<Q", len(header)) + header + whole.content[whole.header :]


def odd_header(whole, _, rng):
    about = whole.about()
    key = rng.choice([*about, "more"])
    if rng.random() < 0.4:
        about.pop(key, None)
    else:
        about[key] = str(rng.choice(["", "6.0", "{}", "null", "ä", "7", "x" * 10_000]))
    return save(whole.tensors, about)


def leaves(values, at=()):
    """Paths of all values in nested JSON, the outer ones too."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [at] * bool(at) + [path for key, value in inner for path in leaves(value, (*at, key))]


def parent_of(values, path):
    for key in path[:-1]:
        values = values[key]
    return values


def some_path(values, rng, kind=object):
    """A path that is not one of hundreds of genes or losses, most of the time."""
    paths = [p for p in leaves(values) if isinstance(parent_of(values, p), kind)]
    by_field = {}
    for path in paths:
        by_field.setdefault(tuple(k for k in path if isinstance(k, str)), []).append(path)
    fields = list(by_field.values())
    some = fields[rng.integers(len(fields))]
    return some[rng.integers(len(some))]


def change_a_value(whole, _, rng):
    values = json.loads(whole.text)
    path = some_path(values, rng)
    new = VALUES[rng.integers(len(VALUES))]
    if type(new) is str and type(parent_of(values, path)[path[-1]]) is str:
        new = 3  # another word may be another valid one
    parent_of(values, path)[path[-1]] = new
    return json.dumps(values), whole.tensors


def nest_deeply(whole, _, rng):
    values = json.loads(whole.text)
    path = some_path(values, rng)
    parent_of(values, path)[path[-1]] = "HERE"
    depth = int(rng.integers(100, 20_000))
    return json.dumps(values).replace('"HERE"', "[" * depth + "]" * depth), whole.tensors


def remove_a_field(whole, _, rng):
    values = json.loads(whole.text)
    path = some_path(values, rng, dict)
    del parent_of(values, path)[path[-1]]
    return json.dumps(values), whole.tensors


def rename_a_field(whole, _, rng):
    values = json.loads(whole.text)
    path = some_path(values, rng, dict)
    parent = parent_of(values, path)
    parent[f"{path[-1]}_"] = parent.pop(path[-1])
    return json.dumps(values), whole.tensors


def change_genes(whole, _, rng):
    values = json.loads(whole.text)
    genes = values[rng.choice(["genes", "context_genes"])]
    how = rng.integers(5)
    if how == 0:
        values["genes"][rng.integers(len(values["genes"]))] = "of no spot"
    elif how == 1:
        genes[0] = genes[1]
    elif how == 2:
        genes.append("one more")
    elif how == 3:
        genes.pop()
    else:
        values["context_genes"] = values["context_genes"] + ["one more"]
    return json.dumps(values), whole.tensors


def change_heads(whole, _, rng):
    values = json.loads(whole.text)
    heads = values["heads"]
    a, b = rng.choice(len(heads), size=2, replace=False)
    how = rng.integers(6)
    if how == 0 and heads[a]["name"] != heads[b]["name"]:
        heads[a]["name"], heads[b]["name"] = heads[b]["name"], heads[a]["name"]
    elif how == 1:
        heads.pop(int(a))
    elif how == 2:
        heads.append(heads[a])
    elif how == 3:
        values["head"] = "+".join(values["head"].split("+")[::-1])
    elif how == 4:
        names = ["aggregate", "coordinates", "in-context", "kriging", "mean", "nearest", "published", "ridge"]
        new = rng.choice([n for n in names if n != heads[a]["name"]])
        old = heads[a]["name"]
        values = json.loads(
            whole.text.replace(f'"{old}"', f'"{new}"').replace(values["head"], values["head"].replace(old, new))
        )
    else:
        heads[a]["weight"] = float(rng.choice([0.0, 2.0, -0.5, heads[a]["weight"] * 1.01]))
    return json.dumps(values), whole.tensors


def blow_up(whole, _, rng):
    """Sizes that would take gigabytes, if memory came before checks."""
    values = json.loads(whole.text)
    head = values["heads"][rng.integers(len(values["heads"]))]
    sized = [key for key in ("width", "n_heads", "n_neighbours") if key in head["config"]]
    if sized:
        head["config"][rng.choice(sized)] = int(rng.choice([16384, 2**20, 2**31, 2**62]))
    else:
        values["info"][rng.choice(["n_spots", "n_sections"])] = int(rng.choice([10**7, 2**40, 2**62]))
    return json.dumps(values), whole.tensors


def change_a_tensor(whole, _, rng):
    tensors = dict(whole.tensors)
    name = str(rng.choice(sorted(tensors)))
    old = tensors[name]
    how = rng.integers(7)
    if how == 0:
        tensors[f"{name}_"] = tensors.pop(name)
    elif how == 1:
        del tensors[name]
    elif how == 2:
        tensors[name] = old.unsqueeze(int(rng.integers(old.ndim + 1)))
    elif how == 3:
        tensors[name] = old.flatten()[: max(old.numel() - 1, 0)]
    elif how == 4:
        tensors[name] = old.to([torch.float16, torch.bfloat16, torch.int32, torch.uint8][rng.integers(4)])
    elif how == 5:
        new = old.to(torch.float32 if not old.is_floating_point() else old.dtype).clone().flatten()
        new[rng.integers(len(new))] = float(rng.choice([np.nan, np.inf, -np.inf]))
        tensors[name] = new.reshape(old.shape)
    else:
        tensors["more" if rng.random() < 0.5 else "0.more"] = torch.zeros(3)
    return whole.text, tensors


def exchange_tensors(whole, other, rng):
    """Of two names of other shapes, or with another model's."""
    tensors = dict(whole.tensors)
    a = str(rng.choice(sorted(tensors)))
    apart = [name for name in sorted(tensors) if tensors[name].shape != tensors[a].shape]
    b = str(rng.choice(apart))
    if rng.random() < 0.5 and a in other.tensors and other.tensors[a].shape != tensors[a].shape:
        tensors[a] = other.tensors[a]
    else:
        tensors[a], tensors[b] = tensors[b], tensors[a]
    return whole.text, tensors


BYTES = [
    flip_a_bit, cut_off, append, lose_some_bytes, empty_a_block, exchange_blocks, half_of_another, text_of_another,
    spaces_in_the_header, odd_header,
]  # fmt: skip
EDITS = [
    change_a_value, nest_deeply, remove_a_field, rename_a_field, change_genes, change_heads, blow_up, change_a_tensor,
    exchange_tensors,
]  # fmt: skip
CASES = [(edit, resealed) for edit in EDITS for resealed in (True, False)] + [(each, False) for each in BYTES]


def write_mutant(folder, kind, resealed, whole, other, rng):
    made = kind(whole, other, rng)
    if isinstance(made, bytes):
        (folder / FILE).write_bytes(made)
    elif resealed:
        write_file(folder / FILE, *made)
    else:
        text, tensors = made
        whole_tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        (folder / FILE).write_bytes(save(whole_tensors, whole.about() | {"text": text}))


def test_mutated_models(models, tmp_path, tries, tally):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failed = []
    for case in range(tries(84, 1120)):
        rng = np.random.default_rng(case)
        kind, resealed = CASES[case % len(CASES)]
        order = rng.permutation(len(models))
        whole, other = models[order[0]], models[order[1]]
        folder = tmp_path / str(case)
        folder.mkdir()
        write_mutant(folder, kind, resealed, whole, other, rng)
        try:
            found = outcome_of(Model.load(folder))
        except sge.ModelError as error:
            outcome = "refused with a message" if str(folder) in str(error) else "no path"
        except Exception as error:  # noqa: BLE001 any other is what is counted here
            outcome = f"raw {type(error).__name__}: {error}"[:200]
        else:
            outcome = "right" if same(found, whole.found) else "wrong"
        tally("mutated models")[outcome.split(":")[0]] += 1
        if outcome not in ("refused with a message", "right"):
            failed.append(f"case {case}: {kind.__name__}, {'right' if resealed else 'old'} sha256: {outcome}")
        (folder / FILE).unlink()
    assert not failed, "\n".join(failed)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KB


@pytest.mark.parametrize("what", ["removed", "a folder", "a broken link", "of no rights"])
def test_a_file_that_cannot_be_read(models, tmp_path, what):
    path = tmp_path / FILE
    if what == "a folder":
        path.mkdir()
    elif what == "a broken link":
        path.symlink_to(tmp_path / "gone")
    elif what == "of no rights":
        path.write_bytes(models[0].content)
        path.chmod(0)
        if can_read(path):
            pytest.skip("this user may read every file")
    with pytest.raises((sge.ModelError, OSError), match=str(tmp_path)):
        Model.load(tmp_path)


def can_read(path):
    try:
        path.read_bytes()
    except PermissionError:
        return False
    return True
