import json
import zipfile
from pathlib import Path

import pytest

from unziplora.bench.cases import CASES, Case, load_cases, select_cases
from unziplora.errors import UserError

SPLITS = {split: load_cases(split) for split in ("dev", "test")}
NEW_FILTERS = {"linocut", "clay", "stained"}
EVERY = [case for cases in SPLITS.values() for case in cases.values()]


def words(case: Case) -> set[str]:
    """All concepts whose drawings are inputs or truths of a case."""
    return {case.content, *(example.word for example in case.others)}


def test_splits_have_8_and_16_cases_half_with_unknown_filters():
    assert [len(cases) for cases in SPLITS.values()] == [8, 16]
    for cases in SPLITS.values():
        assert sum(case.filter in NEW_FILTERS for case in cases.values()) == len(cases) / 2
        assert {case.filter for case in cases.values()} >= NEW_FILTERS
    with zipfile.ZipFile(CASES) as archive:
        entries = json.loads(archive.read("cases.json"))["cases"]
    assert all(entry["new"] == (entry["filter"] in NEW_FILTERS) for entry in entries)


def test_development_and_test_share_neither_concepts_nor_known_filters():
    shown = [set().union(*(words(case) for case in cases.values())) for cases in SPLITS.values()]
    assert not shown[0] & shown[1]
    known = [{case.filter for case in cases.values()} - NEW_FILTERS for cases in SPLITS.values()]
    assert not known[0] & known[1]


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.slug)
def test_every_case_has_its_truths(case: Case):
    assert case.drawing.split("/")[0] in ("fxemoji", "noto-v1")
    assert len({example.word for example in case.targets}) == 4
    assert case.style not in {example.word for example in case.targets}
    assert len({example.word for example in case.others}) == 4
    assert case.content not in {example.word for example in case.others}
    assert all(len(example.images) == 2 for example in case.others)
    images = [case.image, case.mix, *(p for e in (*case.targets, *case.others) for p in e.images)]
    assert {image.size for image in images} == {(128, 128)}
    assert len({image.tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.slug)
def test_the_oracle_sees_no_truth(case: Case):
    learned = [p for e in (*case.oracle_content, *case.oracle_style) for p in e.images]
    truths = [case.image, case.mix, *(p for e in (*case.targets, *case.others) for p in e.images)]
    assert len(case.oracle_content) >= 6
    assert len(case.oracle_style) == 12
    assert len({image.tobytes() for image in (*learned, *truths)}) == len(learned) + len(truths)
    assert case.style not in {example.word for example in case.oracle_content}
    assert not {example.word for example in case.oracle_style} & words(case)


@pytest.mark.parametrize("cases", SPLITS.values(), ids=SPLITS)
def test_partners_are_mutual_and_differ_in_concept_and_filter(cases: dict[str, Case]):
    for case in cases.values():
        partner = cases[case.partner]
        assert partner.partner == case.slug
        assert partner.filter != case.filter
        assert partner.content not in words(case) | {e.word for e in case.oracle_style}


def test_cases_are_selected_by_name_and_quick_selects_a_pair():
    cases = SPLITS["dev"]
    first, second, *_ = cases.values()
    assert select_cases(cases, []) == list(cases.values())
    assert select_cases(cases, [], quick=True) == [first, second]
    assert first.partner == second.slug
    assert select_cases(cases, [second.slug, second.slug]) == [second]
    with pytest.raises(UserError, match=f"unknown case 'nothing'; the cases are {first.slug}, "):
        select_cases(cases, ["nothing"])


def test_file_is_small_and_names_the_authors_of_its_drawings():
    assert CASES.stat().st_size < 4_000_000
    with zipfile.ZipFile(CASES) as archive:
        notice, index = archive.read("NOTICE").decode(), json.loads(archive.read("cases.json"))
    assert {entry["key"]: entry["licence"] for entry in index["attributions"]} == {
        "noto-v1": "Apache-2.0",
        "fxemoji": "CC-BY-4.0",
    }
    for link in ("www.apache.org/licenses/LICENSE-2.0", "creativecommons.org/licenses/by/4.0/"):
        assert f"https://{link}" in notice


@pytest.mark.parametrize("content", [None, b"no zip"])
def test_missing_or_damaged_file_is_refused(tmp_path: Path, content: bytes | None):
    path = tmp_path / "cases.zip"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"cases\.zip: the cases of the benchmark cannot be read"):
        load_cases("dev", path)
