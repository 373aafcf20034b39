"""The page on reliability says what the tests try, no less and no more."""

from tests import faults


def test_the_page_is_up_to_date():
    assert faults.PAGE.read_text("utf-8") == faults.page(), "run `python -m tests.faults`"


def test_every_row_has_its_test_and_every_group_a_row():
    rows = [row for group in faults.faults().values() for row in group]
    assert len(rows) >= 40
    for what, happens, place in rows:
        name, test = place.split("::")
        assert f"def {test}(" in (faults.ROOT / "tests" / name).read_text("utf-8")
        assert what and happens and "|" not in what + happens
