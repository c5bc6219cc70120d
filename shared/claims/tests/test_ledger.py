"""A ledger that is wrong is refused in one sentence that names the file."""

from pathlib import Path

import pytest

from shared.claims.ledger import agrees, load_ledger
from shared.errors import UserError
from shared.metrics.names import load_names

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("Selection: last-epoch", "Selection: last-epoch\n      Colour: red", "Colour"),
        ("Row: fake-a", "Row: fake-z", "no config fake-z.yaml"),
        ("experiment/fake-b.yaml", "elsewhere/fake-b.yaml", "does not exist"),
        ("Row: fake-b", "Row: fake-a", "twice"),
        ("{top1: 76.20}", "{top11: 76.20}", "top11"),
        ("Tolerance: {top1: 0.3}", "Tolerance: {}", "no Tolerance"),
        ("Seeds: [0, 1, 2, 3]", "Seeds: [0, 0]", "Seeds"),
        ("Status: not-run\n      Why: needs a week", "Status: blocked\n      Why: null", "without a Why"),
        ("Status: not-run", "Status: fine", "Status"),
        ("In Collection: Fake", "In Collection: Feke", "Feke"),
        ("Baseline: lite-plain", "Baseline: lite-new", "not another row"),
        ("Metrics: [oa, aa]", "Metrics: [oa, ab]", "'ab'"),
        ("Models:", "Models: [", "not YAML"),
        ("    Rows:\n", "    Row:\n", "a group has Rows"),
        ("    Metrics: [oa]\n", "    Metrics: [oa]\n    Colour: red\n", "a group has Rows"),
        ("Extra: [rho,", "Colour: red, Extra: [rho,", "Colour"),
        ("Collections:", "Headline: {Row: lite-new, Baseline: fake-a}\nCollections:", "Headline"),
    ],
)
def test_malformed_ledger_is_one_sentence_with_the_file(repository, old, new, sentence):
    load_ledger(repository.root, "fake")
    repository.edit(old, new)
    with pytest.raises(UserError) as caught:
        load_ledger(repository.root, "fake")
    assert sentence in str(caught.value)
    assert "fake/metafile.yml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("printed", "measured", "expected"),
    [
        ("7.0e6", 6.9e6, True),
        ("7.0e6", 6_899_999, False),
        ("26e6", 27e6, True),
        ("26e6", 27_000_001, False),
        ("1.9e9", 2.0e9, True),
        ("1.90e9", 1.92e9, False),
        ("26", 27, True),
        ("26", 27.5, False),
        ("1.5", 1.6, True),
    ],
)
def test_counts_agree_within_one_unit_of_the_last_printed_digit(repository, printed, measured, expected):
    repository.edit("{top1: 76.20}", f"{{top1: 76.20, parameters: {printed}}}")
    claimed = load_ledger(repository.root, "fake").Models[0].Claim.Metrics["parameters"]
    assert agrees(claimed, measured) is expected


def test_counts_agree_in_the_papers_unit():
    assert agrees(7, 7_900_000, unit=1e6)
    assert not agrees(7, 8_100_000, unit=1e6)


def test_every_name_of_a_claim_is_a_metric_with_a_label():
    names = load_names()
    for key, known in names.claims.items():
        assert set(known.names) <= set(names.metrics), key


def test_rows_have_what_their_group_gives_and_their_own_keys_come_first(repository):
    repository.edit("  - Group: Digits\n", "  - Group: Digits\n    Compose: {scale: lite, optim.lr: 1}\n")
    repository.edit("Baseline: lite-plain, ", "Baseline: lite-plain, Compose: {optim.lr: 2, model: large}, ")
    plain, new = load_ledger(repository.root, "fake").Lite
    assert (plain.Group, plain.Metrics, new.Metrics) == ("Digits", ["oa", "aa"], ["oa"])
    assert plain.Compose == {"scale": "lite", "optim.lr": 1}
    assert new.Compose == {"scale": "lite", "optim.lr": 2, "model": "large"}
    assert (plain.compared, new.Baseline, new.Extra) == (["oa"], ["lite-plain"], ["rho", "classes_scored"])


def test_every_ledger_of_the_repository_is_valid():
    for path in ROOT.glob("*/metafile.yml"):
        assert load_ledger(ROOT, path.parent.name).Models
